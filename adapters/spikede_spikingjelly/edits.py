"""What a user did to the state between two calls.

The rule of both frameworks: a state that was edited goes on, and the change is an impulse that the history
remembers. A row of the batch whose whole state was put back to its start begins a new history, it alone.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikede_plugins.engine.rows import restart_rows, restarted_rows
from spikede_plugins.errors import SpikedeWarning
from spikede_spikingjelly.state import State, native_memories, state_of, version

_PICKED = (
    "the potential of the fractional {} was given {} as its shape where it had {}: its history cannot follow "
    "and begins anew. spikede_plugins.select_rows(model, index) picks rows of a batch together with their "
    "history."
)


class Left(NamedTuple):
    """What a call left behind.

    Attributes:
        tensors: by name the state variables themselves, held weakly (a graph must not live on here), and
            their versions. A copy of the node has none.
        values: the same as they were, without a graph.
    """

    tensors: dict[str, tuple[weakref.ref[Tensor], int]]
    values: dict[str, Tensor]

    def unedited(self, memories: dict[str, Any]) -> bool:
        """Whether these are still the very tensors, written to by nobody."""
        for name in self.values:
            held = self.tensors.get(name)
            now = memories.get(name)
            if held is None or not isinstance(now, Tensor) or held[0]() is not now:
                return False
            if held[1] != version(now):
                return False
        return True

    def sendable(self) -> Left:
        """The same for a copy or a pickle, which knows the values only."""
        return Left({}, self.values)


def left(node: Any) -> Left | None:
    """What is left behind now, to be compared with when the next call comes; None before the first step."""
    found = {
        name: value
        for name, value in native_memories(node).items()
        if isinstance(value, Tensor) and name != "v_seq"
    }
    if "v" not in found:
        return None
    return Left(
        {name: (weakref.ref(value), version(value)) for name, value in found.items()},
        {name: value.detach().clone() for name, value in found.items()},
    )


def followed(before: Left | None, node: Any, memories: dict[str, Any]) -> Left | None:
    """``before`` for a node whose state was detached: the values are the same, the tensors are new ones."""
    if before is None or not before.unedited(memories):
        return before
    now = {name: node._memories[name] for name in before.values}
    return Left({n: (weakref.ref(value), version(value)) for n, value in now.items()}, before.values)


def entered(node: Any, x: Tensor) -> State:
    """The state to step from with input ``x`` ``[*shape]``, in which edited rows may begin anew."""
    state = state_of(node, x, node._memories)
    before: Left | None = node._spikede.left
    if before is None or torch.compiler.is_compiling() or before.unedited(node._memories):
        return state
    v = node._memories["v"]
    if not isinstance(v, Tensor):
        return state
    if state.history.rows is None:
        if isinstance(node._memories["history"], Tensor) and v.shape == x.shape:
            text = _PICKED.format(
                node.native_class.__name__, tuple(v.shape), tuple(before.values["v"].shape)
            )
            warnings.warn(text, SpikedeWarning, stacklevel=4)
        return state
    names = [name for name, value in before.values.items() if _comparable(_now(state, name), value)]
    if "v" not in names or v.is_meta:
        return state
    rows = restarted_rows(
        [_now(state, name) for name in names],
        [before.values[name].to(state.v.device) for name in names],
        [node._memories_rv[name] for name in names],
    )
    if rows is None:
        return state
    return state._replace(history=restart_rows(node.fractional, state.history, state.v, rows))


def _now(state: State, name: str) -> Any:
    return state.v if name == "v" else state.others.get(name)


def _comparable(now: Any, value: Tensor) -> bool:
    return isinstance(now, Tensor) and now.shape == value.shape
