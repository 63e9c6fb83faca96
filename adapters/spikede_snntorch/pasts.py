"""Which history belongs to which membrane potential.

snnTorch hands the membrane ``mem`` to the user and takes it back at the next step, from an argument or from
its own attribute, and starts again from zeros whenever it (or the user) likes. So a history cannot belong
to the neuron: it belongs to one returned ``mem``, and is found again by the memory that this tensor occupies.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef

from spikede_plugins.engine import History, HistoryLog
from spikede_plugins.errors import SpikedeWarning

_KEPT = 16

_CUT = (
    "a membrane was handed back as an alias, after the tensor that was returned had gone and other sequences "
    "had begun: gradients of its history end here. Hand back the tensor itself, or mem.detach()."
)


def _opaque(method: Any) -> Any:
    """``method``, which captured graphs do not look into; plain code pays nothing for that."""
    hidden = torch.compiler.disable(method)

    def chosen(*args: Any) -> Any:
        return (hidden if torch.compiler.is_compiling() else method)(*args)

    return functools.wraps(method)(chosen)


class Past(NamedTuple):
    """What came before one membrane potential, and the buffer it is written to."""

    history: History
    log: HistoryLog


class _Entry:
    """One membrane, and its past without a graph and, for as long as its tensor is there, with it.

    A graph often holds the memory of the very membrane that it led to. Kept for as long as that memory, it
    would keep itself, and a forward pass without a backward pass would never be freed.
    """

    __slots__ = ("graph", "layout", "past", "storage", "tensor", "version")

    def __init__(self, mem: Tensor, storage: StorageWeakRef, past: Past) -> None:
        self.storage = storage  # weak: a history lives no longer than its membrane
        self.layout, self.version = _layout(mem), _version(mem)
        self.past = Past(past.history.each(Tensor.detach), past.log)
        self.graph = past if mem.grad_fn is not None else None
        self.tensor = weakref.ref(mem) if mem.grad_fn is not None else None

    def expired(self) -> bool:
        if self.graph is not None and self.tensor is not None and self.tensor() is None:
            self.graph = None
        return bool(self.storage.expired())


def _layout(mem: Tensor) -> tuple[Any, ...]:
    return mem.dtype, mem.shape, mem.stride(), mem.storage_offset()


def _version(mem: Tensor) -> int:
    return 0 if mem.is_inference() else mem._version  # inference tensors keep no count


class GivenPast:
    """The past of a neuron whose state is handed in and out with every step: one, whatever its membrane."""

    def __init__(self, past: Past | None = None) -> None:
        self.past = past

    def find(self, mem: Tensor) -> Past | None:
        return self.past

    def is_copy(self, mem: Tensor, last: Tensor | None) -> bool:
        return False

    def add(self, mem: Tensor, past: Past) -> None:
        self.past = past


class Pasts:
    """The histories of the membranes that one neuron has returned and that are still alive.

    A membrane is known by its memory: the tensor itself or a detached view of it. One that was copied, or
    written to since, is not known. Several sequences may run through a neuron in turn, each with its own
    ``mem``, and an older ``mem`` may be taken up again.
    """

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}
        self._limit = _KEPT

    @_opaque
    def find(self, mem: Tensor) -> Past | None:
        """The past of ``mem``, detached if ``mem`` is; None if it was not returned here as it is now."""
        entry = self._entries.get(mem.untyped_storage()._cdata)
        if entry is None or entry.storage.expired() or entry.layout != _layout(mem):
            self._prune()  # a new sequence begins: let go of what the last one left
            return None
        # `mem.data` has a count of its own, from 0; a tensor that was written to never gets back to 0.
        if _version(mem) not in (entry.version, 0):
            return None
        if mem.grad_fn is None or entry.tensor is None:
            return entry.past
        if entry.graph is None:  # let go of long ago, when its tensor was gone
            warnings.warn(_CUT, SpikedeWarning, stacklevel=3)
            return entry.past
        return entry.graph

    @_opaque
    def is_copy(self, mem: Tensor, last: Tensor | None) -> bool:
        """Whether an unknown ``mem`` is, to the last bit and not zero, the ``last`` one returned here."""
        if last is None or last is mem or last.shape != mem.shape or last.device != mem.device:
            return False
        if self.find(last) is None:
            return False
        # Values that cannot be looked at: shapes only, or a CUDA graph that is being recorded.
        if mem.is_meta or isinstance(mem, FakeTensor):
            return False
        if mem.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        return torch.equal(last.to(mem.dtype), mem) and bool(mem.any())

    @_opaque
    def add(self, mem: Tensor, past: Past) -> None:
        """``mem`` was returned, with this past."""
        storage = StorageWeakRef(mem.untyped_storage())
        self._entries.pop(storage.cdata, None)
        self._entries[storage.cdata] = _Entry(mem, storage, past)
        if len(self._entries) > self._limit:
            self._prune()
            self._limit = max(_KEPT, 2 * len(self._entries))

    def _prune(self) -> None:
        # Newest first: the graph of a newer history may be all that keeps an older membrane alive.
        for key in reversed(list(self._entries)):
            if self._entries[key].expired():
                del self._entries[key]

    def __deepcopy__(self, memo: dict[int, Any]) -> Pasts:
        return Pasts()

    def __reduce__(self) -> tuple[type[Pasts], tuple[()]]:
        return Pasts, ()
