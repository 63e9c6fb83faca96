"""A training run that can be killed at any instant and goes on where it was.

It saves after every step, whole or not at all: a file of its own, then a rename.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spikede_plugins import PerChannel, SumOfExponentials, convert_to_fractional


class Net(nn.Module):
    def __init__(self, framework: str) -> None:
        super().__init__()
        if framework == "spikingjelly":
            from spikingjelly.activation_based import neuron

            first, second = neuron.LIFNode(tau=2.0), neuron.LIFNode(tau=2.0)
        else:
            import snntorch

            first, second = (snntorch.Leaky(beta=0.6, init_hidden=True, learn_beta=True) for _ in range(2))
        self.layers = nn.Sequential(nn.Linear(6, 16), first, nn.Dropout(0.2), nn.Linear(16, 4), second)

    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.layers(x) for x in x_seq])


def reset(framework: str, net: nn.Module) -> None:
    if framework == "spikingjelly":
        from spikingjelly.activation_based import functional

        functional.reset_net(net)
    else:
        for module in net.layers:
            if hasattr(module, "reset_mem"):
                module.reset_mem()


def train(framework: str, folder: Path, steps: int, tell: Callable[[tuple[str, Any]], None]) -> None:
    """Go on from what is in ``folder``; tell where it begins, each step that is saved, and the result."""
    warnings.simplefilter("ignore", UserWarning)  # the frameworks' own
    torch.set_num_threads(1)
    torch.manual_seed(0)
    orders = {"layers.1": PerChannel([0.5] * 8 + [0.8] * 8), "*": 0.9}
    memory = SumOfExponentials(tolerance=1e-4, horizon=100)
    net = convert_to_fractional(Net(framework), alpha=orders, learn_alpha=True, memory=memory)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    saved, done = folder / "checkpoint.pt", 0
    if saved.exists():
        checkpoint = torch.load(saved, weights_only=True)
        net.load_state_dict(checkpoint["net"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        schedule.load_state_dict(checkpoint["schedule"])
        torch.set_rng_state(checkpoint["rng"])
        done = checkpoint["done"]
    tell(("begins at", done))
    for step in range(done, steps):
        x = 4 * torch.rand(40, 3, 6)
        reset(framework, net)
        optimizer.zero_grad()
        loss = (net(x).mean(0) - x.mean(0)[:, :4] / 8).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        checkpoint = {
            "net": net.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "rng": torch.get_rng_state(),
            "done": step + 1,
        }
        torch.save(checkpoint, folder / "checkpoint.new")
        os.replace(folder / "checkpoint.new", saved)
        tell(("step", step + 1))
    numbers = [loss.detach(), *(p.detach() for p in net.parameters())]
    tell(("result", b"".join(n.double().numpy().tobytes() for n in numbers)))
