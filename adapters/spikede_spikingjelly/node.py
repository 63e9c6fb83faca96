"""The fractional spiking neuron: one node for every SpikingJelly neuron and release.

It takes over what the native neuron holds (parameters, surrogate, settings, hooks, reset values) and adds a
fractional operator and three state variables: the history of the membrane, the potential it started from, and
the traces of a compressed memory.
All state is in the framework's own ``memories``, so ``reset_net``, ``detach_net``, ``.to()`` and functional
forward carry it.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from spikingjelly.activation_based import neuron
from torch import Tensor

from spikede_plugins.engine import (
    FRESH,
    FractionalOperator,
    History,
    HistoryLog,
    can_scan,
    charge_step,
    forget_fired,
    scan,
    state_dtype,
)
from spikede_plugins.errors import OptionError, StateError
from spikede_plugins.exporting import check_capture, is_exporting, refuse
from spikede_spikingjelly.dynamics import Dynamics, Others
from spikede_spikingjelly.release import EXPLICIT_STATES
from spikede_spikingjelly.user import native_view

#: The state variables a fractional node adds to the native ones.
HISTORY = ("history", "history_start", "history_traces")

#: Module attributes that are dictionaries of the module's own (copied); hook dictionaries are shared, so
#: that the handles a user holds still remove their hooks.
_COPIED = ("_parameters", "_buffers", "_modules", "_memories", "_non_persistent_buffers_set")

#: What every node of the framework has, for natives that derive from a leaner base.
_DEFAULTS: dict[str, Any] = {"_store_v_seq": False, "v_seq": None}


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


class FractionalNode(neuron.BaseNode):
    r"""A spiking neuron with fractional membrane dynamics of order alpha.

    .. math::
        h_k = c_k + (g - 1)(c_k - v_{k-1}) - \sum_{m \ge 1} (w_m + [m = 1]) u_{k-m}, \qquad
        c_k = \mathrm{charge}(v_{k-1}, x_k), \quad u = v - v_{start}

    followed by the native neuron's firing and reset. Gain g and weights w belong to the solver; at alpha = 1
    both brackets vanish and the native neuron remains, to the last bit. The history holds the potential after
    reset. Built from a native neuron by ``convert_to_fractional``; single-step input is ``[B, ...]``,
    multi-step input ``[T, B, ...]``.

    Raises:
        OptionError: for a sequence without time steps, or orders per channel that do not fit the input.
        StateError: for an input whose shape does not fit the state, where the native neuron raises too.
        ExportError: if a call is captured as a program (torch.export, ONNX, TorchScript, NIR) that would hold
            the state as a constant.
    """

    native_class: Any
    fractional: FractionalOperator
    dynamics: Dynamics

    @classmethod
    def from_native(cls, native: Any, operator: FractionalOperator, dynamics: Dynamics) -> FractionalNode:
        """The fractional form of ``native``, which is not changed; the state starts fresh."""
        node = cls.__new__(cls)
        _take_over(node, native)
        attributes = node.__dict__
        added = [] if "_store_v_seq" in attributes else list(_DEFAULTS)
        attributes.update({name: _DEFAULTS[name] for name in added})
        attributes["_added"] = added
        attributes["_native_backend"] = attributes.get("_backend")
        if "_backend" in attributes:
            attributes["_backend"] = "torch"
        attributes["native_class"] = type(native)
        attributes["dynamics"] = dynamics
        attributes["_log"] = HistoryLog()
        node._modules["fractional"] = operator
        for name in HISTORY:
            node._memories[name] = None
            node._memories_rv[name] = None
        node.reset()
        return node

    def to_native(self) -> Any:
        """The native neuron this node was made from, with the settings the node has now; fresh state."""
        native = self.native_class.__new__(self.native_class)
        _take_over(native, self)
        attributes = native.__dict__
        for name in (*attributes["_added"], "_added", "_native_backend", "native_class", "dynamics", "_log"):
            attributes.pop(name, None)
        if "_backend" in attributes:
            attributes["_backend"] = self._native_backend
        if "_native_surrogate" in attributes:
            native.surrogate_function = attributes.pop("_native_surrogate")
        native._modules.pop("fractional")
        for name in HISTORY:
            native._memories.pop(name)
            native._memories_rv.pop(name)
        native.reset()
        return native

    # State

    def native_memories(self) -> dict[str, Any]:
        """The native neuron's own state variables."""
        return {name: value for name, value in self._memories.items() if name not in HISTORY}

    def _state(self, x: Tensor, memories: dict[str, Any]) -> State:
        """The state to step from with input ``x`` ``[*shape]``, as tensors; ``memories`` is not changed."""
        dynamics, dtype = self.dynamics, state_dtype(x)
        v, past = memories["v"], History(*(memories[name] for name in HISTORY))
        others = {n: value for n, value in memories.items() if n != "v" and n != "v_seq" and n not in HISTORY}
        if not isinstance(v, Tensor):
            # A number is what a reset leaves: the run starts here.
            v, past = torch.full_like(x, v, dtype=dtype, requires_grad=False), FRESH
        elif v.shape != x.shape and dynamics.restarts:
            v = torch.full_like(x, dynamics.restart(self), dtype=dtype, requires_grad=False)
            past = FRESH
        else:
            v = v.to(device=x.device, dtype=dtype)
            if v.shape != x.shape:
                v = v.expand(x.shape)
        history = FRESH if past.rows is None or past.start is None else self._history(v, past)
        for name, value in others.items():
            others[name] = self._other(name, value, v)
        return State(v, others, history)

    def _history(self, v: Tensor, past: History) -> History:
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

    def _other(self, name: str, value: Any, v: Tensor) -> Any:
        start = self.dynamics.other_start(self, name)
        if start is None:
            return value
        if not isinstance(value, Tensor):
            return torch.full_like(v, value, requires_grad=False)
        value = value.to(device=v.device, dtype=v.dtype)
        if value.shape == v.shape:
            return value
        if value.dim() == 0 or not self.dynamics.restarts:
            return value.expand(v.shape)
        return torch.full_like(v, start, requires_grad=False)

    def _fit(self, x: Tensor, memories: dict[str, Any]) -> Tensor:
        """``x``, broadcast to the state where the native neuron would.

        Raises:
            StateError: if the two do not fit.
        """
        v = memories["v"]
        if not isinstance(v, Tensor) or v.shape == x.shape or self.dynamics.restarts:
            return x
        try:
            return x.expand(torch.broadcast_shapes(x.shape, v.shape))
        except RuntimeError as error:
            raise StateError(
                f"{self.native_class.__name__} holds a state of shape {tuple(v.shape)}, but one time step of "
                f"the input has shape {tuple(x.shape)}; call functional.reset_net(net) before a batch of "
                "another shape."
            ) from error

    def _packed(self, state: State, memories: dict[str, Any]) -> dict[str, Any]:
        """``memories`` with the values of ``state``, in the same order."""
        past = dict(zip(HISTORY, state.history, strict=True))
        new = {"v": state.v, **state.others, **past}
        return {name: new.get(name, value) for name, value in memories.items()}

    # Time

    def _step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One time step of any neuron: native charge made fractional, native firing and reset."""
        found = self._scan(x.unsqueeze(0), state, keep=False)
        if found is not None:
            return found[0].squeeze(0), found[1]
        cell = self.dynamics.cell(self, x.to(state.v.dtype), state.others)
        charged, history = charge_step(
            self.fractional, cell.charge, state.v, state.history, self._log, affine=self.dynamics.affine
        )
        output, v, others = cell.fire(charged)
        if self.fractional.memory_reset == "spike":
            history = forget_fired(history, v, self.dynamics.fired(self, charged, output))
        return _as_output(output, x), State(v, others, history)

    def _scan(self, x_seq: Tensor, state: State, keep: bool) -> tuple[Tensor, State, Tensor | None] | None:
        """Time steps ``[T, *shape]`` by the scan engine; None for neurons and options that it does not serve.

        A single step takes this way as well: the same sums in the same order give the same bits.
        """
        if not can_scan(self.fractional) or not self.dynamics.scannable(self):
            return None
        if is_exporting():  # a program of torch's own operations: ONNX knows no other, and it loads anywhere
            return None
        cell = self.dynamics.elementwise(self)
        # A captured graph takes the scan as one operation or, without a code for it, step by step.
        if cell is None or (cell.code is None and torch.compiler.is_compiling()):
            return None
        spikes, v, history, v_seq = scan(
            self.fractional, cell, x_seq, state.v, state.history, self._log, keep_v=keep
        )
        return _as_output(spikes, x_seq), State(v, state.others, history), v_seq

    def _run(
        self, x_seq: Tensor, state: State, keep: bool
    ) -> tuple[Tensor, State, Tensor | None, list[Others]]:
        """All time steps; with ``keep`` also the potentials ``[T, *shape]`` and other variables of each."""
        found = self._scan(x_seq, state, keep)
        if found is not None:
            return *found, []
        outputs, potentials, others = [], [], []
        for x in x_seq:
            output, state = self._step(x, state)
            outputs.append(output)
            if keep:
                potentials.append(state.v)
                others.append(state.others)
        return torch.stack(outputs), state, torch.stack(potentials) if keep else None, others

    def _first(self, x_seq: Tensor) -> Tensor:
        if x_seq.dim() == 0 or x_seq.shape[0] == 0:
            raise OptionError(
                f"{self.native_class.__name__} in multi-step mode got an input of shape "
                f"{tuple(x_seq.shape)}, which has no time steps (T = 0); give [T, B, ...] with T >= 1."
            )
        return x_seq[0]

    def single_step_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """One time step: input and output ``[B, ...]``; the state is kept in the node."""
        _no_more(self, args, kwargs)
        self._check_capture(x)
        x = self._fit(x, self._memories)
        output, state = self._step(x, self._state(x, self._memories))
        self._memories.update(self._packed(state, self._memories))
        if self._store_v_seq and EXPLICIT_STATES:
            source = None if "m" in state.others else state.v  # ComplementaryLIFNode keeps none in this mode
            if source is not None:
                self._append_v_seq(source)
        return output

    def multi_step_forward(self, x_seq: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """T time steps: input and output ``[T, B, ...]``; the state is kept in the node."""
        _no_more(self, args, kwargs)
        self._check_capture(x_seq, fresh=not isinstance(self._memories["v"], Tensor))
        x = self._fit(self._first(x_seq), self._memories)
        if x.shape != x_seq.shape[1:]:
            x_seq = x_seq.expand(-1, *x.shape)
        pairs = getattr(self, "_store_state_seqs", False)
        outputs, state, v_seq, others = self._run(
            x_seq, self._state(x, self._memories), keep=self._store_v_seq or pairs
        )
        self._memories.update(self._packed(state, self._memories))
        if self._store_v_seq:
            self.v_seq = v_seq
        if pairs:
            self.state_seqs = [v_seq, torch.stack([other["m"] for other in others])]
        return outputs

    def materialize_states(self, inputs: Any, states: Any, step_mode: str) -> tuple[Any, ...]:
        """The states as tensors that fit the input, as functional forward wants them."""
        memories = self._named(states)
        x = self._fit(self._first(inputs[0]) if step_mode == "m" else inputs[0], memories)
        return tuple(self._packed(self._state(x, memories), memories).values())

    def single_step_functional_forward(
        self, inputs: Any, states: Any, **kwargs: Any
    ) -> tuple[tuple[Tensor], tuple[Any, ...]]:
        """One time step from given states (in the order of ``named_memories``); nothing is kept."""
        _no_more(self, inputs[1:], kwargs)
        memories = self._named(states)
        self._check_capture(inputs[0], fresh=True)
        x = self._fit(inputs[0], memories)
        output, state = self._step(x, self._state(x, memories))
        return (output,), tuple(self._packed(state, memories).values())

    def multi_step_functional_forward(
        self, inputs: Any, states: Any, **kwargs: Any
    ) -> tuple[tuple[Tensor], tuple[Any, ...]]:
        """T time steps from given states (in the order of ``named_memories``); nothing is kept."""
        _no_more(self, inputs[1:], kwargs)
        memories, x_seq = self._named(states), inputs[0]
        self._check_capture(x_seq, fresh=True)
        x = self._fit(self._first(x_seq), memories)
        if x.shape != x_seq.shape[1:]:
            x_seq = x_seq.expand(-1, *x.shape)
        outputs, state, _, _ = self._run(x_seq, self._state(x, memories), keep=False)
        return (outputs,), tuple(self._packed(state, memories).values())

    def _check_capture(self, x: Any, fresh: bool = False) -> None:
        check_capture(self, self.native_class.__name__, x, self.fractional.captures, fresh=fresh)

    def __prepare_scriptable__(self) -> Any:
        refuse(self.native_class.__name__, "torch.jit.script")

    def _named(self, states: Any) -> dict[str, Any]:
        if len(states) != len(self._memories):
            raise StateError(
                f"the fractional {self.native_class.__name__} has {len(self._memories)} states "
                f"({', '.join(self._memories)}), got {len(states)}; three are added: the history, its start "
                "and its traces, each None before the first step."
            )
        return dict(zip(self._memories, states, strict=True))

    # Life cycle

    def reset(self) -> None:
        """Back to the start: every state variable to its reset value, the history forgotten."""
        for name in self._memories:
            self._memories[name] = copy.deepcopy(self._memories_rv[name])
        self.__dict__["_log"] = HistoryLog()
        self._drop_recordings()

    def detach(self) -> None:
        """Cut the graph behind the state (truncated backpropagation); values stay."""
        # Not in place: the states of one run may be views of one tensor.
        for name, value in self._memories.items():
            if isinstance(value, Tensor):
                self._memories[name] = value.detach()
        if isinstance(self.__dict__.get("v_seq"), Tensor):
            self.__dict__["v_seq"] = self.__dict__["v_seq"].detach()

    @property
    def store_state_seqs(self) -> bool:
        """Whether a ComplementaryLIFNode keeps both of its variables of every step."""
        return self.__dict__.get("_store_state_seqs", False)

    @store_state_seqs.setter
    def store_state_seqs(self, value: bool) -> None:
        self.__dict__["_store_state_seqs"] = value
        self.__dict__["state_seqs"] = None

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> FractionalNode:
        # Flat: a memory format such as channels_last is meant for images, not for their history.
        shapes = {n: t.shape for n in HISTORY if isinstance(t := self._memories[n], Tensor) and t.dim() > 2}
        for name in shapes:
            self._memories[name] = self._memories[name].flatten(1)
        try:
            return super()._apply(fn, *args, **kwargs)
        finally:
            for name, shape in shapes.items():
                self._memories[name] = self._memories[name].reshape(shape)

    def _drop_recordings(self) -> None:
        for name in ("v_seq", "state_seqs"):
            if name in self.__dict__:
                self.__dict__[name] = None

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles carry values, not graphs (tensors with a graph refuse both), nor spare buffers.
        state = dict(self.__dict__)
        recorded = [name for name in ("v_seq", "state_seqs") if name in state]
        memories, recordings = self._log.to_send(
            [list(self._memories.values()), [state[name] for name in recorded]]
        )
        state["_memories"] = dict(zip(self._memories, memories, strict=True))
        state.update(zip(recorded, recordings, strict=True))
        return state

    def _replicate_for_data_parallel(self) -> FractionalNode:
        replica = super()._replicate_for_data_parallel()
        replica._memories = dict(self._memories)
        replica.__dict__["_log"] = HistoryLog()  # replicas run side by side
        return replica

    def extra_repr(self) -> str:
        native = native_view(self).extra_repr()
        return f"{self.native_class.__name__}, {native}" if native else self.native_class.__name__


def _take_over(to: Any, origin: Any) -> None:
    """Give ``to`` the attributes of ``origin``: the same parameters and hooks, dictionaries of its own."""
    attributes = dict(origin.__dict__)
    attributes.pop("_compiled_call_impl", None)  # compiled for the other object
    for name in _COPIED:
        if name in attributes:
            attributes[name] = copy.copy(attributes[name])
    attributes["_memories_rv"] = copy.deepcopy(attributes["_memories_rv"])
    to.__dict__.update(attributes)


def _as_output(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.dtype) if x.is_floating_point() else values


def _no_more(node: FractionalNode, args: Any, kwargs: Any) -> None:
    if args or kwargs:
        raise TypeError(
            f"{node.native_class.__name__} takes one input, got {1 + len(args)} and {sorted(kwargs)}."
        )
