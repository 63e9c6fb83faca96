"""The scan as registered torch operations, for graphs that ``torch.compile`` and ``torch.export`` capture.

``spikede::scan`` and ``spikede::scan_backward`` run the same passes as the eager engine; the neuron travels
as the numbers of its :class:`AffineCode`, since an operation takes no callables.
"""

from __future__ import annotations

from typing import Any, List  # torch 2.6 reads no list[...] in the hints of an operation

import torch
from torch import Tensor

from spikede_plugins.engine.affine import AffineCode, affine_neuron
from spikede_plugins.engine.blocks import Reach, handed_on
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
        [code.decay_input, code.short_decay, code.detach_reset, code.strict, code.pull, code.in_rate],
    )


def _neuron(
    leak: str, surrogate: str, numbers: list[float], reset: float | None, flags: list[bool]
) -> ElementwiseNeuron:
    tau, rest, threshold, surrogate_alpha = numbers
    decay_input, short_decay, detach_reset, strict, pull, in_rate = flags
    return affine_neuron(
        AffineCode(
            leak, tau, decay_input, rest, short_decay, threshold, reset, detach_reset,
            surrogate, surrogate_alpha, strict, pull, in_rate,
        )
    )


def _past(
    v: Tensor, rows: Tensor | None, start: Tensor, traces: Tensor | None, reach: list[int], channel_dim: int
) -> Past:
    return Past(v, rows, start, traces, Reach(*reach), None if channel_dim < 0 else channel_dim)


def _kernel(
    gain: Tensor, weights: Tensor, readout: Tensor | None, decay: Tensor | None, inject: Tensor | None
) -> Kernel:
    return Kernel(gain, weights, readout=readout, decay=decay, inject=inject)


