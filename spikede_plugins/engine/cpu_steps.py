"""Single steps in blocks: of any neuron (``engine.block_steps``), and whole ones (``engine.fire_steps``)."""

from __future__ import annotations

import numpy as np

from spikede_plugins.engine.compiled import kernel
from spikede_plugins.engine.cpu_dynamics import dot, surrogate_slope
from spikede_plugins.engine.cpu_sums import (
    add_history,
    add_lagged,
    add_product,
    fold,
    load,
    load_minus,
    unfold,
    widest,
)


@kernel()
def begin(
    rows, block, traces, has_traces, weights, readout, decay, inject, sign, base, new_traces, tiles,
    first_tile, last_tile,
):  # fmt: skip
    """Fold where a block says so; ``base [BLOCK, N]``: sign times its steps' sums over what is older."""
    width = widest(tiles, first_tile, last_tile)
    low, before, folds = block[3], block[4], block[5]
    size, count_traces = base.shape[0], decay.shape[0]
    held = folds * size
    local = np.empty((held + before, width), rows.dtype)
    z, out = np.empty((count_traces, width), rows.dtype), np.empty((size, width), rows.dtype)
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


@kernel()
def begin_adjoint(
    delta, block, into_rows, has_rows, into_traces, has_traces_in, weights, readout_t, decay, inject_t,
    grad_rows, grad_traces, tiles, first_tile, last_tile,
):  # fmt: skip
    """The adjoint of :func:`begin`: from the adjoints of the steps of a block to what is older than it."""
    width = widest(tiles, first_tile, last_tile)
    before, folds = block[4], block[5]
    size, count_traces, traced = delta.shape[0], decay.shape[0], grad_traces.shape[0] > 0
    held = folds * size
    given, spread = np.empty((size, width), delta.dtype), np.empty((size, width), delta.dtype)
    # Minus the gradients, as in backward.
    out = np.empty((held + before, width), delta.dtype)
    z = np.empty((count_traces, width), delta.dtype)
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
            load_minus(z, into_traces, has_traces_in, zero, column, count)
            add_product(z, 0, count_traces, given, 0, size, readout_t[channel], 0, 0, count)
            unfold(z, zero, decay, inject_t, out, held, folds, spread, count)
            for p in range(count_traces):
                there, here = grad_traces[p, column:stop], z[p]
                for i in range(count):
                    there[i] = -here[i]
        for r in range(held + before):
            there, here = grad_rows[r, column:stop], out[r]
            for i in range(count):
                there[i] = -here[i]


@kernel()
def step(
    charged, v, origin, start, has_start, rows, minus, weights, brackets, h, total, keep_total, tiles,
    first_tile, last_tile,
):  # fmt: skip
    """One step of a block: writes the newest of its ``rows``, the charged potential, and minus the sum."""
    width = widest(tiles, first_tile, last_tile)
    lags = rows.shape[0]
    known = np.empty(width, h.dtype)
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


@kernel()
def step_adjoint(
    d, own, delta, place, late, has_late, weights, gains, one, grad_c, grad_v, grad_origin, apart, tiles,
    first_tile, last_tile,
):  # fmt: skip
    """The adjoint of :func:`step`; ``delta [BLOCK, N]`` holds those of the later steps of the block."""
    width = widest(tiles, first_tile, last_tile)
    size = delta.shape[0]
    total = np.empty(width, d.dtype)
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


@kernel()
def fire_step(
    x, v, start, has_start, rows, minus, weights, brackets, leak, threshold, reset, one, spikes, h, tiles,
    first_tile, last_tile,
):  # fmt: skip
    """A step of a block of a leaky neuron with a delayed reset; writes the newest of its ``rows``."""
    width = widest(tiles, first_tile, last_tile)
    lags = rows.shape[0]
    zero = one - one
    known, c = np.empty(width, h.dtype), np.empty(width, h.dtype)
    origin, above = np.empty(width, h.dtype), np.empty(width, h.dtype)
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


@kernel()
def fire_step_adjoint(
    grad_s, has_s, grad_h, has_h, h, v, delta, place, late, has_late, weights, gains, leak, threshold, reset,
    kind, sharpness, one, x, levers, keep_levers, grad_x, grad_v, own, keep_own, tiles, first_tile, last_tile,
):  # fmt: skip
    """The adjoint of :func:`fire_step`; ``delta [BLOCK, N]`` holds those of the later steps of the block."""
    width = widest(tiles, first_tile, last_tile)
    size = delta.shape[0]
    total, keeps = np.empty(width, h.dtype), np.empty(width, h.dtype)
    slope, d = np.empty(width, h.dtype), np.empty(width, h.dtype)
    origin = np.empty(width, h.dtype)
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
            levers[t, 0] = dot(d, origin, count)
            levers[t, 1] = dot(d, x[column:stop], count)
