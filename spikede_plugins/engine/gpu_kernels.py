"""Fused GPU kernels: one program runs all T steps of ``WIDTH`` neurons, forward or backward.

A program goes through its steps a block at a time (``engine.blocks``; the plan is a tensor that
``engine.gpu`` makes). When a block begins, the sums of all its ``SIZE`` steps over the rows before it are
formed together: each row is read once for all of them. Then the steps run one after the other, and each adds
what it leaves to the sums of the later steps of its block. Every sum takes the traces first and then the rows
from the oldest to the newest, so a run in chunks gives the bits of the run as a whole. Backward is the mirror
image: its sums go over the adjoints of later steps.

All is arithmetic on vectors of neurons, and the loops over the steps of a block are unrolled: each thread
keeps the sums of its neurons in registers, one a step (a tuple of ``SIZE`` vectors), weights are the same
number for all threads, and what the steps of a block read of other arrays is asked for before the first of
them runs, so that the memory works while the sums are formed. Steps beyond the end of a short block compute
and store nothing that counts.

A program shares nothing with others but what was there before the launch. A thread reads again only what it
wrote itself; should Triton deal the neurons of two arrays to other threads, a barrier stands between.

Only sums are contracted, by ``fma``. Kernels must be launched with ``enable_fp_fusion=False``: charge, firing
and reset then round as the framework's own operations do, and a neuron at alpha = 1 has its native spikes.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Triton compares every global that a kernel reads at every launch, so the kernels read none.


@triton.jit
def _block(plan, b):
    """What block ``b`` is, in the order of ``engine.gpu``'s plan."""
    row = plan + b * 8
    first, last, place, low = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    folds, read, until, into = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
    return first, last, place, low, folds, read, until, into


@triton.jit
def _neuron(numbers):
    """Rest, threshold, reset, sharpness of the surrogate, leak of the charge, and leak of its gradient."""
    rest, threshold, reset = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    sharpness, leak, fraction = tl.load(numbers + 3), tl.load(numbers + 4), tl.load(numbers + 5)
    return rest, threshold, reset, sharpness, leak, fraction


@triton.jit
def _older(
    sums, rows, begin, end, weights, lag, channels, n, at, lane, STEP: tl.constexpr, SIZE: tl.constexpr
):
    """``sums[i] += W[lag + STEP (r - i)] rows[begin + r]`` for every row up to ``end``.

    ``STEP`` is 1 for rows that are read away from the block, -1 for rows that are read towards it.
    """
    GROUP: tl.constexpr = SIZE // 2  # rows that are read together: so many loads are under way at once
    row = rows + begin * n + at
    for first in range(begin, end, GROUP):
        read = ()
        for r in tl.static_range(GROUP):
            known = at < tl.where(first + r < end, n, 0)
            read = read + (tl.load(row, mask=known, other=0.0),)
            row += n
        # Steps and rows that are equally far apart share a weight.
        nearest = weights + (lag + STEP * (first - begin)) * channels
        shared = ()
        for apart in tl.static_range(GROUP + SIZE - 1):
            shared = shared + (tl.load(nearest + STEP * (apart - (SIZE - 1)) * channels),)
        for r in tl.static_range(GROUP):
            added = ()
            for i in tl.static_range(SIZE):
                added = added + (tl.fma(shared[r - i + SIZE - 1], read[r], sums[i]),)
            sums = added
    return sums


@triton.jit
def _between(weights, channels, SIZE: tl.constexpr):
    """The weights between the steps of a block: ``W[0] ... W[SIZE - 2]``."""
    found = ()
    for lag in tl.static_range(SIZE - 1):
        found = found + (tl.load(weights + lag * channels),)
    return found


@triton.jit
def _taken(sums, traces, readout, place, last, count, channels, read, n, at, lane, SIZE: tl.constexpr):
    """``sums[i] += R[place + i, p] z_p`` for all traces; places up to ``last`` are there."""
    for p in range(0, read):
        z = tl.load(traces + p * n + at, mask=lane, other=0.0)
        added = ()
        for i in tl.static_range(SIZE):
            there = tl.minimum(place + i, last)
            added = added + (tl.fma(tl.load(readout + (there * count + p) * channels), z, sums[i]),)
        sums = added
    return sums


