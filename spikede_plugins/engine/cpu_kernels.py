"""Fused CPU kernels: one pass over a block of neurons runs all T steps while its history stays in cache.

A block of neurons is small enough for its deviations ``u [rows, BLOCK]`` to live in the first caches, so
memory is read and written once a neuron and step: input, spikes, charged potential and deviation forward;
charged potential, incoming and outgoing gradient backward. The history sum takes eight lags at a time,
newest first, each a fused multiply-add in the same order whatever T is: one step at a time gives the same
bits as all at once.

Only the sums may be contracted; charge, firing and reset keep the native rounding. The kernels run a range of
blocks and hold no lock, so that any number of threads share the work.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

BLOCK = 256

# How charge is written (see ``AffineCode``): the same number, rounded as the framework rounds it.
INTEGRATE, DIVIDE_INPUT, DIVIDE, DIVIDE_SHORT, FACTOR_INPUT, FACTOR, FACTOR_SHORT = range(7)
# Surrogates in the order of the slopes below.
SURROGATES = (
    "sigmoid", "atan", "piecewise_quadratic", "piecewise_exp", "soft_sign", "super_spike", "erf",
)  # fmt: skip

_OPTIONS: dict[str, Any] = {"cache": True, "nogil": True}


@njit(fastmath={"contract"}, **_OPTIONS)
def add_history(total, weights, rows, end, column, count, lags):
    """``total[i] += sum_{m < lags} weights[m] rows[end - 1 - m, column + i]`` for ``i < count``."""
    # Slices, here and below: an index that the compiler knows not to be negative is what lets it
    # make vector code of a loop.
    stop = column + count
    m = 0
    while m + 8 <= lags:
        w0, w1, w2, w3 = weights[m], weights[m + 1], weights[m + 2], weights[m + 3]
        w4, w5, w6, w7 = weights[m + 4], weights[m + 5], weights[m + 6], weights[m + 7]
        r = end - 1 - m
        u0, u1 = rows[r, column:stop], rows[r - 1, column:stop]
        u2, u3 = rows[r - 2, column:stop], rows[r - 3, column:stop]
        u4, u5 = rows[r - 4, column:stop], rows[r - 5, column:stop]
        u6, u7 = rows[r - 6, column:stop], rows[r - 7, column:stop]
        for i in range(count):
            t = total[i]
            t += w0 * u0[i]
            t += w1 * u1[i]
            t += w2 * u2[i]
            t += w3 * u3[i]
            t += w4 * u4[i]
            t += w5 * u5[i]
            t += w6 * u6[i]
            t += w7 * u7[i]
            total[i] = t
        m += 8
    while m < lags:
        w, u = weights[m], rows[end - 1 - m, column:stop]
        for i in range(count):
            total[i] += w * u[i]
        m += 1


@njit(**_OPTIONS)
def charge(c, v, x, count, form, leak, rest):
    """The native charge of one step for ``count`` neurons."""
    if form == INTEGRATE:
        for i in range(count):
            c[i] = v[i] + x[i]
    elif form == DIVIDE_INPUT:
        for i in range(count):
            c[i] = v[i] + (x[i] - (v[i] - rest)) / leak
    elif form == DIVIDE:
        for i in range(count):
            c[i] = v[i] - (v[i] - rest) / leak + x[i]
    elif form in (DIVIDE_SHORT, FACTOR_SHORT):
        for i in range(count):
            c[i] = v[i] * leak + x[i]
    elif form == FACTOR_INPUT:
        for i in range(count):
            c[i] = v[i] + (x[i] - (v[i] - rest)) * leak
    else:
        for i in range(count):
            c[i] = v[i] - (v[i] - rest) * leak + x[i]


@njit(**_OPTIONS)
def forward(
    x, v0, start, rows, entering, limit, weights, bracket, form, leak, rest, threshold, hard, reset,
    one, spikes, h_seq, keep_h, v_seq, keep_v, marks, keep_marks, v_last, first_block, last_block,
):  # fmt: skip
    """All steps of all neurons; ``rows [entering + T, N]`` holds the past and receives the new rows."""
    steps, neurons = x.shape
    held = min(entering, limit)
    zero = one - one
    for block in range(first_block, last_block):
        column = block * BLOCK
        count = min(BLOCK, neurons - column)
        stop = column + count
        total, c, v = np.empty(BLOCK, x.dtype), np.empty(BLOCK, x.dtype), np.empty(BLOCK, x.dtype)
        v[:count] = v0[column:stop]
        # A single step reads the past where it lies; a sequence reads it many times, from the cache.
        local = rows
        first, shift, offset = entering, 0, column
        if steps > 1:
            local = np.empty((held + steps, BLOCK), x.dtype)
            shift, offset = entering - held, 0
            for r in range(held):
                local[r, :count] = rows[shift + r, column:stop]
        for k in range(steps):
            end = first + k - shift
            for i in range(count):
                total[i] = 0.0
            add_history(total, weights, local, end, offset, count, min(first + k, limit))
            charge(c, v, x[k, column:stop], count, form, leak, rest)
            # Short loops over few arrays: the compiler makes vector code of each.
            for i in range(count):
                c[i] = c[i] + bracket * (c[i] - v[i]) - total[i]
            fired = spikes[k, column:stop]
            for i in range(count):
                fired[i] = one if c[i] >= threshold else zero
            if hard:
                for i in range(count):
                    s = fired[i]
                    v[i] = (one - s) * c[i] + s * reset
            else:
                for i in range(count):
                    v[i] = c[i] - fired[i] * threshold
            newest, origin = rows[entering + k, column:stop], start[column:stop]
            for i in range(count):
                newest[i] = v[i] - origin[i]
            if steps > 1:
                kept = local[end]
                for i in range(count):
                    kept[i] = newest[i]
            if keep_marks:
                mark = marks[k, column:stop]
                for i in range(count):
                    mark[i] = np.uint8(1) if c[i] >= threshold else np.uint8(0)
            if keep_h:
                charged = h_seq[k, column:stop]
                for i in range(count):
                    charged[i] = c[i]
            if keep_v:
                potential = v_seq[k, column:stop]
                for i in range(count):
                    potential[i] = v[i]
        v_last[column:stop] = v[:count]


@njit(**_OPTIONS)
def surrogate_slope(slope, h, count, threshold, kind, a, one):
    """``slope[i]``: the surrogate's slope at ``h - threshold`` (see ``spikede_plugins.surrogate``)."""
    half = a / (one + one)
    if kind == 0:
        for i in range(count):
            s = one / (one + np.exp(-a * (h[i] - threshold)))
            slope[i] = a * s * (one - s)
    elif kind == 1:
        scale = half * type(one)(math.pi)
        for i in range(count):
            z = scale * (h[i] - threshold)
            slope[i] = half / (one + z * z)
    elif kind == 2:
        for i in range(count):
            slope[i] = max(a - a * a * abs(h[i] - threshold), one - one)
    elif kind == 3:
        for i in range(count):
            slope[i] = half * np.exp(-a * abs(h[i] - threshold))
    elif kind == 4:
        for i in range(count):
            z = one / a + abs(h[i] - threshold)
            slope[i] = one / ((one + one) * a * z * z)
    elif kind == 5:
        for i in range(count):
            z = one + abs(h[i] - threshold)
            slope[i] = a / (z * z)
    else:
        scale = a / type(one)(math.sqrt(math.pi))
        for i in range(count):
            z = a * (h[i] - threshold)
            slope[i] = scale * np.exp(-z * z)


