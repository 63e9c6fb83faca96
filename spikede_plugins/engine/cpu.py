"""The fused CPU engine: the passes of the scan for affine neurons, by the kernels of ``cpu_kernels``.

It serves float32 and float64 neurons of one order whose :class:`AffineCode` names all they are. Everything
else goes to the torch passes, which compute the same numbers. It needs numba
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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spikede_plugins.engine.buffers import empty

if TYPE_CHECKING:
    from spikede_plugins.engine.affine import AffineCode
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


def serves(neuron: ElementwiseNeuron, past: Past, x_seq: Tensor, weights: Tensor) -> bool:
    """Whether the kernels run this neuron on this input."""
    v = past.v
    return (
        neuron.code is not None
        and v.device.type == "cpu"
        and v.dtype in (torch.float32, torch.float64)
        and weights.shape[-1] == 1
        and all(p.numel() == 1 for p in neuron.params)
        and x_seq.numel() > 0
        and past.traces is None
        and not (past.reach.fold and x_seq.shape[0] + _known(past) > past.reach.fold)
        and not missing()
    )


def _known(past: Past) -> int:
    return 0 if past.rows is None else past.rows.shape[0] + 1


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


def march(
    code: AffineCode, params: Sequence[Tensor], x_seq: Tensor, v: Tensor, start: Tensor, rows: Tensor,
    entering: int, limit: int, gain: Tensor, weights: Tensor, spikes: Tensor, h_seq: Tensor | None,
    v_seq: Tensor | None, marks: Tensor | None,
) -> Tensor:  # fmt: skip
    """All steps: fills ``spikes``, the new ``rows``, and of the others what is there; the last potential.

    ``marks`` (uint8) receives 1 where a neuron fired.
    """
    k, steps = _kernels(), x_seq.shape[0]
    x = _flat(x_seq, steps)
    number = x.dtype.type
    form, leak = _form(code, params[0].item() if params else 0.0, number)
    last = torch.empty_like(v, memory_format=torch.contiguous_format)
    nothing = x[:0]
    in_blocks(
        k.forward, x.shape[1], steps * (1 + min(entering + steps, limit)),
        x, _row(v), _row(start), rows.view(rows.shape[0], -1).numpy(), entering, limit, _row(weights),
        number(gain.item()) - number(1.0), form, leak, number(code.rest), number(code.threshold),
        code.reset is not None, number(code.reset or 0.0), number(1.0), spikes.view(steps, -1).numpy(),
        nothing if h_seq is None else h_seq.view(steps, -1).numpy(), h_seq is not None,
        nothing if v_seq is None else v_seq.view(steps, -1).numpy(), v_seq is not None,
        _NO_MARKS if marks is None else marks.view(steps, -1).numpy(), marks is not None,
        last.view(-1).numpy(),
    )  # fmt: skip
    return last


def adjoint(
    code: AffineCode, params: Sequence[Tensor], charged: Tensor | SoftReset, rows: Tensor, start: Tensor,
    entering: int, limit: int, gain: Tensor, weights: Tensor, grad_s: Tensor | None,
    grad_v: Tensor | None, grad_rows: Tensor | None, first_handed: int, keep_delta: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The gradient of the input and, if asked for, the adjoints of the charged potentials."""
    k, rebuild = _kernels(), not isinstance(charged, Tensor)
    steps, like = rows.shape[0] - entering, rows[entering:]
    number = _row(weights).dtype.type
    leak = {"none": 0.0, "divide": 1.0 / code.tau}.get(code.leak)
    leak = params[0].item() if leak is None else leak
    grad_x = empty(tuple(like.shape), like)
    delta = empty(tuple(like.shape), like) if keep_delta else None
    into_x = grad_x.view(steps, -1).numpy()
    nothing = into_x[:0]
    in_blocks(
        k.backward, into_x.shape[1], steps * (2 + min(steps, limit)),
        _flat(charged, steps) if isinstance(charged, Tensor) else nothing, rebuild,
        rows.view(rows.shape[0], -1).numpy(), _row(start),
        _NO_MARKS if isinstance(charged, Tensor) else _flat(charged.fired, steps),
        nothing.reshape(-1) if isinstance(charged, Tensor) else _row(charged.v),
        entering, limit, _row(weights), number(gain.item()), number(1.0 - leak),
        number(leak if code.leak != "none" and code.decay_input else 1.0), number(code.threshold),
        code.reset is not None, number(code.reset or 0.0), code.detach_reset,
        k.SURROGATES.index(code.surrogate), number(code.surrogate_alpha), number(1.0),
        nothing if grad_s is None else _flat(grad_s.to(like.dtype), steps), grad_s is not None,
        nothing.reshape(-1) if grad_v is None else _row(grad_v), grad_v is not None,
        nothing if grad_rows is None or not grad_rows.shape[0] else _flat(grad_rows, grad_rows.shape[0]),
        first_handed, 0 if grad_rows is None else grad_rows.shape[0],
        into_x, nothing if delta is None else delta.view(steps, -1).numpy(),
        keep_delta,
    )  # fmt: skip
    return grad_x, delta


def weight_gradient(
    delta: Tensor, rows: Tensor, entering: int, limit: int, weights: Tensor
) -> Tensor:
    """``-sum_k delta_k u_{k-m}`` for every lag m, in the shape of ``weights``."""
    k, d = _kernels(), _flat(delta, delta.shape[0])
    lags = max(1, min(entering + d.shape[0] - 1, limit))
    partial = torch.zeros(-(-d.shape[1] // k.BLOCK), lags, dtype=torch.float64)
    in_blocks(
        k.weight_gradient, d.shape[1], d.shape[0] * lags,
        d, rows.view(rows.shape[0], -1).numpy(), entering, limit, partial.numpy(),
    )  # fmt: skip
    found = torch.zeros_like(weights)
    found[:lags, 0] = -partial.sum(0).to(weights.dtype)
    return found


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


def in_blocks(kernel: Callable[..., None], neurons: int, work: int, *arguments: Any) -> None:
    """Run ``kernel`` over all blocks of ``neurons``, shared among ``torch.get_num_threads()`` threads."""
    blocks = -(-neurons // _kernels().BLOCK)
    threads = min(torch.get_num_threads(), blocks, 1 + neurons * work // _WORTH_A_THREAD)
    if threads <= 1:
        kernel(*arguments, 0, blocks)
        return
    # A few pieces a thread: one that is held up does not hold up all.
    pieces = min(blocks, 4 * threads)
    bounds = [blocks * i // pieces for i in range(pieces + 1)]
    pool = _workers(threads - 1)
    remaining = iter(list(pairwise(bounds)))
    lock = threading.Lock()

    def take() -> None:
        while True:
            with lock:
                piece = next(remaining, None)
            if piece is None:
                return
            kernel(*arguments, *piece)

    others = [pool.submit(take) for _ in range(threads - 1)]
    take()
    for other in others:
        other.result()
