"""The module tree of a model: finding its spiking neurons, copying it, and putting others in their place."""

from __future__ import annotations

import copy
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spikede_plugins.adapter import Adapter
from spikede_plugins.errors import ConversionError, OptionTypeError
from spikede_plugins.selection import show

#: Set on a native neuron that a conversion left as it is because alpha = 1. A plain attribute: it travels
#: with copies and pickles, and no state_dict sees it.
NATIVE_MARK = "_spikede_native"

#: Set on a fractional neuron, in the same way: the class name of the native one it was made from.
KIND_MARK = "_spikede_kind"

_WRAPPERS = {
    "OptimizedModule": "compiled code is bound to the native neurons; convert before torch.compile",
    "DistributedDataParallel": "its gradient buckets are fixed when it wraps; convert before wrapping",
    "FullyShardedDataParallel": "its parameters are flattened when it wraps; convert before wrapping",
    "FSDPModule": "its parameters are sharded by fully_shard; convert before that",
}


@dataclass
class Neuron:
    """A spiking neuron of a model.

    Attributes:
        module: the neuron.
        adapter: the adapter that knows it.
        fractional: whether it is a fractional one.
        paths: every dotted path to it, in the order of ``named_modules``.
    """

    module: nn.Module
    adapter: Adapter
    fractional: bool
    paths: list[str]

    @property
    def mark(self) -> dict[str, Any] | None:
        """What a conversion to alpha = 1 left on a native neuron."""
        return vars(self.module).get(NATIVE_MARK)

    @property
    def kind(self) -> str:
        """The class name a user knows the neuron by, also of a fractional one."""
        return vars(self.module).get(KIND_MARK) or type(self.module).__name__

    @property
    def done(self) -> bool:
        """Whether a conversion dealt with it already."""
        return self.fractional or self.mark is not None


def check_model(model: Any) -> nn.Module:
    """``model`` if it is a module whose children can be replaced.

    Raises:
        OptionTypeError: if it is no ``nn.Module``.
        ConversionError: if it is a TorchScript module.
    """
    if not isinstance(model, nn.Module):
        hint = "; pass an instance, not the class" if isinstance(model, type) else ""
        raise OptionTypeError(f"model must be a torch.nn.Module, got {type(model).__name__}{hint}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise ConversionError(
            f"the model is a TorchScript module ({type(model).__name__}), whose code is frozen; "
            "convert the nn.Module it was made from, then script or trace that."
        )
    return model


def _wrapper(module: nn.Module) -> str | None:
    for cls in type(module).__mro__:
        if cls.__name__ in _WRAPPERS and cls.__module__.startswith("torch."):
            return cls.__name__
    return None


def find_neurons(model: nn.Module, adapters: Iterable[Adapter], *, to_change: bool = True) -> list[Neuron]:
    """Every spiking neuron once, in the order of ``named_modules``; nothing inside a neuron is looked at.

    Raises:
        ConversionError: if they are to be changed and one sits inside a wrapper that cannot follow that.
    """
    found: dict[int, Neuron] = {}
    _visit(model, "", (), None if to_change else "", list(adapters), found)
    return list(found.values())


# Not a closure: one that calls itself keeps the neurons it found alive until the garbage collector comes,
# and what remembers them weakly (SpikingJelly's reset_net) would go on with the replaced ones.
def _visit(
    module: nn.Module, path: str, above: tuple[int, ...], wrapper: str | None, known: list[Adapter],
    found: dict[int, Neuron],
) -> None:
    if wrapper is None:
        wrapper = _wrapper(module)
    neuron = found.get(id(module)) or _recognise(module, known)
    if neuron is not None:
        if wrapper:
            raise ConversionError(
                f"{show(path)} ({type(module).__name__}) is inside {wrapper}: {_WRAPPERS[wrapper]}."
            )
        found.setdefault(id(module), neuron).paths.append(path)
        return
    if id(module) in above:  # a module that holds itself, through whatever detour
        return
    for key, child in module._modules.items():
        if child is not None:
            below = f"{path}.{key}" if path else key
            _visit(child, below, (*above, id(module)), wrapper, known, found)