@triton.jit
def _fold(traces, rows, top, decay, inject, read, n, at, lane, SIZE: tl.constexpr):
    """``z <- decay z + inject rows`` for the ``SIZE`` rows from ``top`` on."""
    u = ()
    for i in tl.static_range(SIZE):
        u = u + (tl.load(rows + (top + i) * n + at, mask=lane, other=0.0),)
    for p in range(0, read):
        added = tl.load(inject + p * SIZE) * u[0]
        for i in tl.static_range(1, SIZE):
            added = tl.fma(tl.load(inject + p * SIZE + i), u[i], added)
        z = tl.load(traces + p * n + at, mask=lane, other=0.0)
        tl.store(traces + p * n + at, tl.fma(tl.load(decay + p), z, added), mask=lane)


@triton.jit
def _unfold(traces, into, top, decay, inject, read, n, at, lane, SIZE: tl.constexpr):
    """The adjoint of :func:`_fold`: what the rows from ``top`` on got, where they are of the run."""
    found = ()
    for i in tl.static_range(SIZE):
        found = found + (tl.zeros([at.shape[0]], dtype=into.dtype.element_ty),)
    for p in range(0, read):
        z = tl.load(traces + p * n + at, mask=lane, other=0.0)
        added = ()
        for i in tl.static_range(SIZE):
            added = added + (tl.fma(tl.load(inject + p * SIZE + i), z, found[i]),)
        found = added
        tl.store(traces + p * n + at, tl.load(decay + p) * z, mask=lane)
    for i in tl.static_range(SIZE):
        tl.store(into + (top + i) * n + at, found[i], mask=at < tl.where(top + i >= 0, n, 0))


@triton.jit
def _charge(v, x, leak, rest, FORM: tl.constexpr):
    """The native charge of one step."""
    if FORM == "integrate":
        c = v + x
    elif FORM == "input":
        c = v + (x - (v - rest)) * leak
    elif FORM == "plain":
        c = v - (v - rest) * leak + x
    else:
        c = v * leak + x
    return c


@triton.jit
def _slope(z, a, KIND: tl.constexpr):
    """The surrogate's slope (see ``spikede_plugins.surrogate``)."""
    far = tl.abs(z)
    if KIND == "sigmoid":
        s = 1.0 / (1.0 + tl.exp(-a * z))
        slope = a * s * (1.0 - s)
    elif KIND == "atan":
        y = 1.5707963267948966 * a * z
        slope = 0.5 * a / (1.0 + y * y)
    elif KIND == "piecewise_quadratic":
        slope = tl.maximum(a - a * a * far, 0.0)
    elif KIND == "piecewise_exp":
        slope = 0.5 * a * tl.exp(-a * far)
    elif KIND == "soft_sign":
        y = 1.0 / a + far
        slope = 0.5 / (a * y * y)
    elif KIND == "super_spike":
        slope = a / ((1.0 + far) * (1.0 + far))
    elif KIND == "erf":
        y = a * z
        slope = a * 0.5641895835477563 * tl.exp(-y * y)
    elif KIND == "fast_sigmoid":
        y = 1.0 + a * far
        slope = 1.0 / (y * y)
    elif KIND == "triangular":
        slope = tl.where(z < 0.0, a, -a)
    elif KIND == "piecewise_linear":
        slope = tl.where(far <= a, 0.5 / a, 0.0)
    elif KIND == "gaussian":
        y = z / a
        slope = tl.exp(-0.5 * y * y) * (0.3989422804014327 / a)
    else:
        tl.static_assert(KIND == "straight_through")
        slope = tl.zeros_like(z) + 1.0
    return slope


