"""Neurons of a model that a conversion cannot reach, and models that are fractional without one.

``nn.Module`` registers what is assigned to an attribute. A neuron in a plain list, in a dictionary, in a
dataclass, or one that was put past the registration, is no submodule: it is not moved by ``.to()``, not
saved, and not converted. It is looked for here, so that it can be told.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from spikede_plugins.adapter import Adapter
from spikede_plugins.errors import ConversionError
from spikede_plugins.tree import attributes_of

#: Packages whose neurons are superseded, by the beginning of their module; they are recognised by name alone.
_LEGACY = {
    "spikingjelly.clock_driven.": (
        "it comes from spikingjelly.clock_driven, SpikingJelly's former package, whose neurons have no "
        "fractional form; take the class of the same name from spikingjelly.activation_based.neuron"
    ),
}
#: What is not looked into: it holds no neurons of the model, or far too much.
_OPAQUE = (Tensor, type, types.ModuleType, types.FunctionType, types.MethodType, str, bytes, int, float)
#: The most objects that are looked at; a model that refers to a whole program is not searched to its end.
_MOST = 20_000


@dataclass(frozen=True)
class Hidden:
    """A neuron that is seen and not converted: where it is, its class, and why."""

    path: str
    kind: str
    reason: str


def find_hidden(model: nn.Module, adapters: Iterable[Adapter]) -> list[Hidden]:
    """Neurons that are no submodules of ``model``, and those of packages that are superseded."""
    known = list(adapters)
    registered: set[int] = set()
    inside: set[int] = set()
    places: list[tuple[str, nn.Module]] = []
    found: list[Hidden] = []
    for path, module in model.named_modules():
        registered.add(id(module))
        if id(module) in inside:
            continue
        reason = legacy_reason(module)
        if _is_neuron(module, known) or reason:
            inside.update(id(part) for part in module.modules())
            if reason:
                found.append(Hidden(path, type(module).__name__, reason))
        else:
            places.append((path, module))
    seen = set(registered)
    budget = [_MOST]
    for path, module in places:
        for where, name, neuron in _loose(module, seen, known, budget):
            full = f"{path}.{where}" if path else where
            found.append(Hidden(full, type(neuron).__name__, _reason(name, where, neuron)))
    return found


def legacy_reason(module: nn.Module) -> str:
    """Why a neuron of a superseded package is not converted; empty for every other module."""
    for cls in type(module).__mro__:
        for package, reason in _LEGACY.items():
            if cls.__module__.startswith(package) and ".neuron" in cls.__module__:
                return reason
    return ""


def _is_neuron(module: nn.Module, adapters: list[Adapter]) -> bool:
    return any(a.is_fractional(module) or a.is_neuron(module) for a in adapters)


def _reason(holder: str, where: str, neuron: nn.Module) -> str:
    how = {
        "list": "nn.ModuleList",
        "tuple": "nn.ModuleList",
        "deque": "nn.ModuleList",
        "set": "nn.ModuleList",
        "frozenset": "nn.ModuleList",
        "dict": "nn.ModuleDict",
    }.get(holder)
    legacy = legacy_reason(neuron)
    if legacy:
        return legacy
    if how:
        return f"it is in a plain {holder}, which registers no submodules; put it into an {how}"
    if holder == "class":
        return "it is an attribute of the class, which all models share; make it in __init__, self.x = ..."
    if holder:
        return f"it is held by a {holder}, which registers no submodules; assign it to a module, self.x = ..."
    return "it was put past the registration of nn.Module (object.__setattr__); assign it, self.x = ..."


def _loose(
    module: nn.Module, seen: set[int], known: list[Adapter], budget: list[int]
) -> Iterator[tuple[str, str, nn.Module]]:
    """Neurons in the plain attributes of a module: the path from it, what holds them, and the neuron."""
    pending: deque[tuple[str, str, Any]] = deque()
    for name, value in vars(module).items():
        if name not in ("_modules", "_parameters", "_buffers") and not name.endswith("_hooks"):
            pending.append((name, "", value))
    for cls in type(module).__mro__:
        if cls.__module__.split(".")[0] != "torch":
            pending.extend((n, "class", v) for n, v in vars(cls).items() if isinstance(v, nn.Module))
    while pending and budget[0]:
        where, holder, value = pending.popleft()
        if isinstance(value, _OPAQUE) or value is None or id(value) in seen:
            continue
        budget[0] -= 1
        seen.add(id(value))
        if isinstance(value, nn.Module):
            if _is_neuron(value, known) or legacy_reason(value):
                if not any(a.is_fractional(value) for a in known):
                    yield where, holder, value
                seen.update(id(part) for part in value.modules())
                continue
            pending.extend((f"{where}.{n}", holder, v) for n, v in value._modules.items())
            own = {n: v for n, v in vars(value).items() if n not in ("_modules", "_parameters", "_buffers")}
            pending.extend((f"{where}.{n}", "", v) for n, v in own.items() if not n.endswith("_hooks"))
        elif isinstance(value, dict):
            pending.extend((f"{where}[{key!r}]", "dict", v) for key, v in list(value.items()))
        elif isinstance(value, (list, tuple, deque, set, frozenset)):
            kind = next(k.__name__ for k in (list, tuple, deque, set, frozenset) if isinstance(value, k))
            pending.extend((f"{where}[{i}]", kind, v) for i, v in enumerate(list(value)))
        elif is_dataclass(value):
            own = {f.name: getattr(value, f.name, None) for f in fields(value)}
            pending.extend((f"{where}.{n}", "dataclass", v) for n, v in own.items())
        elif held := attributes_of(value):
            kind = type(value).__name__
            pending.extend((f"{where}.{n}", kind, v) for n, v in list(held.items()))


# -- models that are fractional by themselves -----------------------------------------------------

#: The name of the class attribute by which a module of this package tells what to call instead.
HINT = "fractional_by_itself"


def by_itself(model: nn.Module) -> set[int]:
    """The modules, by identity, that are part of one which is fractional by itself."""
    holders = [module for module in model.modules() if getattr(type(module), HINT, "")]
    return {id(part) for holder in holders for part in holder.modules()}


def own_hint(model: nn.Module) -> str:
    """What to call instead of a conversion, if ``model`` holds a module of this package; else nothing."""
    for path, module in model.named_modules():
        hint = getattr(type(module), HINT, "")
        if hint:
            return f"{path or 'the model'} ({type(module).__name__}) {hint}"
    return ""


def refuse_own(model: nn.Module, call: str) -> None:
    """Raise if ``model`` is, or holds, a module that no conversion is for.

    Raises:
        ConversionError: naming the module and the call that serves it.
    """
    hint = own_hint(model)
    if hint:
        raise ConversionError(f"{call}: {hint}")
