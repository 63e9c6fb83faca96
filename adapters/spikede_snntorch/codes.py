"""snnTorch neurons in plain numbers, where they have that form."""

from __future__ import annotations

import types
from typing import Any

import snntorch as snn
from snntorch import surrogate
from torch import Tensor

from spikede_plugins.checks import is_finite
from spikede_plugins.engine import DelayedReset
from spikede_plugins.surrogate import Surrogate, usable_scale

#: Factory of a surrogate: its name in ``spikede_plugins.surrogate``.
_SURROGATES = {
    "atan": "atan",
    "fast_sigmoid": "fast_sigmoid",
    "sigmoid": "sigmoid",
    "triangular": "triangular",
    "straight_through_estimator": "straight_through",
}

#: The native function of a reset mechanism.
_RESETS = {
    snn.Leaky._base_sub: "subtract",
    snn.Leaky._base_zero: "zero",
    snn.Leaky._base_int: "none",
}

#: What a user may have put into an instance in place of the native code.
_METHODS = frozenset(("fire", "mem_reset", "_base_state_function", "_base_sub", "_base_zero", "_base_int"))


def named_surrogate(function: Any) -> tuple[str, float] | None:
    """Name and scale of a function of our own or from one of snnTorch's factories; None for any other."""
    ours = getattr(function, "__self__", None)
    if type(ours) is Surrogate and ours.strict and function.__func__ is Surrogate.forward:
        return ours.name, ours.alpha
    if not isinstance(function, types.FunctionType) or function.__module__ != surrogate.__name__:
        return None
    factory, _, inner = function.__qualname__.partition(".<locals>.")
    if factory not in _SURROGATES or inner != "inner":
        return None
    values = [cell.cell_contents for cell in function.__closure__ or ()]
    if not all(isinstance(value, (int, float)) for value in values) or len(values) > 1:
        return None
    scale = values[0] if values else 1.0
    return (_SURROGATES[factory], float(scale)) if is_finite(scale) and usable_scale(scale) else None


def delayed_reset(neuron: Any) -> DelayedReset | None:
    """A ``Leaky`` in plain numbers, or None if it has options that they do not tell."""
    threshold, factor = neuron.threshold, neuron.graded_spikes_factor
    reset = _RESETS.get(getattr(neuron.state_function, "__func__", None))
    known = named_surrogate(neuron.spike_grad)
    if (
        known is None
        or reset is None
        or not neuron.reset_delay
        or neuron.inhibition
        or neuron.state_quant
        or not _is_number(threshold)
        or not _is_number(factor)
        or float(factor) != 1.0
        or not _METHODS.isdisjoint(vars(neuron))
    ):
        return None
    return DelayedReset(float(threshold), reset, *known)


def _is_number(value: Any) -> bool:
    """Whether it is one number that nothing is to learn."""
    return isinstance(value, Tensor) and value.numel() == 1 and not (value.requires_grad or value.is_meta)
