"""All T steps of a layer of independent neurons as one autograd function.

Forward: ``h_k = c_k + (g - 1)(c_k - v_{k-1}) - sum_m W_m u_{k-m}``, ``c_k = charge(v_{k-1}, x_k)``,
``s_k, v_k = fire(h_k)``, ``u_k = v_k - start`` (W are the bracket weights ``w_m + [m=1]``).

Backward, with ``delta_k`` the adjoint of ``h_k`` and ``eta_k`` that of ``v_k``:

    eta_k   = grad v_k + (g a_{k+1} + 1 - g) delta_{k+1} - sum_{m>=1} W_m delta_{k+m},  a = d charge / d v
    delta_k = (ds/dh)_k grad s_k + (dv/dh)_k eta_k
    d/dg = sum_k delta_k (c_k - v_{k-1}),     d/dW_m = -sum_k delta_k u_{k-m}

the same causal sum run backwards in time with the same weights. Both sums are formed by blocks of steps
(``engine.blocks``). ``ds/dh``, ``dv/dh`` and ``a`` are taken for
all steps at once, in closed form or by differentiating the neuron's own functions, so any elementwise neuron
and any surrogate has its exact adjoint without code of its own, and the graph holds one node a scan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spikede_plugins.engine import cpu, gpu
from spikede_plugins.engine.blocks import (
    Reach,
    base_sums,
    blocks,
    fold,
    handed_on,
    older,
    past_gradients,
    spread_older,
    spread_traces,
    unfold,
    weight_gradients,
)
from spikede_plugins.engine.buffers import empty
from spikede_plugins.engine.history import HistoryLog, combine, history_sum, per_neuron, sum_by_channel
from spikede_plugins.engine.operator import FractionalOperator, Kernel
from spikede_plugins.engine.step import History, check_channels
from spikede_plugins.errors import OptionError
from spikede_plugins.exponentials import BLOCK
from spikede_plugins.solvers.base import ExplicitSolver

if TYPE_CHECKING:
    from spikede_plugins.engine.affine import AffineCode

_NO_STEPS = "the input sequence has no time steps (T = 0); give at least one."


Pulled = tuple[Tensor | None, tuple[Tensor | None, ...]]


class Local(NamedTuple):
    """A neuron's own functions differentiated at every step of a scan.

    Attributes:
        charge: gives ``c [T, *shape]``; called only where the gain is learned.
        charge_slope, reset_slope: ``dc/dv`` and the whole ``dv/dh``, ``[T, *shape]`` or a number.
        spike_slope: ``ds/dh [T, *shape]``; of a neuron that fires before, ``ds/dv``.
        pull_back: from the adjoints of c, of the spikes and of v after firing (the last only where parameters
            are wanted) to the gradients of the input and of each parameter.
    """

    charge: Callable[[], Tensor]
    charge_slope: Tensor
    spike_slope: Tensor
    reset_slope: Tensor
    pull_back: Callable[[Tensor, Tensor | None, Tensor | None], Pulled]


#: ``(v before each step, x, h, params) -> Local``, each tensor ``[T, *shape]``.
Derivatives = Callable[[Tensor, Tensor, Tensor, Sequence[Tensor]], Local]


@dataclass(frozen=True)
class ElementwiseNeuron:
    """A neuron whose charge, firing and reset act on each element alone and are pure functions.

    Attributes:
        charge: ``(v, x, *params) -> v'``; must broadcast over a leading time dimension.
        fire: ``(h, *params) -> (spike, v)``, firing and reset; likewise.
        params: tensors the two depend on and that may need gradients.
        code: the neuron in plain numbers, where it has that form; compiled graphs need it.
        derivatives: its derivatives in closed form, where it has them; else they are found by autograd.
        spike: ``(v, x, *params) -> spike`` of a neuron that fires before the step, on what it has then
            (derivative-style neurons, whose reset is part of their charge); ``fire`` is not called.
    """

    charge: Callable[..., Tensor]
    fire: Callable[..., tuple[Tensor, Tensor]]
    params: tuple[Tensor, ...] = ()
    code: AffineCode | None = None
    derivatives: Derivatives | None = None
    spike: Callable[..., Tensor] | None = None


def can_scan(operator: FractionalOperator) -> bool:
    """Whether the scan serves this operator; the step engine serves all others."""
    explicit = isinstance(operator.solver, ExplicitSolver) and operator.memory_reset == "never"
    return explicit and operator.captures != "step"


class Needs(NamedTuple):
    """Which gradients a backward pass is asked for."""

    x_seq: bool
    v: bool
    rows: bool
    start: bool
    traces: bool
    gain: bool
    weights: bool
    readout: bool
    params: tuple[bool, ...]


class Past(NamedTuple):
    """What a scan starts from, as the passes below take it.

    Attributes:
        v: potential before the first step ``[*shape]``.
        rows: history rows ``[r, *shape]``, None before the first step after a reset.
        start: potential the run started from ``[*shape]``.
        traces: what a compressed memory has folded ``[P, *shape]``, None where it has folded nothing yet.
        reach: how far back the run looks.
        channel_dim: the dimension of ``shape`` that has an order each, or None.
    """

    v: Tensor
    rows: Tensor | None
    start: Tensor
    traces: Tensor | None
    reach: Reach
    channel_dim: int | None


class Run(NamedTuple):
    """What a forward pass leaves.

    Attributes:
        spikes, v, rows: spikes ``[T, *shape]``, the last potential, the history handed on.
        traces: the traces handed on, if any rows were folded in this run.
        v_seq: potentials after each step, if asked for.
        h_seq: charged potentials before firing, if asked for.
        fired: in place of ``h_seq``, 1 where a neuron fired (uint8), where the pass was asked for that.
        all_rows: every deviation ``[entering + T, *shape]``, those of before included.
        entering: how many rows were there before the first step.
    """

    spikes: Tensor
    v: Tensor
    rows: Tensor
    traces: Tensor | None
    v_seq: Tensor | None
    h_seq: Tensor | None
    fired: Tensor | None
    all_rows: Tensor
    entering: int


class SoftReset(NamedTuple):
    """What the charged potentials follow from where the reset is soft: ``h = u + start + threshold s``.

    Attributes:
        fired: 1 where a neuron fired, ``[T, *shape]``, uint8.
        v: the last potential ``[*shape]``.
        threshold: the firing threshold.
    """

    fired: Tensor
    v: Tensor
    threshold: float

    def charged(self, rows: Tensor, start: Tensor) -> Tensor:
        """``h [T, *shape]`` from the deviations ``rows [T, *shape]``."""
        h_seq = rows + start
        h_seq[-1] = self.v  # the newest row may have been overwritten by a potential set by hand
        return h_seq.add_(self.fired, alpha=self.threshold)


class Gradients(NamedTuple):
    """The gradients a backward pass finds; None where none was asked for."""

    x_seq: Tensor | None
    v: Tensor | None
    rows: Tensor | None
    start: Tensor | None
    traces: Tensor | None
    gain: Tensor | None
    weights: Tensor | None
    readout: Tensor | None
    params: tuple[Tensor | None, ...]


def fused(neuron: ElementwiseNeuron, past: Past, x_seq: Tensor, kernel: Kernel) -> Any:
    """The fused engine (``engine.cpu`` or ``engine.gpu``) that runs this neuron on this input, or None."""
    return next((engine for engine in (cpu, gpu) if engine.serves(neuron, past, x_seq, kernel)), None)


def forward_pass(
    neuron: ElementwiseNeuron, past: Past, x_seq: Tensor, kernel: Kernel, params: Sequence[Tensor],
    log: HistoryLog, *, keep_v: bool, keep_h: bool, keep_fired: bool = False,
) -> Run:  # fmt: skip
    """The equations at the head of this file, step by step."""
    v, rows, start, traces, reach, channel_dim = past
    steps, shape = x_seq.shape[0], v.shape
    before = v.new_empty((0, *shape)) if rows is None else rows
    buffer, end = log.reserve(before, steps + (rows is not None))
    low = end - before.shape[0]
    written = buffer.data  # see HistoryLog
    if rows is not None:
        torch.sub(v, start, out=written[end])
        end += 1
    entering = end - low
    all_rows = written[low : end + steps]
    h_seq = empty((steps, *shape), v) if keep_h else None
    v_seq = empty((steps, *shape), v) if keep_v else None
    fired: Tensor | None = None
    folded: Tensor | None = None
    engine = fused(neuron, past, x_seq, kernel)
    if engine is not None and neuron.code is not None:
        fired = empty((steps, *shape), v, torch.uint8) if keep_fired else None
        spikes = empty((steps, *shape), v)
        v, folded = engine.march(
            neuron.code, params, past, x_seq, kernel, all_rows, entering, spikes, h_seq, v_seq, fired, log
        )  # fmt: skip
    else:
        spikes, v, folded = _march(
            neuron, params, x_seq, v, start, traces, all_rows, entering, reach, channel_dim, kernel, log,
            h_seq, v_seq,
        )  # fmt: skip
    first = handed_on(entering, steps, reach, traces is not None)[0]
    handed = buffer[low + first : low + entering + steps - 1]  # the newest deviation is carried by v
    if reach.fold and buffer.shape[0] > 8 * (handed.shape[0] + BLOCK):
        handed = handed.clone()  # not a view: a state of fixed size must not hold on to a whole sequence
    else:
        log.commit(buffer, low + entering + steps - 1)
    return Run(spikes, v, handed, folded, v_seq, h_seq, fired, all_rows, entering)


def _march(
    neuron: ElementwiseNeuron, params: Sequence[Tensor], x_seq: Tensor, v: Tensor, start: Tensor,
    traces: Tensor | None, rows: Tensor, entering: int, reach: Reach, channel_dim: int | None,
    kernel: Kernel, log: HistoryLog, h_seq: Tensor | None, v_seq: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """All steps in torch, for any neuron: fills the new ``rows``, ``h_seq`` and ``v_seq``."""
    steps, shape = x_seq.shape[0], v.shape
    g = per_neuron(kernel.gain, shape, channel_dim) - 1.0
    spikes: Tensor | None = None
    folded: Tensor | None = None
    for block in blocks(entering, steps, reach, traces is not None):
        if block.folds:
            traces = folded = fold(kernel, rows[: block.low][-block.folds * BLOCK :], traces, block.folds)
        base: Tensor | None = None
        if block.before or traces is not None:
            known = rows[block.low : block.begin]
            base = log.base(known, traces, kernel.source)
            if base is None:
                base = base_sums(kernel, kernel.weights, known, traces, reach, channel_dim)
                log.keep_base(known, traces, kernel.source, base)
        for k in range(block.first, block.last):
            place = block.place + k - block.first
            c = neuron.charge(v, x_seq[k], *params)
            h = c + g * (c - v)
            total = None if base is None else base[place]
            if place:
                end = block.begin + place
                inside = history_sum(kernel.weights, rows[end - place : end], channel_dim)
                total = inside if total is None else total + inside
            if total is not None:
                h = h - total
            if neuron.spike is None:
                s, v = neuron.fire(h, *params)
            else:
                s, v = neuron.spike(v, x_seq[k], *params), h
            if spikes is None:
                spikes = empty((steps, *s.shape), s)
            spikes[k] = s
            if h_seq is not None:
                h_seq[k] = h
            if v_seq is not None:
                v_seq[k] = v
            torch.sub(v, start, out=rows[entering + k])
    if spikes is None:
        raise OptionError(_NO_STEPS)
    return spikes, v, folded


def backward_pass(
    neuron: ElementwiseNeuron, past: Past, x_seq: Tensor, kernel: Kernel, params: Sequence[Tensor],
    charged: Tensor | SoftReset, all_rows: Tensor, entering: int, grad_s: Tensor | None,
    grad_v: Tensor | None, grad_rows: Tensor | None, grad_v_seq: Tensor | None,
    grad_traces: Tensor | None, needs: Needs,
) -> Gradients:  # fmt: skip
    """The adjoint at the head of this file; ``all_rows`` and ``charged`` (h) as the forward pass left them.

    ``x_seq`` may be empty for a neuron with closed-form derivatives if neither the gain nor a parameter of
    its is learned.
    """
    v_in, rows_in, start, traces, reach, channel_dim = past
    steps, shape = all_rows.shape[0] - entering, v_in.shape
    first_handed = handed_on(entering, steps, reach, traces is not None)[0]
    g = per_neuron(kernel.gain, shape, channel_dim)
    engine = fused(neuron, past, all_rows, kernel)
    if neuron.code is not None and not needs.start and grad_v_seq is None and engine is not None:
        return _fused_backward(
            engine, neuron.code, past, x_seq, kernel, params, charged, all_rows, entering, grad_s, grad_v,
            grad_rows, first_handed, grad_traces, needs,
        )  # fmt: skip

    # Local derivatives of all steps at once.
    h_seq = charged if isinstance(charged, Tensor) else charged.charged(all_rows[entering:], start)
    v_prev = torch.cat([v_in.unsqueeze(0), start + all_rows[entering : entering + steps - 1]])
    differentiate = neuron.derivatives or _by_autograd(neuron, needs)
    local = differentiate(v_prev, x_seq, h_seq, params)

    delta, eta_seq, row_grad, grad_past, grad_traces_in = _recursion(
        local, kernel, g, entering, past, h_seq, grad_s, grad_v, grad_rows, first_handed, grad_v_seq,
        grad_traces, any(needs.params), neuron.spike is not None,
    )  # fmt: skip

    # What the rows of before received reaches through them and their start the state that came in.
    grad_v_in = grad_start = None
    if needs.start:
        grad_start = -row_grad if grad_past is None else -(row_grad + grad_past[-1])
    if needs.v:
        grad_v_in = (g * _at(local.charge_slope, 0) + (1.0 - g)) * delta[0]
        if neuron.spike is not None and grad_s is not None:
            grad_v_in = grad_v_in + local.spike_slope[0] * grad_s[0].to(delta.dtype)
        grad_v_in = plus(grad_v_in, None if grad_past is None else grad_past[-1])

    grad_gain = grad_weights = grad_readout = None
    if needs.gain:
        grad_gain = sum_by_channel(delta * (local.charge() - v_prev), kernel.gain, channel_dim)
    if needs.weights or needs.readout:
        grad_weights, grad_readout = weight_gradients(
            kernel, delta, all_rows, entering, traces, reach, channel_dim
        )

    grad_x, grad_params = local.pull_back(g * delta, grad_s, eta_seq)
    return Gradients(
        grad_x,
        grad_v_in,
        grad_past[:-1] if needs.rows and grad_past is not None and rows_in is not None else None,
        grad_start,
        grad_traces_in if needs.traces else None,
        grad_gain,
        grad_weights,
        grad_readout,
        grad_params,
    )


def _fused_backward(
    engine: Any, code: AffineCode, past: Past, x_seq: Tensor, kernel: Kernel, params: Sequence[Tensor],
    charged: Tensor | SoftReset, all_rows: Tensor, entering: int, grad_s: Tensor | None,
    grad_v: Tensor | None, grad_rows: Tensor | None, first_handed: int, grad_traces: Tensor | None,
    needs: Needs,
) -> Gradients:  # fmt: skip
    """The same by the fused kernels, for an affine neuron; what they leave are products over delta."""
    past_wanted = needs.v or needs.rows or needs.traces
    weights_wanted = needs.weights or needs.readout
    levers_wanted = needs.gain or any(needs.params)
    grad_x, delta, levers = engine.adjoint(
        code, params, past, x_seq, kernel, charged, all_rows, entering, grad_s, grad_v, grad_rows,
        first_handed, grad_traces, past_wanted or weights_wanted, levers_wanted,
    )  # fmt: skip
    grad_v_in = grad_past = grad_traces_in = grad_gain = grad_weights = grad_readout = None
    grad_params: tuple[Tensor | None, ...] = (None,) * len(params)
    leak = kernel.gain  # not read
    if past_wanted or levers is not None:
        leak = params[0].detach() if code.leak == "multiply" else leak.new_tensor(_leak_number(code))
    if past_wanted and delta is not None:
        grad_past, grad_traces_in = past_gradients(
            kernel, delta, entering, past.traces, past.reach, past.channel_dim, grad_rows, first_handed,
            grad_traces,
        )  # fmt: skip
        g = per_neuron(kernel.gain, past.v.shape, past.channel_dim)
        kept = 1.0 - leak if code.pull else 1.0
        if code.in_rate:  # what the native charge got is the gradient of the input over its factor
            grad_v_in = kept * grad_x[0] / (1.0 if code.leak == "none" else leak) + (1.0 - g) * delta[0]
        else:
            grad_v_in = (g * kept + (1.0 - g)) * delta[0]
        grad_v_in = plus(grad_v_in, None if grad_past is None else grad_past[-1])
    if levers is not None:
        through, direct = levers.unbind(1)
        into_leak = kernel.gain * through
        if code.in_rate:
            grad_gain, into_leak = (through if code.leak == "none" else leak * through), into_leak + direct
        elif code.leak != "none" and code.decay_input:
            grad_gain = leak * through
        else:
            grad_gain = leak * through + direct
        if params:
            grad_params = (into_leak.sum().reshape(params[0].shape),)
    if weights_wanted and delta is not None:
        grad_weights, grad_readout = weight_gradients(
            kernel, delta, all_rows, entering, past.traces, past.reach, past.channel_dim
        )
    return Gradients(
        grad_x,
        grad_v_in if needs.v else None,
        grad_past[:-1] if needs.rows and grad_past is not None else None,
        None,
        grad_traces_in if needs.traces else None,
        grad_gain,
        grad_weights,
        grad_readout,
        grad_params,
    )


def _leak_number(code: AffineCode) -> float:
    return 1.0 / code.tau if code.leak == "divide" else 0.0


def _recursion(
    local: Local, kernel: Kernel, g: Tensor, entering: int, past: Past, h_seq: Tensor,
    grad_s: Tensor | None, grad_v: Tensor | None, grad_rows: Tensor | None, first_handed: int,
    grad_v_seq: Tensor | None, grad_traces: Tensor | None, keep_eta: bool, early: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The adjoint recursion in torch, for any neuron.

    Returns delta, eta (if asked for), what the new rows got in all, what each row of before got, and what the
    traces of before got.
    """
    steps, channel_dim, reach = h_seq.shape[0], past.channel_dim, past.reach
    # What later blocks gave to each row; a row's place takes delta once its own step is done.
    into = empty((entering + steps, *h_seq.shape[1:]), h_seq).zero_()
    if grad_rows is not None:
        into[first_handed : first_handed + grad_rows.shape[0]] = grad_rows
    delta = into[entering:]
    eta_seq = empty(tuple(h_seq.shape), h_seq) if keep_eta else None
    row_grad = torch.zeros_like(h_seq[0])
    traces_grad = grad_traces
    run = list(blocks(entering, steps, reach, past.traces is not None))
    have_traces = [past.traces is not None or any(b.folds for b in run[: n + 1]) for n in range(len(run))]
    for block, traced in zip(reversed(run), reversed(have_traces), strict=True):
        for k in range(block.last - 1, block.first - 1, -1):
            eta = delta[k].clone()
            ahead = block.last - 1 - k
            if ahead:
                eta -= combine(kernel.weights[:ahead].unsqueeze(0), delta[k + 1 : block.last], channel_dim)[0]
            row_grad += eta
            if k < steps - 1:
                eta += (g * _at(local.charge_slope, k + 1) + (1.0 - g)) * delta[k + 1]
                if early and grad_s is not None:
                    eta += local.spike_slope[k + 1] * grad_s[k + 1].to(delta.dtype)
            elif grad_v is not None:
                eta += grad_v
            if grad_v_seq is not None:
                eta += grad_v_seq[k]
            torch.mul(_at(local.reset_slope, k), eta, out=delta[k])
            if grad_s is not None and not early:
                delta[k] += local.spike_slope[k] * grad_s[k].to(delta.dtype)
            if eta_seq is not None:
                eta_seq[k] = eta
        part = delta[block.first : block.last]
        if block.place and block.first == 0:  # rows of this very block that came from before
            inner = older(kernel.weights, part.shape[0], block.place, 0)
            into[block.begin : block.begin + block.place] -= combine(
                inner.transpose(0, 1), part, channel_dim
            )
        spread_older(kernel.weights, part, block, reach, into, channel_dim)
        if traced:
            traces_grad = spread_traces(kernel, part, block, traces_grad, channel_dim)
            if block.folds:
                traces_grad = unfold(kernel, traces_grad, block, into)
    return delta, eta_seq, row_grad, into[:entering] if entering else None, traces_grad


