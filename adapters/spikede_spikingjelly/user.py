"""Neurons that users wrote by defining ``neuronal_charge``: their own methods, run on a view of the node.

The view is an object of the user's class that shares the node's parameters and settings but has its own
state, so ``self.v = ...`` inside a user's method changes the view alone. Between the user's charge and the
user's firing the membrane potential becomes fractional; everything else the neuron keeps stays integer.
"""

from __future__ import annotations

from typing import Any

from spikingjelly.activation_based import neuron
from torch import Tensor

from spikede_spikingjelly.dynamics import Broadcasting, Cell, Others
from spikede_spikingjelly.state import native_memories

#: What a node keeps in dictionaries of its own; a user's method may not replace these through a view.
_CONTAINERS = {"_memories", "_memories_rv", "_parameters", "_buffers", "_modules"}


def native_view(node: Any, memories: dict[str, Any]) -> Any:
    """An object of the native class with the node's attributes and (a copy of) these state variables."""
    view = object.__new__(node.native_class)
    view.__dict__.update(node.__dict__)
    view.__dict__["_memories"] = dict(memories)
    return view


class UserCharge(Broadcasting):
    """A neuron given by its ``neuronal_charge`` (and, where it has them, its own firing and reset)."""

    affine = False
    numbers = ()  # whatever its methods make of them

    def cell(self, node: Any, x: Tensor, others: Others) -> Cell:
        seen: list[Any] = []

        def charge(v: Tensor) -> Tensor:
            # A clone, so that an in-place charge (self.v += x) cannot reach the state handed in.
            view = native_view(node, {**native_memories(node), **others, "v": v.clone()})
            if isinstance(view, neuron.AdaptBaseNode):
                view.w_float_to_tensor(x)
            view.neuronal_charge(x)
            charged = view.v
            seen.append(view)
            return charged

        def fire(h: Tensor) -> tuple[Tensor, Tensor, Others]:
            # The first call was at the potential the step started from: its other variables count.
            view = seen[0]
            view.v = h
            if isinstance(view, neuron.AdaptBaseNode):
                view.neuronal_adaptation()
            spike = view.neuronal_fire()
            view.neuronal_reset(spike)
            _keep_attributes(node, view)
            memories = view.__dict__["_memories"]
            return spike, memories["v"], {name: memories[name] for name in others}

        return Cell(charge, fire)


def _keep_attributes(node: Any, view: Any) -> None:
    """Plain attributes that the user's methods set (counters, diagnostics) belong to the node."""
    for name, value in view.__dict__.items():
        if name not in _CONTAINERS and node.__dict__.get(name) is not value:
            node.__dict__[name] = value
