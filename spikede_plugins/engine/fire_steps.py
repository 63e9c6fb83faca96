"""Whole single steps of a leaky neuron with a delayed reset, by fused kernels: charge, memory, reset, firing.

    r = [v > threshold],   o = v  or, resetting to zero,  (1 - r) v,   c = leak o + x
    h = c + (g - 1)(c - o) - sum_m W_m u_{k-m} - r threshold (resetting by subtraction),   s = [h > threshold]

``h`` is what is carried on. The reset is kept out of the gradient; firing has a surrogate's slope. A step is
one of an open block (``engine.block_steps``), so it costs the lags inside its block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikede_plugins.engine import cpu
from spikede_plugins.engine.block_steps import lag_gradients
from spikede_plugins.engine.history import SECOND_DERIVATIVES, HistoryLog, combine, per_neuron
from spikede_plugins.engine.operator import Kernel
from spikede_plugins.errors import StateError
from spikede_plugins.exponentials import BLOCK
from spikede_plugins.surrogate import slope


class DelayedReset(NamedTuple):
    """Such a neuron in plain numbers.

    Attributes:
        threshold: fires above it.
        reset: ``"none"``, ``"subtract"`` or ``"zero"``.
        surrogate, surrogate_alpha: the surrogate gradient by name (see ``spikede_plugins.surrogate``).
    """

    threshold: float
    reset: str
    surrogate: str
    surrogate_alpha: float


class Fired(NamedTuple):
    """A step that was taken: spikes and potential ``[*shape]``; the rest as of ``block_steps.Taken``."""

    spikes: Tensor
    v: Tensor
    rows: Tensor
    inside: Tensor
    minus: Tensor


class _FireStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, code: DelayedReset, place: int, first: bool, channel_dim: int | None,
        log: HistoryLog, x: Tensor, v: Tensor, start: Tensor, known: Tensor, before: Tensor, inside: Tensor,
        minus: Tensor, gain: Tensor, weights: Tensor, leak: Tensor,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        kernel = kernel._replace(gain=gain.detach(), weights=weights.detach())
        rows, commit = log.room(known) if place else (known, None)
        block_rows = rows[rows.shape[0] - place :]
        spikes, h = cpu.fire_step(kernel, code, leak, place, x, v, start, block_rows, minus, channel_dim)
        if commit is not None:
            commit()
        ctx.numbers = (kernel, code, place, first, channel_dim, rows.shape[0] - place)
        ctx.block_rows = block_rows if ctx.needs_input_grad[14] else None  # never written again
        levers = ctx.needs_input_grad[13] or ctx.needs_input_grad[15]
        ctx.save_for_backward(x if levers else None, v, leak, h)
        ctx.set_materialize_grads(False)
        return spikes, h, rows.detach(), block_rows.detach(), minus.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:  # type: ignore[override]
        grad_s, grad_h, grad_rows, grad_inside, delta = grads
        kernel, code, place, first, channel_dim, before = ctx.numbers
        x, v, leak, h = ctx.saved_tensors
        need = ctx.needs_input_grad
        if (need[13] or need[14]) and torch.is_grad_enabled():
            raise StateError(SECOND_DERIVATIVES)
        grad_before = None
        if grad_rows is not None:
            grad_before, of_block = grad_rows.split([before, place])
            grad_inside = of_block if grad_inside is None else grad_inside + of_block
        late = None if grad_inside is None or not place else grad_inside[-1]
        grad_inside = grad_inside[:-1] if grad_inside is not None and place else None
        grad_gain = grad_weights = grad_leak = None
        if torch.is_grad_enabled():
            grad_x, grad_v, delta, grad_leak = _adjoint(
                kernel, code, place, channel_dim, v, leak, h, grad_s, grad_h, delta, late
            )
        else:
            delta = cpu.adjoints_of_block(delta, v.shape, v, place, first)
            grad_x, grad_v, own, levers = cpu.fire_step_adjoint(
                kernel, code, leak, place, x, v, h, grad_s, grad_h, delta, late, need[14], channel_dim
            )  # fmt: skip
            if levers is not None:
                by_o, by_x = levers.unbind(1)
                grad_gain = (leak - 1.0) * by_o + by_x
                grad_leak = (kernel.gain * by_o).sum().reshape(leak.shape)
            if own is not None:
                grad_weights = lag_gradients(kernel.weights, own, ctx.block_rows, channel_dim)
        return (
            None, None, None, None, None, None, grad_x, grad_v, None, None, grad_before, grad_inside, delta,
            grad_gain, grad_weights, grad_leak,
        )  # fmt: skip


def _adjoint(
    kernel: Kernel, code: DelayedReset, place: int, channel_dim: int | None, v: Tensor, leak: Tensor,
    h: Tensor, grad_s: Tensor | None, grad_h: Tensor | None, delta: Tensor | None, late: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The adjoint of a step in torch, which can be differentiated again."""
    d = torch.zeros_like(h) if grad_h is None else grad_h
    if grad_s is not None:
        d = d + slope(h - code.threshold, code.surrogate, code.surrogate_alpha) * grad_s
    later = h.new_zeros(BLOCK, *h.shape) if delta is None else delta
    delta = torch.cat([later[:place], d.unsqueeze(0), later[place + 1 :]])
    keeps = (v <= code.threshold).to(v.dtype) if code.reset == "zero" else 1.0
    gain = per_neuron(kernel.gain, h.shape, channel_dim)
    grad_v = keeps * (gain * leak + 1.0 - gain) * d
    if place:
        grad_v = grad_v - combine(kernel.weights[: BLOCK - place].unsqueeze(0), delta[place:], channel_dim)[0]
    if late is not None:
        grad_v = grad_v + late
    return gain * d, grad_v, delta, (gain * d * keeps * v).sum().reshape(leak.shape)


def fire_step(
    kernel: Kernel, code: DelayedReset, place: int, first: bool, x: Tensor, v: Tensor, start: Tensor,
    known: Tensor, before: Tensor, inside: Tensor, minus: Tensor, leak: Tensor, log: HistoryLog,
    channel_dim: int | None,
) -> Fired:  # fmt: skip
    """The step at ``place`` of an open block.

    Args:
        kernel: gain and weights.
        code: the neuron.
        place: which step of the block; at 0 all rows are there already.
        first: whether it is the first that is taken in the block.
        x: input ``[*shape]``.
        v: the potential carried into the step.
        start: the potential the run started from; gradients do not reach it.
        known, before, inside, minus, log, channel_dim: see ``block_steps.take_step``.
        leak: what of the potential is left after a step, one number.

    Returns:
        The step, differentiable in x, v, before, inside, minus, gain, weights and leak.

    Raises:
        StateError: in backward, for second derivatives with a learned order.
    """
    return Fired(
        *_FireStep.apply(
            kernel, code, place, first, channel_dim, log, x, v, start, known.detach(), before, inside, minus,
            kernel.gain, kernel.weights, leak,
        )
    )  # fmt: skip