@njit(**_OPTIONS)
def backward(
    h_seq, rebuild, rows, start, marks, v_last, entering, limit, weights, gain, charge_slope,
    input_slope, threshold, hard, reset, detach, kind, sharpness, one, grad_s, has_s, grad_v, has_v,
    grad_rows, first_handed, handed, grad_x, delta, keep_delta, first_block, last_block,
):  # fmt: skip
    """The adjoint recursion; ``grad_x`` and, if asked for, the adjoints ``delta`` of all steps.

    With ``rebuild`` the charged potentials are not given but follow from what a soft reset left of them.
    """
    steps, neurons = grad_x.shape
    zero = one - one
    carried = gain * charge_slope + (one - gain)
    into_input = gain * input_slope
    for block in range(first_block, last_block):
        column = block * BLOCK
        count = min(BLOCK, neurons - column)
        stop = column + count
        total, slope = np.empty(BLOCK, grad_x.dtype), np.empty(BLOCK, grad_x.dtype)
        rebuilt = np.empty(BLOCK, grad_x.dtype)
        local = np.empty((steps, BLOCK), grad_x.dtype)  # adjoints, the last step first
        for back in range(steps):
            k = steps - 1 - back
            for i in range(count):
                total[i] = zero
            add_history(total, weights, local, back, 0, count, min(back, limit))
            h = rebuilt[:count]
            if rebuild:
                mark = marks[k, column:stop]
                if back == 0:  # the newest row may have been overwritten by a potential set by hand
                    after = v_last[column:stop]
                    for i in range(count):
                        h[i] = after[i] + (threshold if mark[i] else zero)
                else:
                    after, origin = rows[entering + k, column:stop], start[column:stop]
                    for i in range(count):
                        h[i] = (after[i] + origin[i]) + (threshold if mark[i] else zero)
            else:
                h[:] = h_seq[k, column:stop]
            surrogate_slope(slope, h, count, threshold, kind, sharpness, one)
            row = entering + k - first_handed
            if 0 <= row < handed:
                handed_on = grad_rows[row, column:stop]
                for i in range(count):
                    total[i] -= handed_on[i]
            if back > 0:
                ahead = local[back - 1]
                for i in range(count):
                    total[i] -= carried * ahead[i]
            elif has_v:
                into_v = grad_v[column:stop]
                for i in range(count):
                    total[i] -= into_v[i]
            d = local[back]
            if hard and detach:
                for i in range(count):
                    d[i] = -total[i] if h[i] < threshold else zero
            elif hard:
                for i in range(count):
                    below = one if h[i] < threshold else zero
                    d[i] = -(below + (reset - h[i]) * slope[i]) * total[i]
            elif detach:
                for i in range(count):
                    d[i] = -total[i]
            else:
                for i in range(count):
                    d[i] = (threshold * slope[i] - one) * total[i]
            if has_s:
                incoming = grad_s[k, column:stop]
                for i in range(count):
                    d[i] += slope[i] * incoming[i]
            outgoing = grad_x[k, column:stop]
            for i in range(count):
                outgoing[i] = into_input * d[i]
            if keep_delta:
                adjoint = delta[k, column:stop]
                for i in range(count):
                    adjoint[i] = d[i]


@njit(fastmath={"contract", "reassoc", "nsz"}, **_OPTIONS)
def _dot(a, b, count):
    total = a[0] * b[0]
    for i in range(1, count):
        total += a[i] * b[i]
    return total


@njit(**_OPTIONS)
def weight_gradient(delta, rows, entering, limit, partial, first_block, last_block):
    """``partial[block, m] = sum over the block and k of delta_k u_{k-1-m}``."""
    steps, neurons = delta.shape
    held = min(entering, limit)
    shift = entering - held
    for block in range(first_block, last_block):
        column = block * BLOCK
        count = min(BLOCK, neurons - column)
        stop = column + count
        past = np.empty((held + steps, BLOCK), delta.dtype)
        for r in range(held + steps):
            past[r, :count] = rows[shift + r, column:stop]
        for k in range(steps):
            adjoint = delta[k, column:stop]
            end = held + k
            for m in range(min(entering + k, limit)):
                partial[block, m] += _dot(adjoint, past[end - 1 - m], count)