def _at(slope: Tensor, k: int) -> Tensor:
    """The slope at step k; a number stands for all steps."""
    return slope[k] if slope.dim() else slope


def _by_autograd(neuron: ElementwiseNeuron, needs: Needs) -> Derivatives:
    """The derivatives of any elementwise neuron, by differentiating its own functions."""

    def derivatives(v_prev: Tensor, x_seq: Tensor, h_seq: Tensor, params: Sequence[Tensor]) -> Local:
        with torch.enable_grad():
            v_at = v_prev.detach().requires_grad_()
            x_at = x_seq.detach().requires_grad_(needs.x_seq)
            p_at = [p.detach().requires_grad_(n) for p, n in zip(params, needs.params, strict=True)]
            c_seq = neuron.charge(v_at, x_at, *p_at)
            h_at = h_seq.detach().requires_grad_()
            early = neuron.spike is not None
            if neuron.spike is None:
                s_out, v_out = neuron.fire(h_at, *p_at)
            else:
                s_out, v_out = neuron.spike(v_at, x_at, *p_at), h_at

        def pull_back(into_c: Tensor, into_s: Tensor | None, into_v: Tensor | None) -> Pulled:
            outputs, cotangents = [c_seq], [into_c.expand_as(c_seq)]
            if early:
                if into_s is not None:
                    outputs, cotangents = [c_seq, s_out], [*cotangents, into_s.to(s_out.dtype)]
            elif into_v is not None:  # parameters are wanted, and firing may depend on them
                outputs += [s_out, v_out]
                cotangents += [torch.zeros_like(s_out) if into_s is None else into_s.to(s_out.dtype), into_v]
            wanted = [t for t in (x_at, *p_at) if t.requires_grad]
            pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
            found: Sequence[Tensor | None] = ()
            if wanted and pairs:
                found = torch.autograd.grad(
                    [o for o, _ in pairs], wanted, [c for _, c in pairs], allow_unused=True
                )
            by_input = dict(zip(map(id, wanted), found, strict=False))
            return by_input.get(id(x_at)), tuple(by_input.get(id(p)) for p in p_at)

        return Local(
            c_seq.detach, _diagonal(c_seq, v_at), _diagonal(s_out, v_at if early else h_at),
            _diagonal(v_out, h_at), pull_back,
        )  # fmt: skip

    return derivatives


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def rebuilds(neuron: ElementwiseNeuron, past: Past, x_seq: Tensor, kernel: Kernel) -> float | None:
    """The threshold, where backward finds the charged potentials from the history and who fired.

    A soft reset loses nothing; the history exists anyway.
    """
    code = neuron.code
    if code is None or code.reset is not None or code.in_rate or fused(neuron, past, x_seq, kernel) is None:
        return None
    return code.threshold


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, neuron: ElementwiseNeuron, kernel: Kernel, reach: Reach, channel_dim: int | None,
        log: HistoryLog, keep_v: bool, x_seq: Tensor, v: Tensor, rows: Tensor | None, start: Tensor,
        traces: Tensor | None, gain: Tensor, weights: Tensor, readout: Tensor | None, *params: Tensor,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        n = ctx.needs_input_grad
        needs_grad = any(n)
        kernel = kernel._replace(gain=gain, weights=weights, readout=readout)
        past = Past(v, rows, start, traces, reach, channel_dim)
        soft = rebuilds(neuron, past, x_seq, kernel)
        run = forward_pass(
            neuron, past, x_seq, kernel, params, log, keep_v=keep_v,
            keep_h=needs_grad and soft is None and neuron.spike is None,
            keep_fired=needs_grad and soft is not None,
        )  # fmt: skip
        if needs_grad:
            # What a neuron in closed form needs of its input is often nothing.
            wants_x = neuron.derivatives is None or neuron.spike is not None or n[11] or any(n[14:])
            x_kept = x_seq if wants_x else x_seq.new_empty(0)
            h_kept, v_kept = (run.h_seq, v) if soft is None else (run.fired, run.v)
            ctx.threshold = soft
            ctx.save_for_backward(
                x_kept, v, start, traces, gain, weights, readout, h_kept, v_kept, *params
            )
            # Rows that are read in backward are never written again (see HistoryLog), so they need no
            # version check; saved as an alias, not as the output, so that no reference cycle forms.
            ctx.all_rows, ctx.entering = run.all_rows, run.entering
            ctx.neuron, ctx.reach, ctx.channel_dim, ctx.fresh = neuron, reach, channel_dim, rows is None
            ctx.constants = (kernel.decay, kernel.inject)
            ctx.set_materialize_grads(False)
        return run.spikes, run.v, run.rows.detach(), run.v_seq, run.traces

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        x_seq, v, start, traces, gain, weights, readout, kept, v_last, *params = ctx.saved_tensors
        charged = kept if ctx.threshold is None else SoftReset(kept, v_last, ctx.threshold)
        if charged is None:  # fires before the step: what memory made of the charge is the potential
            charged = ctx.all_rows[ctx.entering :]
        n = ctx.needs_input_grad
        rows = None if ctx.fresh else ctx.all_rows[: ctx.entering - 1]
        decay, inject = ctx.constants
        grad_s, grad_v, grad_rows, grad_v_seq, grad_traces = grads
        found = backward_pass(
            ctx.neuron, Past(v, rows, start, traces, ctx.reach, ctx.channel_dim), x_seq,
            Kernel(gain, weights, readout=readout, decay=decay, inject=inject), params, charged,
            ctx.all_rows, ctx.entering, grad_s, grad_v, grad_rows, grad_v_seq, grad_traces,
            Needs(n[6], n[7], n[8], n[9], n[10], n[11], n[12], n[13], n[14:]),
        )  # fmt: skip
        return (None, None, None, None, None, None, *found[:-1], *found.params)


