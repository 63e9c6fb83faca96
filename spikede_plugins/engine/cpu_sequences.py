"""Whole sequences of an affine neuron: one pass over a tile of neurons runs all T steps, and back again.

Memory is read and written once a neuron and step: input, spikes, charged potential and deviation forward;
charged potential, incoming and outgoing gradient backward.
"""

from __future__ import annotations

import numpy as np

from spikede_plugins.engine.compiled import kernel
from spikede_plugins.engine.cpu_dynamics import charge, dot, surrogate_slope
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
def forward(
    x, v0, start, rows, entering, limit, plan, room, given_base, has_base, traces, has_traces, new_traces,
    weights, brackets, readout, decay, inject, form, leak, rest, threshold, strict, hard, reset, early, drop,
    one, spikes, h_seq, keep_h, v_seq, keep_v, marks, keep_marks, v_last, tiles, first_tile, last_tile,
):  # fmt: skip
    """All steps of all neurons; ``rows [entering + T, N]`` holds the past and receives the new rows.

    ``plan [blocks, 6]`` is ``engine.blocks``; ``room`` rows are the most that are held at a time. With
    ``has_base`` there is one block, and what is older than it is given. With ``early`` a neuron fires on its
    native charge, and a spike takes ``drop`` from that.
    """
    width = widest(tiles, first_tile, last_tile)
    size, count_traces = given_base.shape[0], decay.shape[0]
    zero = one - one
    local = np.empty((room, width), x.dtype)
    base, z = np.empty((size, width), x.dtype), np.empty((count_traces, width), x.dtype)
    total, c, v = np.empty(width, x.dtype), np.empty(width, x.dtype), np.empty(width, x.dtype)
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
                if not early:
                    for i in range(count):
                        c[i] = c[i] + bracket * (c[i] - v[i]) - total[i]
                fired = spikes[k, column:stop]
                if strict:
                    for i in range(count):
                        fired[i] = one if c[i] > threshold else zero
                else:
                    for i in range(count):
                        fired[i] = one if c[i] >= threshold else zero
                if early:
                    for i in range(count):
                        c[i] = c[i] - fired[i] * drop
                    for i in range(count):
                        v[i] = c[i] + bracket * (c[i] - v[i]) - total[i]
                elif hard:
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


@kernel()
def backward(
    h_seq, rebuild, rows, start, v0, marks, v_last, entering, limit, plan, weights, gains, readout_t, decay,
    inject_t, charge_slope, input_slope, form, leak, pull, rest, threshold, strict, hard, reset, detach,
    early, kind, sharpness, one, grad_s, has_s, grad_v, has_v, grad_rows, first_handed, handed, grad_traces,
    has_grad_traces, x, levers, keep_levers, with_input, grad_x, delta, keep_delta, tiles, first_tile,
    last_tile,
):  # fmt: skip
    """The adjoint recursion; ``grad_x`` and, if asked for, the adjoints ``delta`` of all steps.

    With ``rebuild`` the charged potentials are not given but follow from what a soft reset left of them.
    ``levers[tile]`` receives ``sum delta lever`` and ``sum delta x``, parts of the derivatives to gain and
    leak factor; ``lever = rest - v`` (``+ x`` with ``with_input``). With ``early`` (see :func:`forward`) the
    lever has ``- threshold s`` as well; without that it gives the second, ``sum slope grad_s lever``.
    """
    width = widest(tiles, first_tile, last_tile)
    steps = grad_x.shape[0]
    size, count_traces = readout_t.shape[2], decay.shape[0]
    zero = one - one
    total, slope = np.empty(width, grad_x.dtype), np.empty(width, grad_x.dtype)
    rebuilt, lever = np.empty(width, grad_x.dtype), np.empty(width, grad_x.dtype)
    prior, through = np.empty(width, grad_x.dtype), np.empty(width, grad_x.dtype)
    # Minus what later blocks gave to each step's row; then the adjoint of the step itself.
    into = np.empty((steps, width), grad_x.dtype)
    spread = np.empty((size, width), grad_x.dtype)
    z = np.empty((count_traces, width), grad_x.dtype)
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
        load_minus(z, grad_traces, has_grad_traces, zero, column, count)
        for b in range(plan.shape[0] - 1, -1, -1):
            first, last, place = plan[b, 0], plan[b, 1], plan[b, 2]
            low, before, folds = plan[b, 3], plan[b, 4], plan[b, 5]
            for k in range(last - 1, first - 1, -1):
                d = into[k]
                for i in range(count):
                    total[i] = d[i]
                add_history(total, w, into, 0, k + 1, 1, count, min(last - 1 - k, limit))
                h = rebuilt[:count]
                if early:
                    if k == 0:
                        prior[:count] = v0[column:stop]
                    else:
                        then, begun = rows[entering + k - 1, column:stop], start[column:stop]
                        for i in range(count):
                            prior[i] = then[i] + begun[i]
                    charge(h, prior, x[k, column:stop], count, form, leak, rest)
                elif rebuild:
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
                    if early:
                        for i in range(count):
                            total[i] -= (one - gain) * ahead[i] + charge_slope * through[i]
                    else:
                        for i in range(count):
                            total[i] -= carried * ahead[i]
                elif has_v:
                    into_v = grad_v[column:stop]
                    for i in range(count):
                        total[i] -= into_v[i]
                if early:
                    for i in range(count):
                        d[i] = -total[i]
                elif hard:
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
                if early:  # through: the adjoint of the native charge
                    for i in range(count):
                        through[i] = gain * d[i]
                    if has_s:
                        incoming = grad_s[k, column:stop]
                        for i in range(count):
                            slope[i] = slope[i] * incoming[i]
                        for i in range(count):
                            through[i] += slope[i]
                elif has_s:
                    incoming = grad_s[k, column:stop]
                    for i in range(count):
                        d[i] += slope[i] * incoming[i]
                outgoing = grad_x[k, column:stop]
                if early:
                    for i in range(count):
                        outgoing[i] = input_slope * through[i]
                else:
                    for i in range(count):
                        outgoing[i] = into_input * d[i]
                if keep_delta:
                    adjoint = delta[k, column:stop]
                    for i in range(count):
                        adjoint[i] = d[i]
                if keep_levers:
                    given = x[k, column:stop]
                    if not pull:
                        for i in range(count):
                            lever[i] = zero
                    elif k == 0:
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
                    if early:
                        if has_s:
                            by_input += dot(slope, lever, count)
                        if strict:
                            for i in range(count):
                                lever[i] -= threshold if h[i] > threshold else zero
                        else:
                            for i in range(count):
                                lever[i] -= threshold if h[i] >= threshold else zero
                    else:
                        by_input += dot(d, given, count)
                    by_lever += dot(d, lever, count)
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
            unfold(z, zero, decay, inject_t, into, low - entering, folds, spread, count)
        if keep_levers:
            levers[t, 0] = by_lever
            levers[t, 1] = by_input
