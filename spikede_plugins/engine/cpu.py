"""The fused CPU engine: the passes of the scan for affine neurons, by the kernels of ``cpu_kernels``.

It serves float32 and float64 neurons whose :class:`AffineCode` names all they are, with one order or one a
channel (where a channel's neurons lie together in memory), and every form of memory. Everything else goes to
the torch passes, which compute the same numbers. It needs numba
(``pip install "spikede-plugins[fast]"``) and compiles at first use, cached on disk. Threads follow
``torch.get_num_threads()``; they are Python threads of its own, safe beside others and after a fork.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from spikede_plugins.engine.blocks import blocks
from spikede_plugins.engine.buffers import empty
from spikede_plugins.exponentials import BLOCK

if TYPE_CHECKING:
    from spikede_plugins.engine.affine import AffineCode
    from spikede_plugins.engine.history import HistoryLog
    from spikede_plugins.engine.operator import Kernel
    from spikede_plugins.engine.scan import ElementwiseNeuron, Past, SoftReset


def missing() -> str:
    """Why the engine is not available; empty if it is."""
    if importlib.util.find_spec("numba") is None:
        return 'numba is not installed: pip install "spikede-plugins[fast]"'
    return _failure()


@cache
def _failure() -> str:
    try:
        _kernels()
    except Exception as error:  # a numba that does not fit numpy or python
        return f"numba does not load: {type(error).__name__}: {error}"
    return ""


@cache
def _kernels() -> Any:
    from spikede_plugins.engine import cpu_kernels

    return cpu_kernels


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
        and not missing()
    )


def _behind(shape: torch.Size, channel_dim: int | None) -> int:
    """How many neurons of one channel lie one behind the other."""
    return shape.numel() if channel_dim is None else shape[channel_dim + 1 :].numel()


def _tiles(shape: torch.Size, channels: int, channel_dim: int | None) -> Any:
    """``[tiles, 3]``: first neuron, count and channel of each."""
    size, total = _kernels().TILE, shape.numel()
    length = total if channels == 1 else _behind(shape, channel_dim)
    within = np.arange(0, length, size)
    first = (np.arange(0, total, length)[:, None] + within).reshape(-1)
    count = np.tile(np.minimum(size, length - within), total // length)
    return np.stack([first, count, first // length % channels], 1).astype(np.int64)


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
    """A kernel as arrays: weights ``[S, n]``, gain ``[S]``, readout ``[S, BLOCK, P]``, decay, inject."""

    weights: Any
    gain: Any
    readout: Any
    decay: Any
    inject: Any


def _numbers(kernel: Kernel, traced: bool) -> _Numbers:
    weights, gain = kernel.weights.detach(), kernel.gain.detach()
    readout, decay, inject = kernel.readout, kernel.decay, kernel.inject
    if not traced or readout is None or decay is None or inject is None:
        readout, decay = weights.new_zeros(BLOCK, 0, 1), weights.new_zeros(0)
        inject = weights.new_zeros(0, BLOCK)
    return _Numbers(
        weights.T.contiguous().numpy(), gain.contiguous().numpy(),
        readout.detach().permute(2, 0, 1).contiguous().numpy(), decay.numpy(), inject.contiguous().numpy(),
    )  # fmt: skip


def _form(code: AffineCode, factor: float, number: Any) -> tuple[int, Any]:
    """How the kernels write the charge, and the number they leak by."""
    k = _kernels()
    if code.leak == "none":
        return k.INTEGRATE, number(0.0)
    divide = code.leak == "divide"
    if code.decay_input:
        return (k.DIVIDE_INPUT, number(code.tau)) if divide else (k.FACTOR_INPUT, number(factor))
    if code.short_decay and code.rest == 0.0:
        if divide:
            return k.DIVIDE_SHORT, number(1.0 - 1.0 / code.tau)
        return k.FACTOR_SHORT, number(1.0) - number(factor)
    return (k.DIVIDE, number(code.tau)) if divide else (k.FACTOR, number(factor))


def _flat(t: Tensor, rows: int) -> Any:
    return t.detach().contiguous().view(rows, -1).numpy()


def _row(t: Tensor) -> Any:
    return t.detach().contiguous().view(-1).numpy()


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
    form, leak = _form(code, params[0].item() if params else 0.0, number)
    plan = _plan(past, entering, steps)
    traced = traces is not None or bool(plan[:, 5].any())
    numbers = _numbers(kernel, traced)
    tiles = _tiles(v.shape, kernel.gain.shape[-1], past.channel_dim)
    flat_rows = rows.view(rows.shape[0], -1).numpy()
    folded = None
    if plan[:, 5].any():
        folded = torch.empty((len(numbers.decay), *v.shape), dtype=v.dtype)
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
            kept = torch.empty((BLOCK, *v.shape), dtype=v.dtype)
            in_tiles(
                k.begin, tiles, v.numel() * BLOCK * (before + len(numbers.decay)),
                flat_rows, plan[0], old, traces is not None, numbers.weights, numbers.readout, numbers.decay,
                numbers.inject, kept.view(BLOCK, -1).numpy(), new,
            )  # fmt: skip
            log.keep_base(known, in_use, kernel.source, kept)
        base = kept.view(BLOCK, -1).numpy()
    last = torch.empty_like(v, memory_format=torch.contiguous_format)
    room = entering + steps - low - before if given else _room(plan, entering)
    in_tiles(
        k.forward, tiles, v.numel() * _work(plan, reach.limit, len(numbers.decay), given),
        x, _row(v), _row(past.start), flat_rows, entering, reach.limit or entering + steps, plan,
        room, base, given, old, traces is not None, new, numbers.weights,
        numbers.gain - number(1.0), numbers.readout, numbers.decay, numbers.inject, form, leak,
        number(code.rest), number(code.threshold), code.strict, code.reset is not None,
        number(code.reset or 0.0), number(1.0), spikes.view(steps, -1).numpy(),
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
    return int((inside + steps * (1 + (0 if given else plan[:, 4] + traces))).sum())


class Adjoint(NamedTuple):
    """What the backward pass of an affine neuron finds.

    Attributes:
        grad_x: gradient of the input ``[T, *shape]``.
        delta: adjoints of the charged potentials ``[T, *shape]``, if asked for.
        levers: ``sum delta lever`` and ``sum delta x`` by channel ``[S, 2]``, if asked for; the lever is
            ``rest - v``, plus the input where that goes through the leak.
    """

    grad_x: Tensor
    delta: Tensor | None
    levers: Tensor | None


def adjoint(
    code: AffineCode, params: Sequence[Tensor], past: Past, x_seq: Tensor | None, kernel: Kernel,
    charged: Tensor | SoftReset, rows: Tensor, entering: int, grad_s: Tensor | None, grad_v: Tensor | None,
    grad_rows: Tensor | None, first_handed: int, grad_traces: Tensor | None, keep_delta: bool,
) -> Adjoint:  # fmt: skip
    """The gradients of an affine neuron; with ``x_seq``, also the levers."""
    k, rebuild = _kernels(), not isinstance(charged, Tensor)
    steps, like, v = rows.shape[0] - entering, rows[entering:], past.v
    plan = _plan(past, entering, steps)
    numbers = _numbers(kernel, past.traces is not None or bool(plan[:, 5].any()))
    number = numbers.weights.dtype.type
    leak = {"none": 0.0, "divide": 1.0 / code.tau}.get(code.leak)
    leak = params[0].item() if leak is None else leak
    decayed = code.leak != "none" and code.decay_input
    grad_x = empty(tuple(like.shape), like)
    delta = empty(tuple(like.shape), like) if keep_delta else None
    into_x = grad_x.view(steps, -1).numpy()
    nothing = into_x[:0]
    channels = kernel.gain.shape[-1]
    tiles = _tiles(v.shape, channels, past.channel_dim)
    levers = np.zeros((len(tiles) if x_seq is not None else 0, 2))
    in_tiles(
        k.backward, tiles, v.numel() * _work(plan, past.reach.limit, 2 * len(numbers.decay)),
        _flat(charged, steps) if isinstance(charged, Tensor) else nothing, rebuild,
        rows.view(rows.shape[0], -1).numpy(), _row(past.start), _row(v),
        _NO_MARKS if isinstance(charged, Tensor) else _flat(charged.fired, steps),
        nothing.reshape(-1) if isinstance(charged, Tensor) else _row(charged.v),
        entering, past.reach.limit or rows.shape[0], plan, numbers.weights, numbers.gain,
        np.ascontiguousarray(numbers.readout.transpose(0, 2, 1)), numbers.decay,
        np.ascontiguousarray(numbers.inject.T), number(1.0 - leak), number(leak if decayed else 1.0),
        number(code.rest), number(code.threshold), code.strict, code.reset is not None,
        number(code.reset or 0.0), code.detach_reset, k.SURROGATES.index(code.surrogate),
        number(code.surrogate_alpha), number(1.0),
        nothing if grad_s is None else _flat(grad_s.to(like.dtype), steps), grad_s is not None,
        nothing.reshape(-1) if grad_v is None else _row(grad_v), grad_v is not None,
        nothing if grad_rows is None or not grad_rows.shape[0] else _flat(grad_rows, grad_rows.shape[0]),
        first_handed, 0 if grad_rows is None else grad_rows.shape[0],
        nothing if grad_traces is None else _flat(grad_traces, grad_traces.shape[0]), grad_traces is not None,
        nothing if x_seq is None else _flat(x_seq, steps), levers, x_seq is not None, decayed,
        into_x, nothing if delta is None else delta.view(steps, -1).numpy(), keep_delta,
    )  # fmt: skip
    if x_seq is None:
        return Adjoint(grad_x, delta, None)
    found = np.zeros((channels, 2))
    np.add.at(found, tiles[:, 2], levers)
    return Adjoint(grad_x, delta, torch.from_numpy(found).to(like.dtype))


# -- threads --------------------------------------------------------------------------------------

#: Below this many multiply-adds a second thread costs more than it saves.
_WORTH_A_THREAD = 200_000

_pool_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def _workers(count: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    with _pool_lock:
        if _pool is None or _pool_size < count:
            _pool, _pool_size = ThreadPoolExecutor(count, thread_name_prefix="spikede"), count
        return _pool


def _after_fork() -> None:
    global _pool, _pool_lock
    _pool, _pool_lock = None, threading.Lock()  # threads do not survive a fork


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def in_tiles(kernel: Callable[..., None], tiles: Any, work: int, *arguments: Any) -> None:
    """Run ``kernel`` over all tiles, shared among ``torch.get_num_threads()`` threads."""
    count = len(tiles)
    threads = min(torch.get_num_threads(), count, 1 + work // _WORTH_A_THREAD)
    if threads <= 1:
        kernel(*arguments, tiles, 0, count)
        return
    # A few pieces a thread: one that is held up does not hold up all.
    pieces = min(count, 4 * threads)
    bounds = [count * i // pieces for i in range(pieces + 1)]
    pool = _workers(threads - 1)
    remaining = iter(list(pairwise(bounds)))
    lock = threading.Lock()

    def take() -> None:
        while True:
            with lock:
                piece = next(remaining, None)
            if piece is None:
                return
            kernel(*arguments, tiles, *piece)

    others = [pool.submit(take) for _ in range(threads - 1)]
    take()
    for other in others:
        other.result()
