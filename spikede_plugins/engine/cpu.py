"""The fused CPU engine: the passes of the scan for affine neurons, by the kernels of ``cpu_kernels``.

It serves float32 and float64 neurons whose :class:`AffineCode` names all they are, with one order or one a
channel (where a channel's neurons lie together in memory), and every form of memory. Everything else goes to
the torch passes, which compute the same numbers. It needs numba
(``pip install "spikede-plugins[fast]"``) and compiles at first use, cached on disk. Threads follow
``torch.get_num_threads()`` (``engine.threads``).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from spikede_plugins.engine.blocks import blocks
from spikede_plugins.engine.buffers import empty
from spikede_plugins.engine.observed import counted
from spikede_plugins.engine.threads import in_tiles
from spikede_plugins.exponentials import BLOCK
from spikede_plugins.notices import say_once

if TYPE_CHECKING:
    from spikede_plugins.engine.affine import AffineCode
    from spikede_plugins.engine.blocks import Block
    from spikede_plugins.engine.fire_steps import DelayedReset
    from spikede_plugins.engine.history import HistoryLog
    from spikede_plugins.engine.operator import Kernel
    from spikede_plugins.engine.scan import ElementwiseNeuron, Past, SoftReset


def installed() -> bool:
    """Whether there is a numba, be it one that loads or not."""
    return importlib.util.find_spec("numba") is not None


def missing() -> str:
    """Why the engine is not available; empty if it is."""
    if not installed():
        return 'numba is not installed: pip install "numba>=0.61" (or the extra fast)'
    return _failure()


def available() -> bool:
    """Whether the kernels can run what they could serve; if they cannot, a user is told once."""
    why = missing()
    if why and not torch.compiler.is_compiling():
        say_slow(why)
    return not why


def say_slow(why: str) -> None:
    """Say once what a process without the kernels is missing."""
    say_once(
        "slow",
        "on the CPU fractional neurons run on plain torch here, whole sequences some 8 times slower than "
        f"fused. {why[0].upper()}{why[1:]}.",
    )


@cache
def _failure() -> str:
    try:
        _kernels()
    except Exception as error:  # a numba that does not fit numpy or python
        return f"numba does not load: {type(error).__name__}: {error}"
    return ""


def not_kept() -> str:
    """Why every process compiles the kernels anew; empty if they are kept on disk."""
    if missing():
        return ""
    from spikede_plugins.engine import compiled

    return compiled.not_kept


@cache
def _kernels() -> Any:
    from spikede_plugins.engine import cpu_kernels

    return cpu_kernels


def _run(kernel: Any, tiles: Any, work: int, *arguments: Any) -> None:
    in_tiles(kernel, _kernels().SHARED[kernel], tiles, work, *arguments)


#: Channels of fewer neurons than these, one behind the other, are left to torch.
_NARROW = 16


def serves(neuron: ElementwiseNeuron, past: Past, x_seq: Tensor, kernel: Kernel) -> bool:
    """Whether the kernels run this neuron on this input."""
    v = past.v
    return (
        neuron.code is not None
        and v.device.type == "cpu"
        and v.dtype in (torch.float32, torch.float64)
        and (kernel.gain.shape[-1] == 1 or _behind(v.shape, past.channel_dim) >= _NARROW)
        and all(p.numel() == 1 for p in neuron.params)
        and v.numel() > 0
        and x_seq.shape[0] > 0
        and not counted()
        and available()
    )


def _behind(shape: torch.Size, channel_dim: int | None) -> int:
    """How many neurons of one channel lie one behind the other."""
    return shape.numel() if channel_dim is None else shape[channel_dim + 1 :].numel()


#: Neurons of a tile. Memory is fastest at long pieces: 16 kB at a time take three quarters of the time of 2.
_WIDEST, _NARROWEST = 4096, 256
#: Numbers that a tile holds at a time; they should stay in the second cache.
_HELD = 1 << 19


@lru_cache(64)
def _tiles_of(shape: torch.Size, channels: int, channel_dim: int | None, widest: int, threads: int) -> Any:
    total = shape.numel()
    length = total if channels == 1 else _behind(shape, channel_dim)
    # As many for each thread, of whole cache lines.
    tiles = -(-length // widest)
    size = -(-length // (-(-tiles // threads) * threads))
    size = max(_NARROWEST, -(-size // 16) * 16)
    within = np.arange(0, length, size)
    first = (np.arange(0, total, length)[:, None] + within).reshape(-1)
    count = np.tile(np.minimum(size, length - within), total // length)
    return np.stack([first, count, first // length % channels], 1).astype(np.int64)


def _tiles(shape: torch.Size, kernel: Kernel, channel_dim: int | None, rows: int) -> Any:
    """``[tiles, 3]``: first neuron, count and channel of each, for kernels that hold ``rows`` at a time."""
    widest = max(_NARROWEST, min(_WIDEST, _HELD // max(1, rows)))
    return _tiles_of(shape, kernel.gain.shape[-1], channel_dim, widest, torch.get_num_threads())


def _plan(past: Past, entering: int, steps: int) -> Any:
    """``[blocks, 6]``: the blocks of a run; a window is one block that looks back to its limit only."""
    if past.reach.limit:
        return np.array([[0, steps, entering, 0, 0, 0]], np.int64)
    return np.array(list(blocks(entering, steps, past.reach, past.traces is not None)), np.int64)


def _room(plan: Any, entering: int) -> int:
    """The most rows that are held at a time."""
    origin, most = 0, entering
    for _, last, _, low, _, folds in plan.tolist():
        origin = low if folds else origin
        most = max(most, entering + last - origin)
    return int(most)


class _Numbers(NamedTuple):
    """A kernel as arrays: weights ``[S, n]``, gain ``[S]``, readout ``[S, BLOCK, P]``, decay, inject.

    And of two of them the transposed, which the adjoint takes.
    """

    weights: Any
    gain: Any
    readout: Any
    decay: Any
    inject: Any
    readout_t: Any
    inject_t: Any


def _numbers(kernel: Kernel, traced: bool) -> _Numbers:
    kept: dict[bool, _Numbers] = {} if kernel.source is None else kernel.source.arrays
    if traced not in kept:
        kept[traced] = _arrays(kernel, traced)
    return kept[traced]


def _arrays(kernel: Kernel, traced: bool) -> _Numbers:
    weights, gain = kernel.weights.detach(), kernel.gain.detach()
    readout, decay, inject = kernel.readout, kernel.decay, kernel.inject
    if not traced or readout is None or decay is None or inject is None:
        readout, decay = weights.new_zeros(BLOCK, 0, 1), weights.new_zeros(0)
        inject = weights.new_zeros(0, BLOCK)
    read, into = readout.detach().permute(2, 0, 1).contiguous().numpy(), inject.contiguous().numpy()
    return _Numbers(
        weights.T.contiguous().numpy(), gain.contiguous().numpy(), read, decay.numpy(), into,
        np.ascontiguousarray(read.transpose(0, 2, 1)), np.ascontiguousarray(into.T),
    )  # fmt: skip


def _form(code: AffineCode, factor: float, number: Any) -> tuple[int, Any]:
    """How the kernels write the charge, and the number they leak by."""
    k = _kernels()
    if code.leak == "none":
        return k.INTEGRATE, number(0.0)
    divide = code.leak == "divide"
    if not code.pull:
        return (k.DIVIDE_ONLY_INPUT, number(code.tau)) if divide else (k.FACTOR_ONLY_INPUT, number(factor))
    if code.decay_input:
        return (k.DIVIDE_INPUT, number(code.tau)) if divide else (k.FACTOR_INPUT, number(factor))
    if code.short_decay and code.rest == 0.0:
        if divide:
            return k.DIVIDE_SHORT, number(1.0 - 1.0 / code.tau)
        return k.FACTOR_SHORT, number(1.0) - number(factor)
    return (k.DIVIDE, number(code.tau)) if divide else (k.FACTOR, number(factor))


def _factor(code: AffineCode, params: Sequence[Tensor]) -> float:
    """What the charge scales by: the leak factor."""
    if code.leak == "multiply":
        return float(params[0].item())
    return 1.0 / code.tau if code.leak == "divide" else 1.0


def _flat(t: Tensor, rows: int) -> Any:
    return t.detach().contiguous().view(rows, -1).numpy()


def _row(t: Tensor) -> Any:
    return t.detach().contiguous().view(-1).numpy()


def _one_zero(start: Tensor) -> bool:
    """Whether it is one zero for all neurons, as ``Step`` writes a start of zeros: then nothing is read."""
    return not any(start.stride()) and start.numel() > 0 and start.detach().as_strided((), ()).item() == 0.0


_NO_MARKS = torch.empty((0, 0), dtype=torch.uint8).numpy()
#: Up to so many steps at a time read the sums over what is older than their block from where the first of the
#: block left them.
_FEW = 4


def march(
    code: AffineCode, params: Sequence[Tensor], past: Past, x_seq: Tensor, kernel: Kernel, rows: Tensor,
    entering: int, spikes: Tensor, h_seq: Tensor | None, v_seq: Tensor | None, marks: Tensor | None,
    log: HistoryLog,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """All steps: fills ``spikes``, the new ``rows``, and of the others what is there.

    ``marks`` (uint8) receives 1 where a neuron fired. Returns the last potential, and the traces if any rows
    were folded.
    """
    k, steps = _kernels(), x_seq.shape[0]
    v, traces, reach = past.v, past.traces, past.reach
    x = _flat(x_seq, steps)
    number = x.dtype.type
    factor = _factor(code, params)
    form, leak = _form(code, factor, number)
    plan = _plan(past, entering, steps)
    traced = traces is not None or bool(plan[:, 5].any())
    numbers = _numbers(kernel, traced)
    room = _room(plan, entering)
    tiles = _tiles(v.shape, kernel, past.channel_dim, room)
    flat_rows = rows.view(rows.shape[0], -1).numpy()
    folded = None
    if plan[:, 5].any():
        folded = empty((len(numbers.decay), *v.shape), v)
    nothing = x[:0]
    old = nothing if traces is None else _flat(traces, traces.shape[0])
    new = nothing if folded is None else folded.view(len(numbers.decay), -1).numpy()

    base = np.empty((BLOCK, 0), x.dtype)
    _, _, place, low, before, _ = plan[0].tolist()
    older = before > 0 or traced
    given = older and not reach.limit and len(plan) == 1 and steps <= _FEW
    if given:
        known, in_use = rows[low : low + before], traces if folded is None else folded
        kept = log.base(known, in_use, kernel.source) if place else None
        if kept is None:
            kept = empty((BLOCK, *v.shape), v)
            _run(
                k.begin, tiles, v.numel() * BLOCK * (before + len(numbers.decay)),
                flat_rows, plan[0], old, traces is not None, numbers.weights, numbers.readout, numbers.decay,
                numbers.inject, number(1.0), kept.view(BLOCK, -1).numpy(), new,
            )  # fmt: skip
            log.keep_base(known, in_use, kernel.source, kept)
        base = kept.view(BLOCK, -1).numpy()
    last = torch.empty_like(v, memory_format=torch.contiguous_format)
    if given:
        room = entering + steps - low - before
    _run(
        k.forward, tiles, v.numel() * _work(plan, reach.limit, len(numbers.decay), given),
        x, _row(v), _row(past.start), flat_rows, entering, reach.limit or entering + steps, plan,
        room, base, given, old, traces is not None, new, numbers.weights,
        numbers.gain - number(1.0), numbers.readout, numbers.decay, numbers.inject, form, leak,
        number(code.rest), number(code.threshold), code.strict, code.reset is not None,
        number(code.reset or 0.0), code.in_rate, number(code.threshold * factor), number(1.0),
        spikes.view(steps, -1).numpy(),
        nothing if h_seq is None else h_seq.view(steps, -1).numpy(), h_seq is not None,
        nothing if v_seq is None else v_seq.view(steps, -1).numpy(), v_seq is not None,
        _NO_MARKS if marks is None else marks.view(steps, -1).numpy(), marks is not None,
        last.view(-1).numpy(),
    )  # fmt: skip
    return last, folded


def _work(plan: Any, limit: int, traces: int, given: bool = False) -> int:
    """Multiply-adds a neuron, about."""
    steps = plan[:, 1] - plan[:, 0]
    inside = steps * (plan[:, 2] + steps / 2)
    if limit:
        return int(np.minimum(inside, steps * limit).sum()) + int(steps.sum())
    read = np.maximum.accumulate(plan[:, 5] > 0) * traces  # from the first fold on
    older = 0 if given else plan[:, 4] + read
    return int((inside + steps * (1 + older)).sum() + plan[:, 5].sum() * BLOCK * traces)


class Adjoint(NamedTuple):
    """What the backward pass of an affine neuron finds.

    Attributes:
        grad_x: gradient of the input ``[T, *shape]``.
        delta: adjoints of the charged potentials ``[T, *shape]``, if asked for.
        levers: ``sum delta lever`` and ``sum delta x`` by channel ``[S, 2]``, if asked for; the lever is
            ``rest - v``, plus the input where that goes through the leak. Of a derivative-style neuron the
            lever has ``- threshold s`` as well, and the second is ``sum slope grad_s lever``, without that.
    """

    grad_x: Tensor
    delta: Tensor | None
    levers: Tensor | None


def adjoint(
    code: AffineCode, params: Sequence[Tensor], past: Past, x_seq: Tensor, kernel: Kernel,
    charged: Tensor | SoftReset, rows: Tensor, entering: int, grad_s: Tensor | None, grad_v: Tensor | None,
    grad_rows: Tensor | None, first_handed: int, grad_traces: Tensor | None, keep_delta: bool,
    keep_levers: bool,
) -> Adjoint:  # fmt: skip
    """The gradients of an affine neuron, and the levers if asked for.

    ``x_seq`` may be empty where there are neither levers nor a neuron that fires before (``in_rate``).
    """
    k, rebuild = _kernels(), not isinstance(charged, Tensor)
    steps, like, v = rows.shape[0] - entering, rows[entering:], past.v
    plan = _plan(past, entering, steps)
    numbers = _numbers(kernel, past.traces is not None or bool(plan[:, 5].any()))
    number = numbers.weights.dtype.type
    factor = _factor(code, params)
    form, leak = _form(code, factor, number)
    pull, decayed = code.pull and code.leak != "none", code.leak != "none" and code.decay_input
    grad_x = empty(tuple(like.shape), like)
    delta = empty(tuple(like.shape), like) if keep_delta else None
    into_x = grad_x.view(steps, -1).numpy()
    nothing = into_x[:0]
    channels = kernel.gain.shape[-1]
    tiles = _tiles(v.shape, kernel, past.channel_dim, steps)
    levers = np.zeros((len(tiles) if keep_levers else 0, 2))
    _run(
        k.backward, tiles, v.numel() * _work(plan, past.reach.limit, 2 * len(numbers.decay)),
        _flat(charged, steps) if isinstance(charged, Tensor) else nothing, rebuild,
        rows.view(rows.shape[0], -1).numpy(), _row(past.start), _row(v),
        _NO_MARKS if isinstance(charged, Tensor) else _flat(charged.fired, steps),
        nothing.reshape(-1) if isinstance(charged, Tensor) else _row(charged.v),
        entering, past.reach.limit or rows.shape[0], plan, numbers.weights, numbers.gain,
        numbers.readout_t, numbers.decay, numbers.inject_t, number(1.0 - factor if pull else 1.0),
        number(factor if decayed else 1.0), form, leak, pull or (code.pull and not code.in_rate),
        number(code.rest), number(code.threshold), code.strict, code.reset is not None,
        number(code.reset or 0.0), code.detach_reset, code.in_rate, k.SURROGATES.index(code.surrogate),
        number(code.surrogate_alpha), number(1.0),
        nothing if grad_s is None else _flat(grad_s.to(like.dtype), steps), grad_s is not None,
        nothing.reshape(-1) if grad_v is None else _row(grad_v), grad_v is not None,
        nothing if grad_rows is None or not grad_rows.shape[0] else _flat(grad_rows, grad_rows.shape[0]),
        first_handed, 0 if grad_rows is None else grad_rows.shape[0],
        nothing if grad_traces is None else _flat(grad_traces, grad_traces.shape[0]), grad_traces is not None,
        nothing if not x_seq.numel() else _flat(x_seq, steps), levers, keep_levers, decayed or code.in_rate,
        into_x, nothing if delta is None else delta.view(steps, -1).numpy(), keep_delta,
    )  # fmt: skip
    if not keep_levers:
        return Adjoint(grad_x, delta, None)
    found = np.zeros((channels, 2))
    np.add.at(found, tiles[:, 2], levers)
    return Adjoint(grad_x, delta, torch.from_numpy(found).to(like.dtype))


#: Rows that a single step looks at: those of its block.
_STEP_ROWS = BLOCK


# -- single steps ---------------------------------------------------------------------------------


def serves_steps(shape: torch.Size, like: Tensor, kernel: Kernel, channel_dim: int | None) -> bool:
    """Whether the kernels take single steps ``shape`` of any neuron, in the dtype of ``like``."""
    return (
        like.device.type == "cpu"
        and like.dtype in (torch.float32, torch.float64)
        and kernel.weights.dtype == like.dtype
        and (kernel.gain.shape[-1] == 1 or _behind(shape, channel_dim) >= _NARROW)
        and shape.numel() > 0
        and not torch.compiler.is_compiling()
        and type(like) is Tensor
        and not counted()
        and available()
    )


def begin(
    kernel: Kernel, block: Block, rows: Tensor, traces: Tensor | None, channel_dim: int | None
) -> tuple[Tensor, Tensor | None]:
    """Minus the sums of a block's steps over what is older, ``[B, *shape]``; the traces, if it folds."""
    k, shape = _kernels(), rows.shape[1:]
    numbers = _numbers(kernel, traces is not None or block.folds > 0)
    flat = _flat(rows, rows.shape[0])
    nothing = flat[:0]
    base = empty((BLOCK, *shape), rows)
    folded = empty((len(numbers.decay), *shape), rows) if block.folds else None
    _run(
        k.begin, _tiles(shape, kernel, channel_dim, _STEP_ROWS),
        shape.numel() * BLOCK * (rows.shape[0] + len(numbers.decay)),
        flat, np.array(block, np.int64), nothing if traces is None else _flat(traces, traces.shape[0]),
        traces is not None, numbers.weights, numbers.readout, numbers.decay, numbers.inject,
        numbers.weights.dtype.type(-1.0), base.view(BLOCK, -1).numpy(),
        nothing if folded is None else folded.view(len(numbers.decay), -1).numpy(),
    )  # fmt: skip
    return base, folded


