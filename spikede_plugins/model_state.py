"""What a model keeps from call to call outside its parameters: buffers and attributes of its modules.

A recurrent cell with a hidden state of its own, a counter, a running average. ``Captures`` and
``put_back`` repeat a call as it was; ``same`` and ``poisoned`` find out whether a call depends on it.
"""

from __future__ import annotations

import copy
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

#: What every module has, and what says nothing about a state.
_TORCHS = frozenset(vars(nn.Module()))
_OPAQUE = (
    nn.Module, type, types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType,
    torch.device, torch.dtype, torch.Generator, str, bytes,
)  # fmt: skip
#: How deep a state is looked for in containers and objects, and in how long ones.
_DEEPEST = 4
_LONGEST = 10_000

Captured = list[tuple[nn.Module, dict[str, Any], dict[str, Any]]]


def attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that are its own, neither parameters, buffers, modules nor hooks."""
    return {name: value for name, value in vars(module).items() if name not in _TORCHS}


def _parts(value: Any) -> Callable[[Callable[[Any], Any]], Any] | None:
    """For a container, how to build one like it with every part changed; None for a leaf."""
    if isinstance(value, (dict, list, tuple, deque)) and len(value) > _LONGEST:
        return None  # a data set, no state
    if isinstance(value, dict):

        def mapping(change: Callable[[Any], Any]) -> Any:
            new = copy.copy(value)
            for key in value:
                new[key] = change(value[key])
            return new

        return mapping
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return lambda change: type(value)(*map(change, value))
    if isinstance(value, deque):
        return lambda change: deque(map(change, value), value.maxlen)
    if isinstance(value, (list, tuple)):
        return lambda change: type(value)(map(change, value))
    if _is_plain(value):

        def thing(change: Callable[[Any], Any]) -> Any:
            new = copy.copy(value)
            for name, part in vars(value).items():
                vars(new)[name] = change(part)
            return new

        return thing
    return None


def _is_plain(value: Any) -> bool:
    """Whether an object is no more than its attributes, so that a copy of them is a copy of it."""
    kind = type(value)
    ordinary = kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__
    return (
        ordinary
        and hasattr(value, "__dict__")
        and not hasattr(kind, "__copy__")
        and not hasattr(kind, "__setstate__")
        and not isinstance(value, (Tensor, *_OPAQUE))
    )


def _changed(value: Any, leaf: Callable[[Any], Any], depth: int = 0) -> Any:
    build = _parts(value) if depth < _DEEPEST and not isinstance(value, _Kept) else None
    if build is None:
        return leaf(value)
    try:
        return build(lambda part: _changed(part, leaf, depth + 1))
    except Exception:  # a container that cannot be built anew is taken as it is
        return value


class _Kept(NamedTuple):
    """A tensor as it was: itself as long as nobody has written to it since, else a copy of then."""

    tensor: Tensor
    version: int
    copied: Tensor

    def again(self) -> Tensor:
        unchanged = self.copied is self.tensor or _version(self.tensor) == self.version
        return self.tensor if unchanged else self.copied.clone()


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


class Captures:
    """Takes down what a model keeps, at several moments; a tensor that stays as it is is copied once."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._copies: dict[int, _Kept] = {}

    def take(self) -> Captured:
        """All that the model keeps, as it is now."""
        return [
            (module, _changed(attributes(module), self._leaf), _changed(dict(module._buffers), self._leaf))
            for module in self.model.modules()
        ]

    def _leaf(self, part: Any) -> Any:
        if not isinstance(part, Tensor):
            return part
        if part.requires_grad:  # what has a graph is not written to
            return _Kept(part, 0, part)
        last = self._copies.get(id(part))
        version = _version(part)
        if last is None or last.tensor is not part or last.version != version or version < 0:
            last = self._copies[id(part)] = _Kept(part, version, part.detach().clone())
        return last


def as_is(model: nn.Module) -> Captured:
    """What the model keeps now: the very objects, for a call that is made with others in their place."""
    return [(module, attributes(module), dict(module._buffers)) for module in model.modules()]


def put_back(captured: Captured) -> None:
    """Let the model keep what it kept when this was captured. Tensors are put in place, not written to."""

    def leaf(part: Any) -> Any:
        return part.again() if isinstance(part, _Kept) else part

    for module, own, buffers in captured:
        for name in [name for name in attributes(module) if name not in own]:
            del vars(module)[name]
        vars(module).update({name: _changed(value, leaf) for name, value in own.items()})
        module._buffers.clear()
        module._buffers.update({name: _changed(value, leaf) for name, value in buffers.items()})


def poisoned(value: Any) -> Any:
    """``value`` with other numbers in it, as far as it has any; tensors keep their shapes."""

    def leaf(part: Any) -> Any:
        if isinstance(part, Tensor):
            if part.is_floating_point():
                other = torch.linspace(0.5, 1.5, part.numel()).to(part).reshape(part.shape)
                return 0.5 * part.detach() + other
            return ~part if part.dtype == torch.bool else part + 1
        if isinstance(part, int) and not isinstance(part, bool):  # a counter is far on
            return part + 1000
        return part + 1.7 if isinstance(part, float) else part

    return _changed(value, leaf)


def same(a: Any, b: Any, close: Callable[[Tensor, Tensor], bool], depth: int = 0) -> bool:
    """Whether two attributes hold the same; tensors are compared by ``close``."""
    a, b = (part.copied if isinstance(part, _Kept) else part for part in (a, b))
    if a is b or depth > _DEEPEST:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return (
            isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and close(a, b)
        )
    if isinstance(a, float) and isinstance(b, float):
        return close(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
    if type(a) is not type(b):
        return False
    if isinstance(a, _OPAQUE):
        return not isinstance(a, (str, bytes)) or a == b
    if isinstance(a, (dict, list, tuple, deque)) and len(a) > _LONGEST:
        return len(a) == len(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key], close, depth + 1) for key in a)
    if isinstance(a, (list, tuple, deque)):
        return len(a) == len(b) and all(same(x, y, close, depth + 1) for x, y in zip(a, b, strict=True))
    if _is_plain(a):
        return same(vars(a), vars(b), close, depth + 1)
    try:
        return bool(a == b)
    except Exception:  # an array, or something that cannot be compared
        return all(map(bool, _flat(a == b)))


def _flat(value: Any) -> Iterator[Any]:
    yield from getattr(value, "flat", [False])