@torch.library.custom_op("spikede::scan", mutates_args=())
def scan_op(
    x_seq: Tensor, v: Tensor, rows: Tensor | None, start: Tensor, traces: Tensor | None, gain: Tensor,
    weights: Tensor, readout: Tensor | None, decay: Tensor | None, inject: Tensor | None,
    params: List[Tensor], reach: List[int], channel_dim: int, leak: str, surrogate: str,
    numbers: List[float], reset: float | None, flags: List[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Spikes, last potential, history, potentials, charged potentials and traces of T steps.

    Traces are empty (``[0]``) as long as nothing was folded.
    """
    run = forward_pass(
        _neuron(leak, surrogate, numbers, reset, flags), _past(v, rows, start, traces, reach, channel_dim),
        x_seq, _kernel(gain, weights, readout, decay, inject), params, HistoryLog(), keep_v=True, keep_h=True,
    )  # fmt: skip
    if run.v_seq is None or run.h_seq is None:
        raise RuntimeError("the forward pass kept no potentials")
    folded = traces if run.traces is None else run.traces
    out = v.new_empty(0) if folded is None else folded.clone()
    return run.spikes, run.v.clone(), run.rows.clone(), run.v_seq, run.h_seq, out


def _entering(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.shape[0] + 1


@scan_op.register_fake
def _scan_fake(
    x_seq: Tensor, v: Tensor, rows: Tensor | None, start: Tensor, traces: Tensor | None, gain: Tensor,
    weights: Tensor, readout: Tensor | None, decay: Tensor | None, inject: Tensor | None,
    params: List[Tensor], reach: List[int], channel_dim: int, leak: str, surrogate: str,
    numbers: List[float], reset: float | None, flags: List[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    steps, entering = x_seq.shape[0], _entering(rows)
    first, folded = handed_on(entering, steps, Reach(*reach), traces is not None)
    full = x_seq.new_empty((steps, *v.shape))
    count = decay.shape[0] if folded and decay is not None else 0
    return (
        full,
        torch.empty_like(v, memory_format=torch.contiguous_format),
        v.new_empty((entering + steps - 1 - first, *v.shape)),
        torch.empty_like(full),
        torch.empty_like(full),
        v.new_empty((count, *v.shape) if folded else (0,)),
    )


@torch.library.custom_op("spikede::scan_backward", mutates_args=())
def scan_backward_op(
    x_seq: Tensor, v: Tensor, rows: Tensor | None, start: Tensor, traces: Tensor | None, gain: Tensor,
    weights: Tensor, readout: Tensor | None, decay: Tensor | None, inject: Tensor | None,
    params: List[Tensor], reach: List[int], channel_dim: int, leak: str, surrogate: str,
    numbers: List[float], reset: float | None, flags: List[bool], v_seq: Tensor, h_seq: Tensor,
    grad_s: Tensor, grad_v: Tensor, grad_rows: Tensor, grad_v_seq: Tensor, grad_traces: Tensor | None,
) -> List[Tensor]:  # fmt: skip
    """Gradients to x_seq, v, rows, start, traces, gain, weights, readout and each parameter.

    Where there are no rows, traces or readout, theirs is empty.
    """
    before = [] if rows is None else [rows, (v - start).unsqueeze(0)]
    all_rows = torch.cat([*before, v_seq - start])
    some = (rows is not None, traces is not None, readout is not None)
    found = backward_pass(
        _neuron(leak, surrogate, numbers, reset, flags), _past(v, rows, start, traces, reach, channel_dim),
        x_seq, _kernel(gain, weights, readout, decay, inject), params, h_seq, all_rows,
        all_rows.shape[0] - x_seq.shape[0], grad_s, grad_v, grad_rows, grad_v_seq, grad_traces,
        Needs(True, True, some[0], True, some[1], True, True, some[2], (True,) * len(params)),
    )  # fmt: skip
    inputs = _differentiable(x_seq, v, rows, start, traces, gain, weights, readout, params)
    flat = (*found[:-1], *found.params)
    return [
        torch.zeros_like(like) if grad is None else grad.to(like.dtype).contiguous().clone()
        for grad, like in zip(flat, inputs, strict=True)
    ]


def _differentiable(
    x_seq: Tensor, v: Tensor, rows: Tensor | None, start: Tensor, traces: Tensor | None, gain: Tensor,
    weights: Tensor, readout: Tensor | None, params: List[Tensor],
) -> List[Tensor]:  # fmt: skip
    given = (x_seq, v, rows, start, traces, gain, weights, readout, *params)
    return [x_seq.new_empty(0) if t is None else t for t in given]


@scan_backward_op.register_fake
def _scan_backward_fake(
    x_seq: Tensor, v: Tensor, rows: Tensor | None, start: Tensor, traces: Tensor | None, gain: Tensor,
    weights: Tensor, readout: Tensor | None, decay: Tensor | None, inject: Tensor | None,
    params: List[Tensor], reach: List[int], channel_dim: int, leak: str, surrogate: str,
    numbers: List[float], reset: float | None, flags: List[bool], v_seq: Tensor, h_seq: Tensor,
    grad_s: Tensor, grad_v: Tensor, grad_rows: Tensor, grad_v_seq: Tensor, grad_traces: Tensor | None,
) -> List[Tensor]:  # fmt: skip
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in _differentiable(x_seq, v, rows, start, traces, gain, weights, readout, params)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *state, params, reach, channel_dim, leak, surrogate, numbers, reset, flags = inputs
    ctx.save_for_backward(*state, output[3], output[4], *params)
    ctx.settings = (reach, channel_dim, leak, surrogate, numbers, reset, flags)
    ctx.folded = output[5].dim() > 1


def _backward(
    ctx: Any, grad_s: Tensor, grad_v: Tensor, grad_rows: Tensor, grad_v_seq: Tensor, grad_h: Tensor,
    grad_traces: Tensor,
) -> tuple[Any, ...]:  # fmt: skip
    *state, v_seq, h_seq = ctx.saved_tensors[:12]
    params = list(ctx.saved_tensors[12:])
    grads = scan_backward_op(
        *state, params, *ctx.settings, v_seq, h_seq, grad_s, grad_v, grad_rows, grad_v_seq,
        grad_traces if ctx.folded else None,
    )  # fmt: skip
    # Of the state: x_seq, v, rows, start, traces, gain, weights, readout; decay and inject are constants.
    to_state = [None if t is None else g for t, g in zip(state[:8], grads, strict=False)]
    return (*to_state, None, None, list(grads[8:]), *[None] * len(ctx.settings))


scan_op.register_autograd(_backward, setup_context=_setup_context)


def compiled_scan(
    neuron: ElementwiseNeuron, past: Past, x_seq: Tensor, kernel: Kernel, keep_v: bool
) -> tuple[Tensor, Tensor, History, Tensor | None]:
    """What ``engine.scan`` returns, through the registered operation."""
    if neuron.code is None:
        raise OptionError("only a neuron with an AffineCode can be part of a compiled scan.")
    v, rows, start, traces, reach, channel_dim = past
    spikes, v_last, out_rows, v_seq, _, out_traces = scan_op(
        x_seq, v, rows, start, traces, kernel.gain, kernel.weights, kernel.readout, kernel.decay,
        kernel.inject, list(neuron.params), list(reach), -1 if channel_dim is None else channel_dim,
        *encode(neuron.code),
    )  # fmt: skip
    folded = handed_on(_entering(rows), x_seq.shape[0], reach, traces is not None)[1]
    history = History(out_rows, start, out_traces if folded else None)
    return spikes, v_last, history, v_seq if keep_v else None
