"""Fused CPU kernels: one pass over a tile of neurons runs all T steps while its history stays in cache.

A tile of neurons is small enough for its deviations ``u [rows, TILE]`` to live in the first caches, so memory
is read and written once a neuron and step: input, spikes, charged potential and deviation forward; charged
potential, incoming and outgoing gradient backward. The sums go by blocks of steps (``engine.blocks``): what
is older than a block enters all its steps at once, as a product of small matrices, four rows by four in
registers; the lags inside the block are summed step by step, eight at a time. Each number is summed in the
same order whatever T is: one step at a time gives the same bits as all at once.

Only the sums may be contracted; charge, firing and reset keep the native rounding. The kernels run a range of
tiles and hold no lock, so that any number of threads share the work. A tile is
``(first neuron, count, channel)``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

TILE = 512

# How charge is written (see ``AffineCode``): the same number, rounded as the framework rounds it.
INTEGRATE, DIVIDE_INPUT, DIVIDE, DIVIDE_SHORT, FACTOR_INPUT, FACTOR, FACTOR_SHORT = range(7)
# Resets that act in the step after the spike (see ``engine.fire_steps``).
DELAYED_RESETS = ("none", "subtract", "zero")
# Surrogates in the order of the slopes below.
SURROGATES = (
    "sigmoid", "atan", "piecewise_quadratic", "piecewise_exp", "soft_sign", "super_spike", "erf",
    "fast_sigmoid", "triangular", "straight_through",
)  # fmt: skip

_OPTIONS: dict[str, Any] = {"cache": True, "nogil": True}


@njit(fastmath={"contract"}, **_OPTIONS)
def add_history(total, weights, rows, column, newest, step, count, lags):
    """``total[i] += sum_{m < lags} weights[m] rows[newest + m step, column + i]`` for ``i < count``."""
    m, stop = 0, column + count
    while m + 8 <= lags:
        w0, w1, w2, w3 = weights[m], weights[m + 1], weights[m + 2], weights[m + 3]
        w4, w5, w6, w7 = weights[m + 4], weights[m + 5], weights[m + 6], weights[m + 7]
        r = newest + m * step
        u0, u1 = rows[r, column:stop], rows[r + step, column:stop]
        u2, u3 = rows[r + 2 * step, column:stop], rows[r + 3 * step, column:stop]
        u4, u5 = rows[r + 4 * step, column:stop], rows[r + 5 * step, column:stop]
        u6, u7 = rows[r + 6 * step, column:stop], rows[r + 7 * step, column:stop]
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
        w, u = weights[m], rows[newest + m * step, column:stop]
        for i in range(count):
            total[i] += w * u[i]
        m += 1


@njit(fastmath={"contract"}, **_OPTIONS)
def add_lagged(out, first, n_out, rows, start, n_in, weights, base, sign, count):
    """``out[first + o] += sum_{j < n_in} weights[base + sign (o - j)] rows[start + j]``, ``o < n_out``."""
    o = 0
    while o + 4 <= n_out:
        a0, a1, a2, a3 = out[first + o], out[first + o + 1], out[first + o + 2], out[first + o + 3]
        j = 0
        while j + 4 <= n_in:
            at = base + sign * (o - j)
            wm3, wm2, wm1 = weights[at - 3 * sign], weights[at - 2 * sign], weights[at - sign]
            w0 = weights[at]
            w1, w2, w3 = weights[at + sign], weights[at + 2 * sign], weights[at + 3 * sign]
            r0, r1, r2, r3 = rows[start + j], rows[start + j + 1], rows[start + j + 2], rows[start + j + 3]
            for i in range(count):
                x0, x1, x2, x3 = r0[i], r1[i], r2[i], r3[i]
                t = a0[i]
                t += w0 * x0
                t += wm1 * x1
                t += wm2 * x2
                t += wm3 * x3
                a0[i] = t
                t = a1[i]
                t += w1 * x0
                t += w0 * x1
                t += wm1 * x2
                t += wm2 * x3
                a1[i] = t
                t = a2[i]
                t += w2 * x0
                t += w1 * x1
                t += w0 * x2
                t += wm1 * x3
                a2[i] = t
                t = a3[i]
                t += w3 * x0
                t += w2 * x1
                t += w1 * x2
                t += w0 * x3
                a3[i] = t
            j += 4
        while j < n_in:
            at = base + sign * (o - j)
            w0, w1, w2, w3 = weights[at], weights[at + sign], weights[at + 2 * sign], weights[at + 3 * sign]
            r0 = rows[start + j]
            for i in range(count):
                x0 = r0[i]
                a0[i] += w0 * x0
                a1[i] += w1 * x0
                a2[i] += w2 * x0
                a3[i] += w3 * x0
            j += 1
        o += 4
    while o < n_out:
        a0 = out[first + o]
        for j in range(n_in):
            w0, r0 = weights[base + sign * (o - j)], rows[start + j]
            for i in range(count):
                a0[i] += w0 * r0[i]
        o += 1


@njit(fastmath={"contract"}, **_OPTIONS)
def add_product(out, first, n_out, rows, start, n_in, matrix, top, left, count):
    """``out[first + o] += sum_j matrix[top + o, left + j] rows[start + j]``, ``o < n_out``, ``j < n_in``."""
    o = 0
    while o + 4 <= n_out:
        a0, a1, a2, a3 = out[first + o], out[first + o + 1], out[first + o + 2], out[first + o + 3]
        m0, m1, m2, m3 = matrix[top + o], matrix[top + o + 1], matrix[top + o + 2], matrix[top + o + 3]
        j = 0
        while j + 4 <= n_in:
            c = left + j
            w00, w01, w02, w03 = m0[c], m0[c + 1], m0[c + 2], m0[c + 3]
            w10, w11, w12, w13 = m1[c], m1[c + 1], m1[c + 2], m1[c + 3]
            w20, w21, w22, w23 = m2[c], m2[c + 1], m2[c + 2], m2[c + 3]
            w30, w31, w32, w33 = m3[c], m3[c + 1], m3[c + 2], m3[c + 3]
            r0, r1, r2, r3 = rows[start + j], rows[start + j + 1], rows[start + j + 2], rows[start + j + 3]
            for i in range(count):
                x0, x1, x2, x3 = r0[i], r1[i], r2[i], r3[i]
                t = a0[i]
                t += w00 * x0
                t += w01 * x1
                t += w02 * x2
                t += w03 * x3
                a0[i] = t
                t = a1[i]
                t += w10 * x0
                t += w11 * x1
                t += w12 * x2
                t += w13 * x3
                a1[i] = t
                t = a2[i]
                t += w20 * x0
                t += w21 * x1
                t += w22 * x2
                t += w23 * x3
                a2[i] = t
                t = a3[i]
                t += w30 * x0
                t += w31 * x1
                t += w32 * x2
                t += w33 * x3
                a3[i] = t
            j += 4
        while j < n_in:
            c = left + j
            w0, w1, w2, w3, r0 = m0[c], m1[c], m2[c], m3[c], rows[start + j]
            for i in range(count):
                x0 = r0[i]
                a0[i] += w0 * x0
                a1[i] += w1 * x0
                a2[i] += w2 * x0
                a3[i] += w3 * x0
            j += 1
        o += 4
    while o < n_out:
        a0, m0 = out[first + o], matrix[top + o]
        for j in range(n_in):
            w0, r0 = m0[left + j], rows[start + j]
            for i in range(count):
                a0[i] += w0 * r0[i]
        o += 1


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
def fold(traces, zero, decay, inject, rows, start, folds, known, count):
    """``z <- decay z + inject rows`` for ``folds`` blocks of rows; ``known``: whether there were traces."""
    size = inject.shape[1]
    for n in range(folds):
        for p in range(decay.shape[0]):
            z, keep = traces[p], decay[p]
            if known or n:
                for i in range(count):
                    z[i] = keep * z[i]
            else:
                for i in range(count):
                    z[i] = zero
        add_product(traces, 0, decay.shape[0], rows, start + n * size, size, inject, 0, 0, count)


@njit(**_OPTIONS)
def load(local, rows, first, last, column, count):
    """``local[r - first] = rows[r]`` of one tile."""
    for r in range(first, last):
        here, there = local[r - first], rows[r, column : column + count]
        for i in range(count):
            here[i] = there[i]


@njit(**_OPTIONS)
def begin(
    rows, block, traces, has_traces, weights, readout, decay, inject, sign, base, new_traces, tiles,
    first_tile, last_tile,
):  # fmt: skip
    """Fold where a block says so; ``base [BLOCK, N]``: sign times its steps' sums over what is older."""
    low, before, folds = block[3], block[4], block[5]
    size, count_traces = base.shape[0], decay.shape[0]
    held = folds * size
    local = np.empty((held + before, TILE), rows.dtype)
    z, out = np.empty((count_traces, TILE), rows.dtype), np.empty((size, TILE), rows.dtype)
    zero = np.zeros(1, rows.dtype)[0]
    for t in range(first_tile, last_tile):
        column, count, channel = tiles[t, 0], tiles[t, 1], tiles[t, 2]
        load(local, rows, low - held, low + before, column, count)
        if has_traces:
            load(z, traces, 0, count_traces, column, count)
        if folds:
            fold(z, zero, decay, inject, local, 0, folds, has_traces, count)
        out[:, :count] = zero
        add_lagged(out, 0, size, local, held, before, weights[channel], before - 1, 1, count)
        if has_traces or folds:
            add_product(out, 0, size, z, 0, count_traces, readout[channel], 0, 0, count)
        for o in range(size):
            there, here = base[o, column : column + count], out[o]
            for i in range(count):
                there[i] = sign * here[i]
        if folds:
            for p in range(count_traces):
                there, here = new_traces[p, column : column + count], z[p]
                for i in range(count):
                    there[i] = here[i]


