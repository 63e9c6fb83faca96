"""Single steps in blocks: what is older than a block is summed once, when the block begins.

Within a block, a step looks at the rows of the block only:

    h_k = c_k + (g - 1)(c_k - v) + minus_i - sum_{m=1..i} W_m u_{k-m},    minus_i = -(sum over what is older)

with i the place of the step. Backward, a step takes the adjoints of the later steps of its block, which come
to it as the gradient of ``minus [B, *shape]``: each step puts in its own, ``delta_k``, and hands all of them
on to the step before, and the first of the block to what is older. So nothing is copied on the way, and a
step costs the lags inside its block, forward and backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikede_plugins.engine import cpu
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
from spikede_plugins.engine.history import (
    SECOND_DERIVATIVES,
    HistoryLog,
    combine,
    correlate,
    per_neuron,
    sum_by_channel,
)
from spikede_plugins.engine.operator import Kernel
from spikede_plugins.errors import StateError
from spikede_plugins.exponentials import BLOCK


class Begun(NamedTuple):
    """A block that was begun.

    Attributes:
        rows: the rows kept ``[before, *shape]``.
        traces: the traces ``[P, *shape]``, or None.
        minus: for each step of the block, minus its sum over everything older ``[B, *shape]``.
    """

    rows: Tensor
    traces: Tensor | None
    minus: Tensor


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, block: Block, reach: Reach, channel_dim: int | None, rows: Tensor,
        traces: Tensor | None, weights: Tensor, readout: Tensor | None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        kernel = _detached(kernel, weights, readout)
        kept = rows[block.low :]
        if cpu.serves_steps(rows.shape[1:], rows, kernel, channel_dim):
            minus, folded = cpu.begin(kernel, block, rows, traces, channel_dim)
            in_use = traces if folded is None else folded
        else:
            folded = fold(kernel, rows[: block.low], traces, block.folds) if block.folds else None
            in_use = traces if folded is None else folded
            minus = base_sums(kernel, kernel.weights, kept, in_use, reach, channel_dim).neg_()
        learned = ctx.needs_input_grad[6]
        # Rows that are kept for backward are never written again (see HistoryLog): no version check.
        # An alias of the traces, which may be an output: no reference cycle forms.
        traces_kept = in_use.detach() if learned and in_use is not None else None
        ctx.kept = (kernel, block, reach, channel_dim, kept if learned else None, traces_kept)
        ctx.traced, ctx.shape = in_use is not None, rows.shape
        ctx.set_materialize_grads(False)
        return kept.detach(), folded, minus

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:  # type: ignore[override]
        kernel, block, reach, channel_dim, kept, in_use = ctx.kept
        if kept is not None and torch.is_grad_enabled():
            raise StateError(SECOND_DERIVATIVES)
        into_rows, into_traces, delta = grads
        given = next((g for g in grads if g is not None), None)
        if given is None:
            return (None,) * 8
        if delta is None:
            delta = given.new_zeros(BLOCK, *ctx.shape[1:])
        if cpu.serves_steps(ctx.shape[1:], delta, kernel, channel_dim) and not torch.is_grad_enabled():
            grad_rows, grad_traces = cpu.begin_adjoint(
                kernel, block, ctx.shape, ctx.traced, delta, into_rows, into_traces, channel_dim
            )
        else:
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


def _detached(kernel: Kernel, weights: Tensor, readout: Tensor | None) -> Kernel:
    return kernel._replace(
        gain=kernel.gain.detach(), weights=weights.detach(),
        readout=None if readout is None else readout.detach(),
    )  # fmt: skip


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
        nothing = rows.new_zeros(()).expand(BLOCK, *rows.shape[1:])  # takes no memory
        return Begun(rows, None, nothing)
    kept, folded, minus = _Begin.apply(
        kernel, block._replace(first=0, place=0), reach, channel_dim, rows, traces, kernel.weights,
        kernel.readout,
    )  # fmt: skip
    return Begun(kept, traces if folded is None else folded, minus)


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Kernel, channel_dim: int | None, minus: Tensor, inside: Tensor) -> Tensor:
        ctx.weights, ctx.channel_dim, ctx.known = kernel.weights.detach(), channel_dim, inside.shape[0]
        return minus.detach()

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Any:  # type: ignore[override]
        weights, known = ctx.weights, ctx.known
        step = torch.arange(known + 1, BLOCK, device=delta.device).unsqueeze(0)
        row = torch.arange(known, device=delta.device).unsqueeze(1)
        spread = combine(weights[step - row - 1], delta[known + 1 :], ctx.channel_dim)
        return None, None, delta, -spread


def known_in_block(kernel: Kernel, minus: Tensor, inside: Tensor, channel_dim: int | None) -> Tensor:
    """``minus`` of a block of which some rows are there before its first step is taken.

    Steps hand the adjoint of a row to the step that made it. The rows ``inside [r, *shape]`` were made
    elsewhere (by a sequence, or they are a state that was loaded); the step at place ``r + 1`` is the first
    that is taken. This function leaves ``minus`` as it is and gives those rows their adjoints,
    ``-sum_{i > r} W_{i-j} delta_i`` for row j, backward.
    """
    if not inside.shape[0] or not (torch.is_grad_enabled() and inside.requires_grad):
        return minus
    return _Known.apply(kernel, channel_dim, minus, inside)  # type: ignore[no-any-return]


class Taken(NamedTuple):
    """A step that was taken.

    Attributes:
        charged: the charged potential h ``[*shape]``.
        rows: all rows that are kept, the newest included, with their graph.
        inside: of these the rows of the block ``[place, *shape]``.
        minus: as it was given, with the graph of this step.
        sum: minus the whole memory sum ``[*shape]``, if asked for.
    """

    charged: Tensor
    rows: Tensor
    inside: Tensor
    minus: Tensor
    sum: Tensor | None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, place: int, first: bool, channel_dim: int | None, keep_sum: bool,
        log: HistoryLog, charged: Tensor, v: Tensor, origin: Tensor | None, start: Tensor, known: Tensor,
        before: Tensor, inside: Tensor, minus: Tensor, gain: Tensor, weights: Tensor,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        kernel = _detached(kernel, weights, None)
        rows, newest, commit = known, None, None
        if place:
            rows, commit = log.room(known)
            newest = rows.data[-1]  # see HistoryLog
        block_rows = rows[rows.shape[0] - place :]
        if cpu.serves_steps(v.shape, v, kernel, channel_dim):
            h, total = cpu.step(
                kernel, place, charged, v, origin, start, block_rows, minus, keep_sum, channel_dim
            )
        else:
            if newest is not None:
                torch.sub(v, start, out=newest)
            total = minus[place]
            if place:
                lags = kernel.weights[:place].flip(0).unsqueeze(0)
                total = total - combine(lags, block_rows, channel_dim)[0]
            g = per_neuron(kernel.gain, v.shape, channel_dim)
            h = charged + (g - 1.0) * (charged - (v if origin is None else origin)) + total
        if commit is not None:
            commit()
        need = ctx.needs_input_grad
        ctx.numbers = (kernel, place, first, channel_dim, origin is not None)
        ctx.block_rows = block_rows if need[15] else None  # never written again (see HistoryLog)
        ctx.before = rows.shape[0] - place
        if need[14]:
            ctx.save_for_backward(charged, v if origin is None else origin)
        ctx.set_materialize_grads(False)
        return h, rows.detach(), block_rows.detach(), minus.detach(), total if keep_sum else None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:  # type: ignore[override]
        grad_h, grad_rows, grad_inside, delta, grad_sum = grads
        kernel, place, first, channel_dim, apart = ctx.numbers
        need = ctx.needs_input_grad
        if (need[14] or need[15]) and torch.is_grad_enabled():
            raise StateError(SECOND_DERIVATIVES)
        given = next((g for g in grads if g is not None), None)
        if given is None:
            return (None,) * 16
        shape = given.shape if given is grad_h or given is grad_sum else given.shape[1:]
        like = given
        d = like.new_zeros(shape) if grad_h is None else grad_h
        own = d if grad_sum is None else d + grad_sum
        grad_before = None
        if grad_rows is not None:  # whoever takes all rows, the beginning of the next block above all
            grad_before, of_block = grad_rows.split([ctx.before, place])
            grad_inside = of_block if grad_inside is None else grad_inside + of_block
        late = None if grad_inside is None or not place else grad_inside[-1]
        if cpu.serves_steps(shape, d, kernel, channel_dim) and not torch.is_grad_enabled():
            delta = cpu.adjoints_of_block(delta, shape, like, place, first)
            grad_c, grad_v, grad_origin = cpu.step_adjoint(
                kernel, place, d, own, delta, late, apart or need[9], channel_dim
            )
        else:
            later = like.new_zeros(BLOCK, *shape) if delta is None else delta
            delta = torch.cat([later[:place], own.unsqueeze(0), later[place + 1 :]])
            g = per_neuron(kernel.gain, shape, channel_dim)
            grad_c, grad_origin = g * d, (1.0 - g) * d
            grad_v = torch.zeros_like(d)
            if place:
                lags = kernel.weights[: BLOCK - place].unsqueeze(0)
                grad_v = -combine(lags, delta[place:], channel_dim)[0]
            if late is not None:
                grad_v = grad_v + late
            if not (apart or need[9]):
                grad_v, grad_origin = grad_v + grad_origin, None
        grad_start = None
        if need[9]:
            grad_start = -grad_v if place else None
            if not apart and grad_origin is not None:
                grad_v, grad_origin = grad_v + grad_origin, None
        grad_gain = grad_weights = None
        if need[14]:
            charged, from_ = ctx.saved_tensors
            grad_gain = sum_by_channel((d * (charged - from_)).unsqueeze(0), kernel.gain, channel_dim)
        if need[15]:
            grad_weights = lag_gradients(kernel.weights, own, ctx.block_rows, channel_dim)
        return (
            None, None, None, None, None, None, grad_c, grad_v, grad_origin if apart else None, grad_start,
            None, grad_before, grad_inside[:-1] if grad_inside is not None and place else None, delta,
            grad_gain, grad_weights,
        )  # fmt: skip


def lag_gradients(weights: Tensor, own: Tensor, rows: Tensor, channel_dim: int | None) -> Tensor:
    """``-delta u_{-m}`` summed over neurons, ``[n, S]`` as the weights, from the ``rows`` of a step."""
    found = torch.zeros_like(weights)
    if rows.shape[0]:
        products = correlate(own.unsqueeze(0), rows, channel_dim, weights.shape[-1])
        found[: rows.shape[0]] = -products[0].flip(0)
    return found


def take_step(
    kernel: Kernel, place: int, first: bool, charged: Tensor, v: Tensor, origin: Tensor | None, start: Tensor,
    known: Tensor, before: Tensor, inside: Tensor, minus: Tensor, log: HistoryLog,
    channel_dim: int | None, *, keep_sum: bool = False,
) -> Taken:  # fmt: skip
    """The step at ``place`` of an open block.

    Args:
        kernel: gain and weights.
        place: which step of the block; at 0 all rows are there already.
        first: whether it is the first that is taken in the block.
        charged: the native charge ``[*shape]``.
        v: the potential carried into the step, whose deviation from ``start`` is the newest row (place > 0).
        origin: the potential that was charged where that is not ``v``.
        start: the potential the run started from.
        known: the rows that are kept, without the newest (with it at place 0).
        before: of these, with their graph, those before the block.
        inside: and those of the block ``[place - 1, *shape]``.
        minus: as :func:`begin_block` or the step before gave it.
        log: where the newest row is written, behind ``known``.
        channel_dim: which dimension has an order each, or None.
        keep_sum: also return the memory sum (minus it), with its graph.

    Returns:
        The step, differentiable in charged, v, origin, start, before, inside, minus, gain and weights.
    """
    return Taken(
        *_Step.apply(
            kernel, place, first, channel_dim, keep_sum, log, charged, v, origin, start, known.detach(),
            before, inside, minus, kernel.gain, kernel.weights,
        )
    )  # fmt: skip
