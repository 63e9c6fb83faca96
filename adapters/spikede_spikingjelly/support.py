"""Which SpikingJelly neurons have a fractional form, and why the others have none."""

from __future__ import annotations

from typing import Any

from spikingjelly.activation_based import base, neuron
from torch import nn

from spikede_plugins.adapter import Support
from spikede_spikingjelly.dynamics import DYNAMICS, Dynamics, LeakyAnalog
from spikede_spikingjelly.node import FractionalNode
from spikede_spikingjelly.release import CHARGE_BASES, EXPLICIT_STATES
from spikede_spikingjelly.state import HISTORY
from spikede_spikingjelly.user import UserCharge

_NEURON_PACKAGE = neuron.__name__

#: Methods that take a whole step; a class that writes one has dynamics of its own.
_STEPS = frozenset(
    {
        "forward",
        "__call__",
        "single_step_forward",
        "multi_step_forward",
        "functional_forward",
        "single_step_functional_forward",
        "multi_step_functional_forward",
        "materialize_states",
        "v_float_to_tensor",
        "detach",
    }
)

#: Parts of a step: a neuron made of a charge may write them, a subclass of a ready neuron changes it by them.
_PARTS = ("neuronal_", "jit_", "apply_", "w_float_to_tensor", "_v_seq_source")

#: Numbers and functions a step reads; a property of that name changes what the step computes.
_SETTINGS = frozenset(
    {
        *("v", "v_threshold", "v_reset", "detach_reset", "surrogate_function", "tau", "decay_input", "w"),
        *("k", "scale_reset", "act", "threshold_related", "v_rest", "v_c", "a0", "theta_rh", "delta_T"),
        *("a", "b", "tau_w", "w_rest", "c_decay", "v_decay", "training", "store_v_seq"),
        *("step_mode", "supported_step_mode"),
        *("__getattr__", "__setattr__", "__getattribute__"),
    }
)

#: What a fractional neuron has for itself beside the native one's attributes.
_NEEDED = (*HISTORY, "fractional", "native_class")

#: Why a class of the framework has no fractional form (its subclasses have none either).
_REASONS = {
    "PSN": "it maps all time steps to spikes with one learned matrix; no membrane is charged step by step",
    "MaskedPSN": "it weighs the last inputs with a learned matrix; no membrane is charged from step to step",
    "SlidingPSN": "it weighs the last inputs with learned weights; no membrane is charged from step to step",
    "FewSpikeNode": "it codes one value in a few weighted spikes; its steps are code digits, not time",
    "DSRIFNode": "it is trained through its mean firing rate; its gradient is not that of the time steps",
    "DSRLIFNode": "it is trained through its mean firing rate; its gradient is not that of the time steps",
    "STBIFNode": "it counts quantised charges and emitted spikes in integers; there is no membrane equation",
    "ActivationAwareIFNode": (
        "its calibrated threshold and offset make the spike count equal a trained activation, which holds "
        "for a membrane without memory only"
    ),
    "GatedLIFNode": (
        "its gates mix leak, input and the reset of the last spike in one formula, so charge and reset "
        "cannot be told apart"
    ),
    "NonSpikingBaseNode": "it never fires: it is a readout that decodes the whole sequence at once",
    "RAFNode": "it rotates two coupled variables (resonate-and-fire); there is no single membrane charge",
    "OTTTLIFNode": "its online learning rule cuts the past at every step, which a fractional memory needs",
    "SLTTLIFNode": "its online learning rule cuts the past at every step, which a fractional memory needs",
    "MPBNBaseNode": "it batch-normalises the membrane inside a step: the charge depends on the whole batch",
    "NoisyBaseNode": "it draws noise inside a step and keeps its state out of the framework's memories",
    "NoisyNonSpikingBaseNode": "it never fires: it is a noisy readout of the whole sequence at once",
    "ILCBaseNode": "its neurons feed back on each other inside a step and it keeps no state between calls",
    "FlexSN": "its step is one function given by the user, in which charge and firing cannot be told apart",
}
_BASES = ("BaseNode", "SimpleBaseNode", "AdaptBaseNode")


