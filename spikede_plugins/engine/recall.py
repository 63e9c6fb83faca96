"""What each step of a run recalls: minus its memory sum, for any right-hand side.

A run begins as a thin loop over one buffer of deviations; from the first state on that needs a gradient, the
differentiable steps of ``engine.block_steps`` go on with what the buffer holds. Sums are formed by blocks of
steps (``engine.blocks``).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from spikede_plugins.engine.block_steps import begin_block, take_step
from spikede_plugins.engine.blocks import Block, Reach, blocks, fold, older
from spikede_plugins.engine.buffers import empty
from spikede_plugins.engine.history import HistoryLog, append, combine, joined, remember
from spikede_plugins.engine.operator import Kernel, Source
from spikede_plugins.exponentials import BLOCK, EXACT

#: What a step recalls: minus its memory sum, by the weights of each stage of the solver.
Recalled = tuple[Tensor, ...]
#: Yields what each step recalls; is sent the state that the step led to.
Recall = Generator[Recalled, Tensor, None]


def recall_nothing(start: Tensor) -> Recall:
    """At alpha = 1 explicit steps have no memory."""
    nothing = torch.full((), -0.0, dtype=start.dtype, device=start.device)  # x + -0.0 is x, for 0 and -0 too
    while True:
        yield (nothing,)


def recall_window(kernels: Sequence[Kernel], limit: int, start: Tensor, channel_dim: int | None) -> Recall:
    """The sum over the newest ``limit`` states, formed anew at every step."""
    weights = torch.stack([kernel.weights for kernel in kernels])
    log, rows = HistoryLog(), start.detach().new_empty((0, *start.shape))
    recalled = start.detach().new_zeros(()).expand(len(kernels), *start.shape)
    while True:
        y = yield recalled.unbind(0)
        rows, sums = remember(rows, y - start, weights, limit, channel_dim, log)
        recalled = -sums


def recall_by_blocks(
    kernels: Sequence[Kernel], reach: Reach, start: Tensor, steps: int, channel_dim: int | None
) -> Recall:
    """The sum over all states, old ones by way of traces where the memory folds; nothing needs a gradient.

    From the first state on that does, :func:`_recall_with_graph` goes on.
    """
    buffer = _Buffer(kernels, reach, start, steps, channel_dim)
    for block in blocks(0, steps, reach, False):
        buffer.begin(block)
        for k in range(block.first, block.last):
            y = yield buffer.recalled(k - block.first)
            if y.requires_grad:
                yield from _recall_with_graph(
                    kernels, reach, start, y, steps - k - 1, buffer.rows, buffer.traces, channel_dim
                )
                return
            buffer.append(y)


class _Buffer:
    """The deviations of a run, row behind row, and their sums for one block of steps after the other.

    Args:
        kernels: the weights; G sums are formed at once, of which a memory that folds has one.
        reach: how far back they go.
        start: the state that deviations are counted from ``[*shape]``.
        steps: how many the run has.
        channel_dim: which dimension has an order each, or None.

    Attributes:
        traces: what was folded ``[P, *shape]``, or None.
    """

    def __init__(
        self, kernels: Sequence[Kernel], reach: Reach, start: Tensor, steps: int, channel_dim: int | None
    ) -> None:
        self.start, self.channel_dim = start, channel_dim
        self.kernels = [Kernel(*map(_detached, each)) for each in kernels]
        self.traces: Tensor | None = None
        self._all = empty((min(steps, reach.fold + 2 * BLOCK) if reach.fold else steps, *start.shape), start)
        self._known = 0
        self._older: Tensor | None = None
        # By how far a step is into its block: the weights of the rows of the block, oldest first.
        self._inside = [
            torch.stack([each.weights[:place].flip(0) for each in self.kernels]) for place in range(BLOCK)
        ]
        # One order, and no autocast to keep out: the product of ``combine`` in one operation.
        self._plain = kernels[0].weights.shape[-1] == 1 and not torch.is_autocast_enabled(start.device.type)
        self._flat = self._all.view(self._all.shape[0], -1)
        self._products = [weights[..., 0] for weights in self._inside]

    @property
    def rows(self) -> Tensor:
        """The rows that are kept ``[r, *shape]``, newest last."""
        return self._all[: self._known]

    def append(self, y: Tensor) -> None:
        """The newest state."""
        torch.sub(y, self.start, out=self._all[self._known])
        self._known += 1

    def begin(self, block: Block) -> None:
        """Fold where the block says so, and form minus the sums over what is older than it."""
        if block.folds:
            gone = block.folds * BLOCK
            self.traces = fold(self.kernels[0], self.rows[:gone], self.traces, block.folds)
            self._all[:EXACT] = self.rows[gone:].clone()
            self._known = EXACT
        groups, shape = len(self.kernels), self.start.shape
        minus = self._older_sums() if self._known else self._all.new_zeros(()).expand(groups * BLOCK, *shape)
        self._minus = minus.unflatten(0, (groups, BLOCK))
        self._flat_minus = minus.reshape(groups, BLOCK, -1)

    def _older_sums(self) -> Tensor:
        """``[G BLOCK, *shape]``; one product takes the rows from memory once for all kernels."""
        count, readout = self._all.shape[0], self.kernels[0].readout
        if self._older is None:
            self._older = torch.cat([older(each.weights, BLOCK, count, 0) for each in self.kernels])
        # What a step gives to a row depends on how far they are apart: of fewer rows, the last ones' weights.
        sums = combine(self._older[:, count - self._known :], self.rows, self.channel_dim)
        if self.traces is not None and readout is not None:
            sums += combine(readout, self.traces, self.channel_dim)
        return sums.neg_()

    def recalled(self, place: int) -> Recalled:
        """Minus the sums of the step at ``place`` of the block, by each kernel."""
        if not place:
            return self._minus[:, 0].unbind(0)
        block = slice(self._known - place, self._known)
        if self._plain:
            minus, weights = self._flat_minus[:, place], self._products[place]
            flat = torch.addmm(minus, weights, self._flat[block], alpha=-1.0)
            return flat.view(len(self.kernels), *self.start.shape).unbind(0)
        inside = combine(self._inside[place], self._all[block], self.channel_dim)
        return (self._minus[:, place] - inside).unbind(0)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _recall_with_graph(
    kernels: Sequence[Kernel], reach: Reach, start: Tensor, y: Tensor, steps: int, rows: Tensor,
    traces: Tensor | None, channel_dim: int | None,
) -> Recall:  # fmt: skip
    """The same, differentiable in the states and the kernels: ``rows`` lie behind the state ``y``."""
    streams = [_graph_stream(each, reach, start, steps, rows, traces, channel_dim) for each in kernels]
    for stream in streams:
        next(stream)
    for _ in range(steps):
        u = y - start
        y = yield tuple(stream.send(u) for stream in streams)


def _graph_stream(
    kernel: Kernel, reach: Reach, start: Tensor, steps: int, known: Tensor, traces: Tensor | None,
    channel_dim: int | None,
) -> Generator[Tensor, Tensor, None]:  # fmt: skip
    """Minus the memory sum of each of ``steps`` steps; is sent the newest deviation before each.

    The charge that ``take_step`` adds the sum to is zero here.
    """
    zero = start.detach().new_zeros(start.shape)
    no_start = zero.new_zeros(()).expand(start.shape)
    # Steps look at the lags of their block only; the gradient of more would be zeros, a row for every lag.
    near = kernel._replace(weights=kernel.weights[:BLOCK], source=Source())
    log, rows = _log_with_room(known, 0 if reach.fold else steps)
    u = yield zero
    for block in blocks(known.shape[0] + 1, steps, reach, traces is not None):
        block = block._replace(low=block.folds * BLOCK)  # rows that were folded before are not among these
        if block.place:  # the run began without a graph, and goes on in the middle of a block
            begun = begin_block(kernel, rows[: block.before], traces, block, reach, channel_dim)
            inside = rows[block.before :]
        else:
            whole = joined(append(rows, u, log), rows, u.unsqueeze(0))
            begun = begin_block(kernel, whole, traces, block, reach, channel_dim)
            rows, inside = begun.rows, begun.rows.detach()[:0]
        before, traces, minus = begun
        for place in range(block.place, block.place + block.last - block.first):
            first = place == block.place
            taken = take_step(
                near, place, first, zero, u, zero, no_start, rows, before, inside, minus, log, channel_dim
            )
            rows, inside, minus = taken.rows, taken.inside, taken.minus
            u = yield taken.charged


def _log_with_room(rows: Tensor, more: int) -> tuple[HistoryLog, Tensor]:
    """A log that holds ``rows`` and has room for more, and its view of them."""
    log, count = HistoryLog(), rows.shape[0]
    buffer = rows.new_empty((count + more, *rows.shape[1:]))
    buffer[:count] = rows
    log.commit(buffer, count)
    return log, buffer[:count]
