"""The module tree of a model: finding its spiking neurons, copying it, and putting others in their place."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

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
    def mark(self) -> dict[str, str] | None:
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


def _wrapper(module: nn.Module) -> str:
    for cls in type(module).__mro__:
        if cls.__name__ in _WRAPPERS and cls.__module__.startswith("torch."):
            return cls.__name__
    return ""


def find_neurons(model: nn.Module, adapters: Iterable[Adapter]) -> list[Neuron]:
    """Every spiking neuron once, in the order of ``named_modules``; nothing inside a neuron is looked at.

    Raises:
        ConversionError: if one sits inside a wrapper that cannot follow a change of its modules.
    """
    known = list(adapters)
    found: dict[int, Neuron] = {}

    def visit(module: nn.Module, path: str, above: tuple[int, ...], wrapper: str) -> None:
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
                visit(child, below, (*above, id(module)), wrapper or _wrapper(module))

    visit(model, "", (), "")
    return list(found.values())


def _recognise(module: nn.Module, adapters: list[Adapter]) -> Neuron | None:
    for adapter in adapters:
        if adapter.is_fractional(module):
            return Neuron(module, adapter, True, [])
        if adapter.is_neuron(module):
            return Neuron(module, adapter, False, [])
    return None


# -- copying --------------------------------------------------------------------------------------


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy, also of a model whose neurons hold a graph; the original is not touched.

    ``copy.deepcopy`` refuses tensors that have a history; those are detached in the copy.

    Raises:
        ConversionError: if something in the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    for tensor in _graph_tensors(vars(module) for module in model.modules()):
        memo[id(tensor)] = tensor.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ConversionError(
            f"the model ({type(model).__name__}) cannot be copied: {type(error).__name__}: {error}; "
            "pass inplace=True to convert it where it is."
        ) from error


def _graph_tensors(attributes: Iterable[dict[str, Any]]) -> Iterator[Tensor]:
    """Tensors with a history in the attributes of modules: states, in whatever container or object."""
    opaque = (nn.Module, type, types.FunctionType, types.MethodType, types.ModuleType)
    pending: list[Any] = list(attributes)
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            if value.grad_fn is not None:
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


def replace_modules(model: nn.Module, pairs: Iterable[tuple[nn.Module, nn.Module]]) -> None:
    """Put the second of each pair wherever a module of ``model`` holds the first.

    Children in every slot, and references in plain attributes (a list of layers kept beside the children).
    """
    new = {id(old): fresh for old, fresh in pairs}
    for module in list(model.modules()):
        _replace_in(module._modules, new)
        attributes = vars(module)
        for key, value in list(attributes.items()):
            if id(value) in new:
                attributes[key] = new[id(value)]
            elif isinstance(value, tuple) and type(value) is tuple and any(id(v) in new for v in value):
                attributes[key] = tuple(new.get(id(v), v) for v in value)
            elif isinstance(value, (dict, list)):
                _replace_in(value, new)


def _replace_in(container: Any, new: dict[int, nn.Module]) -> None:
    entries = list(container.items() if isinstance(container, dict) else enumerate(container))
    for key, value in entries:
        if id(value) in new:
            container[key] = new[id(value)]


def exchange(a: nn.Module, b: nn.Module) -> None:
    """Let two modules trade places: each becomes, in class and content, what the other was.

    For a model that is itself a neuron and is converted in place: the caller's reference is all there is.
    """
    of_a, of_b = dict(vars(a)), dict(vars(b))
    class_a, class_b = type(a), type(b)
    for module, cls, content, former in ((a, class_b, of_b, b), (b, class_a, of_a, a)):
        object.__setattr__(module, "__class__", cls)
        vars(module).clear()
        vars(module).update({key: _rebind(value, former, module) for key, value in content.items()})


def _rebind(value: Any, former: nn.Module, now: nn.Module) -> Any:
    # Neurons keep bound methods of their own (snnTorch's state_function); they must follow.
    if isinstance(value, types.MethodType) and value.__self__ is former:
        return types.MethodType(value.__func__, now)
    return value