def begin_adjoint(
    kernel: Kernel, block: Block, shape: torch.Size, traced: bool, delta: Tensor, into_rows: Tensor | None,
    into_traces: Tensor | None, channel_dim: int | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The gradients of the rows ``shape`` and of the traces that :func:`begin` got."""
    k, numbers = _kernels(), _numbers(kernel, traced)
    flat = _flat(delta, BLOCK)
    nothing = flat[:0]
    grad_rows = empty(tuple(shape), delta)
    grad_traces = empty((len(numbers.decay), *shape[1:]), delta) if traced else None
    _run(
        k.begin_adjoint, _tiles(shape[1:], kernel, channel_dim, _STEP_ROWS),
        shape[1:].numel() * BLOCK * (shape[0] + 2 * len(numbers.decay)),
        flat, np.array(block, np.int64),
        nothing if into_rows is None else _flat(into_rows, into_rows.shape[0]), into_rows is not None,
        nothing if into_traces is None else _flat(into_traces, into_traces.shape[0]), into_traces is not None,
        numbers.weights, numbers.readout_t, numbers.decay, numbers.inject_t,
        grad_rows.view(shape[0], -1).numpy(),
        nothing if grad_traces is None else grad_traces.view(len(numbers.decay), -1).numpy(),
    )  # fmt: skip
    return grad_rows, grad_traces


def step(
    kernel: Kernel, place: int, charged: Tensor, v: Tensor, origin: Tensor | None, start: Tensor,
    rows: Tensor, minus: Tensor, keep_sum: bool, channel_dim: int | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The charged potential of a step of a block and minus its memory sum; writes the newest of ``rows``."""
    k, numbers = _kernels(), _numbers(kernel, False)
    number = numbers.weights.dtype.type
    h = torch.empty(v.shape, dtype=v.dtype)
    total = torch.empty(v.shape, dtype=v.dtype) if keep_sum else None
    at_v, c = _row(v), _row(charged.to(v.dtype))
    zero = _one_zero(start)
    _run(
        k.step, _tiles(v.shape, kernel, channel_dim, _STEP_ROWS), v.numel() * (place + 4),
        c, at_v, at_v if origin is None else _row(origin),
        at_v if zero else _row(start), not zero, rows.view(place, v.numel()).numpy(),
        _row(minus[place]), numbers.weights, numbers.gain - number(1.0), h.view(-1).numpy(),
        h.view(-1).numpy() if total is None else total.view(-1).numpy(), keep_sum,
    )  # fmt: skip
    return h, total


def adjoints_of_block(
    later: Tensor | None, shape: torch.Size, like: Tensor, place: int, first: bool
) -> Tensor:
    """The adjoints of the later steps of a block ``[BLOCK, *shape]``, with room for that at ``place``.

    Each step of the block will put in its own; those that were never taken are zero.
    """
    delta = empty((BLOCK, *shape), like) if later is None else later.contiguous()
    if later is None:
        delta[place + 1 :] = 0.0
    if first:
        delta[:place] = 0.0
    return delta


def step_adjoint(
    kernel: Kernel, place: int, d: Tensor, own: Tensor, delta: Tensor, late: Tensor | None, apart: bool,
    channel_dim: int | None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Puts ``own`` in its place in ``delta``; gradients of charged, v and, with ``apart``, the origin."""
    k, numbers = _kernels(), _numbers(kernel, False)
    number = numbers.weights.dtype.type
    grad_c, grad_v = (torch.empty(d.shape, dtype=d.dtype) for _ in range(2))
    grad_origin = torch.empty(d.shape, dtype=d.dtype) if apart else None
    into_v = grad_v.view(-1).numpy()
    at_d = _row(d)
    _run(
        k.step_adjoint, _tiles(d.shape, kernel, channel_dim, _STEP_ROWS), d.numel() * (BLOCK - place + 4),
        at_d, at_d if own is d else _row(own), delta.view(BLOCK, -1).numpy(), place,
        at_d if late is None else _row(late), late is not None, numbers.weights, numbers.gain, number(1.0),
        grad_c.view(-1).numpy(), into_v, into_v if grad_origin is None else grad_origin.view(-1).numpy(),
        apart,
    )  # fmt: skip
    return grad_c, grad_v, grad_origin


def fire_step(
    kernel: Kernel, code: DelayedReset, leak: Tensor, place: int, x: Tensor, v: Tensor, start: Tensor,
    rows: Tensor, minus: Tensor, channel_dim: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Spikes and potential of a step of a block (``engine.fire_steps``); writes the newest of ``rows``."""
    k, numbers = _kernels(), _numbers(kernel, False)
    number = numbers.weights.dtype.type
    spikes, h = torch.empty(v.shape, dtype=v.dtype), torch.empty(v.shape, dtype=v.dtype)
    at_v, zero = _row(v), _one_zero(start)
    _run(
        k.fire_step, _tiles(v.shape, kernel, channel_dim, _STEP_ROWS), v.numel() * (place + 8),
        _row(x), at_v, at_v if zero else _row(start), not zero, rows.view(place, v.numel()).numpy(),
        _row(minus[place]), numbers.weights, numbers.gain - number(1.0), number(leak.item()),
        number(code.threshold), k.DELAYED_RESETS.index(code.reset), number(1.0),
        spikes.view(-1).numpy(), h.view(-1).numpy(),
    )  # fmt: skip
    return spikes, h


def fire_step_adjoint(
    kernel: Kernel, code: DelayedReset, leak: Tensor, place: int, x: Tensor | None, v: Tensor, h: Tensor,
    grad_s: Tensor | None, grad_h: Tensor | None, delta: Tensor, late: Tensor | None, keep_own: bool,
    channel_dim: int | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of x and v; the adjoint of the step if asked for; with ``x`` the levers.

    Puts the adjoint in its place in ``delta``. Levers are ``sum delta o`` and ``sum delta x`` by channel.
    """
    k, numbers = _kernels(), _numbers(kernel, False)
    number = numbers.weights.dtype.type
    grad_x, grad_v = torch.empty(v.shape, dtype=v.dtype), torch.empty(v.shape, dtype=v.dtype)
    own = torch.empty(v.shape, dtype=v.dtype) if keep_own else None
    channels = kernel.gain.shape[-1]
    tiles = _tiles(v.shape, kernel, channel_dim, _STEP_ROWS)
    levers = np.zeros((len(tiles) if x is not None else 0, 2))
    at_h, into_x = _row(h), grad_x.view(-1).numpy()
    _run(
        k.fire_step_adjoint, tiles, v.numel() * (BLOCK - place + 12),
        at_h if grad_s is None else _row(grad_s.to(v.dtype)), grad_s is not None,
        at_h if grad_h is None else _row(grad_h), grad_h is not None, at_h, _row(v),
        delta.view(BLOCK, -1).numpy(), place, at_h if late is None else _row(late), late is not None,
        numbers.weights, numbers.gain, number(leak.item()), number(code.threshold),
        k.DELAYED_RESETS.index(code.reset), k.SURROGATES.index(code.surrogate), number(code.surrogate_alpha),
        number(1.0), at_h if x is None else _row(x), levers, x is not None, into_x,
        grad_v.view(-1).numpy(), into_x if own is None else own.view(-1).numpy(), keep_own,
    )  # fmt: skip
    if x is None:
        return grad_x, grad_v, own, None
    found = np.zeros((channels, 2))
    np.add.at(found, tiles[:, 2], levers)
    return grad_x, grad_v, own, torch.from_numpy(found).to(v.dtype)
