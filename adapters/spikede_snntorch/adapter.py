"""Conversion between snnTorch's neurons and their fractional forms."""

from __future__ import annotations

import types
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import snntorch as snn
import torch
from torch import Tensor, nn

from spikede_plugins.adapter import Adapter, Support
from spikede_plugins.engine import FractionalOperator, History, HistoryLog
from spikede_plugins.engine.choice import engine_of
from spikede_plugins.engine.rows import Carried, Snapshot
from spikede_plugins.errors import OptionError
from spikede_plugins.surrogate import Surrogate, is_step
from spikede_plugins.tree import copy_of_state

from .codes import delayed_reset
from .entries import GivenPast, Past
from .neurons import FRACTIONAL, FractionalLeaky, FractionalNeuron, from_native, to_native
from .pasts import Pasts

#: The native classes with a membrane charge of their own, most derived first where they derive.
_CONVERTED = tuple(cls for cls in FRACTIONAL if cls.__module__.startswith("snntorch."))

_WHOLE_SEQUENCE = "its membrane is one convolution over the whole sequence, with no charge or reset a step"

#: Neurons of either release without a fractional form, by name: not every release has all of them.
_UNSUPPORTED = {
    "DeltaLeaky": "it fires on the change of its membrane between two steps and has no charge apart from "
    "its forward method",
    "LinearLeaky": f"{_WHOLE_SEQUENCE}; use torch.nn.Linear followed by Leaky",
    "StateLeaky": f"{_WHOLE_SEQUENCE}; use Leaky",
    "AssociativeLeaky": "its state is an associative memory summed over the whole sequence, not a membrane "
    "charged step by step",
    "LeakyParallel": "its membrane is the hidden state of a torch.nn.RNN run over the whole sequence; "
    "use torch.nn.Linear followed by Leaky",
    "SLSTM": "its membrane is the hidden state of an LSTM cell, whose gates are no membrane charge",
    "SConv2dLSTM": "its membrane is the hidden state of a convolutional LSTM, whose gates are no "
    "membrane charge",
}


#: The variables of the converted neurons, as they name them.
_STATES = ("spk", "syn", "syn_exc", "syn_inh", "mem")


def _listed(name: str) -> type[nn.Module] | None:
    return getattr(snn, name, None)


#: What makes up a neuron's dynamics beside its methods; a subclass that defines one of these changes them.
_STATE_NAMES = (
    "state_function", "beta", "alpha", "threshold", "mem", "syn", "syn_exc", "syn_inh", "spk", "reset", "V",
    "R", "C", "time_step", "spike_grad", "state_quant", "inhibition", "init_hidden", "output", "reset_delay",
    "reset_mechanism_val", "graded_spikes_factor", "recurrent", "__call__", "_call_impl", "__getattr__",
    "__getattribute__", "__setattr__",
)  # fmt: skip


def _dynamics(native: type[nn.Module]) -> set[str]:
    names = set(_STATE_NAMES)
    for cls in native.__mro__[: native.__mro__.index(nn.Module)]:
        names.update(name for name in vars(cls) if not name.startswith("__"))
    return names - {"instances", "reset_dict"}


def _changes(module: nn.Module, native: type[nn.Module]) -> list[str]:
    """The dynamics that a subclass, or this one object, defines differently from its native class."""
    names = _dynamics(native)
    ours = set(native.__mro__)
    changed = {name for cls in type(module).__mro__ if cls not in ours for name in vars(cls) if name in names}
    for name, value in vars(module).items():
        if name == "state_function":
            bound = isinstance(value, types.MethodType) and value.__self__ is module
            if not bound or value.__func__ is not getattr(native, value.__name__, None):
                changed.add(name)
        elif name in names and callable(value) and callable(getattr(native, name, None)):
            changed.add(name)
    return sorted(changed)


