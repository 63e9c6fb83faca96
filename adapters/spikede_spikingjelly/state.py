"""The state of a fractional node: what it steps from, and how that lies in the framework's memories.

A node adds two state entries to the native ones: ``history``, the rows ``[r, *shape]``, and
``history_start``, the potential that the run started from. What else a solver or a memory carries lies behind
the start, in the same tensor: the rate at the start and the age of each neuron (``engine.History``), then the
traces of a compressed memory. Without them it is the start itself, ``[*shape]``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikede_plugins.engine import FRESH, FractionalOperator, History, state_dtype
from spikede_plugins.errors import OptionError, StateError
from spikede_plugins.solvers.base import CorrectorSolver
from spikede_spikingjelly.dynamics import Others

#: The state entries a fractional node adds to the native ones.
HISTORY = ("history", "history_start")

#: The attribute of a packed start that holds what it was packed of, with its version then.
_PARTS = "_spikede_parts"


class State(NamedTuple):
    """The state of a node before or after a step.

    Attributes:
        v: membrane potential ``[*shape]``.
        others: the neuron's further variables by name.
        history: the past of the membrane.
    """

    v: Tensor
    others: Others
    history: History


def unpack(operator: FractionalOperator, rows: Tensor | None, packed: Tensor | None) -> History:
    """The history that these two state entries hold."""
    if rows is None or packed is None:
        return FRESH
    parts = None if torch.compiler.is_dynamo_compiling() else getattr(packed, _PARTS, None)
    if parts is not None and parts[2] == version(packed):
        return History(rows, parts[0], parts[1])
    if packed.dim() < rows.dim() or isinstance(operator.solver, CorrectorSolver):
        return History(rows, packed)  # a solver with a corrector has no compressed memory
    if operator.memory_reset != "spike":
        return History(rows, packed[0], packed[1:])
    return History(rows, packed[:2], packed[2:] if packed.shape[0] > 2 else None)


def pack(history: History, last: Any) -> tuple[Tensor | None, Tensor | None]:
    """The two state entries for this history.

    Args:
        history: the history after a step.
        last: the packed start of the step before, used again where it still holds the same parts.
    """
    rows, start, traces = history
    if traces is None or start is None:
        return rows, start
    if torch.compiler.is_dynamo_compiling():
        return rows, _joined(start, traces)
    parts = getattr(last, _PARTS, None)
    if parts is not None and parts[0] is start and parts[1] is traces and parts[2] == version(last):
        return rows, last
    packed = _joined(start, traces)
    setattr(packed, _PARTS, (start, traces, version(packed)))
    return rows, packed


def _joined(start: Tensor, traces: Tensor) -> Tensor:
    if start.dim() < traces.dim():  # a potential, or one number for all
        start = start.expand(traces.shape[1:]).unsqueeze(0)
    return torch.cat([start, traces])


def version(t: Tensor) -> int:
    """How often ``t`` was written to."""
    return 0 if t.is_inference() else t._version  # inference tensors keep no count


def native_memories(node: Any) -> dict[str, Any]:
    """The native neuron's own state variables."""
    return {name: value for name, value in node._memories.items() if name not in HISTORY}


def fit(node: Any, x: Tensor, memories: dict[str, Any]) -> Tensor:
    """``x``, broadcast to the state where the native neuron would.

    Raises:
        StateError: if the two do not fit.
    """
    v = memories["v"]
    if not isinstance(v, Tensor) or v.shape == x.shape or node._spikede.dynamics.restarts:
        return x
    try:
        return x.expand(torch.broadcast_shapes(x.shape, v.shape))
    except RuntimeError as error:
        raise StateError(
            f"{node.native_class.__name__} holds a state of shape {tuple(v.shape)}, but one time step of "
            f"the input has shape {tuple(x.shape)}; call functional.reset_net(net) before a batch of "
            "another shape."
        ) from error


def state_of(node: Any, x: Tensor, memories: dict[str, Any]) -> State:
    """The state to step from with input ``x`` ``[*shape]``, as tensors; ``memories`` is not changed."""
    dynamics, dtype = node._spikede.dynamics, state_dtype(x)
    v = memories["v"]
    past = unpack(node.fractional, memories["history"], memories["history_start"])
    others = {n: value for n, value in memories.items() if n != "v" and n != "v_seq" and n not in HISTORY}
    if not isinstance(v, Tensor):
        # A number is what a reset leaves: the run starts here.
        v, past = torch.full_like(x, v, dtype=dtype, requires_grad=False), FRESH
    elif v.shape != x.shape and dynamics.restarts:
        v = torch.full_like(x, dynamics.restart(node), dtype=dtype, requires_grad=False)
        past = FRESH
    else:
        v = v.to(device=x.device, dtype=dtype)
        if v.shape != x.shape:
            v = v.expand(x.shape)
    history = FRESH if past.rows is None or past.start is None else _fitting(v, past)
    for name, value in others.items():
        others[name] = _other(node, name, value, v)
    return State(v, others, history)


def _fitting(v: Tensor, past: History) -> History:
    """The past in the dtype, on the device and in the shape of the potential."""
    if past.rows is not None and (past.rows.dtype != v.dtype or past.rows.device != v.device):
        past = past.each(lambda t: t.to(device=v.device, dtype=v.dtype))
    rows, start, traces = past
    if rows is None or start is None or rows.shape[1:] == v.shape:
        return past
    try:
        pair = () if start.dim() < rows.dim() else start.shape[:1]
        return History(
            rows.expand(-1, *v.shape),
            start.expand(*pair, *v.shape),
            None if traces is None else traces.expand(-1, *v.shape),
        )
    except RuntimeError:
        return FRESH  # a potential of a new shape, set by hand: the run starts there


def _other(node: Any, name: str, value: Any, v: Tensor) -> Any:
    start = node._spikede.dynamics.other_start(node, name)
    if start is None:
        return value
    if not isinstance(value, Tensor):
        return torch.full_like(v, value, requires_grad=False)
    value = value.to(device=v.device, dtype=v.dtype)
    if value.shape == v.shape:
        return value
    if value.dim() == 0 or not node._spikede.dynamics.restarts:
        return value.expand(v.shape)
    return torch.full_like(v, start, requires_grad=False)


def packed(state: State, memories: dict[str, Any]) -> dict[str, Any]:
    """``memories`` with the values of ``state``, in the same order."""
    past = dict(zip(HISTORY, pack(state.history, memories["history_start"]), strict=True))
    new = {"v": state.v, **state.others, **past}
    return {name: new.get(name, value) for name, value in memories.items()}


def named(node: Any, states: Any) -> dict[str, Any]:
    """Given states by name.

    Raises:
        StateError: for another number of states.
    """
    if len(states) != len(node._memories):
        raise StateError(
            f"the fractional {node.native_class.__name__} has {len(node._memories)} states "
            f"({', '.join(node._memories)}), got {len(states)}; two are added to the native ones: the "
            "history and its start, each None before the first step."
        )
    return dict(zip(node._memories, states, strict=True))


def first_step(node: Any, x_seq: Tensor) -> Tensor:
    """The first time step of a sequence.

    Raises:
        OptionError: for a sequence without time steps.
    """
    if x_seq.dim() == 0 or x_seq.shape[0] == 0:
        raise OptionError(
            f"{node.native_class.__name__} in multi-step mode got an input of shape "
            f"{tuple(x_seq.shape)}, which has no time steps (T = 0); give [T, B, ...] with T >= 1."
        )
    return x_seq[0]