@njit(**_OPTIONS)
def begin_adjoint(
    delta, block, into_rows, has_rows, into_traces, has_traces_in, weights, readout_t, decay, inject_t,
    grad_rows, grad_traces, tiles, first_tile, last_tile,
):  # fmt: skip
    """The adjoint of :func:`begin`: from the adjoints of the steps of a block to what is older than it."""
    before, folds = block[4], block[5]
    size, count_traces, traced = delta.shape[0], decay.shape[0], grad_traces.shape[0] > 0
    held = folds * size
    given, spread = np.empty((size, TILE), delta.dtype), np.empty((size, TILE), delta.dtype)
    # Minus the gradients, as in backward.
    out, z = np.empty((held + before, TILE), delta.dtype), np.empty((count_traces, TILE), delta.dtype)
    zero = np.zeros(1, delta.dtype)[0]
    for t in range(first_tile, last_tile):
        column, count, channel = tiles[t, 0], tiles[t, 1], tiles[t, 2]
        stop = column + count
        load(given, delta, 0, size, column, count)
        for r in range(held + before):
            here = out[r]
            if has_rows and r >= held:
                there = into_rows[r - held, column:stop]
                for i in range(count):
                    here[i] = -there[i]
            else:
                for i in range(count):
                    here[i] = zero
        add_lagged(out, held, before, given, 0, size, weights[channel], before - 1, -1, count)
        if traced:
            for p in range(count_traces):
                here = z[p]
                if has_traces_in:
                    there = into_traces[p, column:stop]
                    for i in range(count):
                        here[i] = -there[i]
                else:
                    for i in range(count):
                        here[i] = zero
            add_product(z, 0, count_traces, given, 0, size, readout_t[channel], 0, 0, count)
            for n in range(folds):
                spread[:, :count] = zero
                add_product(spread, 0, size, z, 0, count_traces, inject_t, 0, 0, count)
                top = held - (n + 1) * size
                for r in range(size):
                    here, there = out[top + r], spread[r]
                    for i in range(count):
                        here[i] += there[i]
                for p in range(count_traces):
                    here, keep = z[p], decay[p]
                    for i in range(count):
                        here[i] = keep * here[i]
            for p in range(count_traces):
                there, here = grad_traces[p, column:stop], z[p]
                for i in range(count):
                    there[i] = -here[i]
        for r in range(held + before):
            there, here = grad_rows[r, column:stop], out[r]
            for i in range(count):
                there[i] = -here[i]