@triton.jit(do_not_specialize=["blocks", "entering"])
def forward(
    x, v0, start, rows, traces, plan, weights, gain, readout, decay, inject, factor, numbers, spikes, h_seq,
    v_seq, marks, v_last, blocks, entering, count_traces, n, inner, channels,
    FORM: tl.constexpr, LEARNED: tl.constexpr, STRICT: tl.constexpr, HARD: tl.constexpr,
    KEEP_H: tl.constexpr, KEEP_V: tl.constexpr, KEEP_MARKS: tl.constexpr, CHANNELS: tl.constexpr,
    TRACED: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """All steps; ``rows [entering + T, n]`` holds the past and receives the new rows, ``traces`` is updated.

    Where rows are folded, ``traces`` holds what was folded before, or zeros. ``weights`` begin with
    ``W[0]``; zeros lie before them and behind, where blocks and groups reach further than the sums.
    """
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    lane = at < n
    channel = (at // inner) % channels
    if CHANNELS:  # numbers are read by the vector, to each neuron its own; else one for all
        weights, readout = weights + channel, readout + channel
    rest, threshold, reset, _sharpness, leak, _fraction = _neuron(numbers)
    if LEARNED:
        leak = tl.load(factor)
        if FORM == "short":
            leak = 1.0 - leak
    bracket = tl.load(gain + channel) - 1.0
    between = _between(weights, channels, SIZE)
    v = tl.load(v0 + at, mask=lane, other=0.0)
    begun = tl.load(start + at, mask=lane, other=0.0)
    for b in range(0, blocks):
        first, last, place, low, folds, read, _until, _into = _block(plan, b)
        inputs, sums, here = (), (), x + first * n + at
        for i in tl.static_range(SIZE):
            own = at < tl.where(first + i < last, n, 0)
            inputs = inputs + (tl.load(here, mask=own, other=0.0),)
            here += n
            sums = sums + (tl.zeros([WIDTH], dtype=v.dtype),)
        tl.debug_barrier()  # rows and traces of the blocks before
        if TRACED:
            for j in range(0, folds):
                _fold(traces, rows, low - (folds - j) * SIZE, decay, inject, read, n, at, lane, SIZE)
                tl.debug_barrier()
            end = place + last - first - 1
            sums = _taken(sums, traces, readout, place, end, count_traces, channels, read, n, at, lane, SIZE)
        end = entering + first
        sums = _older(sums, rows, low, end, weights, end - 1 - low, channels, n, at, lane, -1, SIZE)
        to = first * n + at.to(tl.int64)
        into_rows, into_spikes = rows + entering * n + to, spikes + to
        into_h, into_v, into_marks = h_seq + to, v_seq + to, marks + to
        for j in tl.static_range(SIZE):
            there = first + j < last
            own = at < tl.where(there, n, 0)
            c = _charge(v, inputs[j], leak, rest, FORM)
            h = c + bracket * (c - v) - sums[j]
            fired = h > threshold if STRICT else h >= threshold
            s = fired.to(h.dtype)
            v = tl.where(there, (1.0 - s) * h + s * reset if HARD else h - s * threshold, v)
            u = v - begun
            tl.store(into_rows, u, mask=own)
            tl.store(into_spikes, s, mask=own)
            into_rows += n
            into_spikes += n
            if KEEP_H:
                tl.store(into_h, h, mask=own)
                into_h += n
            if KEEP_V:
                tl.store(into_v, v, mask=own)
                into_v += n
            if KEEP_MARKS:
                tl.store(into_marks, fired.to(tl.uint8), mask=own)
                into_marks += n
            added = ()
            for i in tl.static_range(SIZE):
                added = added + ((tl.fma(between[i - j - 1], u, sums[i]) if i > j else sums[i]),)
            sums = added
    tl.store(v_last + at, v, mask=lane)


@triton.jit(do_not_specialize=["blocks", "entering", "steps"])
def backward(
    h_seq, rows, start, marks, v_last, plan, weights, gain, readout, decay, inject, factor, numbers, grad_s,
    grad_v, traces, grad_x, delta, blocks, steps, entering, count_traces, n, inner, channels,
    LEARNED: tl.constexpr, DECAYED: tl.constexpr, STRICT: tl.constexpr, HARD: tl.constexpr,
    DETACH: tl.constexpr, KIND: tl.constexpr, REBUILD: tl.constexpr, HAS_S: tl.constexpr,
    HAS_V: tl.constexpr, HANDED: tl.constexpr, CHANNELS: tl.constexpr,
    TRACED: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The adjoint recursion: ``grad_x`` and the adjoints ``delta`` of all steps.

    ``traces`` holds minus the adjoint of the traces handed on and is used up. Before its step is done, a
    place of ``delta`` holds minus what its row got otherwise than from later steps of the run: from the
    traces it was folded into (``into`` in the plan says whether) and, with ``HANDED``, as a row that was
    handed on. With ``REBUILD`` the charged potentials follow from what a soft reset left of them.
    """
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    lane = at < n
    channel = (at // inner) % channels
    if CHANNELS:
        weights, readout = weights + channel, readout + channel
    _rest, threshold, reset, sharpness, _leak, fraction = _neuron(numbers)
    if LEARNED:
        fraction = tl.load(factor)
    g = tl.load(gain + channel)
    carried = g * (1.0 - fraction) + (1.0 - g)
    to_input = g * fraction if DECAYED else g
    between = _between(weights, channels, SIZE)
    begun = tl.load(start + at, mask=lane, other=0.0)
    newest = tl.load(v_last + at, mask=lane, other=0.0) if REBUILD else begun
    # Minus what a step's potential got from the step after it.
    ahead = -tl.load(grad_v + at, mask=lane, other=0.0) if HAS_V else tl.zeros_like(begun)
    for back in range(0, blocks):
        first, last, place, low, folds, read, until, into = _block(plan, blocks - 1 - back)
        tl.debug_barrier()  # adjoints of the blocks behind
        to = first * n + at.to(tl.int64)
        from_rows, from_marks, from_h = rows + entering * n + to, marks + to, h_seq + to
        from_s, from_delta = grad_s + to, delta + to
        charged, arriving, got, sums = (), (), (), ()
        for i in tl.static_range(SIZE):
            own = at < tl.where(first + i < last, n, 0)
            if REBUILD:
                left = tl.load(from_rows, mask=own, other=0.0) + begun
                # The newest row may have been overwritten by a potential set by hand.
                left = tl.where(first + i == steps - 1, newest, left)
                left += tl.where(tl.load(from_marks, mask=own, other=0) > 0, threshold, 0.0)
                from_rows += n
                from_marks += n
            else:
                left = tl.load(from_h, mask=own, other=0.0)
                from_h += n
            charged = charged + (left,)
            if HAS_S:
                arriving = arriving + (tl.load(from_s, mask=own, other=0.0),)
                from_s += n
            if HANDED:
                got = got + (tl.load(from_delta, mask=own, other=0.0),)
            elif TRACED:
                some = at < tl.where((first + i < last) & (into > 0), n, 0)
                got = got + (tl.load(from_delta, mask=some, other=0.0),)
            from_delta += n
            sums = sums + (tl.zeros([WIDTH], dtype=begun.dtype),)
        sums = _older(sums, delta, last, until, weights, last - 1 - first, channels, n, at, lane, 1, SIZE)
        behind = (first + SIZE - 1) * n + at.to(tl.int64)
        into_delta, into_x = delta + behind, grad_x + behind
        adjoints = ()
        for j in tl.static_range(SIZE - 1, -1, -1):
            there = first + j < last
            own = at < tl.where(there, n, 0)
            total = ahead + sums[j]
            if HANDED or TRACED:
                total += got[j]
            h = charged[j]
            slope = _slope(h - threshold, sharpness, KIND)
            if HARD:
                if STRICT:
                    through = tl.where(h <= threshold, 1.0, 0.0).to(h.dtype)
                else:
                    through = tl.where(h < threshold, 1.0, 0.0).to(h.dtype)
                if not DETACH:
                    through += (reset - h) * slope
                # A neuron that fired and was reset hands nothing on, also if what comes is not finite.
                d = tl.where(through != 0.0, -through * total, 0.0)
            elif DETACH:
                d = -total
            else:
                d = (threshold * slope - 1.0) * total
            if HAS_S:
                d += slope * arriving[j]
            d = tl.where(there, d, 0.0)
            tl.store(into_delta, d, mask=own)
            tl.store(into_x, to_input * d, mask=own)
            into_delta -= n
            into_x -= n
            ahead = tl.where(there, -carried * d, ahead)
            added = ()
            for i in tl.static_range(SIZE):
                added = added + ((tl.fma(between[j - 1 - i], d, sums[i]) if i < j else sums[i]),)
            sums = added
            adjoints = (d,) + adjoints
        if TRACED:
            for p in range(0, read):
                z = tl.load(traces + p * n + at, mask=lane, other=0.0)
                for i in tl.static_range(SIZE):
                    taken = place + tl.minimum(i, last - first - 1)
                    z = tl.fma(tl.load(readout + (taken * count_traces + p) * channels), adjoints[i], z)
                tl.store(traces + p * n + at, z, mask=lane)
            for j in range(0, folds):
                tl.debug_barrier()
                _unfold(
                    traces, delta, low - (j + 1) * SIZE - entering, decay, inject, read, n, at, lane, SIZE
                )
