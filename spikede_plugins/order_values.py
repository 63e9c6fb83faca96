"""Orders as they are written down: numbers, one a channel, several terms, and parameters of the caller's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spikede_plugins.checks import counted, is_finite, is_readable, items_of
from spikede_plugins.errors import OptionError, OptionTypeError, OrderError

_TRAINED = (
    "{what} is a tensor that requires a gradient that ends here; pass nn.Parameter({what}.detach()) to "
    "train that very parameter, {what}.item() with learn_alpha=True to train one that starts from it, or "
    "{what}.item() for a fixed order."
)


def check_untrained(value: Any, what: str) -> None:
    """Refuse a tensor whose gradient would be lost if its numbers were read.

    Raises:
        OptionTypeError: for a tensor that requires a gradient and is no parameter.
    """
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.requires_grad:
        raise OptionTypeError(_TRAINED.format(what=what))


def check_parameter(value: nn.Parameter, what: str = "alpha", high: float = 1.0, single: bool = True) -> None:
    """Whether a parameter can be the order (or coefficients) of a layer as it is.

    Raises:
        OptionTypeError: if it has no numbers yet, or holds them in less than float32.
        OrderError: if it has another shape, or a number outside of (0, high].
    """
    if not is_readable(value):
        raise OptionTypeError(f"{what} is a parameter without numbers (uninitialised, meta or sparse).")
    if value.dtype not in (torch.float32, torch.float64):
        raise OptionTypeError(
            f"{what} is a parameter of {value.dtype}, in which an order would be rounded to a few digits; "
            "pass nn.Parameter(value.float())."
        )
    if value.dim() > 1 or not value.numel() or (single and value.numel() != 1):
        raise OrderError(
            f"{what} is a parameter of shape {tuple(value.shape)}; a parameter is the order of a layer, of "
            "shape () or (1,). Pass a list of parameters, one for each layer, or PerChannel(parameter), "
            "MultiTerm(parameter, coefficients) for several in one layer."
        )
    for number in value.detach().reshape(-1).tolist():
        if not math.isfinite(number) or not 0.0 < number <= high:
            raise OrderError(
                f"{what} is a parameter that must lie in (0, {'1' if high == 1.0 else 'inf'}"
                f"{']' if high == 1.0 else ')'}, where it stays in training; got {number}."
            )


def check_alpha(value: Any, what: str = "alpha") -> float:
    """``value`` as a float in (0, 1].

    Raises:
        OptionTypeError: if it is not a number.
        OrderError: if it is not finite or lies outside (0, 1].
    """
    if isinstance(value, Tensor) and is_readable(value) and value.numel() == 1:
        value = value.item()
    # A truth value is no order, NumPy's neither, which float() would take.
    number = not isinstance(value, (str, bytes, bool, Tensor)) and str(getattr(value, "dtype", "")) != "bool"
    try:
        alpha = float(value) if number else math.nan
    except OverflowError:
        alpha = math.inf
    except (TypeError, ValueError):
        number = False
    if not number:
        raise OptionTypeError(
            f"{what} must be a number in (0, 1], got {value!r} ({type(value).__name__}); "
            f"pass e.g. {what}=0.7, PerChannel([...]) or MultiTerm([...], [...])."
        )
    if not math.isfinite(alpha) or not 0.0 < alpha <= 1.0:
        raise OrderError(
            f"{what} must lie in (0, 1], got {alpha}; the Caputo order 1 is the ordinary "
            f"(integer) neuron, smaller orders have longer memory. Pass e.g. {what}=0.7."
        )
    return alpha


def _check_all(values: Iterable[Any], what: str) -> tuple[float, ...]:
    if isinstance(values, nn.Parameter):
        check_parameter(values, what, single=False)
    check_untrained(values, what)
    items = None if isinstance(values, (str, bytes)) else items_of(values)
    if items is None:
        raise OptionTypeError(
            f"{what} must be a sequence of numbers in (0, 1], got {values!r} ({type(values).__name__})."
        )
    if not items:
        raise OrderError(f"{what} is empty; give at least one order in (0, 1].")
    return tuple(check_alpha(v, f"{what}[{i}]") for i, v in enumerate(items))


@dataclass(frozen=True)
class PerChannel:
    """One order a channel.

    Args:
        alphas: orders in (0, 1], one for each channel; one number, for as many channels as the layer has; or
            an ``nn.Parameter`` ``[C]``, which is then trained.
        dim: which dimension of a single time step ``[B, C, ...]`` counts the channels.

    Raises:
        OrderError: if an order lies outside (0, 1] or there is none.
        OptionError: if ``dim`` is not an int.

    Example::

        convert_to_fractional(net, alpha=PerChannel(0.8), learn_alpha=True)   # an order for every channel
    """

    alphas: tuple[float, ...]
    dim: int = 1
    #: Whether the number of channels was given; else the layer's is taken.
    sized: bool = True
    parameter: nn.Parameter | None = field(default=None, compare=False, repr=False)

    def __init__(self, alphas: float | Sequence[float] | Tensor, dim: int = 1) -> None:
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise OptionError(f"PerChannel dim must be an int, got {dim!r}; use dim=1 for [B, C, ...].")
        check_untrained(alphas, "PerChannel alphas")
        one = isinstance(alphas, (int, float)) or (
            isinstance(alphas, Tensor) and not isinstance(alphas, nn.Parameter) and not alphas.dim()
        )
        what = "PerChannel alphas"
        checked = (check_alpha(alphas, what),) if one else _check_all(alphas, what)  # type: ignore[arg-type]
        object.__setattr__(self, "alphas", checked)
        object.__setattr__(self, "dim", dim)
        object.__setattr__(self, "sized", not one)
        object.__setattr__(self, "parameter", alphas if isinstance(alphas, nn.Parameter) else None)


@dataclass(frozen=True)
class MultiTerm:
    """Several orders at once: ``sum_i c_i D^{a_i} v = rate``.

    Args:
        orders: the orders ``a_i`` in (0, 1], all different.
        coefficients: the positive factors ``c_i``, as many as orders. Both may be an ``nn.Parameter``
            ``[K]``, which is then trained.
        learn_coefficients: make the coefficients trainable parameters.

    Raises:
        OrderError: if an order lies outside (0, 1], or the counts differ.
        OptionError: if a coefficient is not finite and positive.
    """

    orders: tuple[float, ...]
    coefficients: tuple[float, ...]
    learn_coefficients: bool = False
    sized = True
    parameter: nn.Parameter | None = field(default=None, compare=False, repr=False)
    factors: nn.Parameter | None = field(default=None, compare=False, repr=False)

    def __init__(
        self,
        orders: Sequence[float] | Tensor,
        coefficients: Sequence[float] | Tensor,
        learn_coefficients: bool = False,
    ) -> None:
        checked = _check_all(orders, "MultiTerm orders")
        if isinstance(coefficients, nn.Parameter):
            check_parameter(coefficients, "MultiTerm coefficients", math.inf, single=False)
        check_untrained(coefficients, "MultiTerm coefficients")
        values = items_of(coefficients)
        if values is None:
            raise OptionTypeError(
                "MultiTerm coefficients must be a sequence of numbers, one for each order, got "
                f"{coefficients!r} ({type(coefficients).__name__})."
            )
        if len(values) != len(checked):
            raise OrderError(
                f"MultiTerm has {counted(len(checked), 'order')} but {counted(len(values), 'coefficient')}; "
                "give one coefficient for each order."
            )
        for i, c in enumerate(values):
            if isinstance(c, bool) or not isinstance(c, (int, float)):
                raise OptionTypeError(f"MultiTerm coefficients[{i}] must be a number, got {c!r}.")
            if not is_finite(c) or c <= 0:
                raise OptionError(
                    f"MultiTerm coefficients[{i}] must be finite and positive, got {c}; "
                    "sum_i c_i D^{a_i} v = rate has no decaying solution otherwise."
                )
        if not isinstance(learn_coefficients, bool):
            raise OptionTypeError(
                f"learn_coefficients must be True or False, got {learn_coefficients!r}."
            )
        object.__setattr__(self, "orders", checked)
        object.__setattr__(self, "coefficients", tuple(float(c) for c in values))
        factors = coefficients if isinstance(coefficients, nn.Parameter) else None
        object.__setattr__(self, "learn_coefficients", learn_coefficients or factors is not None)
        object.__setattr__(self, "parameter", orders if isinstance(orders, nn.Parameter) else None)
        object.__setattr__(self, "factors", factors)