@njit(**_OPTIONS)
def step(
    charged, v, origin, start, has_start, rows, minus, weights, brackets, h, total, keep_total, tiles,
    first_tile, last_tile,
):  # fmt: skip
    """One step of a block: writes the newest of its ``rows``, the charged potential, and minus the sum."""
    lags = rows.shape[0]
    known = np.empty(TILE, h.dtype)
    for t in range(first_tile, last_tile):
        column, count, channel = tiles[t, 0], tiles[t, 1], tiles[t, 2]
        stop = column + count
        older, bracket = minus[column:stop], brackets[channel]
        for i in range(count):
            known[i] = -older[i]
        if lags:
            now, newest = v[column:stop], rows[lags - 1, column:stop]
            if has_start:
                begun = start[column:stop]
                for i in range(count):
                    newest[i] = now[i] - begun[i]
            else:
                for i in range(count):
                    newest[i] = now[i]
            add_history(known, weights[channel], rows, column, lags - 1, -1, count, lags)
        c, out, then = charged[column:stop], h[column:stop], origin[column:stop]
        for i in range(count):
            out[i] = c[i] + bracket * (c[i] - then[i]) - known[i]
        if keep_total:
            there = total[column:stop]
            for i in range(count):
                there[i] = -known[i]


@njit(**_OPTIONS)
def step_adjoint(
    d, own, delta, place, late, has_late, weights, gains, one, grad_c, grad_v, grad_origin, apart, tiles,
    first_tile, last_tile,
):  # fmt: skip
    """The adjoint of :func:`step`; ``delta [BLOCK, N]`` holds those of the later steps of the block."""
    size = delta.shape[0]
    total = np.empty(TILE, d.dtype)
    zero = one - one
    for t in range(first_tile, last_tile):
        column, count, channel = tiles[t, 0], tiles[t, 1], tiles[t, 2]
        stop = column + count
        gain = gains[channel]
        mine, here = own[column:stop], delta[place, column:stop]
        for i in range(count):
            here[i] = mine[i]
        for i in range(count):
            total[i] = zero
        if place:
            add_history(total, weights[channel], delta, column, place, 1, count, size - place)
        given, into_c, into_v = d[column:stop], grad_c[column:stop], grad_v[column:stop]
        for i in range(count):
            into_c[i] = gain * given[i]
        if place and has_late:
            handed = late[column:stop]
            for i in range(count):
                total[i] -= handed[i]
        if apart:
            into_origin = grad_origin[column:stop]
            for i in range(count):
                into_origin[i] = (one - gain) * given[i]
            for i in range(count):
                into_v[i] = -total[i]
        else:
            for i in range(count):
                into_v[i] = (one - gain) * given[i] - total[i]


