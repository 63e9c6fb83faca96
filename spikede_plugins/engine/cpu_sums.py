"""History sums of one tile of neurons, which stays in the caches: what every CPU kernel is made of.

A tile of neurons is small enough for its deviations ``u [rows, width]`` to live there. The sums go by blocks
of steps (``engine.blocks``): what is older than a block enters all its steps at once, as a product of small
matrices, four rows by four in registers; the lags inside the block are summed step by step, eight at a time.
Each number is summed in the same order whatever T is: one step at a time gives the same bits as all at once.

Kernels hold no lock and run a range of tiles, so any number of threads share the work. A tile is
``(first neuron, count, channel)``. Only sums may be contracted.
"""

from __future__ import annotations

from spikede_plugins.engine.compiled import kernel


@kernel()
def widest(tiles, first_tile, last_tile):
    """The most neurons of a tile: as many columns a thread's own arrays have."""
    width = 0
    for t in range(first_tile, last_tile):
        width = max(width, tiles[t, 1])
    return width


@kernel(fastmath={"contract"})
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
    if m + 4 <= lags:
        w0, w1, w2, w3 = weights[m], weights[m + 1], weights[m + 2], weights[m + 3]
        r = newest + m * step
        u0, u1 = rows[r, column:stop], rows[r + step, column:stop]
        u2, u3 = rows[r + 2 * step, column:stop], rows[r + 3 * step, column:stop]
        for i in range(count):
            t = total[i]
            t += w0 * u0[i]
            t += w1 * u1[i]
            t += w2 * u2[i]
            t += w3 * u3[i]
            total[i] = t
        m += 4
    while m < lags:
        w, u = weights[m], rows[newest + m * step, column:stop]
        for i in range(count):
            total[i] += w * u[i]
        m += 1


@kernel(fastmath={"contract"})
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


@kernel(fastmath={"contract"})
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


@kernel()
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


@kernel()
def unfold(traces, zero, decay, inject_t, rows, start, folds, spread, count):
    """The adjoint of :func:`fold`, for the blocks of rows before ``start``; leaves out those before row 0."""
    size = spread.shape[0]
    for n in range(folds):
        spread[:, :count] = zero
        add_product(spread, 0, size, traces, 0, decay.shape[0], inject_t, 0, 0, count)
        top = start - (n + 1) * size
        for r in range(size):
            if top + r >= 0:
                here, there = rows[top + r], spread[r]
                for i in range(count):
                    here[i] += there[i]
        for p in range(decay.shape[0]):
            z, keep = traces[p], decay[p]
            for i in range(count):
                z[i] = keep * z[i]


@kernel()
def load(local, rows, first, last, column, count):
    """``local[r - first] = rows[r]`` of one tile."""
    for r in range(first, last):
        here, there = local[r - first], rows[r, column : column + count]
        for i in range(count):
            here[i] = there[i]


@kernel()
def load_minus(local, rows, given, zero, column, count):
    """``local[r] = -rows[r]`` of one tile; zeros where nothing is given."""
    for r in range(local.shape[0]):
        here = local[r]
        if given:
            there = rows[r, column : column + count]
            for i in range(count):
                here[i] = -there[i]
        else:
            for i in range(count):
                here[i] = zero
