"""A scan that keeps the state at every k-th step only and runs the steps between once more for backward.

Of a sequence of T steps it keeps T/k states, a compressed memory's P traces and few rows each, and for the
piece in hand what a scan keeps of k steps: O(T/k + k) instead of O(T), for one more forward pass. (The whole
history of ``memory="full"`` is itself O(T), and kept.) The numbers are those of the scan in pieces, to the
last bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spikede_plugins.engine.blocks import Reach
from spikede_plugins.engine.buffers import empty
from spikede_plugins.engine.history import HistoryLog
from spikede_plugins.engine.operator import Kernel
from spikede_plugins.engine.scan import (
    ElementwiseNeuron,
    Gradients,
    Needs,
    Past,
    SoftReset,
    backward_pass,
    forward_pass,
    plus,
    rebuilds,
)


class CheckpointedScan(torch.autograd.Function):
    """As the scan, with ``every``: after how many steps a state is kept."""

    @staticmethod
    def forward(
        ctx: Any, neuron: ElementwiseNeuron, kernel: Kernel, reach: Reach, channel_dim: int | None,
        log: HistoryLog, keep_v: bool, every: int, x_seq: Tensor, v: Tensor, rows: Tensor | None,
        start: Tensor, traces: Tensor | None, gain: Tensor, weights: Tensor, readout: Tensor | None,
        *params: Tensor,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        numbers = kernel._replace(gain=gain, weights=weights, readout=readout)
        at, states, steps = Past(v, rows, start, traces, reach, channel_dim), [], x_seq.shape[0]
        spikes: Tensor | None = None
        v_seq = empty((steps, *v.shape), v) if keep_v else None
        for begin in range(0, steps, every):
            states.append(at)
            piece = slice(begin, begin + every)
            run = forward_pass(
                neuron, at, x_seq[piece], numbers, params, log, keep_v=keep_v, keep_h=False
            )
            if spikes is None:
                spikes = empty((steps, *run.spikes.shape[1:]), run.spikes)
            spikes[piece] = run.spikes
            if v_seq is not None and run.v_seq is not None:
                v_seq[piece] = run.v_seq
            # Not a view of the piece: a state that is kept must not hold on to it.
            kept = run.rows.clone() if reach.fold else run.rows
            at = at._replace(v=run.v, rows=kept, traces=at.traces if run.traces is None else run.traces)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x_seq, v, start, gain, weights, readout, *params)
            # States are never written to again (see HistoryLog).
            ctx.states = [None, *((s.v, s.rows, s.traces) for s in states[1:])]
            ctx.first = (rows, traces)
            ctx.neuron, ctx.reach, ctx.channel_dim, ctx.every = neuron, reach, channel_dim, every
            ctx.constants = (kernel.decay, kernel.inject)
            ctx.set_materialize_grads(False)
        folded = at.traces if at.traces is not traces else None
        return spikes, at.v, None if at.rows is None else at.rows.detach(), v_seq, folded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        x_seq, v, start, gain, weights, readout, *params = ctx.saved_tensors
        decay, inject = ctx.constants
        kernel = Kernel(gain, weights, readout=readout, decay=decay, inject=inject)
        n, every = ctx.needs_input_grad, ctx.every
        grad_s, grad_v, grad_rows, grad_v_seq, grad_traces = grads
        grad_x = torch.empty_like(x_seq) if n[7] else None
        total: list[Tensor | None] = [None] * (5 + len(params))  # start, gain, weights, readout, params
        found: Gradients | None = None
        for number in range(len(ctx.states) - 1, -1, -1):
            state = ctx.states[number]
            at_v, at_rows, at_traces = (v, *ctx.first) if state is None else state
            at = Past(at_v, at_rows, start, at_traces, ctx.reach, ctx.channel_dim)
            piece = slice(number * every, (number + 1) * every)
            x = x_seq[piece]
            soft = rebuilds(ctx.neuron, at, x, kernel)
            run = forward_pass(
                ctx.neuron, at, x, kernel, params, HistoryLog(), keep_v=False,
                keep_h=soft is None and ctx.neuron.spike is None, keep_fired=soft is not None,
            )  # fmt: skip
            charged = run.h_seq if ctx.neuron.spike is None else run.all_rows[run.entering :]
            if soft is not None and run.fired is not None:
                charged = SoftReset(run.fired, run.v, soft)  # type: ignore[assignment]
            if charged is None:
                raise RuntimeError("the forward pass kept no potentials")
            inner = state is not None
            found = backward_pass(
                ctx.neuron, at, x, kernel, params, charged, run.all_rows, run.entering,
                None if grad_s is None else grad_s[piece], grad_v, grad_rows,
                None if grad_v_seq is None else grad_v_seq[piece], grad_traces,
                Needs(
                    n[7], inner or n[8], inner or n[9], n[10], at_traces is not None and (inner or n[11]),
                    n[12], n[13], n[14], n[15:],
                ),
            )  # fmt: skip
            if grad_x is not None and found.x_seq is not None:
                grad_x[piece] = found.x_seq
            parts = (found.start, found.gain, found.weights, found.readout, *found.params)
            total = [plus(a, b) for a, b in zip(total, parts, strict=False)]
            grad_v, grad_rows, grad_traces = found.v, found.rows, found.traces
        return (
            *[None] * 7, grad_x, grad_v if n[8] else None, grad_rows if n[9] else None, total[0],
            grad_traces if n[11] else None, *total[1:4], *total[4 : 4 + len(params)],
        )  # fmt: skip