@njit(**_OPTIONS)
def forward(
    x, v0, start, rows, entering, limit, plan, room, given_base, has_base, traces, has_traces, new_traces,
    weights, brackets, readout, decay, inject, form, leak, rest, threshold, strict, hard, reset, one, spikes,
    h_seq, keep_h, v_seq, keep_v, marks, keep_marks, v_last, tiles, first_tile, last_tile,
):  # fmt: skip
    """All steps of all neurons; ``rows [entering + T, N]`` holds the past and receives the new rows.

    ``plan [blocks, 6]`` is ``engine.blocks``; ``room`` rows are the most that are held at a time. With
    ``has_base`` there is one block, and what is older than it is given.
    """
    size, count_traces = given_base.shape[0], decay.shape[0]
    zero = one - one
    local = np.empty((room, TILE), x.dtype)
    base, z = np.empty((size, TILE), x.dtype), np.empty((count_traces, TILE), x.dtype)
    total, c, v = np.empty(TILE, x.dtype), np.empty(TILE, x.dtype), np.empty(TILE, x.dtype)
    for t in range(first_tile, last_tile):
        column, count, channel = tiles[t, 0], tiles[t, 1], tiles[t, 2]
        stop = column + count
        w, bracket = weights[channel], brackets[channel]
        v[:count] = v0[column:stop]
        traced = has_traces
        if has_traces and not has_base:
            load(z, traces, 0, count_traces, column, count)
        # Row r of the past is local[r - origin].
        origin = plan[0, 3] + plan[0, 4] if has_base else 0
        load(local, rows, origin, entering, column, count)
        for b in range(plan.shape[0]):
            first, last, place = plan[b, 0], plan[b, 1], plan[b, 2]
            low, before, folds = plan[b, 3], plan[b, 4], plan[b, 5]
            older = has_base or before > 0 or traced or folds > 0
            if not has_base:
                if folds:
                    fold(z, zero, decay, inject, local, low - folds * size - origin, folds, traced, count)
                    traced = True
                    for r in range(low - origin, low + before - origin):  # close the gap
                        here, there = local[r - (low - origin)], local[r]
                        for i in range(count):
                            here[i] = there[i]
                    origin = low
                if older:
                    base[: last - first, :count] = zero
                    add_lagged(
                        base, 0, last - first, local, low - origin, before, w, place + before - 1, 1, count
                    )
                    if traced:
                        add_product(
                            base, 0, last - first, z, 0, count_traces, readout[channel], place, 0, count
                        )
            else:
                for k in range(first, last):
                    here, there = base[k - first], given_base[place + k - first, column:stop]
                    for i in range(count):
                        here[i] = there[i]
            for k in range(first, last):
                if older:
                    known = base[k - first]
                    for i in range(count):
                        total[i] = known[i]
                else:
                    for i in range(count):
                        total[i] = zero
                end = entering + k - origin
                add_history(total, w, local, 0, end - 1, -1, count, min(place + k - first, limit))
                charge(c, v, x[k, column:stop], count, form, leak, rest)
                # Short loops over few arrays: the compiler makes vector code of each.
                for i in range(count):
                    c[i] = c[i] + bracket * (c[i] - v[i]) - total[i]
                fired = spikes[k, column:stop]
                if strict:
                    for i in range(count):
                        fired[i] = one if c[i] > threshold else zero
                else:
                    for i in range(count):
                        fired[i] = one if c[i] >= threshold else zero
                if hard:
                    for i in range(count):
                        s = fired[i]
                        v[i] = (one - s) * c[i] + s * reset
                else:
                    for i in range(count):
                        v[i] = c[i] - fired[i] * threshold
                newest, begun, kept = rows[entering + k, column:stop], start[column:stop], local[end]
                for i in range(count):
                    newest[i] = v[i] - begun[i]
                for i in range(count):
                    kept[i] = newest[i]
                if keep_marks:
                    mark = marks[k, column:stop]
                    for i in range(count):
                        mark[i] = np.uint8(fired[i] > zero)
                if keep_h:
                    charged = h_seq[k, column:stop]
                    for i in range(count):
                        charged[i] = c[i]
                if keep_v:
                    potential = v_seq[k, column:stop]
                    for i in range(count):
                        potential[i] = v[i]
        v_last[column:stop] = v[:count]
        if traced and not has_base and new_traces.shape[0] > 0:
            for p in range(count_traces):
                there, here = new_traces[p, column:stop], z[p]
                for i in range(count):
                    there[i] = here[i]


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
    elif kind == 6:
        scale = a / type(one)(math.sqrt(math.pi))
        for i in range(count):
            z = a * (h[i] - threshold)
            slope[i] = scale * np.exp(-z * z)
    elif kind == 7:
        for i in range(count):
            z = one + a * abs(h[i] - threshold)
            slope[i] = one / (z * z)
    elif kind == 8:
        for i in range(count):
            slope[i] = a if h[i] < threshold else -a
    else:
        for i in range(count):
            slope[i] = one