def is_neuron(module: nn.Module) -> bool:
    """Whether ``module`` is a native spiking neuron (not a layer, container, encoder or learning rule)."""
    if isinstance(module, FractionalNode):
        return False
    bases: tuple[Any, ...] = tuple(
        kind for name in _BASES if (kind := getattr(neuron, name, None)) is not None
    )
    if isinstance(module, bases):
        return True
    # A class of the framework's neuron package, or derived from one.
    return any(
        (kind.__module__ == _NEURON_PACKAGE or kind.__module__.startswith(_NEURON_PACKAGE + "."))
        and issubclass(kind, (nn.Module, base.StepModule))
        for kind in type(module).__mro__
    )


def dynamics_of(module: nn.Module) -> Dynamics | None:
    """The dynamics of a supported neuron, else None."""
    found = _examine(module)
    return found if isinstance(found, Dynamics) else None


def support_of(module: nn.Module) -> Support:
    """Whether this native neuron has a fractional form; its exact class and its own attributes count."""
    kind = type(module).__name__
    found = _examine(module)
    if isinstance(found, str):
        return Support(False, kind, reason=found)
    return Support(True, kind, note=_note(module, found))


def _note(module: nn.Module, dynamics: Dynamics) -> str:
    notes = []
    if getattr(module, "backend", "torch") != "torch":
        notes.append(f"backend {module.backend!r} becomes 'torch'")
    if getattr(module, "_neuron_precision", None) is not None:
        notes.append("the reduced-precision setting is not used")
    if isinstance(dynamics, LeakyAnalog) and dynamics.plain_sequences(type(module)):
        notes.append("gives plain spikes in multi-step mode, as this release does")
    if isinstance(dynamics, UserCharge):
        notes.append("runs the class's own neuronal_charge")
    return "; ".join(notes)


def _examine(module: nn.Module) -> Dynamics | str:
    """The dynamics, or the reason why there are none."""
    kind = type(module)
    own = [n for n in vars(module) if n == "reset" or n in _STEPS or n.startswith(_PARTS)]
    if own:
        return f"its {_listed(own)} was replaced on the instance (changed dynamics)"
    taken = [name for name in _NEEDED if hasattr(module, name)]
    if taken:
        return f"it already has an attribute {_listed(taken)}, which a fractional neuron needs for itself"
    changed: list[str] = []
    for ancestor in kind.__mro__:
        if ancestor in DYNAMICS and not changed:
            return DYNAMICS[ancestor]
        if ancestor in DYNAMICS or ancestor in CHARGE_BASES:
            return _by_charge(kind, ancestor, changed)
        reason = _REASONS.get(ancestor.__name__)
        if reason and ancestor.__module__.startswith(_NEURON_PACKAGE):
            return reason
        if ancestor.__module__.startswith(_NEURON_PACKAGE) and ancestor.__name__ in _BASES:
            break
        changed += [
            name
            for name in vars(ancestor)
            if (name in _STEPS or name in _SETTINGS or name.startswith(_PARTS)) and name not in changed
        ]
    if kind.__name__ in _BASES and not changed:
        return "it is a base class without a membrane charge"
    if EXPLICIT_STATES and isinstance(module, neuron.BaseNode):
        return (
            f"it writes its own step ({_listed(changed)}), in which charge and firing cannot be told apart; "
            "derive from neuron.SimpleBaseNode and define neuronal_charge"
        )
    return "its dynamics are not known, so no membrane charge can be made fractional"


def _by_charge(kind: type, ancestor: type, changed: list[str]) -> Dynamics | str:
    """A class below ``ancestor`` that defines ``changed``: its own charge, or changed dynamics."""
    steps = [name for name in changed if name in _STEPS]
    made_of_parts = any(issubclass(ancestor, one) for one in CHARGE_BASES) and not (
        ancestor in DYNAMICS and not EXPLICIT_STATES
    )
    if made_of_parts and not steps and ancestor is not kind:
        charge = getattr(kind, "neuronal_charge", None)
        if all(charge is not getattr(one, "neuronal_charge", None) for one in CHARGE_BASES):
            return UserCharge()
    if ancestor is kind or (not changed and ancestor in CHARGE_BASES):
        return "it is a base class without a membrane charge"
    return (
        f"it changes the dynamics of {ancestor.__name__}: {_listed(steps or changed)} overridden; "
        "derive from a base class and define neuronal_charge, or exclude it"
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names)
