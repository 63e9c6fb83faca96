"""A checkpoint of spikeDE's wrapper, taken over: weights, buffers, time constants and orders.

spikeDE keeps every weight several times, under the graphs that it traces, and its orders by call:

    traced_backbone.<path>, ode_func[._orig_mod].traced.<path>, _ode_gm.<path>, ...    the model's own
    per_layer_alpha_params.<i>, per_layer_coefficient_params.<i>                       the i-th neuron called

A trained time constant is ``tau_0 (1 + exp(theta))`` there and ``tau_0 exp(p)`` here, so
``p = log(1 + exp(theta))``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spikede_plugins.call_order import traced_calls
from spikede_plugins.errors import LoadError, OptionTypeError
from spikede_plugins.layer_runs import FrameworkNeuron
from spikede_plugins.neurons import BaseNeuron
from spikede_plugins.orders import FractionalOrder
from spikede_plugins.wrapper import SNNWrapper

#: Where a key of the model itself may stand: the parts of spikeDE's wrapper that hold (a part of) it.
_PLACES = re.compile(
    r"^(?:(?:ode_func|_ode_func_uncompiled)\.(?:traced|ode_gm|post_neuron_module)"
    r"|traced_backbone|_ode_gm|post_neuron_module)\.(.+)$"
)
_ORDERS = re.compile(r"^per_layer_(alpha|coefficient)_params\.(\d+)$")
#: Numbers written into a traced forward, which the model here has in its own code.
_CONSTANTS = re.compile(r"(^|\.)_tensor_constant\d+$")


def load_spikede_state_dict(wrapper: SNNWrapper, state_dict: Mapping[str, Any]) -> None:
    """Take over a checkpoint of the same model in spikeDE's ``SNNWrapper``: all of it, or nothing.

    Args:
        wrapper: the model here, built with the arguments that it had there. Its orders and coefficients
            become those of the checkpoint, trained or not. A checkpoint saved before ``_set_neuron_shapes``
            has none; the wrapper then keeps its own.
        state_dict: ``net.state_dict()`` of spikeDE, on any device; also that of a ``DistributedDataParallel``
            around it. Use ``torch.load(..., weights_only=True)``.

    Raises:
        LoadError: for entries that are missing, of other shapes or without a place here, for copies of one
            weight that differ, and for orders that this wrapper cannot have; all of them are listed, and
            nothing is changed.
        OptionTypeError: if ``wrapper`` is no SNNWrapper or ``state_dict`` no mapping.

    Example:
        >>> net = SNNWrapper(model, integrator="fdeint", alpha=0.6)
        >>> load_spikede_state_dict(net, torch.load("snn_cnn_best.pt", weights_only=True))
    """
    if not isinstance(wrapper, SNNWrapper):
        raise OptionTypeError(f"an SNNWrapper takes spikeDE's checkpoints, got {type(wrapper).__name__}.")
    if not isinstance(state_dict, Mapping):
        raise OptionTypeError(f"state_dict must map names to tensors, got {type(state_dict).__name__}.")
    problems: dict[str, str] = {}
    weights, given = _sorted_out(state_dict, problems)
    targets = _targets(wrapper)
    values = _fitted(weights, targets, wrapper, problems)
    orders = _orders_of(wrapper, given, problems)
    if problems:
        listed = "\n".join(f"  {name}: {problem}." for name, problem in sorted(problems.items()))
        raise LoadError(f"spikeDE's checkpoint does not fit the model; nothing of it was loaded:\n{listed}")
    with torch.no_grad():
        for name, value in values.items():
            targets[name].copy_(value)
    for order, (alphas, factors) in orders.items():
        _put(order, alphas, factors)
    wrapper._operators.clear()  # their weights are those of the orders before


def _sorted_out(
    state_dict: Mapping[str, Any], problems: dict[str, str]
) -> tuple[dict[str, Tensor], dict[str, dict[int, Tensor]]]:
    """The entries by the model's own names, and the orders and coefficients by call."""
    weights: dict[str, Tensor] = {}
    given: dict[str, dict[int, Tensor]] = {"alpha": {}, "coefficient": {}}
    for key, value in state_dict.items():
        name = str(key).removeprefix("module.").replace("_orig_mod.", "")
        order, place = _ORDERS.match(name), _PLACES.match(name)
        if _CONSTANTS.search(name):
            continue
        if not isinstance(value, Tensor):
            problems[str(key)] = f"it is no tensor but {type(value).__name__}"
        elif order:
            given[order[1]][int(order[2])] = value.detach().reshape(-1)
        elif place is None:
            problems[str(key)] = "spikeDE's wrapper has nothing of that name"
        elif place[1] not in weights:
            weights[place[1]] = value.detach()
        elif weights[place[1]].shape != value.shape or not torch.equal(
            weights[place[1]].cpu(), value.detach().cpu()
        ):
            problems[place[1]] = f"the checkpoint holds it twice, and not the same in {key}"
    return weights, given