@njit(fastmath={"contract", "reassoc", "nsz"}, **_OPTIONS)
def _dot(a, b, count):
    total = a[0] * b[0]
    for i in range(1, count):
        total += a[i] * b[i]
    return total


@njit(**_OPTIONS)
def backward(
    h_seq, rebuild, rows, start, v0, marks, v_last, entering, limit, plan, weights, gains, readout_t, decay,
    inject_t, charge_slope, input_slope, rest, threshold, strict, hard, reset, detach, kind, sharpness, one,
    grad_s, has_s, grad_v, has_v, grad_rows, first_handed, handed, grad_traces, has_grad_traces, x, levers,
    keep_levers, with_input, grad_x, delta, keep_delta, tiles, first_tile, last_tile,
):  # fmt: skip
    """The adjoint recursion; ``grad_x`` and, if asked for, the adjoints ``delta`` of all steps.

    With ``rebuild`` the charged potentials are not given but follow from what a soft reset left of them.
    ``levers[tile]`` receives ``sum delta lever`` and ``sum delta x``, parts of the derivatives to gain and
    leak factor; ``lever = rest - v`` (``+ x`` with ``with_input``).
    """
    steps = grad_x.shape[0]
    size, count_traces = readout_t.shape[2], decay.shape[0]
    zero = one - one
    total, slope = np.empty(TILE, grad_x.dtype), np.empty(TILE, grad_x.dtype)
    rebuilt, lever = np.empty(TILE, grad_x.dtype), np.empty(TILE, grad_x.dtype)
    # Minus what later blocks gave to each step's row; then the adjoint of the step itself.
    into = np.empty((steps, TILE), grad_x.dtype)
    spread = np.empty((size, TILE), grad_x.dtype)
    z = np.empty((count_traces, TILE), grad_x.dtype)
    for t in range(first_tile, last_tile):
        column, count, channel = tiles[t, 0], tiles[t, 1], tiles[t, 2]
        stop = column + count
        w, gain = weights[channel], gains[channel]
        carried = gain * charge_slope + (one - gain)
        into_input = gain * input_slope
        by_lever, by_input = 0.0, 0.0
        for k in range(steps):
            row = entering + k - first_handed
            here = into[k]
            if 0 <= row < handed:
                handed_on = grad_rows[row, column:stop]
                for i in range(count):
                    here[i] = -handed_on[i]
            else:
                for i in range(count):
                    here[i] = zero
        for p in range(count_traces):
            here = z[p]
            if has_grad_traces:
                there = grad_traces[p, column:stop]
                for i in range(count):
                    here[i] = -there[i]
            else:
                for i in range(count):
                    here[i] = zero
        for b in range(plan.shape[0] - 1, -1, -1):
            first, last, place = plan[b, 0], plan[b, 1], plan[b, 2]
            low, before, folds = plan[b, 3], plan[b, 4], plan[b, 5]
            for k in range(last - 1, first - 1, -1):
                d = into[k]
                for i in range(count):
                    total[i] = d[i]
                add_history(total, w, into, 0, k + 1, 1, count, min(last - 1 - k, limit))
                h = rebuilt[:count]
                if rebuild:
                    mark = marks[k, column:stop]
                    if k == steps - 1:  # the newest row may have been overwritten by a potential set by hand
                        after = v_last[column:stop]
                        for i in range(count):
                            h[i] = after[i] + (threshold if mark[i] else zero)
                    else:
                        after, begun = rows[entering + k, column:stop], start[column:stop]
                        for i in range(count):
                            h[i] = (after[i] + begun[i]) + (threshold if mark[i] else zero)
                else:
                    h[:] = h_seq[k, column:stop]
                surrogate_slope(slope, h, count, threshold, kind, sharpness, one)
                if k < steps - 1:
                    ahead = into[k + 1]
                    for i in range(count):
                        total[i] -= carried * ahead[i]
                elif has_v:
                    into_v = grad_v[column:stop]
                    for i in range(count):
                        total[i] -= into_v[i]
                if hard:
                    if strict:
                        for i in range(count):
                            rebuilt[i] = (one if h[i] <= threshold else zero) + (
                                zero if detach else (reset - h[i]) * slope[i]
                            )
                    else:
                        for i in range(count):
                            rebuilt[i] = (one if h[i] < threshold else zero) + (
                                zero if detach else (reset - h[i]) * slope[i]
                            )
                    for i in range(count):
                        # What fired and was reset hands nothing on, also if what comes is not finite.
                        d[i] = -rebuilt[i] * total[i] if rebuilt[i] != zero else zero
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
                if keep_levers:
                    given = x[k, column:stop]
                    if k == 0:
                        then = v0[column:stop]
                        for i in range(count):
                            lever[i] = rest - then[i]
                    else:
                        then, begun = rows[entering + k - 1, column:stop], start[column:stop]
                        for i in range(count):
                            lever[i] = rest - (then[i] + begun[i])
                    if with_input:
                        for i in range(count):
                            lever[i] += given[i]
                    by_lever += _dot(d, lever, count)
                    by_input += _dot(d, given, count)
            # What this block gave to the rows before it, as far as they belong to this run.
            inside = max(low, entering)
            steps_here = last - first
            if low + before > inside:
                add_lagged(
                    into, inside - entering, low + before - inside, into, first, steps_here, w,
                    place + low + before - 1 - inside, -1, count,
                )  # fmt: skip
            if count_traces:
                add_product(z, 0, count_traces, into, first, steps_here, readout_t[channel], 0, place, count)
            for n in range(folds):
                spread[:, :count] = zero
                add_product(spread, 0, size, z, 0, count_traces, inject_t, 0, 0, count)
                top = low - (n + 1) * size - entering
                for r in range(size):
                    if top + r >= 0:
                        here, there = into[top + r], spread[r]
                        for i in range(count):
                            here[i] += there[i]
                for p in range(count_traces):
                    here, keep = z[p], decay[p]
                    for i in range(count):
                        here[i] = keep * here[i]
        if keep_levers:
            levers[t, 0] = by_lever
            levers[t, 1] = by_input


