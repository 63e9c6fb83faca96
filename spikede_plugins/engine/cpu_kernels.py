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
    m = 0
    while m + 8 <= lags:
        w0, w1, w2, w3 = weights[m], weights[m + 1], weights[m + 2], weights[m + 3]
        w4, w5, w6, w7 = weights[m + 4], weights[m + 5], weights[m + 6], weights[m + 7]
        r = end - 1 - m
        for i in range(count):
            j = column + i
            t = total[i]
            t += w0 * rows[r, j]
            t += w1 * rows[r - 1, j]
            t += w2 * rows[r - 2, j]
            t += w3 * rows[r - 3, j]
            t += w4 * rows[r - 4, j]
            t += w5 * rows[r - 5, j]
            t += w6 * rows[r - 6, j]
            t += w7 * rows[r - 7, j]
            total[i] = t
        m += 8
    while m < lags:
        w, r = weights[m], end - 1 - m
        for i in range(count):
            total[i] += w * rows[r, column + i]
        m += 1


@njit(**_OPTIONS)
def charge(c, v, x, column, count, form, leak, rest, one):
    """The native charge of one step for ``count`` neurons."""
    if form == INTEGRATE:
        for i in range(count):
            c[i] = v[i] + x[column + i]
    elif form == DIVIDE_INPUT:
        for i in range(count):
            c[i] = v[i] + (x[column + i] - (v[i] - rest)) / leak
    elif form == DIVIDE:
        for i in range(count):
            c[i] = v[i] - (v[i] - rest) / leak + x[column + i]
    elif form in (DIVIDE_SHORT, FACTOR_SHORT):
        for i in range(count):
            c[i] = v[i] * leak + x[column + i]
    elif form == FACTOR_INPUT:
        for i in range(count):
            c[i] = v[i] + (x[column + i] - (v[i] - rest)) * leak
    else:
        for i in range(count):
            c[i] = v[i] - (v[i] - rest) * leak + x[column + i]


@njit(**_OPTIONS)
def forward(
    x, v0, start, rows, entering, limit, weights, bracket, form, leak, rest, threshold, hard, reset,
    one, spikes, h_seq, keep_h, v_seq, keep_v, v_last, first_block, last_block,
):  # fmt: skip
    """All steps of all neurons; ``rows [entering + T, N]`` holds the past and receives the new rows."""
    steps, neurons = x.shape
    held = min(entering, limit)
    for block in range(first_block, last_block):
        column = block * BLOCK
        count = min(BLOCK, neurons - column)
        total, c, v = np.empty(BLOCK, x.dtype), np.empty(BLOCK, x.dtype), np.empty(BLOCK, x.dtype)
        for i in range(count):
            v[i] = v0[column + i]
        # A single step reads the past where it lies; a sequence reads it many times, from the cache.
        local = rows
        first, shift, offset = entering, 0, column
        if steps > 1:
            local = np.empty((held + steps, BLOCK), x.dtype)
            shift, offset = entering - held, 0
            for r in range(held):
                for i in range(count):
                    local[r, i] = rows[shift + r, column + i]
        for k in range(steps):
            end = first + k - shift
            for i in range(count):
                total[i] = 0.0
            add_history(total, weights, local, end, offset, count, min(first + k, limit))
            charge(c, v, x[k], column, count, form, leak, rest, one)
            for i in range(count):
                h = c[i] + bracket * (c[i] - v[i]) - total[i]
                s = one if h >= threshold else one - one
                if hard:
                    v[i] = (one - s) * h + s * reset
                else:
                    v[i] = h - s * threshold
                spikes[k, column + i] = s
                u = v[i] - start[column + i]
                rows[entering + k, column + i] = u
                if steps > 1:
                    local[end, i] = u
                if keep_h:
                    h_seq[k, column + i] = h
                if keep_v:
                    v_seq[k, column + i] = v[i]
        for i in range(count):
            v_last[column + i] = v[i]


