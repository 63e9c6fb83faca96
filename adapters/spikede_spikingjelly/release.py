"""What differs between the releases of SpikingJelly, found by looking for features."""

from __future__ import annotations

from spikingjelly.activation_based import base, neuron

#: Neurons give their step as a function of explicit states (``functional_forward``). Without it, the release
#: has ``neuronal_charge/fire/reset`` on every neuron, and backends.
EXPLICIT_STATES = hasattr(base.MemoryModule, "functional_forward")


def neuron_class(name: str) -> type | None:
    """The neuron class of that name, or None where the release does not have it."""
    return getattr(neuron, name, None)


#: The bases that a user derives from to write a neuron with nothing but a charge.
CHARGE_BASES: tuple[type, ...] = tuple(
    kind
    for kind in (
        (neuron_class("SimpleBaseNode"),)
        if EXPLICIT_STATES
        else (neuron_class("BaseNode"), neuron_class("AdaptBaseNode"))
    )
    if kind is not None
)