class SnnTorchAdapter(Adapter):
    """snnTorch 0.9.4 and 1.0.0: Leaky, Lapicque, Synaptic, Alpha, RLeaky, RSynaptic."""

    name = "snntorch"

    def is_neuron(self, module: nn.Module) -> bool:
        if isinstance(module, FractionalNeuron):
            return False
        others = tuple(cls for name in _UNSUPPORTED if (cls := _listed(name)) is not None)
        return isinstance(module, (snn.SpikingNeuron, *others))

    def is_fractional(self, module: nn.Module) -> bool:
        return isinstance(module, FractionalNeuron)

    def support(self, module: nn.Module) -> Support:
        kind = type(module).__name__
        for name, reason in _UNSUPPORTED.items():
            listed = _listed(name)
            if listed is not None and isinstance(module, listed):
                own = "" if type(module) is listed else f"it derives from {name}: "
                return Support(False, kind, own + reason)
        native = next((cls for cls in _CONVERTED if isinstance(module, cls)), None)
        if native is None:
            known = ", ".join(cls.__name__ for cls in _CONVERTED)
            return Support(False, kind, f"it derives from none of the neurons with a known charge ({known})")
        changed = _changes(module, native)
        if changed:
            reason = f"it is a {native.__name__} with dynamics of its own: it defines {', '.join(changed)}"
            return Support(False, kind, reason)
        return Support(True, kind)

    def to_fractional(self, module: nn.Module, operator: FractionalOperator) -> nn.Module:
        return from_native(module, operator)

    def to_native(self, module: nn.Module) -> nn.Module:
        return to_native(module)

    def operator(self, module: nn.Module) -> FractionalOperator:
        return module.fractional  # type: ignore[return-value]

    def engine(self, module: nn.Module, operator: FractionalOperator) -> str:
        leaky: Any = module if type(module) in (snn.Leaky, FractionalLeaky) else None
        whole = leaky is not None and leaky.beta.numel() == 1 and delayed_reset(leaky) is not None
        return engine_of(operator, None, whole_steps=whole)

    def reset_state(self, module: nn.Module) -> None:
        """Zeros, as ``reset_mem`` gives; this neuron only, where ``utils.reset`` reaches all of a class."""
        reset = getattr(module, "reset_mem", None)
        if callable(reset):
            reset()
        for name in ("mem", "spk"):  # neurons over whole sequences keep their last results
            value = vars(module).get(name)
            if isinstance(value, Tensor):
                setattr(module, name, value.detach())

    def use_surrogate(self, module: nn.Module, surrogate: Surrogate) -> None:
        neuron: Any = module
        if not is_step(neuron.spike_grad):
            raise OptionError(
                f"spike_grad of {neuron.native_class.__name__} is no step, so it is part of what the neuron "
                "computes."
            )
        vars(neuron)["_native_spike_grad"] = neuron.spike_grad
        # The method, not the module, which would become a child of the neuron.
        neuron.spike_grad = Surrogate(surrogate.name, surrogate.alpha, strict=True).forward

    def carry_state(self, module: nn.Module, operator: FractionalOperator) -> None:
        neuron: Any = module
        neuron.fractional = operator
        self.reset_state(module)
        vars(neuron)["_pasts"] = GivenPast()

    def state(self, module: nn.Module) -> dict[str, Tensor]:
        neuron: Any = module
        found = {}
        if neuron.init_hidden:  # else they are arguments and results already
            found = {name: neuron._buffers[name] for name in _STATES if name in neuron._buffers}
        past = vars(neuron)["_pasts"].past if isinstance(neuron, FractionalNeuron) else None
        if past is not None:
            traces = past.history.traces
            found |= {"history": past.history.rows, **({} if traces is None else {"traces": traces})}
        return found

    def set_state(self, module: nn.Module, state: dict[str, Tensor]) -> None:
        neuron: Any = module
        for name in _STATES:
            if name in state:
                setattr(neuron, name, state[name])
        rows = state.get("history")
        if rows is not None:
            history = History(rows, rows.new_zeros(()), state.get("traces"))
            vars(neuron)["_pasts"] = GivenPast(Past(history, HistoryLog()))

    # The state as users save, pick and put it back.

    membrane = "mem"

    def snapshot(self, module: nn.Module) -> Snapshot:
        neuron: Any = module
        variables = {name: neuron._buffers[name] for name in _STATES if name in neuron._buffers}
        pasts = vars(neuron).get("_pasts")
        if not isinstance(pasts, Pasts):
            return Snapshot(variables)
        held = bool(neuron.init_hidden)
        carried = []
        for entry in pasts.current(neuron.mem, held):
            past = entry.past if entry.graph is None else entry.graph
            carried.append(Carried(past.history, past.log, None if held else entry.returned()))
        return Snapshot(variables, tuple(carried))

    def restore(self, module: nn.Module, snapshot: Snapshot) -> None:
        neuron: Any = module
        for name, value in snapshot.variables.items():
            setattr(neuron, name, value)
        pasts = vars(neuron).get("_pasts")
        if not isinstance(pasts, Pasts):
            return
        found = [
            (neuron.mem if past.membrane is None else past.membrane, Past(past.history, past.log))
            for past in snapshot.pasts
        ]
        pasts.restore(found)
        if found and not neuron.init_hidden:
            neuron.mem = found[-1][0]

    def sequence_obstacle(self, module: nn.Module) -> str:
        neuron: Any = module
        if not getattr(neuron, "init_hidden", False) or getattr(neuron, "output", False):
            return "it hands its membrane in and out; construct it with init_hidden=True and output=False"
        return ""

    def run_sequence(self, module: nn.Module, operator: FractionalOperator, x_seq: Tensor) -> Tensor:
        own, module.fractional = module.fractional, operator
        self.reset_state(module)
        try:
            return torch.stack([module(x) for x in x_seq])
        finally:
            self.reset_state(module)
            module.fractional = own  # the order is another module's: it must not be found here

    def stepping(self, module: nn.Module, operator: FractionalOperator) -> nn.Module:
        alone: Any = copy_of_state(module)
        alone.fractional = operator
        self.reset_state(alone)
        return alone

    # snnTorch finds the neurons to reset and to detach in lists that its constructors fill.

    def finish(
        self, model: nn.Module, replaced: Sequence[nn.Module], added: Sequence[nn.Module]
    ) -> None:
        _forget(replaced)
        _register(added)

    def abandon(self, made: Sequence[nn.Module]) -> None:
        _forget(made)

    def adopt(self, copied: Sequence[nn.Module]) -> None:
        _register(copied)
        for module in copied:
            _relink(module)


def _register(neurons: Iterable[nn.Module]) -> None:
    listed = {id(neuron) for neuron in snn.SpikingNeuron.instances}
    spiking = (n for n in neurons if isinstance(n, snn.SpikingNeuron) and id(n) not in listed)
    snn.SpikingNeuron.instances.extend(spiking)


def _forget(neurons: Iterable[nn.Module]) -> None:
    for neuron in neurons:
        lists = {id(snn.SpikingNeuron.instances): snn.SpikingNeuron.instances}
        for cls in type(neuron).__mro__:  # `init()` gives a class a list of its own
            own = vars(cls).get("instances")
            if isinstance(own, list):
                lists[id(own)] = own
        for instances in lists.values():
            # One call, during which no other thread runs: another may be making neurons right now.
            with suppress(ValueError):
                instances.remove(neuron)


def _relink(module: nn.Module) -> None:
    """Lapicque derives its capacitance from a learnable beta at construction; a copy loses that graph."""
    if not isinstance(module, snn.Lapicque) or not isinstance(module.beta, nn.Parameter):
        return
    capacitance = module.time_step / (module.R * torch.log(1 / module.beta))
    if module.C.grad_fn is None and torch.equal(module.C, capacitance):
        module.C = capacitance