@njit(**_OPTIONS)
def surrogate_slope(slope, h, column, count, threshold, kind, a, one):
    """``slope[i]``: the surrogate's slope at ``h - threshold`` (see ``spikede_plugins.surrogate``)."""
    half = a / (one + one)
    if kind == 0:
        for i in range(count):
            s = one / (one + np.exp(-a * (h[column + i] - threshold)))
            slope[i] = a * s * (one - s)
    elif kind == 1:
        scale = half * type(one)(math.pi)
        for i in range(count):
            z = scale * (h[column + i] - threshold)
            slope[i] = half / (one + z * z)
    elif kind == 2:
        for i in range(count):
            slope[i] = max(a - a * a * abs(h[column + i] - threshold), one - one)
    elif kind == 3:
        for i in range(count):
            slope[i] = half * np.exp(-a * abs(h[column + i] - threshold))
    elif kind == 4:
        for i in range(count):
            z = one / a + abs(h[column + i] - threshold)
            slope[i] = one / ((one + one) * a * z * z)
    elif kind == 5:
        for i in range(count):
            z = one + abs(h[column + i] - threshold)
            slope[i] = a / (z * z)
    else:
        scale = a / type(one)(math.sqrt(math.pi))
        for i in range(count):
            z = a * (h[column + i] - threshold)
            slope[i] = scale * np.exp(-z * z)


@njit(**_OPTIONS)
def backward(
    h_seq, entering, limit, weights, gain, charge_slope, input_slope, threshold, hard, reset, detach,
    kind, sharpness, one, grad_s, has_s, grad_v, has_v, grad_rows, first_handed, handed,
    grad_x, delta, keep_delta, first_block, last_block,
):  # fmt: skip
    """The adjoint recursion; ``grad_x`` and, if asked for, the adjoints ``delta`` of all steps."""
    steps, neurons = h_seq.shape
    zero = one - one
    carried = gain * charge_slope + (one - gain)
    into_input = gain * input_slope
    for block in range(first_block, last_block):
        column = block * BLOCK
        count = min(BLOCK, neurons - column)
        total, slope = np.empty(BLOCK, h_seq.dtype), np.empty(BLOCK, h_seq.dtype)
        local = np.empty((steps, BLOCK), h_seq.dtype)  # adjoints, the last step first
        for back in range(steps):
            k = steps - 1 - back
            for i in range(count):
                total[i] = zero
            add_history(total, weights, local, back, 0, count, min(back, limit))
            surrogate_slope(slope, h_seq[k], column, count, threshold, kind, sharpness, one)
            row = entering + k - first_handed
            if 0 <= row < handed:
                for i in range(count):
                    total[i] -= grad_rows[row, column + i]
            if back > 0:
                for i in range(count):
                    total[i] -= carried * local[back - 1, i]
            elif has_v:
                for i in range(count):
                    total[i] -= grad_v[column + i]
            for i in range(count):
                h = h_seq[k, column + i]
                if hard:
                    through = one if h < threshold else zero
                    if not detach:
                        through += (reset - h) * slope[i]
                else:
                    through = one
                    if not detach:
                        through -= threshold * slope[i]
                d = -through * total[i]
                if has_s:
                    d += slope[i] * grad_s[k, column + i]
                local[back, i] = d
                grad_x[k, column + i] = into_input * d
                if keep_delta:
                    delta[k, column + i] = d


@njit(fastmath={"contract", "reassoc", "nsz"}, **_OPTIONS)
def _dot(a, r, b, q, count):
    total = a[r, 0] * b[q, 0]
    for i in range(1, count):
        total += a[r, i] * b[q, i]
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
        past = np.empty((held + steps, BLOCK), delta.dtype)
        for r in range(held + steps):
            for i in range(count):
                past[r, i] = rows[shift + r, column + i]
        adjoint = np.empty((1, BLOCK), delta.dtype)
        for k in range(steps):
            for i in range(count):
                adjoint[0, i] = delta[k, column + i]
            end = held + k
            for m in range(min(entering + k, limit)):
                partial[block, m] += _dot(adjoint, 0, past, end - 1 - m, count)
