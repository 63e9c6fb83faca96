"""Orders of a model as numbers, and as parameters that an optimiser treats by themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spikede_plugins.checks import is_finite, is_readable
from spikede_plugins.errors import ConversionError, OptionError, OptionTypeError, StateError
from spikede_plugins.fractional_events import FractionalLIFDynamics
from spikede_plugins.hidden import by_itself, refuse_own
from spikede_plugins.orders import LEARNED, FractionalOrder
from spikede_plugins.registry import adapters_in_use
from spikede_plugins.selection import count, show
from spikede_plugins.tree import check_model, find_neurons
from spikede_plugins.wrapper import SNNWrapper


def alphas(model: nn.Module) -> dict[str, Tensor]:
    """The orders of a fractional model as they are now, by the dotted path of the neuron.

    Args:
        model: a converted model, an ``SNNWrapper``, or a model that holds such.

    Returns:
        ``{path: orders}``: float64 on the CPU, detached; of shape [] for one order, ``[C]`` for one a channel
        and ``[K]`` for several terms. A neuron that a conversion to the order 1 left native has 1.

    Raises:
        OptionTypeError: if ``model`` is no ``nn.Module``.
        ConversionError: if nothing in it is fractional.
        StateError: if a learned order is sharded over processes, or on the meta device.

    Example::

        for path, alpha in alphas(fnet).items():
            print(path, alpha.mean().item())
    """
    check_model(model)
    found: dict[str, Tensor] = {}
    others = by_itself(model)
    neurons = find_neurons(model, adapters_in_use(), to_change=False)
    for neuron in neurons:
        if id(neuron.module) in others:  # those of an SNNWrapper, whose orders are its own
            continue
        if neuron.fractional:
            own = neuron.adapter.operator(neuron.module).order
            found[neuron.paths[0]] = _numbers(own, neuron.paths[0])
        elif neuron.mark is not None:
            found[neuron.paths[0]] = torch.ones((), dtype=torch.float64)
    for path, module in model.named_modules():
        if isinstance(module, SNNWrapper):
            labels = getattr(getattr(module, "_places", None), "labels", module.neuron_names)
            for label, order in zip(labels, module.orders, strict=True):
                name = label if label.split(" ")[0] == "base" else f"base.{label}"
                found[f"{path}.{name}" if path else name] = _numbers(order, label)
        elif isinstance(module, FractionalLIFDynamics):
            found[path] = _numbers(module.order, path)
    if not found:
        refuse_own(model, "alphas")
        raise ConversionError(
            f"{type(model).__name__} has no orders: it has {count(len(neurons))}, none of them fractional; "
            "convert_to_fractional(model) gives a model that has."
        )
    return found


def _numbers(order: Any, path: str) -> Tensor:
    if not order.readable:
        raise StateError(
            f"{show(path)}: the order cannot be read, it is {order.describe()}; look at it where it is "
            "whole and has numbers."
        )
    with torch.no_grad():
        numbers: Tensor = order.alphas(torch.device("cpu"))
    return numbers.detach().clone() if order.sized else numbers[0].detach().clone()


def parameter_groups(
    model: nn.Module, *, lr: float, alpha_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """The parameters of a model in groups for an optimiser, with the orders in a group without decay.

    Weight decay pulls an order towards 0, which is no neutral value: it is the longest memory there is.
    Learned orders, and learned coefficients of several terms, get no decay here, and a learning rate of their
    own if you wish.

    Args:
        model: a converted model, an ``SNNWrapper``, or any model that holds such.
        lr: the learning rate of all other parameters.
        alpha_lr: the learning rate of orders and coefficients; None for ``lr``.
        weight_decay: the weight decay of all other parameters.

    Returns:
        At most two groups, ``"weights"`` and ``"orders"``, one without parameters left out. Every parameter
        of the model is in one of them, once.

    Raises:
        OptionTypeError, OptionError: for a model or number that cannot be used.

    Example::

        optimizer = torch.optim.AdamW(parameter_groups(fnet, lr=1e-3, alpha_lr=1e-2, weight_decay=1e-2))
    """
    check_model(model)
    rate = _number(lr, "lr")
    own_rate = rate if alpha_lr is None else _number(alpha_lr, "alpha_lr")
    decay = _number(weight_decay, "weight_decay")
    orders = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, FractionalOrder)
        for name in LEARNED
        if isinstance(parameter := getattr(module, name, None), nn.Parameter)
    }
    others = [p for p in model.parameters() if id(p) not in orders]
    own = [p for p in model.parameters() if id(p) in orders]
    groups = [
        {"name": "weights", "params": others, "lr": rate, "weight_decay": decay},
        {"name": "orders", "params": own, "lr": own_rate, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise OptionError(f"{type(model).__name__} has no parameters to be trained.")
    return groups


def _number(value: Any, what: str) -> Any:
    if isinstance(value, Tensor) and is_readable(value) and value.numel() == 1:
        # A tensor of one number is what optimisers that are captured take.
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise OptionTypeError(f"{what} must be a number, got {value!r} ({type(value).__name__}).")
    if not is_finite(value) or value < 0:
        raise OptionError(f"{what} must be finite and at least 0, got {value}.")
    return value
