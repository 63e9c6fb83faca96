"""The fused GPU engine: the passes of the scan for affine neurons, by the Triton kernels of ``gpu_kernels``.

It serves float32 and float64 neurons on a CUDA device whose :class:`AffineCode` names all they are, with
one order or one a channel and every form of memory. Everything else goes to the torch passes, which compute
the same numbers. It needs Triton, which CUDA builds of torch bring along (else ``pip install
"spikede-plugins[gpu]"``); kernels are compiled at first use and cached on disk. A pass is one launch, and
nothing waits for the device: what depends on shapes is computed on the host and kept on the device, what is
learned is read by the kernel.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from spikede_plugins.engine.blocks import Block, Reach, blocks
from spikede_plugins.engine.buffers import empty
from spikede_plugins.engine.cpu import Adjoint
from spikede_plugins.engine.observed import counted
from spikede_plugins.exponentials import BLOCK

if TYPE_CHECKING:
    from spikede_plugins.engine.affine import AffineCode
    from spikede_plugins.engine.history import HistoryLog
    from spikede_plugins.engine.operator import Kernel
    from spikede_plugins.engine.scan import ElementwiseNeuron, Past, SoftReset

#: Neurons a program, as many as keep their sums in registers; it is one warp, so a barrier costs little.
_WIDTH = {torch.float32: 64, torch.float64: 32}
#: So many neurons the kernels count in 32 bits, those of the last program included.
_MOST = 2**31 - max(_WIDTH.values())
#: No sums contracted but those that the kernels ask for; no loads moved ahead of the stores that they read
#: from (a pipelined loop would).
_LAUNCH: dict[str, Any] = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": False, "maxnreg": 168}


@cache
def missing() -> str:
    """Why the engine is not available; empty if it is."""
    if importlib.util.find_spec("triton") is None:
        return 'triton is not installed: pip install "spikede-plugins[gpu]"'
    version = importlib.metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < (3, 3):
        return f"triton {version} has no tuples, in which the kernels keep their sums: 3.3 or newer has"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return "there is no CUDA device"
    try:
        _kernels()
    except Exception as error:  # a triton that does not fit torch or python
        return f"triton does not load: {type(error).__name__}: {error}"
    return ""


@cache
def _kernels() -> Any:
    from spikede_plugins.engine import gpu_kernels

    return gpu_kernels


def _device_fits(device: torch.device) -> bool:
    """Tests have Triton's interpreter run the kernels on the CPU; nothing else may choose it."""
    return device.type == "cuda"


def serves(neuron: ElementwiseNeuron, past: Past, x_seq: Tensor, kernel: Kernel) -> bool:
    """Whether the kernels run this neuron on this input."""
    v = past.v
    return (
        neuron.code is not None
        and not neuron.code.in_rate
        and neuron.code.pull
        and _device_fits(v.device)
        and v.dtype in _WIDTH
        and all(p.numel() == 1 for p in neuron.params)
        and 0 < v.numel() < _MOST
        and x_seq.shape[0] > 0
        and not missing()
        and not counted()
    )


class _Plan(NamedTuple):
    """The blocks of a run.

    Attributes:
        table: ``[blocks, 8]`` on the device, int64, with the columns of ``gpu_kernels``: first and last step,
            place of the first, first row that is still a row, how many times B rows are folded, how many
            traces there are then, up to which step the block's own rows are summed as they are, and whether
            they go into the traces then.
        size: how many blocks there are.
        folds: whether rows are folded.
        traces: how many traces there are at the end.
    """

    table: Tensor
    size: int
    folds: bool
    traces: int