@njit(**_OPTIONS)
def fire_step(
    x, v, start, has_start, rows, minus, weights, brackets, leak, threshold, reset, one, spikes, h, tiles,
    first_tile, last_tile,
):  # fmt: skip
    """A step of a block of a leaky neuron with a delayed reset; writes the newest of its ``rows``."""
    lags = rows.shape[0]
    zero = one - one
    known = np.empty(TILE, h.dtype)
    origin, above, c = np.empty(TILE, h.dtype), np.empty(TILE, h.dtype), np.empty(TILE, h.dtype)
    for t in range(first_tile, last_tile):
        column, count, channel = tiles[t, 0], tiles[t, 1], tiles[t, 2]
        stop = column + count
        older, bracket, now, given = minus[column:stop], brackets[channel], v[column:stop], x[column:stop]
        for i in range(count):
            known[i] = -older[i]
        if lags:
            newest = rows[lags - 1, column:stop]
            if has_start:
                begun = start[column:stop]
                for i in range(count):
                    newest[i] = now[i] - begun[i]
            else:
                for i in range(count):
                    newest[i] = now[i]
            add_history(known, weights[channel], rows, column, lags - 1, -1, count, lags)
        for i in range(count):
            above[i] = one if now[i] > threshold else zero
        if reset == 2:
            for i in range(count):
                origin[i] = (one - above[i]) * now[i]
        else:
            for i in range(count):
                origin[i] = now[i]
        for i in range(count):
            c[i] = leak * origin[i] + given[i]
        for i in range(count):
            c[i] = c[i] + bracket * (c[i] - origin[i]) - known[i]
        if reset == 1:
            for i in range(count):
                c[i] = c[i] - above[i] * threshold
        out, fired = h[column:stop], spikes[column:stop]
        for i in range(count):
            out[i] = c[i]
        for i in range(count):
            fired[i] = one if c[i] > threshold else zero


