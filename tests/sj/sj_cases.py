"""Neurons, options and inputs that the SpikingJelly tests share."""

from __future__ import annotations

import torch
from spikede_spikingjelly import SpikingJellyAdapter
from spikede_spikingjelly.release import EXPLICIT_STATES
from spikingjelly.activation_based import neuron, surrogate
from torch import nn

from spikede_plugins import convert_to_fractional
from spikede_plugins.engine import FractionalOperator
from spikede_plugins.memory import as_memory
from spikede_plugins.orders import FractionalOrder
from spikede_plugins.registry import get_solver

ADAPTER = SpikingJellyAdapter()
HARD_OR_SOFT = {"v_reset": [0.0, -0.2, None]}
LEAKY = {"decay_input": [True, False], **HARD_OR_SOFT}

#: Name -> (fixed arguments, options and their values).
NEURONS: dict[str, tuple[dict, dict]] = {
    "IFNode": ({}, {**HARD_OR_SOFT, "detach_reset": [False, True]}),
    "LIFNode": ({"tau": 1.7}, {**LEAKY, "detach_reset": [False, True]}),
    "ParametricLIFNode": ({"init_tau": 1.7}, LEAKY),
    "QIFNode": ({}, {"v_reset": [-0.1, None], "detach_reset": [False, True]}),
    "EIFNode": ({}, {"v_reset": [-0.1, None], "detach_reset": [False, True]}),
    "IzhikevichNode": (
        {"a": 0.3, "b": 0.2, "w_rest": 0.1},
        {"v_reset": [0.0, -0.2, None], "detach_reset": [False, True]},
    ),
    "KLIFNode": (
        {"tau": 1.7},
        {
            "decay_input": [True, False],
            # The older release cannot run its own KLIF neuron with soft reset.
            "v_reset": [0.0, -0.2, None] if EXPLICIT_STATES else [0.0, -0.2],
            "scale_reset": [False, True],
        },
    ),
    "LIAFNode": (
        {"act": torch.relu, "tau": 1.7},
        {"threshold_related": [True, False], **LEAKY},
    ),
    "HalfThresholdIFNode": ({}, {"detach_reset": [False, True]}),
    "SimpleIFNode": ({}, {**HARD_OR_SOFT, "detach_reset": [False, True]}),
    "SimpleLIFNode": ({"tau": 1.7}, {"decay_input": [True, False], "v_reset": [0.0, -0.2]}),
    "CUBALIFNode": ({}, HARD_OR_SOFT),
    "ILIFNode": ({}, {"detach_reset": [False, True]}),
    "TernaryIFNode": ({}, {**HARD_OR_SOFT, "detach_reset": [False, True]}),
    "TernaryLIFNode": ({"tau": 1.7}, LEAKY),
    "ComplementaryLIFNode": ({}, {"tau": [1.7]}),
}

#: The older release raises in LIAFNode's own constructor.
AVAILABLE = [
    name for name in NEURONS if hasattr(neuron, name) and (EXPLICIT_STATES or name != "LIAFNode")
]


def combinations(name: str) -> list[dict]:
    """Every combination of the options of a neuron."""
    fixed, options = NEURONS[name]
    found: list[dict] = [dict(fixed)]
    for key, values in options.items():
        found = [{**one, key: value} for one in found for value in values]
    return found


def build(name: str, step_mode: str = "m", **arguments) -> nn.Module:
    """A native neuron; what is not given is as in the first combination of the table."""
    if name == "IFNode":
        arguments.setdefault("surrogate_function", surrogate.ATan())
    node = getattr(neuron, name)(**{**combinations(name)[0], **arguments})
    node.step_mode = step_mode
    return node


def case_id(arguments: dict) -> str:
    return "-".join(f"{key}={value}" for key, value in arguments.items() if not callable(value))


def drive(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """An input that makes every kind of neuron fire now and then."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).mul(1.2).add(0.5).to(dtype)


def operator(
    alpha=0.6, learn_alpha=False, method="gl", memory="full", memory_reset="never"
) -> FractionalOperator:
    return FractionalOperator(
        FractionalOrder(alpha, learn_alpha), get_solver(method), as_memory(memory), memory_reset=memory_reset
    )


def fractional(native: nn.Module, **settings) -> nn.Module:
    """The fractional form of a single neuron."""
    return ADAPTER.to_fractional(native, operator(**settings))


def convert(model: nn.Module, **settings) -> nn.Module:
    return convert_to_fractional(model, **settings)
