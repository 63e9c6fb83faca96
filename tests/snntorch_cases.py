"""What the snnTorch tests share: neurons with every option, and one way to run them over time."""

from __future__ import annotations

import warnings
from typing import Any

import snntorch as snn
import torch
from snntorch.functional import quant
from torch import Tensor, nn

WIDTH = 4
MECHANISMS = ("subtract", "zero", "none")

#: name: (class, arguments, number of states beside the spikes, whether it has reset_delay)
NEURONS: dict[str, tuple[type[nn.Module], dict[str, Any], int, bool]] = {
    "Leaky": (snn.Leaky, {"beta": 0.9}, 1, True),
    "Lapicque": (snn.Lapicque, {"beta": 0.6, "threshold": 0.5}, 1, False),
    "LapicqueRC": (snn.Lapicque, {"R": 1.5, "C": 1.1, "threshold": 0.5}, 1, False),
    "Synaptic": (snn.Synaptic, {"alpha": 0.7, "beta": 0.8}, 2, True),
    "Alpha": (snn.Alpha, {"alpha": 0.9, "beta": 0.8}, 3, False),
    "RLeaky": (snn.RLeaky, {"beta": 0.9, "linear_features": WIDTH}, 1, True),
    "RLeakyOne": (snn.RLeaky, {"beta": 0.9, "all_to_all": False, "V": 0.4}, 1, True),
    "RSynaptic": (snn.RSynaptic, {"alpha": 0.7, "beta": 0.8, "linear_features": WIDTH}, 2, True),
    "RSynapticOne": (snn.RSynaptic, {"alpha": 0.7, "beta": 0.8, "all_to_all": False}, 2, True),
}

#: Constructor options; `state_quant` stands for the quantiser.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "hidden": {"init_hidden": True},
    "hidden_output": {"init_hidden": True, "output": True},
    "output": {"output": True},
    "inhibition": {"inhibition": True},
    "learned": {"learn_beta": True, "learn_threshold": True},
    "learned_hidden": {"learn_beta": True, "learn_threshold": True, "init_hidden": True},
    "quant": {"state_quant": True},
    "quant_hidden": {"state_quant": True, "init_hidden": True, "learn_threshold": True},
    "learn_synapse": {"learn_alpha": True, "learn_beta": True},
    "fixed_recurrence": {"learn_recurrent": False},
    "graded": {"graded_spikes_factor": 0.7},
    "learn_graded": {"graded_spikes_factor": 0.7, "learn_graded_spikes_factor": True, "learn_beta": True},
    "bypass": {"surrogate_disable": True},
    "tensors": {"beta": torch.linspace(0.5, 0.7, WIDTH), "threshold": torch.linspace(0.5, 1.0, WIDTH)},
}


def applies(name: str, option: str) -> bool:
    """Whether the native constructor takes the option, in a way that works natively."""
    cls = NEURONS[name][0]
    if option in ("graded", "learn_graded"):
        return cls is snn.Leaky
    if option == "learn_synapse":
        return cls in (snn.Synaptic, snn.RSynaptic)
    if option == "fixed_recurrence":
        return cls in (snn.RLeaky, snn.RSynaptic)
    if option == "tensors":
        return cls in (snn.Leaky, snn.Synaptic, snn.RLeaky, snn.RSynaptic, snn.Alpha)
    return True


def build(name: str, option: str = "plain", mechanism: str = "subtract", delay: bool = True) -> nn.Module:
    """A native neuron."""
    cls, arguments, _, has_delay = NEURONS[name]
    options = dict(OPTIONS[option])
    if "state_quant" in options:
        options["state_quant"] = quant.state_quant(num_bits=4, uniform=True, threshold=1)
    if name == "LapicqueRC":
        options.pop("learn_beta", None)  # needs beta
    if has_delay:
        options["reset_delay"] = delay
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Inhibition")
        return cls(**{**arguments, **options}, reset_mechanism=mechanism)


def inputs(steps: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    """A drive ``[T, B, WIDTH]`` that makes every neuron fire, and rest."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(steps, 2, WIDTH, generator=generator, dtype=torch.float64) + 0.4
    return x.to(dtype).requires_grad_()


def run(neuron: nn.Module, x: Tensor, states: tuple[Tensor, ...] | None = None) -> tuple[list[Tensor], Any]:
    """Spikes and membranes of every step, and the states to go on with."""
    recurrent = isinstance(neuron, (snn.RLeaky, snn.RSynaptic))  # the spikes are a state
    if states is None and not neuron.init_hidden:
        count = sum(hasattr(neuron, s) for s in ("syn", "syn_exc", "syn_inh", "mem")) + recurrent
        states = tuple(torch.zeros_like(x[0]) for _ in range(count))
    outputs: list[Tensor] = []
    for xk in x:
        out = neuron(xk) if neuron.init_hidden else neuron(xk, *states)
        if isinstance(out, tuple):
            states = out if recurrent else out[1:]
            outputs += [out[0], *out[1:]]
        else:
            outputs += [out, neuron.mem]
    return outputs, states


def loss(outputs: list[Tensor]) -> Tensor:
    """A scalar that every output enters with its own factor."""
    generator = torch.Generator().manual_seed(5)
    factors = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    return sum(((o * f).sum() for o, f in zip(outputs, factors, strict=True)), torch.zeros(()))


def gradients(outputs: list[Tensor], x: Tensor, neuron: nn.Module) -> dict[str, Tensor | None]:
    """Of :func:`loss` to the input and every native parameter."""
    wanted = {"x": x}
    wanted |= {
        name: p for name, p in neuron.named_parameters()
        if p.requires_grad and not name.startswith("fractional.")
    }
    total = loss(outputs)
    if not total.requires_grad:
        return {}
    found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    return dict(zip(wanted, found, strict=True))