def _diagonal(out: Tensor, at: Tensor) -> Tensor:
    """The derivative of an elementwise function, element by element (zero where it is constant)."""
    if not out.requires_grad:
        return torch.zeros_like(at)
    (found,) = torch.autograd.grad(out, at, torch.ones_like(out), retain_graph=True, allow_unused=True)
    return torch.zeros_like(at) if found is None else found


def scan(
    operator: FractionalOperator,
    neuron: ElementwiseNeuron,
    x_seq: Tensor,
    v: Tensor,
    history: History,
    log: HistoryLog,
    *,
    keep_v: bool = False,
) -> tuple[Tensor, Tensor, History, Tensor | None]:
    """Run ``T`` steps of a layer of elementwise neurons.

    Args:
        operator: order, explicit solver, memory, step size (see :func:`can_scan`).
        neuron: charge and fire.
        x_seq: input ``[T, *shape]``.
        v: membrane potential ``[*shape]`` before the first step, in the dtype of the state.
        history: what came before; ``FRESH`` makes ``v`` the start.
        log: the buffer that history rows live in.
        keep_v: also return the potential after every step.

    Returns:
        Spikes ``[T, *shape]``, the last potential, the history for the next step, and the potentials
        ``[T, *shape]`` or None. Differentiable in ``x_seq``, ``v``, the history, gain, weights and the
        neuron's parameters.

    Raises:
        OptionError: for T = 0, or per-channel orders that do not fit the shape.
    """
    if x_seq.dim() == 0 or x_seq.shape[0] == 0:
        raise OptionError(_NO_STEPS)
    channel_dim = check_channels(operator, v.shape)
    start = v if history.start is None else history.start
    known = 0 if history.rows is None else history.rows.shape[0] + 1
    folded = history.traces is not None
    kernel = operator.kernel(known + x_seq.shape[0] - 1, v, folded, known)
    x_seq = x_seq.to(v.dtype)
    past = Past(v, history.rows, start, history.traces, operator.reach(), channel_dim)
    if torch.compiler.is_compiling() and neuron.code is not None:
        from spikede_plugins.engine import scan_op

        return scan_op.compiled_scan(neuron, past, x_seq, kernel, keep_v)
    operator.warn_beyond_horizon(log.advance(history.rows, x_seq.shape[0], folded))
    setting = (neuron, kernel, past.reach, channel_dim, log, keep_v)
    numbers = (kernel.gain, kernel.weights, kernel.readout, *neuron.params)
    given = (x_seq, v, history.rows, start, history.traces, *numbers)
    if operator.checkpoint and operator.checkpoint < x_seq.shape[0] and torch.is_grad_enabled():
        from spikede_plugins.engine.checkpoint import CheckpointedScan

        spikes, v, rows, v_seq, traces = CheckpointedScan.apply(*setting, operator.checkpoint, *given)
    else:
        spikes, v, rows, v_seq, traces = _Scan.apply(*setting, *given)
    log.hand_on(rows)
    handed = History(rows, start, history.traces if traces is None else traces)
    return spikes, v, handed, v_seq if keep_v else None
