"""Fused GPU kernels: one program runs all T steps of ``WIDTH`` neurons, forward or backward.

A program goes through its steps a block at a time (``engine.blocks``; the plan is a tensor that
``engine.gpu`` makes). When a block begins, the sums of all its steps over the rows before it are formed
together in registers, ``sums [SIZE, WIDTH]``: each row is read once for ``SIZE`` steps. Then the steps run
one after the other, and each adds what it leaves to the sums of the later steps of its block. Every sum
takes the traces first and then the rows from the oldest to the newest, so a run in chunks gives the bits of
the run as a whole. Backward is the mirror image: its sums go over the adjoints of later steps.

A program shares nothing with others but what was there before the launch. What it wrote itself it may read
again by other threads (it stores a row as a vector, and loads it as a part of a tile): a barrier stands
between.

Only sums are contracted, by ``fma``. Kernels must be launched with ``enable_fp_fusion=False``: charge, firing
and reset then round as the framework's own operations do, and a neuron at alpha = 1 has its native spikes.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Columns of the plan.
FIRST, LAST, PLACE, LOW, FOLDS, READ, UNTIL, INTO = (tl.constexpr(column) for column in range(8))
COLUMNS = tl.constexpr(8)
#: Places of the numbers.
REST, THRESHOLD, RESET, SHARPNESS, LEAK, FACTOR = (tl.constexpr(place) for place in range(6))


@triton.jit
def _older(
    sums, rows, begin, end, weights, lag, step, inside, limit, channels, column, n, at, lane,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """``sums[i] += W[lag[i] + step r] rows[begin + r]`` for every row up to ``end``, where ``inside[i]``."""
    for row in range(begin, end):
        u = tl.load(rows + row * n + at, mask=lane, other=0.0)
        reached = lag + step * (row - begin)
        known = inside & (reached < limit) if WINDOW else inside
        w = tl.load(weights + reached[:, None] * channels + column, mask=known[:, None], other=0.0)
        sums = tl.fma(w, u[None, :], sums)
    return sums


@triton.jit
def _inside(sums, u, weights, lag, inside, limit, channels, column, WINDOW: tl.constexpr):
    """``sums[i] += W[lag[i]] u`` where a step of the block is reached by this one."""
    known = inside & (lag >= 0)
    if WINDOW:
        known = known & (lag < limit)
    w = tl.load(weights + lag[:, None] * channels + column, mask=known[:, None], other=0.0)
    return tl.fma(w, u[None, :], sums)


@triton.jit
def _fold(traces, rows, top, decay, inject, read, n, at, lane, SIZE: tl.constexpr):
    """``z <- decay z + inject rows`` for the ``SIZE`` rows from ``top`` on."""
    i = tl.arange(0, SIZE)
    u = tl.load(rows + (top + i)[:, None] * n + at[None, :], mask=lane[None, :], other=0.0)
    for p in range(0, read):
        z = tl.load(traces + p * n + at, mask=lane, other=0.0)
        added = tl.sum(tl.load(inject + p * SIZE + i)[:, None] * u, 0)
        tl.store(traces + p * n + at, tl.load(decay + p) * z + added, mask=lane)


@triton.jit
def _unfold(traces, into, top, decay, inject, read, n, at, lane, SIZE: tl.constexpr):
    """The adjoint of :func:`_fold`: what the rows from ``top`` on got, where they are of the run."""
    i = tl.arange(0, SIZE)
    found = tl.zeros([SIZE, at.shape[0]], dtype=into.dtype.element_ty)
    for p in range(0, read):
        z = tl.load(traces + p * n + at, mask=lane, other=0.0)
        found = tl.fma(tl.load(inject + p * SIZE + i)[:, None], z[None, :], found)
        tl.store(traces + p * n + at, tl.load(decay + p) * z, mask=lane)
    reached = (top + i >= 0)[:, None] & lane[None, :]
    tl.store(into + (top + i)[:, None] * n + at[None, :], found, mask=reached)


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


@triton.jit(do_not_specialize=["blocks", "entering", "limit"])
def forward(
    x, v0, start, rows, traces, plan, weights, gain, readout, decay, inject, factor, numbers, spikes, h_seq,
    v_seq, marks, v_last, blocks, entering, limit, count_traces, n, inner, channels,
    FORM: tl.constexpr, LEARNED: tl.constexpr, STRICT: tl.constexpr, HARD: tl.constexpr,
    KEEP_H: tl.constexpr, KEEP_V: tl.constexpr, KEEP_MARKS: tl.constexpr, CHANNELS: tl.constexpr,
    WINDOW: tl.constexpr, TRACED: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """All steps; ``rows [entering + T, n]`` holds the past and receives the new rows, ``traces`` is updated.

    Where rows are folded, ``traces`` holds what was folded before, or zeros.
    """
    at = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    lane = at < n
    i = tl.arange(0, SIZE)
    channel = (at // inner) % channels
    column = channel[None, :] if CHANNELS else 0  # weights [SIZE, WIDTH], each neuron its own; or [SIZE, 1]
    rest, threshold, reset = tl.load(numbers + REST), tl.load(numbers + THRESHOLD), tl.load(numbers + RESET)
    leak = tl.load(numbers + LEAK)
    if LEARNED:
        leak = tl.load(factor)
        if FORM == "short":
            leak = 1.0 - leak
    bracket = tl.load(gain + channel) - 1.0
    v = tl.load(v0 + at, mask=lane, other=0.0)
    begun = tl.load(start + at, mask=lane, other=0.0)
    for b in range(0, blocks):
        block = plan + b * COLUMNS
        first, last, place = tl.load(block + FIRST), tl.load(block + LAST), tl.load(block + PLACE)
        low, read = tl.load(block + LOW), tl.load(block + READ)
        inside = first + i < last
        sums = tl.zeros([SIZE, WIDTH], dtype=v.dtype)
        tl.debug_barrier()  # rows and traces of the blocks before
        if TRACED:
            folds = tl.load(block + FOLDS)
            for j in range(0, folds):
                _fold(traces, rows, low - (folds - j) * SIZE, decay, inject, read, n, at, lane, SIZE)
                tl.debug_barrier()
            for p in range(0, read):
                z = tl.load(traces + p * n + at, mask=lane, other=0.0)
                taken = tl.load(
                    readout + ((place + i)[:, None] * count_traces + p) * channels + column,
                    mask=inside[:, None], other=0.0,
                )  # fmt: skip
                sums = tl.fma(taken, z[None, :], sums)
        end = entering + first
        lag = end - 1 - low + i
        sums = _older(
            sums, rows, low, end, weights, lag, -1, inside, limit, channels, column, n, at, lane, WINDOW
        )  # fmt: skip
        for k in range(first, last):
            total = tl.sum(tl.where((i == k - first)[:, None], sums, 0.0), 0)
            c = _charge(v, tl.load(x + k * n + at, mask=lane, other=0.0), leak, rest, FORM)
            h = c + bracket * (c - v) - total
            fired = h > threshold if STRICT else h >= threshold
            s = fired.to(h.dtype)
            v = (1.0 - s) * h + s * reset if HARD else h - s * threshold
            u = v - begun
            tl.store(rows + (entering + k) * n + at, u, mask=lane)
            tl.store(spikes + k * n + at, s, mask=lane)
            if KEEP_H:
                tl.store(h_seq + k * n + at, h, mask=lane)
            if KEEP_V:
                tl.store(v_seq + k * n + at, v, mask=lane)
            if KEEP_MARKS:
                tl.store(marks + k * n + at, fired.to(tl.uint8), mask=lane)
            sums = _inside(sums, u, weights, i - (k - first) - 1, inside, limit, channels, column, WINDOW)
    tl.store(v_last + at, v, mask=lane)


@triton.jit(do_not_specialize=["blocks", "entering", "limit", "steps"])
def backward(
    h_seq, rows, start, marks, v_last, plan, weights, gain, readout, decay, inject, factor, numbers, grad_s,
    grad_v, traces, grad_x, delta, blocks, steps, entering, limit, count_traces, n, inner, channels,
    LEARNED: tl.constexpr, DECAYED: tl.constexpr, STRICT: tl.constexpr, HARD: tl.constexpr,
    DETACH: tl.constexpr, KIND: tl.constexpr, REBUILD: tl.constexpr, HAS_S: tl.constexpr,
    HAS_V: tl.constexpr, HANDED: tl.constexpr, CHANNELS: tl.constexpr, WINDOW: tl.constexpr,
    TRACED: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The adjoint recursion: ``grad_x`` and the adjoints ``delta`` of all steps.

    ``traces`` holds minus the adjoint of the traces handed on and is used up. Before its step is done, a
    place of ``delta`` holds minus what its row got otherwise than from later steps of the run: from the
    traces it was folded into (``INTO`` in the plan says whether) and, with ``HANDED``, as a row that was
    handed on. With ``REBUILD`` the charged potentials follow from what a soft reset left of them.
    """
    at = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    lane = at < n
    i = tl.arange(0, SIZE)
    channel = (at // inner) % channels
    column = channel[None, :] if CHANNELS else 0
    threshold, reset = tl.load(numbers + THRESHOLD), tl.load(numbers + RESET)
    sharpness = tl.load(numbers + SHARPNESS)
    fraction = tl.load(factor) if LEARNED else tl.load(numbers + FACTOR)
    g = tl.load(gain + channel)
    carried = g * (1.0 - fraction) + (1.0 - g)
    to_input = g * fraction if DECAYED else g
    begun = tl.load(start + at, mask=lane, other=0.0)
    # Minus what a step's potential got from the step after it.
    ahead = -tl.load(grad_v + at, mask=lane, other=0.0) if HAS_V else tl.zeros_like(begun)
    for back in range(0, blocks):
        block = plan + (blocks - 1 - back) * COLUMNS
        first, last, place = tl.load(block + FIRST), tl.load(block + LAST), tl.load(block + PLACE)
        low, read, until = tl.load(block + LOW), tl.load(block + READ), tl.load(block + UNTIL)
        folded = at < n * tl.load(block + INTO)  # all neurons or none
        inside = first + i < last
        sums = tl.zeros([SIZE, WIDTH], dtype=begun.dtype)
        tl.debug_barrier()  # adjoints of the blocks behind
        lag = last - 1 - first - i
        sums = _older(
            sums, delta, last, until, weights, lag, 1, inside, limit, channels, column, n, at, lane, WINDOW
        )  # fmt: skip
        for back_k in range(first, last):
            k = first + last - 1 - back_k
            total = ahead + tl.sum(tl.where((i == k - first)[:, None], sums, 0.0), 0)
            if HANDED:
                total += tl.load(delta + k * n + at, mask=lane, other=0.0)
            elif TRACED:
                total += tl.load(delta + k * n + at, mask=folded, other=0.0)
            if REBUILD:
                # The newest row may have been overwritten by a potential set by hand.
                newest = k == steps - 1
                h = tl.load(rows + (entering + k) * n + at, mask=lane, other=0.0) + begun
                h = tl.where(newest, tl.load(v_last + at, mask=lane, other=0.0), h)
                h += tl.where(tl.load(marks + k * n + at, mask=lane, other=0) > 0, threshold, 0.0)
            else:
                h = tl.load(h_seq + k * n + at, mask=lane, other=0.0)
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
                d += slope * tl.load(grad_s + k * n + at, mask=lane, other=0.0)
            tl.store(delta + k * n + at, d, mask=lane)
            tl.store(grad_x + k * n + at, to_input * d, mask=lane)
            ahead = -carried * d
            sums = _inside(sums, d, weights, (k - first) - 1 - i, inside, limit, channels, column, WINDOW)
        if TRACED:
            tl.debug_barrier()  # adjoints of this block, and what later ones left in the traces
            own = inside[:, None] & lane[None, :]
            d = tl.load(delta + (first + i)[:, None] * n + at[None, :], mask=own, other=0.0)
            for p in range(0, read):
                taken = tl.load(
                    readout + ((place + i)[:, None] * count_traces + p) * channels + column,
                    mask=inside[:, None], other=0.0,
                )  # fmt: skip
                z = tl.load(traces + p * n + at, mask=lane, other=0.0)
                tl.store(traces + p * n + at, z + tl.sum(taken * d, 0), mask=lane)
            for j in range(0, tl.load(block + FOLDS)):
                tl.debug_barrier()
                _unfold(
                    traces, delta, low - (j + 1) * SIZE - entering, decay, inject, read, n, at, lane, SIZE
                )
