"""One returned membrane with what came before it, and what tells it apart from others."""

from __future__ import annotations

import warnings
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from spikede_plugins.engine import History, HistoryLog
from spikede_plugins.errors import SpikedeWarning

from .matching import Likeness, likeness, mark

_CUT = (
    "a membrane was handed back as an alias or edited, after the tensor that was returned had gone and other "
    "sequences had begun: gradients of its history end here. Hand back the tensor itself, or mem.detach()."
)


class Past(NamedTuple):
    """What came before one membrane potential, and the buffer it is written to.

    Attributes:
        history, log: as of the engine.
        origin: the membrane or the new sequence that the step goes on from; None outside a step.
    """

    history: History
    log: HistoryLog
    origin: Any = None


class Stream:
    """A sequence of steps from one beginning.

    Attributes:
        began: when it began.
        steps: how many it has taken.
        firsts: the variables beside the membrane before the first one; None for zeros.
        edited: whether a membrane of it was handed back changed or as a copy.
        clamps: whether they are clamped to the start.
    """

    __slots__ = ("began", "clamps", "edited", "firsts", "steps")

    def __init__(self, began: int, firsts: tuple[Tensor | None, ...] = ()) -> None:
        self.began, self.firsts, self.steps = began, firsts, 0
        self.edited = self.clamps = False


class Mark:
    """The memory that a tensor occupies, and whether it was written to since."""

    __slots__ = ("layout", "storage", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.storage = StorageWeakRef(tensor.untyped_storage())  # weak: nothing is kept alive
        self.layout, self.version = _layout(tensor), _version(tensor)

    def occupies(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is the same memory."""
        if self.storage.expired() or self.storage.cdata != tensor.untyped_storage()._cdata:
            return False
        return self.layout == _layout(tensor)

    def untouched(self, tensor: Tensor) -> bool:
        """Whether nobody wrote to ``tensor``, which is the same memory; False where that cannot be told."""
        # `mem.data` has a count of its own, from 0; a tensor that was written to never gets back to 0.
        return not tensor.is_inference() and _version(tensor) in (self.version, 0)


def _layout(mem: Tensor) -> tuple[Any, ...]:
    return mem.dtype, mem.shape, mem.stride(), mem.storage_offset()


def _version(mem: Tensor) -> int:
    return 0 if mem.is_inference() else mem._version  # inference tensors keep no count


class Entry:
    """One membrane, and its past without a graph and, for as long as its tensor is there, with it.

    A graph often holds the memory of the very membrane that it led to. Kept for as long as that memory, it
    would keep itself, and a forward pass without a backward pass would never be freed.

    Attributes:
        mark: the memory of the membrane; None where it was taken from a saved state.
        values: the whole state as it was returned, the membrane first; None once a step has continued it.
        head: whether no step has continued it.
    """

    __slots__ = (
        "graph", "had_graph", "head", "mark", "others", "past", "stream", "tensor", "time",
        "tokens", "values",
    )  # fmt: skip

    def __init__(
        self, mem: Tensor, others: tuple[Tensor, ...], past: Past, stream: Stream, time: int
    ) -> None:  # fmt: skip
        self.mark: Mark | None = Mark(mem)
        self.others = tuple(Mark(other) for other in others)
        self.values: tuple[Tensor, ...] | None = None
        self.past = Past(past.history.each(Tensor.detach), past.log)
        self.tokens = mark(mem)
        self.had_graph = mem.grad_fn is not None
        self.graph = Past(past.history, past.log) if self.had_graph else None
        self.tensor = weakref.ref(mem)
        self.stream, self.time, self.head = stream, time, True

    @property
    def alive(self) -> bool:
        """Whether anybody still holds the membrane, or a graph that leads through it."""
        held = self.mark is not None and not self.mark.storage.expired()
        return held or any(token() is not None for token in self.tokens)

    def edited(self, mem: Tensor, others: tuple[Tensor, ...]) -> bool:
        """Whether the state, whose membrane is the same memory, may be another than the one returned."""
        if self.mark is None or not self.mark.untouched(mem) or len(others) != len(self.others):
            return True
        pairs = zip(self.others, others, strict=True)
        return not all(m.occupies(other) and m.untouched(other) for m, other in pairs)

    def take(self, connected: bool) -> Past:
        """The past, with its graph if a gradient is to flow."""
        if not connected or not self.had_graph:
            return self.past
        if self.graph is None:  # let go of long ago, when its tensor was gone
            warnings.warn(_CUT, SpikedeWarning, stacklevel=5)
            return self.past
        return self.graph

    @property
    def shape(self) -> torch.Size | None:
        """The shape of the membrane."""
        if self.values is not None:
            return self.values[0].shape
        return None if self.mark is None else self.mark.layout[1]  # type: ignore[no-any-return]

    def newest(self) -> Tensor | None:
        """The membrane as it was returned, where it can still be read."""
        if self.values is not None:
            return self.values[0]
        tensor = self.tensor()
        if tensor is None or self.mark is None or not self.mark.untouched(tensor):
            return None
        return tensor.detach()

    @property
    def size(self) -> int:
        """The bytes of the history."""
        return sum(t.numel() * t.element_size() for t in self.past.history if t is not None)

    def returned(self) -> Tensor | None:
        """The membrane that was returned, with its graph where that is there."""
        tensor = self.tensor()
        if tensor is not None and self.mark is not None and self.mark.untouched(tensor):
            return tensor
        return self.newest()

    def like(self, mem: Tensor) -> Likeness | None:
        """How like the membrane that was returned ``mem`` is; None if that one can no longer be read."""
        values = self.newest()
        return None if values is None else likeness(mem, values)


class GivenPast:
    """The past of a neuron whose state is handed in and out with every step: one, whatever its membrane."""

    def __init__(self, past: Past | None = None) -> None:
        self.past = past

    def find(self, mem: Tensor, owner: Any = None) -> Past | None:
        return self.past

    def add(
        self, mem: Tensor, past: Past, others: tuple[Tensor, ...] = (), values: Tensor | None = None
    ) -> None:  # fmt: skip
        self.past = past

    def reset(self) -> None:
        pass