def _sent(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host on the device, without waiting for it."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


@lru_cache(maxsize=128)
def _plan(
    entering: int, steps: int, reach: Reach, traced: bool, traces: int, device: torch.device, _: int
) -> _Plan:
    """Kept for each stream of the device, as other streams do not wait for the copy."""
    limit = reach.limit
    run = list(_windows(entering, steps, limit) if limit else blocks(entering, steps, reach, traced))
    folding = any(block.folds for block in run)
    table, read = [], traced
    for n, block in enumerate(run):
        read = read or block.folds > 0
        until, into = min(steps, block.last + limit) if limit else steps, False
        if folding:
            # Rows of a block are folded together, as both go by B from the same row on.
            begin = entering + block.first
            later = next((b for b in islice(run, n, None) if b.low > begin), None)
            until, into = (until, False) if later is None else (later.first, True)
        here = traces if read else 0
        table.append((block.first, block.last, block.place, block.low, block.folds, here, until, int(into)))
    return _Plan(_sent(table, torch.int64, device), len(run), folding, traces if read else 0)


def _windows(entering: int, steps: int, limit: int) -> list[Block]:
    """A window has no blocks; the kernels take B steps at a time and skip what is too old for each."""
    return [
        Block(k, min(steps, k + BLOCK), 0, max(0, entering + k - limit), min(entering + k, limit), 0)
        for k in range(0, steps, BLOCK)
    ]


@lru_cache(maxsize=128)
def _numbers(code: AffineCode, dtype: torch.dtype, device: torch.device, _: int) -> Tensor:
    """The neuron's numbers in the order of the kernels; float arguments of a kernel would be float32."""
    # On a GPU torch divides by a number by multiplying with its reciprocal, in the precision of the tensor.
    divide = code.leak == "divide"
    fraction = (torch.ones((), dtype=dtype) / code.tau).item() if divide else 0.0
    leak = 1.0 - 1.0 / code.tau if divide and _form(code) == "short" else fraction
    values = (code.rest, code.threshold, code.reset or 0.0, code.surrogate_alpha, leak, fraction)
    return _sent(values, dtype, device)


def _form(code: AffineCode) -> str:
    """How the kernels write the charge (see ``AffineCode``): rounded as the framework rounds it."""
    if code.leak == "none":
        return "integrate"
    if code.decay_input:
        return "input"
    return "short" if code.short_decay and code.rest == 0.0 else "plain"


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _setting(
    code: AffineCode, params: Sequence[Tensor], past: Past, kernel: Kernel, entering: int, steps: int
) -> tuple[_Plan, tuple[Tensor, ...], tuple[int, int, int]]:
    """The plan; plan, weights, gain, readout, decay, inject, factor and numbers; neurons, inner, channels."""
    v, device = past.v, past.v.device
    stream = _stream(device)
    weights = _padded(past, kernel, stream)
    count = 0 if kernel.decay is None else kernel.decay.shape[0]
    plan = _plan(entering, steps, past.reach, past.traces is not None, count, device, stream)
    readout, decay, inject = kernel.readout, kernel.decay, kernel.inject
    if not plan.traces or readout is None or decay is None or inject is None:
        readout = decay = inject = weights  # not read
    numbers = _numbers(code, v.dtype, device, stream)
    factor = params[0].detach().to(numbers) if code.leak == "multiply" else numbers
    channels = kernel.gain.shape[-1]
    one = channels == 1 or past.channel_dim is None
    inner = 1 if one or past.channel_dim is None else v.shape[past.channel_dim + 1 :].numel()
    return (
        plan,
        (
            plan.table, weights, kernel.gain.detach().contiguous(), readout.detach().contiguous(), decay,
            inject.contiguous(), factor, numbers,
        ),
        (v.numel(), inner, channels),
    )  # fmt: skip


def _padded(past: Past, kernel: Kernel, stream: int) -> Tensor:
    """The weights that the sums use, from their first on; zeros lie before them and behind.

    Kernels take sums by groups of steps and rows, some of which are further apart than a window reaches, or
    the wrong way around. Kept for the same numbers.
    """
    kept = {} if kernel.source is None else kernel.source.arrays
    key = ("padded", past.reach.limit, stream)
    found: Tensor | None = kept.get(key)
    if found is None or len(found) < len(kernel.weights) + 2 * BLOCK:
        weights = kernel.weights.detach()[: past.reach.limit or None]
        # As long with a window as without one, so that a look tells whether it is long enough.
        behind = 2 * BLOCK + len(kernel.weights) - len(weights)
        found = kept[key] = torch.nn.functional.pad(weights, (0, 0, BLOCK, behind))[BLOCK:]
    return found


def _grid(v: Tensor) -> tuple[int]:
    return (-(-v.numel() // _WIDTH[v.dtype]),)


def march(
    code: AffineCode, params: Sequence[Tensor], past: Past, x_seq: Tensor, kernel: Kernel, rows: Tensor,
    entering: int, spikes: Tensor, h_seq: Tensor | None, v_seq: Tensor | None, marks: Tensor | None,
    log: HistoryLog,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """All steps: fills ``spikes``, the new ``rows``, and of the others what is there.

    ``marks`` (uint8) receives 1 where a neuron fired. Returns the last potential, and the traces if any rows
    were folded. Nothing is kept in ``log`` for other steps of a block: each call sums what it needs.
    """
    v = past.v
    plan, kernel_numbers, sizes = _setting(code, params, past, kernel, entering, x_seq.shape[0])
    last = torch.empty_like(v, memory_format=torch.contiguous_format)
    folded = None
    if plan.folds:
        folded = v.new_zeros((plan.traces, *v.shape)) if past.traces is None else _new(past.traces)
    traces = past.traces.detach().contiguous() if folded is None and past.traces is not None else folded
    with torch.cuda.device_of(v):
        _kernels().forward[_grid(v)](
            x_seq.detach().contiguous(), v.detach().contiguous(), past.start.detach().contiguous(), rows,
            last if traces is None else traces, *kernel_numbers, spikes, last if h_seq is None else h_seq,
            last if v_seq is None else v_seq, last if marks is None else marks, last, plan.size, entering,
            plan.traces, *sizes, FORM=_form(code),
            LEARNED=code.leak == "multiply", STRICT=code.strict, HARD=code.reset is not None,
            KEEP_H=h_seq is not None, KEEP_V=v_seq is not None, KEEP_MARKS=marks is not None,
            CHANNELS=sizes[2] > 1, TRACED=plan.traces > 0, SIZE=BLOCK,
            WIDTH=_WIDTH[v.dtype], **_LAUNCH,
        )  # fmt: skip
    return last, folded


def _new(t: Tensor) -> Tensor:
    return t.detach().clone(memory_format=torch.contiguous_format)


def adjoint(
    code: AffineCode, params: Sequence[Tensor], past: Past, x_seq: Tensor, kernel: Kernel,
    charged: Tensor | SoftReset, rows: Tensor, entering: int, grad_s: Tensor | None, grad_v: Tensor | None,
    grad_rows: Tensor | None, first_handed: int, grad_traces: Tensor | None, keep_delta: bool,
    keep_levers: bool,
) -> Adjoint:  # fmt: skip
    """The gradients of an affine neuron, and the levers if asked for; else ``x_seq`` may be empty."""
    v, steps, like = past.v, rows.shape[0] - entering, rows[entering:]
    plan, kernel_numbers, sizes = _setting(code, params, past, kernel, entering, steps)
    grad_x, delta = empty(tuple(like.shape), like), empty(tuple(like.shape), like)
    traces = None
    if plan.traces:
        traces = v.new_zeros((plan.traces, *v.shape)) if grad_traces is None else _new(-grad_traces)
    handed = grad_rows is not None and first_handed + grad_rows.shape[0] > entering
    if handed and grad_rows is not None:
        delta.zero_()
        first = max(first_handed, entering)
        last_handed = first_handed + grad_rows.shape[0]
        torch.neg(grad_rows[first - first_handed :], out=delta[first - entering : last_handed - entering])
    h_seq, marks, last = (
        (charged, delta, delta) if isinstance(charged, Tensor) else (delta, charged.fired, charged.v)
    )
    decayed = code.leak != "none" and code.decay_input
    with torch.cuda.device_of(v):
        _kernels().backward[_grid(v)](
            h_seq.detach().contiguous(), rows, past.start.detach().contiguous(), marks,
            last.detach().contiguous(), *kernel_numbers,
            delta if grad_s is None else grad_s.to(like.dtype).contiguous(),
            delta if grad_v is None else grad_v.to(like.dtype).contiguous(),
            delta if traces is None else traces, grad_x, delta, plan.size, steps, entering,
            plan.traces, *sizes,
            LEARNED=code.leak == "multiply", DECAYED=decayed, STRICT=code.strict, HARD=code.reset is not None,
            DETACH=code.detach_reset, KIND=code.surrogate, REBUILD=not isinstance(charged, Tensor),
            HAS_S=grad_s is not None, HAS_V=grad_v is not None, HANDED=handed, CHANNELS=sizes[2] > 1,
            TRACED=plan.traces > 0, SIZE=BLOCK, WIDTH=_WIDTH[v.dtype], **_LAUNCH,
        )  # fmt: skip
    levers = _levers(code, past, x_seq, kernel, rows, entering, delta) if keep_levers else None
    return Adjoint(grad_x, delta if keep_delta else None, levers)


def _levers(
    code: AffineCode, past: Past, x_seq: Tensor, kernel: Kernel, rows: Tensor, entering: int, delta: Tensor
) -> Tensor:
    lever = empty(tuple(delta.shape), delta)
    lever[0] = past.v.detach()
    torch.add(rows[entering:-1], past.start.detach(), out=lever[1:])
    lever.neg_().add_(code.rest)
    if code.leak != "none" and code.decay_input:
        lever += x_seq.detach()
    parts = [lever.mul_(delta), delta * x_seq.detach()]
    if kernel.gain.shape[-1] == 1 or past.channel_dim is None:
        return torch.stack([part.sum() for part in parts]).unsqueeze(0)
    others = [d for d in range(delta.dim()) if d != past.channel_dim + 1]
    return torch.stack([part.sum(others) for part in parts], 1)
