"""Where the neurons of a run begin, and where they end: initial potentials, and a state carried over chunks.

A state is a plain nested dict, by the neuron's path (from the second call of a neuron in a step on
``"path (call 2)"``), laid out as that of :func:`spikede_plugins.get_state`:

    {"fc.lif": {"variables": {"v": [B, ...]}, "histories": [{"rows": [r, B, ...], "start": ..., ...}],
                "step_size": h, "rates": decay rates of a compressed memory's traces [P], or None}}

with the graph of the run that it comes from; ``torch.save`` writes it, ``torch.load(weights_only=True)``
reads it. A chunk that begins with the state at the end of another one goes on as if both were one run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spikede_plugins.call_order import use_name
from spikede_plugins.checks import is_finite, is_readable
from spikede_plugins.engine import FRESH, FractionalOperator, HistoryLog
from spikede_plugins.engine.rows import (
    Carried,
    over_rows,
    restart_rows,
    row_index,
    row_mask,
    select_history,
    unpack,
)
from spikede_plugins.errors import OptionError, OptionTypeError, StateError
from spikede_plugins.neuron_steps import NeuronCall, OwnNeuronCall
from spikede_plugins.orders import FractionalOrder
from spikede_plugins.registry import get_solver
from spikede_plugins.solvers.base import CorrectorSolver

#: What a run ends with.
State = dict[str, dict[str, Any]]
_PARTS = {"variables", "histories", "step_size", "rates"}


class RunStates:
    """The beginning and the end of each neuron call of one run.

    Args:
        names: the neurons' paths by the identity of the module.
        v0: a number, a tensor that broadcasts against the potentials ``[B, ...]``, or either by the neuron's
            path; neurons that are not named begin at 0.
        initial_state: what an earlier run ended with.
        keep: whether it is asked for what this one ends with.

    Raises:
        OptionError, OptionTypeError, StateError: for both of them, or what is none of these.
    """

    def __init__(
        self, names: Mapping[int, str], v0: Any = None, initial_state: Any = None, keep: bool = False
    ) -> None:
        self.names, self.v0, self.before, self.keep = names, v0, initial_state, keep
        self.calls: list[NeuronCall] = []
        self._paths: list[str] = []
        if v0 is not None and initial_state is not None:
            raise OptionError("initial_state has the potentials that a run goes on with; leave v0 out.")
        if initial_state is not None and not isinstance(initial_state, Mapping):
            raise OptionTypeError(
                "initial_state must be the state that net(x, x_time, return_state=True) returned, got "
                f"{type(initial_state).__name__}."
            )
        self._check_names(v0, "v0")
        self._check_names(initial_state, "initial_state")

    def _check_names(self, given: Any, what: str) -> None:
        if not isinstance(given, Mapping):
            return
        known = sorted(self.names.values())
        for name in given:
            if not isinstance(name, str) or name.split(" (call ")[0] not in known:
                raise StateError(f"{what} names {name!r}; the model's neurons are {', '.join(known)}.")

    def _name_of_next(self, layer: Any) -> str:
        self._paths.append(self.names[id(layer)])
        return use_name(self._paths, len(self._paths) - 1)

    def first(self, layer: Any, rest: Tensor) -> Tensor:
        """Where the next neuron call begins, for integrators that ask for its potential alone."""
        return self._potential(self._name_of_next(layer), rest)

    def begin(self, call: NeuronCall, layer: Any) -> NeuronCall:
        """The call, put where it begins."""
        name = self._name_of_next(layer)
        self.calls.append(call)
        if not isinstance(call, OwnNeuronCall):
            raise OptionError(
                f"{name}: SNNWrapper begins and ends neurons of a framework at rest. "
                "convert_to_fractional(model) carries their state from call to call, and get_state and "
                "set_state take it out and put it back; or use LIFNeuron or IFNeuron here."
            )
        if self.before is not None:
            call.v, carried = _entry(self.before, name, call.v)
            _check_history(self.before[name], carried, call.operator, name)
            call.history, call.log = carried.history, carried.log
        elif self.v0 is not None:
            call.v = self._potential(name, call.v)
        return call

    def _potential(self, name: str, rest: Tensor) -> Tensor:
        """Where a neuron with the resting potential ``rest [B, ...]`` begins."""
        given = self.v0.get(name, 0.0) if isinstance(self.v0, Mapping) else self.v0
        if given is None:
            return rest
        if isinstance(given, bool) or not isinstance(given, (int, float, Tensor)):
            raise OptionTypeError(f"v0 of {name} must be a number or a tensor, got {type(given).__name__}.")
        if not isinstance(given, Tensor):
            if not is_finite(given):
                raise OptionError(f"v0 of {name} must be finite, got {given}.")
            return torch.full_like(rest, float(given))
        if not is_readable(given) or given.is_complex() or not bool(given.isfinite().all()):
            raise OptionError(f"v0 of {name} must hold finite numbers.")
        try:
            return given.to(rest).expand(rest.shape).contiguous()
        except RuntimeError as error:
            raise OptionError(
                f"v0 of {name} has shape {tuple(given.shape)}, which does not broadcast against its "
                f"potentials, {tuple(rest.shape)}; give a number, or a tensor for each neuron: "
                f"v0={{{name!r}: ...}}."
            ) from error

    def all_used(self) -> None:
        """After the run: every name that was given has had its neuron call.

        Raises:
            StateError: if the model did not call one of them.
        """
        used = {use_name(self._paths, i) for i in range(len(self._paths))}
        for given, what in ((self.v0, "v0"), (self.before, "initial_state")):
            unused = sorted(set(given) - used) if isinstance(given, Mapping) else []
            if unused:
                raise StateError(f"{what} names {', '.join(unused)}, which the model did not call.")

    def end(self) -> State:
        """The state at the end of the run, in tensors of its own, with their graph."""
        state: State = {}
        for i, call in enumerate(self.calls):
            assert isinstance(call, OwnNeuronCall)
            parts = dict(zip(("rows", "start", "traces"), call.history, strict=True))
            history = {name: None if t is None else t.clone() for name, t in parts.items()}
            state[use_name(self._paths, i)] = {
                "variables": {"v": call.v.clone()},
                "histories": [{**history, "membrane": None, "steps": call.log.steps}],
                "step_size": call.operator.step_size,
                "rates": _rates(call.operator),
            }
        return state


def _entry(state: Mapping[str, Any], name: str, rest: Tensor) -> tuple[Tensor, Carried]:
    """The potential and the past of one neuron call in a state.

    Raises:
        StateError: if the state has none, or one of another batch, shape or dtype.
        OptionTypeError: if it is no state.
    """
    if name not in state:
        raise StateError(
            f"initial_state has nothing of {name}; it has {', '.join(map(str, state)) or 'no neuron'}. Take "
            "the state from a run of the same model."
        )
    v, histories = _parts(state[name], name)
    try:
        carried = unpack(histories[0]) if histories else Carried(FRESH, HistoryLog())
    except (OptionError, OptionTypeError) as error:
        raise type(error)(f"initial_state of {name}: {error}") from error
    if v.shape != rest.shape:
        raise StateError(
            f"initial_state of {name} is one of potentials {tuple(v.shape)}, and this input needs "
            f"{tuple(rest.shape)}; select_rows(state, index) picks samples, another model has another state."
        )
    if v.dtype != rest.dtype or v.device != rest.device:
        v = v.to(rest)
        carried = carried._replace(history=carried.history.each(lambda t: t.to(rest)))
    return v, carried


def _rates(operator: FractionalOperator) -> Tensor | None:
    return None if operator._nodes is None else operator._nodes.rates.clone()


def _check_history(entry: Any, carried: Carried, operator: FractionalOperator, name: str) -> None:
    """Whether a run can go on with this past.

    Raises:
        StateError: if the past is one of another step, another kind of solver or other traces.
    """
    step, h = float(entry["step_size"]), operator.step_size
    if abs(step - h) > 1e-5 * h:
        raise StateError(
            f"initial_state of {name} comes from steps of {step:g}, and this run has steps of {h:g}. Give "
            "x_time with the same step; for a single time point, with the end of its step, or "
            f'options={{"step_size": {step:g}}}.'
        )
    rows, start, traces = carried.history
    if rows is None or start is None:
        return
    if (start.dim() == rows.dim()) != isinstance(operator.solver, CorrectorSolver):
        raise StateError(
            f"initial_state of {name} comes from another kind of method than {operator.solver.name!r}; go on "
            "with the method that the run began with."
        )
    rates = _rates(operator)
    if traces is not None and (rates is None or not _same(rates, entry["rates"])):
        raise StateError(
            f"initial_state of {name} holds traces of another memory than {operator.memory.describe()!r} "
            f"of order {operator.order.describe()}; go on with the memory, method and order of before."
        )


def _same(rates: Tensor, given: Any) -> bool:
    return isinstance(given, Tensor) and given.shape == rates.shape and torch.allclose(given.to(rates), rates)


def _parts(entry: Any, name: str) -> tuple[Tensor, Sequence[Any]]:
    if not isinstance(entry, Mapping) or set(entry) != _PARTS or set(entry["variables"]) != {"v"}:
        raise OptionTypeError(
            f"the state of {name} must hold its variable v and its histories, got {entry!r:.80}; it is what "
            "net(x, x_time, return_state=True) returns."
        )
    return entry["variables"]["v"], entry["histories"]


# -- rows of a state ------------------------------------------------------------------------------


def reset_state_rows(state: Mapping[str, Any], rows: Any) -> State:
    """The state in which some samples of the batch are back at their start; the others as they are."""

    def again(v: Tensor, past: Carried) -> tuple[Tensor, Carried]:
        history = past.history
        if history.rows is None or history.start is None:
            return v, past
        corrector = history.start.dim() == history.rows.dim()
        start = history.start[0] if corrector else history.start
        mask = row_mask(rows, v.shape[0])
        v = torch.where(over_rows(mask.to(v.device), v.shape), start, v)
        return v, Carried(restart_rows(_any_operator(corrector), history, v, mask), past.log)

    return _changed(state, again)


def select_state_rows(state: Mapping[str, Any], index: Any) -> State:
    """The state of some samples of the batch, in the order of ``index``."""

    def chosen(v: Tensor, past: Carried) -> tuple[Tensor, Carried]:
        rows = row_index(index, v.shape[0])
        return v.index_select(0, rows.to(v.device)), Carried(select_history(past.history, rows), past.log)

    return _changed(state, chosen)


def _changed(state: Mapping[str, Any], change: Callable[[Tensor, Carried], tuple[Tensor, Carried]]) -> State:
    new: State = {}
    for name, entry in state.items():
        v, histories = _parts(entry, str(name))
        pasts = []
        for packed in histories:
            moved, past = change(v, unpack(packed))
            parts = dict(zip(("rows", "start", "traces"), past.history, strict=True))
            pasts.append({**parts, "membrane": None, "steps": past.log.steps})
        new[str(name)] = {**entry, "variables": {"v": moved}, "histories": pasts}
    return new


def _any_operator(corrector: bool) -> FractionalOperator:
    """An operator of the kind of solver that a history was made by."""
    return FractionalOperator(FractionalOrder(0.5), get_solver("abm" if corrector else "gl"))
