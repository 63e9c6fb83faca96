"""Which of several returned membranes an edited one came from: by its graph, or by its values.

An edit (a clamp, a mask, noise, another dtype) makes a new tensor. Where it has a graph, the graph leads back
to the step that returned the membrane. Else only the numbers tell: most edits leave elements as they were,
and the others move a membrane less than two streams differ.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

_KEY = "spikede_plugins.membrane"
_MOST_NODES = 4096
#: Another stream is chosen only if it is nearer than the next one by this factor.
_CLEARLY = 0.5
#: The same for a stream that seems to have ended.
_BEYOND_DOUBT = 0.1
#: Less than this share of equal elements says nothing.
_SOME_SHARE = 0.05
#: As many of the elements that tell something must be equal to take two membranes for the same.
_SAME_SHARE = 0.5


class Token:
    """A mark on a node of a graph; it lives for as long as the node does."""

    __slots__ = ("__weakref__", "output")

    def __init__(self, output: int) -> None:
        self.output = output


def mark(mem: Tensor) -> tuple[weakref.ref[Token], ...]:
    """Mark the node that ``mem`` came out of; nothing without a graph."""
    if mem.grad_fn is None:
        return ()
    token, node = Token(mem.output_nr), cast(Any, mem.grad_fn)
    node.metadata.setdefault(_KEY, []).append(token)
    return (weakref.ref(token),)


class Traced(NamedTuple):
    """What a graph tells of where a tensor came from.

    Attributes:
        through: the marks of membranes that a gradient reaches.
        beside: the marks of steps whose other results (the spikes) it reaches.
        whole: whether the graph was followed to its ends.
        reentrant: whether it goes through a checkpoint with ``use_reentrant=True``.
    """

    through: list[Token]
    beside: list[Token]
    whole: bool
    reentrant: bool


def trace(mem: Tensor, wanted: set[int]) -> Traced:
    """Follow the graph of ``mem`` back to the first marks with an id in ``wanted``."""
    through: list[Token] = []
    beside: list[Token] = []
    queue: deque[tuple[Any, int]] = deque([(mem.grad_fn, mem.output_nr)])
    seen: set[tuple[int, int]] = set()
    held = []  # a node is known by its id for as long as it is held
    reentrant = False
    while queue and len(seen) < _MOST_NODES:
        node, output = queue.popleft()
        if node is None or (id(node), output) in seen:
            continue
        seen.add((id(node), output))
        held.append(node)
        reentrant = reentrant or is_reentrant(node)
        marks = [t for t in node.metadata.get(_KEY, ()) if id(t) in wanted]
        if marks:
            for token in marks:
                into = through if token.output == output else beside
                if all(token is not other for other in into):
                    into.append(token)
            continue
        queue.extend(node.next_functions)
    return Traced(through, beside, not queue, reentrant)


def is_reentrant(node: Any) -> bool:
    """Whether a node is that of a checkpoint with ``use_reentrant=True``."""
    return "CheckpointFunction" in type(node).__name__


def readable(mem: Tensor) -> bool:
    """Whether the values may be looked at: not shapes only, no CUDA graph that is being recorded."""
    if mem.is_meta or isinstance(mem, FakeTensor):
        return False
    return not (mem.is_cuda and torch.cuda.is_current_stream_capturing())


class Likeness(NamedTuple):
    """How like two membranes are.

    Attributes:
        share: of the elements that are not zero, the share that are equal.
        distance: the mean distance of elements.
        size: the mean size of the elements of the edited one.
    """

    share: float
    distance: float
    size: float

    @property
    def same(self) -> bool:
        """Whether so much is equal that they are the same membrane, edited in part."""
        return self.share >= _SAME_SHARE

    @property
    def close(self) -> bool:
        """Whether there is no need to look for another."""
        return self.same or self.distance <= 0.05 * self.size

    @property
    def rank(self) -> tuple[float, float]:
        return (self.share if self.share > _SOME_SHARE else 0.0, -self.distance)


def likeness(mem: Tensor, values: Tensor) -> Likeness:
    """How like the membrane ``values`` the membrane ``mem`` is; zeros, which many edits make, say nothing."""
    with torch.no_grad():
        mem = mem.detach()
        values = values.to(mem)  # in the precision of the edited one, where it has less
        wide = torch.promote_types(mem.dtype, torch.float32)
        told = mem != 0
        parts = [told, (mem == values) & told, (mem.to(wide) - values.to(wide)).abs(), mem.to(wide).abs()]
        told, equal, distance, size = torch.stack([part.to(wide).mean() for part in parts]).tolist()
    return Likeness(equal / told if told > 0 else 0.0, _number(distance), _number(size))


def _number(value: float) -> float:
    return value if value == value else float("inf")


def nearer(a: Likeness, b: Likeness, *, ended: bool = False) -> bool:
    """Whether ``a`` is clearly the better of two; of a stream that seems to have ended, beyond doubt."""
    if a.share > 2.0 * b.share and a.share > _SOME_SHARE and (a.same or not ended):
        return True
    if b.share > a.share and b.share > _SOME_SHARE:
        return False
    return a.distance < (_BEYOND_DOUBT if ended else _CLEARLY) * b.distance


def holds_row(values: Tensor, mem: Tensor) -> bool:
    """Whether the first row of ``mem`` seems to be one of the rows of ``values``."""
    if not mem.numel() or not values.numel():
        return False
    with torch.no_grad():
        row = mem[:1].detach()
        values = values.to(row)
        told = row != 0
        equal = ((values == row) & told).flatten(1).sum(1).max()
        near = (values - row).abs().flatten(1).mean(1).min() < _CLEARLY * row.abs().mean()
        return bool((near | (equal >= _SAME_SHARE * told.sum())) & told.any())
