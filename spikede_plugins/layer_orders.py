"""The fractional orders of several neuron layers, as they are written in one argument.

| alpha | alpha_mode | meaning |
|---|---|---|
| 0.6, ``PerChannel``, ``MultiTerm`` | any | every layer |
| [0.3, 0.8] | ``"per_layer"`` | one order a layer |
| [0.3, 0.8] | ``"multiterm"`` | every layer: ``sum_j c_j D^{a_j} v``, c from ``multi_coefficient`` (ones) |
| [0.3, 0.8] with ``multi_coefficient`` | ``"auto"`` | as ``"multiterm"`` |
| [[0.3, 0.5], 0.8] | any | one entry a layer; several orders there are a sum of terms |

One entry a layer goes by the order in which the neurons are called (``call_order``). A coefficient counts
for a single term as well: ``c D^a v``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from spikede_plugins.checks import counted, is_readable
from spikede_plugins.errors import OptionError, OptionTypeError, OrderError, UnknownNameError, nearest
from spikede_plugins.orders import FractionalOrder, MultiTerm, PerChannel

ALPHA_MODES = ("auto", "per_layer", "multiterm")


def layer_orders(
    alpha: Any,
    layers: Sequence[str],
    multi_coefficient: Any = None,
    learn_alpha: bool | Sequence[bool] = False,
    learn_coefficient: bool | Sequence[bool] = False,
    alpha_mode: str = "auto",
) -> list[FractionalOrder]:
    """One :class:`FractionalOrder` for each layer.

    Args:
        alpha, alpha_mode: see the table at the head of this file.
        layers: the names of the layers, in the order of their calls.
        multi_coefficient: factors of a sum of terms, or of a single one: one sequence for all layers, or one
            a layer.
        learn_alpha, learn_coefficient: train them: for all layers, or one bool a layer.

    Raises:
        OrderError: for orders out of range, a wrong count, or a flat list whose meaning is open.
        OptionError, OptionTypeError, UnknownNameError: for the other arguments.
    """
    if not isinstance(alpha_mode, str) or alpha_mode not in ALPHA_MODES:
        raise UnknownNameError(f"unknown alpha_mode {alpha_mode!r}; {nearest(str(alpha_mode), ALPHA_MODES)}")
    entries = _entries(alpha, layers, multi_coefficient, alpha_mode)
    learned = _flags(learn_alpha, layers, "learn_alpha")
    factors = _coefficients(multi_coefficient, entries, layers)
    train_factors = _flags(learn_coefficient, layers, "learn_coefficient")
    several = [isinstance(entry, (list, MultiTerm)) for entry in entries]
    if learn_coefficient is True and not any(several) and all(c is None for c in factors):
        raise OptionError(
            "learn_coefficient=True, but no layer has coefficients; give one, e.g. multi_coefficient=[1.0], "
            'or several orders, e.g. alpha=[0.3, 0.7], alpha_mode="multiterm".'
        )
    orders = []
    for entry, c, train, learn, name in zip(entries, factors, train_factors, learned, layers, strict=True):
        single = not isinstance(entry, (list, MultiTerm))
        if single and c is None and not isinstance(learn_coefficient, bool) and train:
            raise OptionError(
                f"learn_coefficient is True for layer {name!r}, which has one order only and no coefficient."
            )
        try:
            if single and c is not None and (train or c != [1.0]):
                entry = _with_factor(entry)
            if isinstance(entry, list):
                entry = MultiTerm(entry, c if c is not None else [1.0] * len(entry), train)
            elif isinstance(entry, MultiTerm):
                entry = MultiTerm(entry.orders, entry.coefficients, train or entry.learn_coefficients)
            orders.append(FractionalOrder(entry, learn))
        except (OrderError, OptionError, OptionTypeError) as error:
            raise type(error)(f"layer {name!r}: {error}") from error
    return orders


def _with_factor(entry: Any) -> list[Any]:
    if isinstance(entry, PerChannel):
        raise OptionError("orders by channel take no coefficient; scale tau instead.")
    return [entry]


def entries_by_layer(
    alpha: Any, layers: int, multi_coefficient: Any, learned: Sequence[Any], alpha_mode: str
) -> int | None:
    """How many entries, one a layer, the arguments of :func:`layer_orders` have; None if all are for all.

    Args:
        layers: how many neurons there are.
        learned: ``learn_alpha`` and ``learn_coefficient``.
    """
    alpha, factors = _plain(alpha), _plain(multi_coefficient)
    if isinstance(alpha, list):
        nested = any(isinstance(a, (list, PerChannel, MultiTerm)) for a in alpha)
        alone = alpha_mode == "auto" and factors is None and len(alpha) == layers == 1
        if nested or alone or alpha_mode == "per_layer":
            return len(alpha)
    if isinstance(factors, list) and any(isinstance(c, list) or c is None for c in factors):
        return len(factors)
    return next((len(flags) for flags in learned if isinstance(flags, (list, tuple))), None)


def _plain(value: Any) -> Any:
    """Tensors, arrays and tuples as lists."""
    if isinstance(value, nn.Parameter):  # the order of every layer, that very parameter
        return value
    if isinstance(value, Tensor):
        if not is_readable(value):
            raise OptionTypeError("orders and coefficients must be numbers, got a meta or sparse tensor.")
        return value.detach().tolist()
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _found(layers: Sequence[str]) -> str:
    return f"{len(layers)} neuron layer{'s' * (len(layers) != 1)} ({', '.join(layers)})"


def _entries(alpha: Any, layers: Sequence[str], coefficients: Any, mode: str) -> list[Any]:
    """For each layer a number, a list of orders (terms), ``PerChannel`` or ``MultiTerm``."""
    alpha = _plain(alpha)
    if not isinstance(alpha, list):
        return [alpha] * len(layers)
    if not alpha:
        raise OrderError("alpha is empty; give one order, e.g. alpha=0.7.")
    nested = any(isinstance(a, (list, PerChannel, MultiTerm)) for a in alpha)
    if not nested and mode == "auto":
        if coefficients is not None:
            mode = "multiterm"
        elif len(alpha) == len(layers) == 1:
            mode = "per_layer"
        elif len(alpha) == len(layers):
            raise OrderError(
                f"alpha={alpha} may mean one order for each of the {_found(layers)}, or {len(alpha)} terms "
                'in every layer; say which with alpha_mode="per_layer" or alpha_mode="multiterm".'
            )
        else:
            raise OrderError(
                f"alpha has {counted(len(alpha), 'order')}, but the model has {_found(layers)}; give one for "
                f'each, or, if every layer is to have {len(alpha)} terms, alpha_mode="multiterm".'
            )
    if not nested and mode == "multiterm":
        return [alpha] * len(layers)
    if len(alpha) != len(layers):
        raise OrderError(
            f"alpha has {len(alpha)} entries, but the model has {_found(layers)}; give one for each."
        )
    return [a[0] if isinstance(a, list) and len(a) == 1 else a for a in alpha]


def _coefficients(given: Any, entries: list[Any], layers: Sequence[str]) -> list[list[float] | None]:
    """For each layer its factors, None where they are not given."""
    given = _plain(given)
    if given is None:
        return [None] * len(layers)
    if not isinstance(given, list):
        raise OptionTypeError(
            f"multi_coefficient must be a sequence of numbers, or one a layer, got {type(given).__name__}."
        )
    if not any(isinstance(c, list) or c is None for c in given):
        if any(isinstance(entry, list) for entry in entries):
            return [given if isinstance(entry, list) else None for entry in entries]
        if len(given) not in (1, len(layers)):
            raise OrderError(
                f"multi_coefficient has {len(given)} entries for layers with one order each; give one for "
                f"all, or one for each of the {_found(layers)}."
            )
        given = [[c] for c in given] * (len(layers) if len(given) == 1 else 1)
    if len(given) != len(layers):
        raise OrderError(
            f"multi_coefficient has {len(given)} entries, but the model has {_found(layers)}; "
            "give one for each, or one flat sequence for all."
        )
    return [_factors(c, entry, name) for c, entry, name in zip(given, entries, layers, strict=True)]


def _factors(given: Any, entry: Any, name: str) -> list[float] | None:
    """The factors of one layer."""
    if given is None or isinstance(entry, MultiTerm):  # which has its own
        return None
    count = len(entry) if isinstance(entry, list) else 1
    factors = [given] * count if isinstance(given, (int, float)) else given
    if count == 1 and len(factors) != 1:
        raise OrderError(f"layer {name!r} has one order but {len(factors)} coefficients; give one.")
    return factors  # type: ignore[no-any-return]


def _flags(given: Any, layers: Sequence[str], what: str) -> list[bool]:
    if isinstance(given, bool):
        return [given] * len(layers)
    flags = list(given) if isinstance(given, (list, tuple)) else None
    if flags is None or not all(isinstance(flag, bool) for flag in flags):
        raise OptionTypeError(f"{what} must be True, False, or one bool a layer, got {given!r}.")
    if len(flags) != len(layers):
        raise OptionError(
            f"{what} has {len(flags)} entries, but the model has {_found(layers)}; give one for each."
        )
    return flags
