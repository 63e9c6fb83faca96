"""What the examples train: a small fractional network for scikit-learn's handwritten digits.

The eight rows of an image are fed one after the other, two time steps each; the class is the neuron that
fires most. The network is written for either framework, as its users write it; one line makes it fractional.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from spikede_plugins import conversion_report, convert_to_fractional


def digits(samples: int | None = None) -> TensorDataset:
    """Images ``[N, 8, 8]`` with pixels in [0, 1], and their labels."""
    images, labels = load_digits(return_X_y=True)
    images, labels = images[:samples], labels[:samples]
    return TensorDataset(torch.tensor(images).float().reshape(-1, 8, 8) / 16, torch.tensor(labels))


class SpikingJellyNet(nn.Module):
    """Rates of ten output neurons ``[B, 10]`` for images ``[B, 8, 8]``."""

    def __init__(self) -> None:
        super().__init__()
        from spikingjelly.activation_based import functional, layer, neuron

        self.reset = functional.reset_net
        self.layers = nn.Sequential(
            layer.Linear(8, 64), neuron.LIFNode(tau=2.0), layer.Linear(64, 10), neuron.LIFNode(tau=2.0)
        )
        functional.set_step_mode(self.layers, "m")

    def forward(self, images: Tensor) -> Tensor:
        self.reset(self.layers)
        return self.layers(4 * sequence(images)).mean(0)


class SnnTorchNet(nn.Module):
    """Rates of ten output neurons ``[B, 10]`` for images ``[B, 8, 8]``."""

    def __init__(self) -> None:
        super().__init__()
        import snntorch as snn

        self.fc1, self.lif1 = nn.Linear(8, 64), snn.Leaky(beta=0.5)
        self.fc2, self.lif2 = nn.Linear(64, 10), snn.Leaky(beta=0.5)

    def forward(self, images: Tensor) -> Tensor:
        mem1, mem2, spikes = self.lif1.reset_mem(), self.lif2.reset_mem(), []
        for x in 4 * sequence(images):
            spike, mem1 = self.lif1(self.fc1(x), mem1)
            spike, mem2 = self.lif2(self.fc2(spike), mem2)
            spikes.append(spike)
        return torch.stack(spikes).mean(0)


NETS = {"spikingjelly": SpikingJellyNet, "snntorch": SnnTorchNet}


def sequence(images: Tensor) -> Tensor:
    """``[B, 8, 8]`` images as ``[16, B, 8]``: row by row, each twice."""
    return images.transpose(0, 1).repeat_interleave(2, dim=0)


def fractional_net(framework: str) -> nn.Module:
    """The network with neurons of a learned fractional order."""
    return convert_to_fractional(NETS[framework](), alpha=0.8, learn_alpha=True)


def orders(net: nn.Module) -> str:
    """The orders as the neurons see them now."""
    return ", ".join(row.alpha for row in conversion_report(net).rows)
