"""The scan as registered torch operations, for graphs that ``torch.compile`` and ``torch.export`` capture.

``spikede::scan`` and ``spikede::scan_backward`` run the same passes as the eager engine; the neuron travels
as the numbers of its :class:`AffineCode`, since an operation takes no callables.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikede_plugins.engine.affine import AffineCode, affine_neuron
from spikede_plugins.engine.history import HistoryLog
from spikede_plugins.engine.operator import Kernel
from spikede_plugins.engine.scan import ElementwiseNeuron, Needs, Past, backward_pass, forward_pass
from spikede_plugins.engine.step import History
from spikede_plugins.errors import OptionError


def encode(code: AffineCode) -> tuple[str, str, list[float], float | None, list[bool]]:
    """The code as arguments an operation can take."""
    return (
        code.leak,
        code.surrogate,
        [code.tau, code.rest, code.threshold, code.surrogate_alpha],
        code.reset,
        [code.decay_input, code.short_decay, code.detach_reset],
    )


def _neuron(
    leak: str, surrogate: str, numbers: list[float], reset: float | None, flags: list[bool]
) -> ElementwiseNeuron:
    tau, rest, threshold, surrogate_alpha = numbers
    decay_input, short_decay, detach_reset = flags
    return affine_neuron(
        AffineCode(
            leak, tau, decay_input, rest, short_decay, threshold, reset, detach_reset,
            surrogate, surrogate_alpha,
        )
    )


def _past(v: Tensor, rows: Tensor | None, start: Tensor, limit: int, channel_dim: int) -> Past:
    return Past(v, rows, start, limit, None if channel_dim < 0 else channel_dim)


@torch.library.custom_op("spikede::scan", mutates_args=())
def scan_op(
    x_seq: Tensor, v: Tensor, rows: Tensor | None, start: Tensor, gain: Tensor, weights: Tensor,
    params: list[Tensor], limit: int, channel_dim: int, leak: str, surrogate: str, numbers: list[float],
    reset: float | None, flags: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Spikes, last potential, history, potentials and charged potentials of T steps."""
    run = forward_pass(
        _neuron(leak, surrogate, numbers, reset, flags), _past(v, rows, start, limit, channel_dim), x_seq,
        gain, weights, params, HistoryLog(), keep_v=True, keep_h=True,
    )  # fmt: skip
    if run.v_seq is None or run.h_seq is None:
        raise RuntimeError("the forward pass kept no potentials")
    return run.spikes, run.v.clone(), run.rows.clone(), run.v_seq, run.h_seq


@scan_op.register_fake
def _scan_fake(
    x_seq: Tensor, v: Tensor, rows: Tensor | None, start: Tensor, gain: Tensor, weights: Tensor,
    params: list[Tensor], limit: int, channel_dim: int, leak: str, surrogate: str, numbers: list[float],
    reset: float | None, flags: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    steps = x_seq.shape[0]
    known = steps - 1 + (0 if rows is None else rows.shape[0] + 1)
    handed = min(known, limit)
    full = x_seq.new_empty((steps, *v.shape))
    return (
        full,
        torch.empty_like(v, memory_format=torch.contiguous_format),
        v.new_empty((handed, *v.shape)),
        torch.empty_like(full),
        torch.empty_like(full),
    )


@torch.library.custom_op("spikede::scan_backward", mutates_args=())
def scan_backward_op(
    x_seq: Tensor, v: Tensor, rows: Tensor | None, start: Tensor, gain: Tensor, weights: Tensor,
    params: list[Tensor], limit: int, channel_dim: int, leak: str, surrogate: str, numbers: list[float],
    reset: float | None, flags: list[bool], v_seq: Tensor, h_seq: Tensor,
    grad_s: Tensor, grad_v: Tensor, grad_rows: Tensor, grad_v_seq: Tensor,
) -> list[Tensor]:  # fmt: skip
    """Gradients to x_seq, v, rows, start, gain, weights and each parameter."""
    before = [] if rows is None else [rows, (v - start).unsqueeze(0)]
    all_rows = torch.cat([*before, v_seq - start])
    found = backward_pass(
        _neuron(leak, surrogate, numbers, reset, flags), _past(v, rows, start, limit, channel_dim), x_seq,
        gain, weights, params, h_seq, all_rows, all_rows.shape[0] - x_seq.shape[0],
        grad_s, grad_v, grad_rows, grad_v_seq,
        Needs(True, True, rows is not None, True, True, True, (True,) * len(params)),
    )  # fmt: skip
    inputs = (x_seq, v, torch.empty(0) if rows is None else rows, start, gain, weights, *params)
    flat = (*found[:-1], *found.params)
    return [
        torch.zeros_like(like) if grad is None else grad.to(like.dtype).contiguous().clone()
        for grad, like in zip(flat, inputs, strict=True)
    ]


@scan_backward_op.register_fake
def _scan_backward_fake(
    x_seq: Tensor, v: Tensor, rows: Tensor | None, start: Tensor, gain: Tensor, weights: Tensor,
    params: list[Tensor], limit: int, channel_dim: int, leak: str, surrogate: str, numbers: list[float],
    reset: float | None, flags: list[bool], v_seq: Tensor, h_seq: Tensor,
    grad_s: Tensor, grad_v: Tensor, grad_rows: Tensor, grad_v_seq: Tensor,
) -> list[Tensor]:  # fmt: skip
    past = x_seq.new_empty(0) if rows is None else rows
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (x_seq, v, past, start, gain, weights, *params)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_seq, v, rows, start, gain, weights, params, *settings = inputs
    ctx.save_for_backward(x_seq, v, rows, start, gain, weights, output[3], output[4], *params)
    ctx.settings = settings


def _backward(
    ctx: Any, grad_s: Tensor, grad_v: Tensor, grad_rows: Tensor, grad_v_seq: Tensor, grad_h: Tensor
) -> tuple[Any, ...]:
    x_seq, v, rows, start, gain, weights, v_seq, h_seq, *params = ctx.saved_tensors
    grads = scan_backward_op(
        x_seq, v, rows, start, gain, weights, params, *ctx.settings, v_seq, h_seq,
        grad_s, grad_v, grad_rows, grad_v_seq,
    )  # fmt: skip
    return (
        grads[0], grads[1], None if rows is None else grads[2], *grads[3:6], list(grads[6:]),
        *[None] * len(ctx.settings),
    )  # fmt: skip


scan_op.register_autograd(_backward, setup_context=_setup_context)


def compiled_scan(
    neuron: ElementwiseNeuron, past: Past, x_seq: Tensor, kernel: Kernel, keep_v: bool
) -> tuple[Tensor, Tensor, History, Tensor | None]:
    """What ``engine.scan`` returns, through the registered operation."""
    if neuron.code is None:
        raise OptionError("only a neuron with an AffineCode can be part of a compiled scan.")
    v, rows, start, limit, channel_dim = past
    spikes, v_last, out_rows, v_seq, _ = scan_op(
        x_seq, v, rows, start, kernel.gain, kernel.weights, list(neuron.params), limit,
        -1 if channel_dim is None else channel_dim, *encode(neuron.code),
    )  # fmt: skip
    return spikes, v_last, History(out_rows, start), v_seq if keep_v else None
