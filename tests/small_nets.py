"""The same small network written for each framework, for tests that hold for both."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

STEPS, BATCH, INPUTS = 6, 3, 4


@dataclass(frozen=True)
class Framework:
    """How a framework spells a LIF neuron that takes and gives plain tensors, and the reset of a net."""

    name: str
    native: str

    def neuron(self) -> nn.Module:
        if self.name == "spikingjelly":
            from spikingjelly.activation_based import neuron

            return neuron.LIFNode(tau=2.0)
        import snntorch

        return snntorch.Leaky(beta=0.6, init_hidden=True)

    def unsupported(self) -> nn.Module:
        """A subclass with dynamics of its own."""
        parent = type(self.neuron())

        class Homemade(parent):
            def forward(self, *args, **kwargs):
                return super().forward(*args, **kwargs) * 2.0

        return Homemade() if self.name == "spikingjelly" else Homemade(beta=0.6, init_hidden=True)

    def reset(self, net: nn.Module) -> None:
        if self.name == "spikingjelly":
            from spikingjelly.activation_based import functional

            functional.reset_net(net)
        else:
            from snntorch import utils

            for module in net.modules():
                utils.reset(module)

    def net(self) -> Net:
        torch.manual_seed(0)
        return Net(self)

    def run(self, net: nn.Module, x: Tensor) -> Tensor:
        """Spikes ``[T, ...]`` of a freshly reset net."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the frameworks' own
            self.reset(net)
            return torch.stack([net(step) for step in x])


class Net(nn.Module):
    """Nested: one neuron as an attribute, one inside a block."""

    def __init__(self, framework: Framework) -> None:
        super().__init__()
        self.fc = nn.Linear(INPUTS, 16)
        self.lif = framework.neuron()
        self.block = nn.Sequential(nn.Linear(16, 8), framework.neuron())
        with torch.no_grad():
            self.block[0].weight.mul_(5.0)  # so that the last layer fires as well

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.lif(self.fc(x)))


def frames() -> Tensor:
    """An input that makes the neurons fire, ``[T, B, 4]``."""
    return 8 * torch.randn(STEPS, BATCH, INPUTS, generator=torch.Generator().manual_seed(1))


FRAMEWORKS = [
    pytest.param(
        Framework(name, native),
        id=name,
        marks=pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed"),
    )
    for name, native in (("spikingjelly", "LIFNode"), ("snntorch", "Leaky"))
]

each_framework = pytest.mark.parametrize("framework", FRAMEWORKS)