def _recognise(module: nn.Module, adapters: list[Adapter]) -> Neuron | None:
    for adapter in adapters:
        if adapter.is_fractional(module):
            return Neuron(module, adapter, True, [])
        if adapter.is_neuron(module):
            return Neuron(module, adapter, False, [])
    return None


# -- copying --------------------------------------------------------------------------------------


def copy_model(model: nn.Module, shared: Iterable[nn.Parameter] = ()) -> nn.Module:
    """A deep copy, also of a model whose neurons hold a graph; the original is not touched.

    ``copy.deepcopy`` refuses tensors that have a history; those are detached in the copy. Parameters in
    ``shared`` are the same objects in the copy.

    Raises:
        ConversionError: if something in the model cannot be copied.
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in shared}
    for tensor in _tensors(vars(module) for module in model.modules()):
        if tensor.grad_fn is not None:
            memo[id(tensor)] = tensor.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ConversionError(
            f"the model ({type(model).__name__}) cannot be copied: {type(error).__name__}: {error}; "
            "pass inplace=True to convert it where it is."
        ) from error


def copy_of_state(
    module: nn.Module, detached: bool = False, change: Callable[[Tensor], Tensor] | None = None
) -> Any:
    """A deep copy that shares the parameters, and, unless ``detached``, tensors with a history as well.

    What the copy carries from call to call is its own; what it learns is the original's. Tensors of which
    ``change`` makes others are these in the copy.

    Raises:
        Exception: whatever a part of the module raises that refuses to be copied.
    """
    memo: dict[int, Any] = {id(p): p for p in module.parameters()}
    for tensor in _tensors(vars(part) for part in module.modules()):
        if tensor.grad_fn is not None:
            memo[id(tensor)] = tensor.detach().clone() if detached else tensor
        if change is not None and (other := change(tensor)) is not tensor:
            memo[id(tensor)] = other
    return copy.deepcopy(module, memo)


def without_hooks(model: nn.Module) -> nn.Module:
    """``model`` with the hooks taken off that are not torch's own, such as those of monitors."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                home = getattr(hook, "__module__", None) or type(hook).__module__
                if home.split(".")[0] != "torch" and type(hook).__module__.split(".")[0] != "torch":
                    del hooks[key]
    return model


def _tensors(attributes: Iterable[dict[str, Any]]) -> Iterator[Tensor]:
    """Tensors in the attributes of modules, in whatever container or object."""
    opaque = (nn.Module, type, types.FunctionType, types.MethodType, types.ModuleType)
    pending: list[Any] = list(attributes)
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            yield value
        elif id(value) not in seen and not isinstance(value, opaque):
            seen.add(id(value))
            if isinstance(value, dict):
                pending.extend(value.values())
            elif isinstance(value, (list, tuple, set)):
                pending.extend(value)
            elif hasattr(value, "__dict__"):
                pending.append(vars(value))


# -- replacing ------------------------------------------------------------------------------------

Pairs = Iterable[tuple[nn.Module, nn.Module]]


class _Place(NamedTuple):
    """Something that holds a module, what it holds, and what it is to hold."""

    put: Callable[[Any, Any], Any]
    key: Any
    before: Any
    after: Any


