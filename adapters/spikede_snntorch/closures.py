"""Pickling of the functions that snnTorch's factories return.

``surrogate.atan()``, ``functional.quant.state_quant()`` and their like return a function defined inside
another, which ``pickle`` refuses, so that native neurons cannot be pickled at all. Such a function is wholly
given by its factory and the values that it closes over.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from typing import Any


def _inner_code(factory: Any, name: str) -> types.CodeType | None:
    if not isinstance(factory, types.FunctionType):
        return None
    constants = factory.__code__.co_consts
    codes = [c for c in constants if isinstance(c, types.CodeType) and c.co_name == name]
    return codes[0] if len(codes) == 1 else None


def _rebuild(module: str, path: str, values: tuple[Any, ...], defaults: Any) -> Inner:
    factory_name, _, name = path.partition(".<locals>.")
    factory = getattr(importlib.import_module(module), factory_name)
    code = _inner_code(factory, name)
    if code is None:
        raise AttributeError(f"{module}.{factory_name} defines no function {name!r} any more.")
    cells = tuple(types.CellType(value) for value in values)
    function = types.FunctionType(code, factory.__globals__, name, defaults, cells)
    function.__qualname__, function.__module__ = path, module
    return Inner(function)


class Inner:
    """Carries such a function through a pickle; copies share it, as they share any function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __deepcopy__(self, memo: dict[int, Any]) -> Inner:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        function = self.function
        if not isinstance(function, types.FunctionType):
            raise TypeError(f"{function!r} is no function")
        values = tuple(cell.cell_contents for cell in function.__closure__ or ())
        return _rebuild, (function.__module__, function.__qualname__, values, function.__defaults__)


def wrap(value: Any) -> Any:
    """``value``, in an :class:`Inner` if it is a function that a factory of an importable module returned."""
    if not isinstance(value, types.FunctionType) or value.__qualname__.count(".<locals>.") != 1:
        return value
    factory_name, _, name = value.__qualname__.partition(".<locals>.")
    try:
        factory = getattr(importlib.import_module(value.__module__), factory_name, None)
    except ImportError:
        return value
    same = _inner_code(factory, name) == value.__code__
    return Inner(value) if same else value


def unwrap(value: Any) -> Any:
    """The inverse of :func:`wrap`."""
    return value.function if isinstance(value, Inner) else value