@njit(**_OPTIONS)
def fire_step_adjoint(
    grad_s, has_s, grad_h, has_h, h, v, delta, place, late, has_late, weights, gains, leak, threshold, reset,
    kind, sharpness, one, x, levers, keep_levers, grad_x, grad_v, own, keep_own, tiles, first_tile, last_tile,
):  # fmt: skip
    """The adjoint of :func:`fire_step`; ``delta [BLOCK, N]`` holds those of the later steps of the block."""
    size = delta.shape[0]
    total, keeps = np.empty(TILE, h.dtype), np.empty(TILE, h.dtype)
    slope, d, origin = np.empty(TILE, h.dtype), np.empty(TILE, h.dtype), np.empty(TILE, h.dtype)
    zero = one - one
    for t in range(first_tile, last_tile):
        column, count, channel = tiles[t, 0], tiles[t, 1], tiles[t, 2]
        stop = column + count
        gain = gains[channel]
        if has_h:
            into_h = grad_h[column:stop]
            for i in range(count):
                d[i] = into_h[i]
        else:
            for i in range(count):
                d[i] = zero
        if has_s:
            surrogate_slope(slope, h[column:stop], count, threshold, kind, sharpness, one)
            into_s = grad_s[column:stop]
            for i in range(count):
                d[i] += slope[i] * into_s[i]
        if keep_own:
            mine = own[column:stop]
            for i in range(count):
                mine[i] = d[i]
        there = delta[place, column:stop]
        for i in range(count):
            there[i] = d[i]
        for i in range(count):
            total[i] = zero
        if place:
            add_history(total, weights[channel], delta, column, place, 1, count, size - place)
            if has_late:
                handed = late[column:stop]
                for i in range(count):
                    total[i] -= handed[i]
        into_x, into_v, now = grad_x[column:stop], grad_v[column:stop], v[column:stop]
        for i in range(count):
            into_x[i] = gain * d[i]
        carried = gain * leak + (one - gain)
        if reset == 2:
            for i in range(count):
                keeps[i] = one if now[i] <= threshold else zero
            for i in range(count):
                into_v[i] = keeps[i] * carried * d[i] - total[i]
        else:
            for i in range(count):
                into_v[i] = carried * d[i] - total[i]
        if keep_levers:
            if reset == 2:
                for i in range(count):
                    origin[i] = keeps[i] * now[i]
            else:
                for i in range(count):
                    origin[i] = now[i]
            levers[t, 0] = _dot(d, origin, count)
            levers[t, 1] = _dot(d, x[column:stop], count)
