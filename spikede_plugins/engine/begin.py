"""The beginning of a block of single steps, as one autograd function.

What is older than the block enters all its steps here at once (and is folded, where the memory is
compressed), so a step itself looks at the rows of its own block only, forward and backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikede_plugins.engine.blocks import (
    Block,
    Reach,
    add_lags,
    base_sums,
    fold,
    older_lags,
    spread_older,
    spread_traces,
    unfold,
)
from spikede_plugins.engine.history import SECOND_DERIVATIVES, correlate
from spikede_plugins.engine.operator import Kernel
from spikede_plugins.errors import StateError


class Begun(NamedTuple):
    """A block that was begun.

    Attributes:
        rows: the rows kept ``[before, *shape]``.
        traces: the traces ``[P, *shape]``, or None.
        base: for each step of the block, its sum over everything older than the block ``[*shape]``; empty if
            there is nothing older.
    """

    rows: Tensor
    traces: Tensor | None
    base: tuple[Tensor, ...]


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, block: Block, reach: Reach, channel_dim: int | None, rows: Tensor,
        traces: Tensor | None, weights: Tensor, readout: Tensor | None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        kernel = Kernel(
            kernel.gain.detach(), weights.detach(), readout=None if readout is None else readout.detach(),
            decay=kernel.decay, inject=kernel.inject,
        )  # fmt: skip
        folded = fold(kernel, rows[: block.low], traces, block.folds) if block.folds else None
        kept = rows[block.low :]
        in_use = traces if folded is None else folded
        base = base_sums(kernel, kernel.weights, kept, in_use, reach, channel_dim)
        learned = ctx.needs_input_grad[6]
        # Rows that are kept for backward are never written again (see HistoryLog): no version check.
        ctx.kept = (kernel, block, reach, channel_dim, kept if learned else None, in_use if learned else None)
        ctx.traced, ctx.shape = in_use is not None, rows.shape
        ctx.set_materialize_grads(False)
        return kept.detach(), folded, *base.unbind(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:  # type: ignore[override]
        kernel, block, reach, channel_dim, kept, in_use = ctx.kept
        if kept is not None and torch.is_grad_enabled():
            raise StateError(SECOND_DERIVATIVES)
        into_rows, into_traces, *into_base = grads
        given = next((g for g in grads if g is not None), None)
        if given is None:
            return (None,) * 8
        zero = None if None not in into_base else given.new_zeros(ctx.shape[1:])
        # The functions of the scan take adjoints of h, from which the sums are taken away.
        delta = torch.stack([zero if g is None else g for g in into_base]).neg_()  # type: ignore[misc]
        grad_rows = given.new_zeros(ctx.shape)
        if into_rows is not None:
            grad_rows[block.low :] = into_rows
        spread_older(kernel.weights, delta, block, reach, grad_rows, channel_dim)
        grad_traces = None
        if ctx.traced:
            grad_traces = spread_traces(kernel, delta, block, into_traces, channel_dim)
            if block.folds:
                grad_traces = unfold(kernel, grad_traces, block, grad_rows)
        grad_weights = grad_readout = None
        if kept is not None:
            grad_weights = torch.zeros_like(kernel.weights)
            channels = grad_weights.shape[-1]
            if kept.shape[0]:
                lags = older_lags(delta.shape[0], kept.shape[0], kept.device)
                add_lags(grad_weights, correlate(delta, kept, channel_dim, channels), lags, reach.limit)
            if in_use is not None:
                grad_readout = -correlate(delta, in_use, channel_dim, channels)
        old = grad_traces if ctx.needs_input_grad[5] else None
        return None, None, None, None, grad_rows, old, grad_weights, grad_readout


def begin_block(
    kernel: Kernel, rows: Tensor, traces: Tensor | None, block: Block, reach: Reach, channel_dim: int | None
) -> Begun:
    """Fold where the block says so, and form the sums over what is older than it.

    Args:
        kernel: gain, weights, and the numbers of the traces.
        rows: all rows before the block ``[r, *shape]``.
        traces: the traces before it ``[P, *shape]``, or None.
        block: which block (see :func:`blocks`), its own rows not counted.
        reach, channel_dim: as a scan takes them.

    Returns:
        Differentiable in rows, traces, weights and readout.
    """
    if not rows.shape[0] and traces is None:
        return Begun(rows, None, ())
    kept, folded, *base = _Begin.apply(
        kernel, block._replace(first=0, place=0), reach, channel_dim, rows, traces, kernel.weights,
        kernel.readout,
    )  # fmt: skip
    return Begun(kept, traces if folded is None else folded, tuple(base))