class Trade:
    """Modules that take the places of others. All places are found before the first one is changed."""

    def __init__(self, places: list[_Place], pairs: list[tuple[nn.Module, nn.Module]]) -> None:
        self._places, self._pairs = places, pairs

    @classmethod
    def replacing(cls, model: nn.Module, pairs: Pairs) -> Trade:
        """The second of each pair wherever a module of ``model`` holds the first.

        Children in every slot, and references in plain attributes: lists, tuples and dictionaries of layers
        kept beside the children, however nested, objects of the user's own classes that hold them, and bound
        methods (``self.act = self.lif.forward``).
        """
        pairs = list(pairs)
        new = {id(old): fresh for old, fresh in pairs}
        places: list[_Place] = []
        seen: set[int] = set()
        for module in model.modules():
            if id(module) not in new:  # those leave as they are, so that they can come back
                _replaced(module._modules, new, places, seen)
                _replaced(vars(module), new, places, seen)
        return cls(places, pairs)

    @classmethod
    def exchanging(cls, a: nn.Module, b: nn.Module) -> Trade:
        """Each becomes, in class and content, what the other was.

        For a model that is itself a neuron and is converted in place: the caller's reference is all there is.
        """
        places = []
        for module, other in ((a, b), (b, a)):
            content = {key: _rebind(value, other, module) for key, value in vars(other).items()}
            put = partial(object.__setattr__, module)
            places.append(_Place(put, "__class__", type(module), type(other)))
            places.append(_Place(put, "__dict__", vars(module), content))
        return cls(places, [(a, a)])

    def carry_out(self) -> None:
        """Make the change."""
        for place in self._places:
            place.put(place.key, place.after)
        for _, fresh in self._pairs:
            bind_hooks(fresh)

    def undo(self) -> None:
        """Take the change back, also one that went only half way."""
        for place in reversed(self._places):
            place.put(place.key, place.before)
        for old, _ in self._pairs:
            bind_hooks(old)


def replace_modules(model: nn.Module, pairs: Pairs) -> None:
    """Put the second of each pair wherever a module of ``model`` holds the first; see :class:`Trade`."""
    Trade.replacing(model, pairs).carry_out()


#: Packages whose objects hold no neurons of a model, or far more than a model.
_FOREIGN = ("torch", "numpy", "builtins", "collections", "threading", "logging", "weakref", "functools")
#: How deep objects are looked into, and how many containers and objects there may be; beyond, none is.
_DEEPEST, _MOST = 12, 50_000


def attributes_of(value: Any) -> dict[str, Any] | None:
    """The attributes of an object of a user's class; None of everything else, modules too."""
    opaque = (nn.Module, Tensor, type, types.ModuleType, types.FunctionType, types.MethodType)
    if isinstance(value, opaque) or type(value).__module__.split(".")[0] in _FOREIGN:
        return None
    try:
        own = vars(value)
    except Exception:  # no attributes, or a proxy that fails where it is asked for them
        return None
    return own if isinstance(own, dict) else None


def _replaced(
    value: Any, new: dict[int, nn.Module], places: list[_Place], seen: set[int], depth: int = 0
) -> Any:
    """What is to stand where ``value`` does; what changes inside of it is added to ``places``."""
    if id(value) in new:
        return new[id(value)]
    if isinstance(value, types.MethodType) and id(value.__self__) in new:
        return getattr(new[id(value.__self__)], value.__name__, value)
    if isinstance(value, tuple):
        items = [_replaced(item, new, places, seen, depth) for item in value]
        if all(item is was for item, was in zip(items, value, strict=True)):
            return value
        return value._make(items) if hasattr(value, "_make") else type(value)(items)
    if isinstance(value, (dict, list, deque)) and id(value) not in seen:
        seen.add(id(value))
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            changed = _replaced(item, new, places, seen, depth)
            if changed is not item:
                places.append(_Place(value.__setitem__, key, item, changed))
    elif depth < _DEEPEST and len(seen) < _MOST and id(value) not in seen:
        attributes = attributes_of(value)
        if attributes:
            seen.add(id(value))
            _replaced(attributes, new, places, seen, depth + 1)
    return value


def bind_hooks(module: nn.Module) -> None:
    """Hooks called with their module (before a checkpoint is loaded) get the one they hang on now."""
    hooks: dict[int, Any] = dict(module._load_state_dict_pre_hooks)
    for hook in hooks.values():
        if getattr(hook, "with_module", False):
            hook.module = weakref.ref(module)


def _rebind(value: Any, former: nn.Module, now: nn.Module) -> Any:
    # Neurons keep bound methods of their own (snnTorch's state_function); they must follow.
    if isinstance(value, types.MethodType) and value.__self__ is former:
        return types.MethodType(value.__func__, now)
    return value
