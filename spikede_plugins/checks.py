"""What checks of options share: questions on which Python and torch would raise errors of their own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from spikede_plugins.errors import OptionError, OptionTypeError


def is_finite(value: float) -> bool:
    """Whether a number is finite as a float, for which an int may be too large."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def is_readable(value: Any) -> bool:
    """Whether a tensor's numbers can be looked at: it is not uninitialised, sparse or on the meta device."""
    if is_lazy(value):
        return False
    return not isinstance(value, Tensor) or (value.layout == torch.strided and not value.is_meta)


def items_of(value: Any) -> list[Any] | None:
    """The items of a sequence, an array or a tensor (flat); None for what has none."""
    if isinstance(value, Tensor):
        return list(value.detach().reshape(-1).tolist()) if is_readable(value) else None
    try:
        return list(value)
    except TypeError:
        return None


def counted(number: int, what: str) -> str:
    """``"1 order"``, ``"2 orders"``"""
    return f"{number} {what}{'' if number == 1 else 's'}"


def check_held(value: float, what: str, dtype: torch.dtype) -> None:
    """Whether the dtype of a layer can hold one of its numbers.

    Raises:
        OptionError: if it cannot.
    """
    if abs(value) > torch.finfo(dtype).max:
        raise OptionError(f"{what} = {value:g} is more than {dtype} can hold, the layer's dtype.")


def flag(value: Any, what: str) -> bool:
    """``value``, which must be True or False.

    Raises:
        OptionTypeError: if it is anything else.
    """
    if not isinstance(value, bool):
        raise OptionTypeError(f"{what} must be True or False, got {value!r}.")
    return value
