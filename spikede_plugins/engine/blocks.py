"""The history sum by blocks of steps: what is older than a block enters its steps as one matrix product.

    S_k = base_i + sum_{m=1..i} W_m u_{k-m},      i the place of step k in its block of B
    base_i = sum over the rows before the block of W_m u_{k-m}  +  sum_p readout_{ip} z_p

so a step costs the lags inside its block, and a block one product ``[B, rows] @ [rows, N]``. A compressed
memory folds the oldest rows into P traces at the beginning of a block, B rows at a time, and keeps the rest:

    z_p <- x_p^B z_p + sum_{j<B} x_p^(B-1-j) u_j

Where a block begins depends on the number of past steps alone, so single steps, chunks and whole sequences do
the same arithmetic in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from spikede_plugins.engine.history import combine, correlate
from spikede_plugins.exponentials import BLOCK, EXACT

if TYPE_CHECKING:
    from spikede_plugins.engine.operator import Kernel


class Reach(NamedTuple):
    """How far back a run looks.

    Attributes:
        limit: the largest lag that is summed; 0 for all.
        fold: with how many rows a compressed memory begins to fold; 0 for a memory that does not.
    """

    limit: int = 0
    fold: int = 0

    def place(self, rows: int) -> int:
        """The place in its block of a step that has ``rows`` rows behind it; a window has no blocks."""
        return 0 if self.limit else rows % BLOCK

    @property
    def size(self) -> int:
        """Steps a block."""
        return 1 if self.limit else BLOCK


class Block(NamedTuple):
    """Steps of one block that belong to one run.

    Attributes:
        first, last: the steps, ``first <= k < last``, counted within the run.
        place: the place of step ``first`` in the block.
        low: the first row that is still a row.
        before: how many rows lie before the block: ``rows[low : low + before]``.
        folds: how many times B rows are folded when the block begins.
    """

    first: int
    last: int
    place: int
    low: int
    before: int
    folds: int

    @property
    def begin(self) -> int:
        """The first row of the block itself."""
        return self.low + self.before


def blocks(entering: int, steps: int, reach: Reach, folded: bool) -> Iterator[Block]:
    """The blocks of a run of ``steps`` steps that begins with ``entering`` rows."""
    low, k = 0, 0
    while k < steps:
        known = entering + k - low
        folds = 0
        if reach.fold and known % BLOCK == 0 and known >= (EXACT + BLOCK if folded else reach.fold):
            folds, folded = (known - EXACT) // BLOCK, True
            low += folds * BLOCK
            known = EXACT
        if reach.limit:
            drop = max(0, known - reach.limit)
            low, known = low + drop, known - drop
        place = reach.place(known)
        last = min(steps, k + reach.size - place)
        yield Block(k, last, place, low, known - place, folds)
        k = last


def handed_on(entering: int, steps: int, reach: Reach, folded: bool) -> tuple[int, bool]:
    """The first row that the next step may need, and whether rows were ever folded."""
    low, known = 0, entering
    for block in blocks(entering, steps, reach, folded):
        low, folded = block.low, folded or block.folds > 0
    known = entering + steps - low
    if reach.limit:
        low += max(0, known - 1 - reach.limit)  # the newest row is none of those handed on
    return low, folded


def fold(kernel: Kernel, rows: Tensor, traces: Tensor | None, folds: int) -> Tensor:
    """The traces after ``folds B`` rows were folded into them, oldest first; ``[P, *shape]``."""
    if kernel.decay is None or kernel.inject is None:
        raise RuntimeError("this kernel has no traces")
    for n in range(folds):
        into = combine(kernel.inject.unsqueeze(-1), rows[n * BLOCK : (n + 1) * BLOCK], None)
        traces = into if traces is None else into.add_(_column(kernel.decay, traces) * traces)
    if traces is None:
        raise RuntimeError("nothing was folded")
    return traces


def _column(numbers: Tensor, like: Tensor) -> Tensor:
    return numbers.reshape(-1, *([1] * (like.dim() - 1)))


def older(weights: Tensor, size: int, before: int, limit: int) -> Tensor:
    """``[size, before, S]``: the weight that the steps of a block give to each row before it."""
    lag = older_lags(size, before, weights.device)
    matrix = weights[lag.clamp_max(weights.shape[0] - 1)]
    return matrix.masked_fill((lag >= limit).unsqueeze(-1), 0.0) if limit else matrix


def older_lags(size: int, before: int, device: torch.device) -> Tensor:
    """Lag minus one of step i to row j before the block."""
    i = torch.arange(size, device=device).unsqueeze(1)
    return i + before - 1 - torch.arange(before, device=device).unsqueeze(0)


def base_sums(
    kernel: Kernel, weights: Tensor, rows: Tensor, traces: Tensor | None, reach: Reach,
    channel_dim: int | None,
) -> Tensor:  # fmt: skip
    """``base [B, *shape]`` of a block from the rows before it and the traces."""
    base = combine(older(weights, reach.size, rows.shape[0], reach.limit), rows, channel_dim)
    if traces is not None and kernel.readout is not None:
        base += combine(kernel.readout, traces, channel_dim)
    return base


# -- the adjoint ----------------------------------------------------------------------------------


def spread_older(
    weights: Tensor, delta: Tensor, block: Block, reach: Reach, into: Tensor, channel_dim: int | None
) -> None:
    """Take from ``into [rows, *shape]`` what the steps ``delta`` of a block gave the rows before it."""
    if not block.before:
        return
    steps = slice(block.place, block.place + delta.shape[0])
    matrix = older(weights, reach.size, block.before, reach.limit)[steps]
    rows = into[block.low : block.begin]
    rows -= combine(matrix.transpose(0, 1), delta, channel_dim)


def spread_traces(
    kernel: Kernel, delta: Tensor, block: Block, traces_grad: Tensor | None, channel_dim: int | None
) -> Tensor:
    """The adjoint of the traces of a block: what its steps read, added to what comes from later."""
    if kernel.readout is None:
        raise RuntimeError("this kernel has no traces")
    matrix = kernel.readout[block.place : block.place + delta.shape[0]].transpose(0, 1)
    read = combine(matrix, delta, channel_dim).neg_()
    return read if traces_grad is None else read.add_(traces_grad)


def unfold(kernel: Kernel, traces_grad: Tensor, block: Block, into: Tensor) -> Tensor:
    """The adjoint of :func:`fold`: adds to the folded rows of ``into``, returns that of the traces before."""
    if kernel.decay is None or kernel.inject is None:
        raise RuntimeError("this kernel has no traces")
    end = block.low
    for _ in range(block.folds):
        rows = into[end - BLOCK : end]
        rows += combine(kernel.inject.T.unsqueeze(-1), traces_grad, None)
        traces_grad = _column(kernel.decay, traces_grad) * traces_grad
        end -= BLOCK
    return traces_grad


def past_gradients(
    kernel: Kernel, delta: Tensor, entering: int, traces: Tensor | None, reach: Reach,
    channel_dim: int | None, grad_rows: Tensor | None, first_handed: int, grad_traces: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """What the rows ``[entering, *shape]`` and the traces of before a run receive from its adjoints delta.

    ``grad_rows``, from row ``first_handed`` on, and ``grad_traces`` came in for what the run handed on.
    """
    into = delta.new_zeros((entering, *delta.shape[1:]))
    if grad_rows is not None and first_handed < entering:
        into[first_handed:] += grad_rows[: entering - first_handed]
    traced = traces is not None
    run: list[tuple[Block, bool]] = []
    for block in blocks(entering, delta.shape[0], reach, traced):
        traced = traced or block.folds > 0
        run.append((block, traced))
    for block, traced in reversed(run):
        part = delta[block.first : block.last]
        steps, known = part.shape[0], min(block.begin + block.place, entering) - block.low
        if known > 0:  # rows of before, older than the block or in it
            at = torch.arange(steps, device=delta.device).unsqueeze(1) + block.before + block.place - 1
            lag = at - torch.arange(known, device=delta.device).unsqueeze(0)
            matrix = kernel.weights[lag.clamp_max(kernel.weights.shape[0] - 1)]
            if reach.limit:
                matrix = matrix.masked_fill((lag >= reach.limit).unsqueeze(-1), 0.0)
            into[block.low : block.low + known] -= combine(matrix.transpose(0, 1), part, channel_dim)
        if traced:
            grad_traces = spread_traces(kernel, part, block, grad_traces, channel_dim)
            if block.folds:
                first = block.low - block.folds * BLOCK
                folded = delta.new_zeros((block.low, *delta.shape[1:]))
                grad_traces = unfold(kernel, grad_traces, block, folded)
                last = min(block.low, entering)
                into[first:last] += folded[first:last]
    return into if entering else None, grad_traces if traces is not None else None


def add_lags(found: Tensor, products: Tensor, lag: Tensor, limit: int) -> None:
    """Take from ``found [n, S]`` at each lag (less one) its ``products [i, r, S]``, where there is one."""
    inside = (lag >= 0) & (lag < (limit or found.shape[0]))
    channels = found.shape[-1]
    products = products * inside.unsqueeze(-1)
    found.index_add_(
        0, lag.clamp(0, found.shape[0] - 1).reshape(-1), products.reshape(-1, channels), alpha=-1.0
    )


def weight_gradients(
    kernel: Kernel, delta: Tensor, rows: Tensor, entering: int, traces: Tensor | None, reach: Reach,
    channel_dim: int | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``-sum_k delta_k u_{k-m}`` for every lag that entered directly, and the same of the readout.

    One product a block, its diagonals summed; the traces are formed once more on the way.
    """
    channels = kernel.weights.shape[-1]
    found = torch.zeros_like(kernel.weights)
    readout = None if kernel.readout is None else torch.zeros_like(kernel.readout)
    for block in blocks(entering, delta.shape[0], reach, traces is not None):
        for n in range(block.folds, 0, -1):
            start = block.low - n * BLOCK
            traces = fold(kernel, rows[start : start + BLOCK], traces, 1)
        part = delta[block.first : block.last]
        steps = part.shape[0]
        known = block.before + block.place  # rows behind the first of these steps
        reached = rows[block.low : block.low + known + steps - 1]
        if reached.shape[0]:
            at = torch.arange(steps, device=found.device).unsqueeze(1)
            lag = known - 1 + at - torch.arange(reached.shape[0], device=found.device).unsqueeze(0)
            add_lags(found, correlate(part, reached, channel_dim, channels), lag, reach.limit)
        if traces is not None and readout is not None:
            readout[block.place : block.place + steps] -= correlate(part, traces, channel_dim, channels)
    return found, readout
