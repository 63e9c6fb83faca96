"""The history sum ``sum_m weights_m u_{k-m}`` and the rows it runs over.

The history of a neuron layer is a tensor ``[r, *shape]`` of past deviations ``u = v - start``, newest last.
A step appends one row. Rows are only ever added behind those that exist, so all histories of one run can
be views of one growing buffer (:class:`HistoryLog`) and nothing is copied, neither forward nor for backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikede_plugins.engine.buffers import empty
from spikede_plugins.engine.observed import recorded
from spikede_plugins.errors import StateError

SECOND_DERIVATIVES = (
    "second derivatives with a learned order are not supported (create_graph=True); "
    "fix the order, learn_alpha=False, or take first derivatives."
)


class OpenBlock(NamedTuple):
    """The block that single steps are in, as the last of them left it.

    Attributes:
        before: the rows before the block, with their graph.
        inside: the rows of the block itself, with their graph.
        minus: for each step of the block, minus its sum over what is older than the block ``[B, *shape]``.
        source: what tells the weights of these sums.
        first: the place of the first step that was taken in it.
    """

    before: Tensor
    inside: Tensor
    minus: Tensor
    source: object
    first: int = 0


#: The attribute of history rows with a graph that holds the block they are in.
_OPEN = "_spikede_open"


class _Base(NamedTuple):
    rows: Tensor
    traces: Tensor | None
    source: object
    base: Tensor


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same memory."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.dtype == b.dtype


def _address(t: Tensor) -> int:
    try:
        return t.data_ptr()
    except RuntimeError:  # a tensor without memory: shapes only
        return 0


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version  # inference tensors keep no count


class HistoryLog:
    """The growing buffer behind a neuron's history tensors. A cache: losing it costs one copy.

    A history that ends where the buffer is filled is continued in place. Any other (loaded, copied,
    moved, or an older state taken up again) is first copied into a new buffer, so states never
    disturb each other. Rows behind a history are written through ``.data``, an alias whose writes are not
    counted: torch must not take a history that it has saved (a checkpoint's input) for changed.
    """

    def __init__(self) -> None:
        self._entry: tuple[Tensor, int] | None = None
        self._version = 0
        self._base: _Base | None = None
        self._steps = 0
        self._handed: int | None = None
        self._open: tuple[Tensor, OpenBlock] | None = None
        self._sent: list[Tensor] = []

    def reserve(self, history: Tensor, rows: int) -> tuple[Tensor, int]:
        """A buffer that holds ``history`` with room for ``rows`` more, and where they begin."""
        entry, kept = self._entry, history.shape[0]
        if entry is not None:
            buffer, filled = entry
            if (
                kept <= filled
                and filled + rows <= buffer.shape[0]
                and buffer.shape[1:] == history.shape[1:]
                and buffer.dtype == history.dtype
                and buffer.device == history.device
                and buffer.is_inference() == torch.is_inference_mode_enabled()
                and (filled == 0 if kept == 0 else buffer[filled - kept].data_ptr() == history.data_ptr())
            ):
                if _version(buffer) != self._version:  # a user wrote into the history
                    self._base = None
                return buffer, filled
        # What is continued will be continued again: room to double. A new sequence asks for what it needs.
        spare = max(31, kept) if kept or rows == 1 else 0
        buffer = empty((kept + rows + spare, *history.shape[1:]), history)
        buffer[:kept] = history.detach()
        return buffer, kept

    def keep_open(self, rows: Tensor, block: OpenBlock) -> None:
        """The block that the next step finds if it comes with these rows."""
        self._open = None
        if rows.requires_grad:
            # It belongs to the rows and dies with them: kept here, its graph would keep all states alive.
            setattr(rows, _OPEN, block)
        else:
            self._open = (rows, block)

    def opened(self, rows: Tensor, source: object, learned: bool) -> OpenBlock | None:
        """The open block, if it ends with these rows and its sums have the graph that they should have."""
        if recorded():
            return None
        found: OpenBlock | None = getattr(rows, _OPEN, None)
        if found is None and self._open is not None and not rows.requires_grad:
            found = self._open[1] if _same(self._open[0], rows) else None
        if found is None or source is None or found.source is not source:
            return None
        if self._entry is not None and _version(self._entry[0]) != self._version:
            return None  # a user wrote into the history
        if learned and torch.is_grad_enabled() and found.before.shape[0] and not found.minus.requires_grad:
            return None
        return found

    def room(self, history: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """``history`` with one more row that is to be written; then the second of the two is to be called."""
        buffer, filled = self.reserve(history, 1)
        rows = buffer[filled - history.shape[0] : filled + 1]
        return rows, lambda: self.commit(buffer, filled + 1)

    def commit(self, buffer: Tensor, filled: int) -> None:
        """The buffer holds ``filled`` rows now; the next append continues behind them."""
        self._entry, self._version = (buffer, filled), _version(buffer)

    def base(self, rows: Tensor, traces: Tensor | None, source: object) -> Tensor | None:
        """What :meth:`keep_base` was given last, if it belongs to these rows, traces and weights."""
        kept = self._base
        if kept is None or source is None or kept.source is not source or not _same(kept.rows, rows):
            return None
        if (traces is None) != (kept.traces is None):
            return None
        if traces is not None and kept.traces is not None and not _same(kept.traces, traces):
            return None
        return kept.base

    def keep_base(self, rows: Tensor, traces: Tensor | None, source: object, base: Tensor) -> None:
        """Keep the sums over the rows before a block for the other steps of that block."""
        self._base = _Base(rows, traces, source, base)

    def advance(self, rows: Tensor | None, steps: int, folded: bool) -> int:
        """Count: how many steps there are since the start after ``steps`` more behind these rows.

        Once rows were folded, their number is known only here, and only of the state that was handed on
        last (or of its copy): of any other state, at least as many are known as it has rows.
        """
        known = 0 if rows is None else rows.shape[0] + 1
        if folded and rows is not None and self._handed in (None, _address(rows)):
            known = max(known, self._steps)
        self._steps = known + steps
        return self._steps

    @property
    def steps(self) -> int:
        """How many steps there were since the start, as :meth:`advance` counted them."""
        return self._steps

    @classmethod
    def counting(cls, steps: int) -> HistoryLog:
        """A log without buffers that goes on counting from ``steps``."""
        log = cls()
        log._steps = steps
        return log

    def hand_on(self, rows: Tensor) -> None:
        """These rows are the newest state; the steps that were counted are its."""
        self._handed = _address(rows)

    def to_send(self, state: Any) -> Any:
        """A state (tensors, and lists and tuples of them) for a copy or a pickle: values, without a graph.

        A view of a longer buffer is copied, not to take all of that along. What was copied is kept until the
        next time: to another process goes the memory of a tensor, which must be there when it is opened.
        """
        self._sent = []
        return self._to_send(state)

    def _to_send(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            items = [self._to_send(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        if value.is_contiguous() and (value.is_meta or value.untyped_storage().nbytes() == value.nbytes):
            return value
        self._sent.append(value.clone())
        return self._sent[-1]

    def copy(self) -> HistoryLog:
        """The log for a copy of the newest state: no buffers, but the number of its steps."""
        return self.counting(self._steps)

    def __deepcopy__(self, memo: dict[int, Any]) -> HistoryLog:
        return self.copy()

    def __reduce__(self) -> tuple[type[HistoryLog], tuple[()], dict[str, int]]:
        return HistoryLog, (), {"_steps": self._steps}


def _split(shape: torch.Size, channel_dim: int | None) -> tuple[int, int, int]:
    """The sizes before, of and behind the channel dimension of a single time step."""
    if channel_dim is None:
        return 1, 1, shape.numel()
    return shape[:channel_dim].numel(), shape[channel_dim], shape[channel_dim + 1 :].numel()


def per_neuron(values: Tensor, shape: torch.Size, channel_dim: int | None) -> Tensor:
    """``[S]`` numbers shaped to broadcast against a single time step ``shape``."""
    if values.shape[-1] == 1 or channel_dim is None:
        return values.reshape(())  # one number
    return values.reshape([-1 if dim == channel_dim else 1 for dim in range(len(shape))])


def sum_by_channel(values: Tensor, like: Tensor, channel_dim: int | None) -> Tensor:
    """The sums ``[S]`` of ``values [T, *shape]`` over all but the channel."""
    if like.shape[-1] == 1 or channel_dim is None:
        return values.sum().reshape(1)
    return values.movedim(channel_dim + 1, -1).reshape(-1, like.shape[-1]).sum(0)


def _own_precision(like: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Sums in the dtype of the state, also where autocast would make them products in half precision."""
    kind = like.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


def combine(matrix: Tensor, rows: Tensor, channel_dim: int | None) -> Tensor:
    """``out[i] = sum_r matrix[i, r] rows[r]`` with matrix ``[i, r, S]`` and rows ``[r, *shape]``.

    One product for one order (S = 1), one a channel otherwise.
    """
    with _own_precision(rows):
        if matrix.shape[-1] == 1:
            product = matrix.squeeze(-1) @ rows.reshape(rows.shape[0], -1)
        else:
            a, c, b = _split(rows.shape[1:], channel_dim)
            product = torch.einsum("irc,racb->iacb", matrix, rows.reshape(rows.shape[0], a, c, b))
    return product.reshape(matrix.shape[0], *rows.shape[1:])


def correlate(left: Tensor, rows: Tensor, channel_dim: int | None, channels: int) -> Tensor:
    """``out[i, r] = sum over neurons of left[i] rows[r]``, shape ``[i, r, S]``: the adjoint of combine."""
    with _own_precision(rows):
        if channels == 1:
            return (left.reshape(left.shape[0], -1) @ rows.reshape(rows.shape[0], -1).T).unsqueeze(-1)
        a, c, b = _split(rows.shape[1:], channel_dim)
        return torch.einsum(
            "iacb,racb->irc", left.reshape(left.shape[0], a, c, b), rows.reshape(rows.shape[0], a, c, b)
        )


def history_sum(weights: Tensor, rows: Tensor, channel_dim: int | None) -> Tensor:
    """``sum_{m=1..r} weights[m-1] rows[r-m]`` for weights ``[n, S]`` (n >= r): one time step."""
    return combine(weights[: rows.shape[0]].flip(0).unsqueeze(0), rows, channel_dim)[0]


class _Remember(torch.autograd.Function):
    """The sums of one step over ``rows``, whose last one is ``u``, for one or two sets of weights."""

    @staticmethod
    def forward(
        ctx: Any, history: Tensor, u: Tensor, weights: Tensor, rows: Tensor, channel_dim: int | None,
        age: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        kept = rows.shape[0]
        sums = combine(weights[:, :kept].flip(1), remembered(rows, age), channel_dim)
        # Rows behind these may be written later, never these: no version check is needed, and an
        # alias (not the output itself) is kept so that no reference cycle forms.
        ctx.rows = rows if ctx.needs_input_grad[2] else None
        ctx.age = age
        ctx.kept, ctx.weights, ctx.channel_dim = kept, weights.detach(), channel_dim
        ctx.dropped = history.shape[0] + 1 - kept
        return rows.detach(), sums

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor | None, grad_sums: Tensor) -> Any:  # type: ignore[override]
        kept, weights, channel_dim = ctx.kept, ctx.weights, ctx.channel_dim
        shape = grad_sums.shape[1:]
        flipped = weights[:, :kept].flip(1)
        total = grad_rows
        if ctx.needs_input_grad[2] and torch.is_grad_enabled():
            raise StateError(SECOND_DERIVATIVES)
        if weights.shape[-1] == 1 and total is not None and ctx.age is None:
            with _own_precision(grad_sums):
                total = torch.addmm(
                    total.reshape(kept, -1), flipped.squeeze(-1).T, grad_sums.reshape(weights.shape[0], -1)
                ).reshape(kept, *shape)
        else:
            spread = remembered(combine(flipped.transpose(0, 1), grad_sums, channel_dim), ctx.age)
            total = spread if total is None else total + spread
        grad_history = grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_history = total[:-1]
            if ctx.dropped:
                grad_history = torch.cat([total.new_zeros(ctx.dropped, *shape), grad_history])
        if ctx.needs_input_grad[2]:
            grad_weights = torch.zeros_like(weights)
            rows = remembered(ctx.rows, ctx.age)
            grad_weights[:, :kept] = correlate(grad_sums, rows, channel_dim, weights.shape[-1]).flip(1)
        return grad_history, total[-1], grad_weights, None, None, None


def remembered(rows: Tensor, age: Tensor | None) -> Tensor:
    """The rows with those blanked that are older than their neuron remembers."""
    if age is None:
        return rows
    lag = torch.arange(rows.shape[0], 0, -1, device=rows.device, dtype=age.dtype)
    return rows.masked_fill(lag.reshape(-1, *([1] * age.dim())) > age, 0.0)


def remember(
    history: Tensor, u: Tensor, weights: Tensor, lags: int, channel_dim: int | None, log: HistoryLog,
    age: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Append ``u`` and sum: the history without and with it, and ``sums[g] = sum_m weights[g, m-1] u_{-m}``.

    Args:
        history: past rows ``[r, *shape]``.
        u: the newest deviation ``[*shape]``.
        weights: ``[G, n, S]``, n >= the number of rows summed.
        lags: how many rows to sum and to keep.
        channel_dim: which dimension of ``shape`` the S orders belong to.
        log: the buffer to append to.
        age: how many rows, the newest included, each neuron remembers ``[*shape]``; None for all.

    Returns:
        The rows kept ``[min(r + 1, lags), *shape]`` and the sums ``[G, *shape]``; differentiable in all.
    """
    if torch.compiler.is_compiling():
        # No buffer behind the scenes in a captured graph: the same rows and sums, functionally.
        rows = torch.cat([history, u.unsqueeze(0)])
        kept = min(rows.shape[0], lags)
        rows = rows[rows.shape[0] - kept :]
        return rows, combine(weights[:, :kept].flip(1), remembered(rows, age), channel_dim)
    rows = append(history, u, log)
    return _Remember.apply(history, u, weights, rows[-min(rows.shape[0], lags) :], channel_dim, age)


def append(history: Tensor, u: Tensor, log: HistoryLog) -> Tensor:
    """Write ``u`` behind ``history``: the rows ``[r + 1, *shape]``, a view of the log without a graph."""
    with torch.no_grad():
        rows, commit = log.room(history)
        rows.data[-1] = u
        commit()
        return rows


class _Joined(torch.autograd.Function):
    """``cat([*parts])`` where that lies in memory as ``whole`` already."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, *parts: Tensor) -> Tensor:
        ctx.sizes = [part.shape[0] for part in parts]
        return whole.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return None, *grad.split(ctx.sizes)


def joined(whole: Tensor, *parts: Tensor) -> Tensor:
    """``whole``, which holds ``parts`` one behind the other, with their graph; nothing is copied."""
    if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
        return _Joined.apply(whole, *parts)
    return whole