def _targets(wrapper: SNNWrapper) -> dict[str, Tensor]:
    """The parameters and buffers of the model that a checkpoint has."""
    return {name: t for name, t in wrapper.base.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}


def _fitted(
    weights: dict[str, Tensor], targets: dict[str, Tensor], wrapper: SNNWrapper, problems: dict[str, str]
) -> dict[str, Tensor]:
    """The values to put into the model, by name."""
    neurons = {name for name, module in wrapper.base.named_modules() if isinstance(module, BaseNeuron)}
    values: dict[str, Tensor] = {}
    shared: dict[int, str] = {}
    for name, target in targets.items():
        first = shared.setdefault(id(target), name)
        if name not in weights and first not in weights:
            problems[name] = "it is not in the checkpoint (spikeDE keeps what its traced forward uses)"
    for name, value in weights.items():
        if name not in targets:
            problems[name] = "the model here has none of that name"
            continue
        path, _, last = name.rpartition(".")
        if last == "tau_param" and path in neurons:
            value = F.softplus(value.to(torch.float64))
        if value.shape != targets[name].shape:
            problems[name] = (
                f"it has the shape {tuple(value.shape)}, this model's has {tuple(targets[name].shape)}"
            )
        values[name] = value
    return values


def _orders_of(
    wrapper: SNNWrapper, given: dict[str, dict[int, Tensor]], problems: dict[str, str]
) -> dict[FractionalOrder, tuple[Tensor, Tensor | None]]:
    """For each order of the wrapper its values in the checkpoint."""
    alphas, factors = given["alpha"], given["coefficient"]
    if not alphas:
        return {}
    calls = traced_calls(wrapper.base, (BaseNeuron, FrameworkNeuron))
    if calls is None:
        problems["per_layer_alpha_params"] = (
            "its entries go by the neurons' calls, which cannot be found by tracing this model"
        )
        return {}
    if sorted(alphas) != list(range(len(calls))):
        problems["per_layer_alpha_params"] = (
            f"there are {len(alphas)} entries, and the model calls its neurons {len(calls)} times "
            f"({', '.join(calls)})"
        )
        return {}
    found: dict[FractionalOrder, tuple[Tensor, Tensor | None]] = {}
    seen: dict[FractionalOrder, Tensor] = {}
    orders = wrapper._fractional_orders()
    for i, name in enumerate(calls):
        order = orders[wrapper._places.place(name, i)]
        alpha = alphas[i].to(torch.float64)
        factor = factors.get(i, torch.ones(len(alpha))).to(torch.float64)
        both = torch.cat([alpha, factor])
        if order in seen and not torch.equal(seen[order], both):
            problems[f"per_layer_alpha_params.{i}"] = (
                f"another call of {name} has another order there; give this wrapper an order for each of "
                f"the {len(calls)} calls (alpha=[...])"
            )
        seen[order] = both
        problem = _unfit(order, alpha, factor)
        if problem:
            problems[f"per_layer_alpha_params.{i} ({name})"] = problem
        found[order] = alpha, factor if order.multi_term else None
    return found


def _unfit(order: FractionalOrder, alpha: Tensor, factor: Tensor) -> str:
    """Why an order cannot take these values; empty if it can."""
    several = f"{order.count} order{'s' * (order.count > 1)} here"
    if order.channel_dim is not None or len(alpha) != order.count:
        return f"it has {len(alpha)} in the checkpoint and {several}; build the wrapper with the same alpha"
    if not bool(((alpha > 0) & (alpha <= 1)).all()):
        return f"orders lie in (0, 1], the checkpoint has {alpha.tolist()}"
    if not order.multi_term and bool((factor != 1).any()):
        return (
            f"the checkpoint has the coefficient {factor.tolist()} and the layer here none; build the "
            "wrapper with the same multi_coefficient"
        )
    if order.multi_term and not bool((factor > 0).all()):
        return f"coefficients are positive here, the checkpoint has {factor.tolist()}"
    return ""


def _put(order: FractionalOrder, alphas: Tensor, factors: Tensor | None) -> None:
    """Give an order other values: its parameters, or the numbers that it holds where it is not trained."""
    for name, values in (("alpha", alphas), ("coefficients", factors)):
        if values is None:
            continue
        own = order._parameters.get(name)
        numbers = tuple(values.tolist())
        if own is not None:
            with torch.no_grad():
                own.copy_(values.reshape(own.shape))
        elif name == "alpha":
            order._fixed_alpha = numbers if order.multi_term else numbers[0]
        else:
            order._fixed_coefficients = numbers
    order.low = min(order.low, *alphas.tolist())
    if factors is not None:
        order.low_coefficient = min(order.low_coefficient, *factors.tolist())
