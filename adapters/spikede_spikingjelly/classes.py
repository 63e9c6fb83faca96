"""The fractional class of each native class, and neurons on their way between the two."""

from __future__ import annotations

import copy
import threading
import types
import weakref
from typing import Any

from spikede_plugins.engine import FractionalOperator
from spikede_spikingjelly.dynamics import Dynamics
from spikede_spikingjelly.node import FractionalNode, Own
from spikede_spikingjelly.state import HISTORY

#: Module attributes that are dictionaries of the module's own (copied); hook dictionaries are shared, so
#: that the handles a user holds still remove their hooks.
_COPIED = ("_parameters", "_buffers", "_modules", "_memories", "_non_persistent_buffers_set")

#: Weak on both sides: a class that a user defines again and again is not kept; a made class keeps its own.
_MADE: weakref.WeakKeyDictionary[type[Any], weakref.ref[type[FractionalNode]]] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def fractional_class(native_class: type[Any]) -> type[FractionalNode]:
    """The fractional class of a native neuron class, or of a user's subclass: the same one at every call.

    It derives from :class:`FractionalNode`, which takes every step, and then from the native class.
    """
    with _LOCK:
        reference = _MADE.get(native_class)
        made = None if reference is None else reference()
        if made is None:
            names = {
                "native_class": native_class,
                "__module__": __name__,
                "__doc__": f"``{native_class.__name__}`` with fractional membrane dynamics.",
            }
            made = types.new_class(
                f"Fractional{native_class.__name__}", (FractionalNode, native_class), {},
                lambda namespace: namespace.update(names),
            )  # fmt: skip
            _MADE[native_class] = weakref.ref(made)
        return made


def empty(native_class: type[Any]) -> FractionalNode:
    """A fractional neuron without contents, for copies and pickles to fill."""
    cls = fractional_class(native_class)
    return cls.__new__(cls)


def from_native(native: Any, operator: FractionalOperator, dynamics: Dynamics) -> FractionalNode:
    """The fractional form of ``native``, which is not changed; the state starts fresh."""
    node = empty(type(native))
    _take_over(node, native)
    attributes = node.__dict__
    attributes["_spikede"] = Own(dynamics, attributes.get("_backend"))
    if "_backend" in attributes:
        attributes["_backend"] = "torch"
    node._modules["fractional"] = operator
    for name in HISTORY:
        node._memories[name] = None
        node._memories_rv[name] = None
    node.reset()
    return node


def to_native(node: FractionalNode) -> Any:
    """The native neuron that ``node`` was made from, with the settings the node has now; fresh state."""
    native: Any = object.__new__(node.native_class)
    _take_over(native, node)
    own: Own = native.__dict__.pop("_spikede")
    if own.backend is not None:
        native.__dict__["_backend"] = own.backend
    if own.surrogate is not None:
        native.surrogate_function = own.surrogate[0]
    native._modules.pop("fractional")
    for name in HISTORY:
        native._memories.pop(name)
        native._memories_rv.pop(name)
    native.reset()
    return native


def _take_over(to: Any, origin: Any) -> None:
    """Give ``to`` the attributes of ``origin``: the same parameters and hooks, dictionaries of its own."""
    attributes = dict(origin.__dict__)
    attributes.pop("_compiled_call_impl", None)  # compiled for the other object
    for name in _COPIED:
        if name in attributes:
            attributes[name] = copy.copy(attributes[name])
    attributes["_memories_rv"] = copy.deepcopy(attributes["_memories_rv"])
    to.__dict__.update(attributes)
