"""The training runs that several processes and a single one must agree on.

A run is small and whole: a converted net, a batch of sequences, a few steps of an optimiser. The single
process takes the whole batch; each of several takes its part, and the average over them is the same loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from spikede_plugins import PerChannel, convert_to_fractional

STEPS, BATCH, INPUTS, HIDDEN, OUTPUTS = 40, 8, 4, 8, 4  # 40 steps: "soe" folds its oldest into traces
RATE = 0.5

#: How a framework is used: what steps through time, and who carries the membrane.
STYLES = ("spikingjelly multi-step", "spikingjelly step by step", "snntorch hidden", "snntorch mem")
#: How the processes share the model. "neurons": neurons in units of their own, inside the one of the model.
#: "all": every module with parameters, also the order inside a neuron.
WRAPPERS = (
    "ddp",
    "fsdp",
    "fsdp flat",
    "fsdp neurons",
    "fsdp all",
    "fully_shard",
    "fully_shard neurons",
    "fully_shard all",
)
ORDERS: dict[str, Any] = {
    "one order": 0.6,
    "an order a layer": [0.5, 0.8],
    "an order a channel": [
        PerChannel(torch.linspace(0.3, 0.7, HIDDEN)),
        PerChannel(torch.linspace(0.7, 0.4, OUTPUTS)),
    ],
    "at the edge": 0.99,  # and then beyond, where a step of an optimiser may leave it: it has to be put back
}


@dataclass(frozen=True)
class Case:
    """One training run, and how it is shared."""

    style: str
    wrapper: str
    orders: str = "one order"
    learn_alpha: bool = True
    memory: str = "full"
    dtype: torch.dtype = torch.float64

    @property
    def name(self) -> str:
        learned = "learned" if self.learn_alpha else "fixed"
        what = (self.style, self.wrapper, self.orders, learned, self.memory, str(self.dtype))
        return ", ".join(what).replace("torch.", "")


def quick_cases() -> list[Case]:
    """Each style, wrapper, kind of order and memory at least once."""
    jelly, stepwise, hidden, explicit = STYLES
    return [
        Case(jelly, "ddp", "an order a layer", memory="soe"),
        Case(stepwise, "ddp", learn_alpha=False),
        Case(hidden, "ddp", "an order a channel"),
        Case(hidden, "ddp", dtype=torch.float32),
        Case(jelly, "fsdp", "at the edge"),
        Case(explicit, "fsdp", "an order a layer", memory="soe"),
        Case(jelly, "fsdp flat", "an order a channel"),
        Case(jelly, "fsdp neurons", memory="soe"),
        Case(jelly, "fsdp all", "an order a layer"),
        Case(jelly, "fully_shard", "at the edge"),
        Case(explicit, "fully_shard", "an order a channel", memory="soe"),
        Case(jelly, "fully_shard neurons"),
        Case(jelly, "fully_shard all", "at the edge"),
    ]


def all_cases() -> list[Case]:
    """Everything with everything; in units of their own, at every time step, learned orders of two kinds."""
    return list(_all_cases())


def _all_cases() -> Iterator[Case]:
    for style, wrapper, orders, memory in product(STYLES, WRAPPERS, ORDERS, ("full", "soe")):
        if wrapper.endswith(("neurons", "all")):
            if orders in ("one order", "at the edge"):
                yield Case(style, wrapper, orders, memory=memory)
            continue
        # A piece of a flat parameter cannot be put back (test_an_order_in_a_flat_parameter_says_so).
        if (wrapper, orders) != ("fsdp flat", "at the edge"):
            yield Case(style, wrapper, orders, memory=memory)
        if orders != "at the edge":
            yield Case(style, wrapper, orders, learn_alpha=False, memory=memory)
    for style, wrapper in product(STYLES, WRAPPERS):
        yield Case(style, wrapper, dtype=torch.float32)


class StepByStep(nn.Module):
    """Calls a net of single steps at each of the times ``[T, B, ...]``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.net(step) for step in x])


class SnnTorchNet(nn.Module):
    """Two layers of ``Leaky``; the membranes are passed on, or hidden in the neurons."""

    def __init__(self, hidden: bool) -> None:
        super().__init__()
        import snntorch

        self.hidden = hidden
        self.fc1, self.lif1 = nn.Linear(INPUTS, HIDDEN), snntorch.Leaky(beta=0.6, init_hidden=hidden)
        self.fc2, self.lif2 = nn.Linear(HIDDEN, OUTPUTS), snntorch.Leaky(beta=0.7, init_hidden=hidden)

    def forward(self, x: Tensor) -> Tensor:
        mem1, mem2, spikes = self.lif1.reset_mem(), self.lif2.reset_mem(), []
        for step in x:
            if self.hidden:
                out = self.lif2(self.fc2(self.lif1(self.fc1(step))))
            else:
                out, mem1 = self.lif1(self.fc1(step), mem1)
                out, mem2 = self.lif2(self.fc2(out), mem2)
            spikes.append(out)
        return torch.stack(spikes)


def _dyadic(shape: tuple[int, ...], seed: int, scale: float) -> Tensor:
    """Random multiples of 1/64, of which sums are exact in float32, in whatever order."""
    x = scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (64 * x).round() / 64


def build(case: Case) -> nn.Module:
    """The converted net of a case; the same in every process."""
    net: nn.Module
    if case.style.startswith("snntorch"):
        net = SnnTorchNet(hidden=case.style.endswith("hidden"))
    else:
        from spikingjelly.activation_based import functional, layer, neuron

        net = nn.Sequential(
            layer.Linear(INPUTS, HIDDEN), neuron.LIFNode(), layer.Linear(HIDDEN, OUTPUTS), neuron.LIFNode()
        )
        if case.style.endswith("multi-step"):
            functional.set_step_mode(net, "m")
        else:
            net = StepByStep(net)
    with torch.no_grad():
        for seed, parameter in enumerate(net.parameters()):
            parameter.copy_(_dyadic(tuple(parameter.shape), seed, 1.0))
    # snnTorch's own surrogates give float32 spikes, whatever the membrane is.
    surrogate = "atan" if case.dtype == torch.float64 else None
    made = convert_to_fractional(
        net.to(case.dtype),
        alpha=ORDERS[case.orders],
        learn_alpha=case.learn_alpha,
        memory=case.memory,
        surrogate=surrogate,
    ).to(case.dtype)
    if case.orders == "at the edge":
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if name.endswith("order.alpha"):
                    parameter.fill_(1.05)
    return made


def batch(case: Case) -> Tensor:
    """The input of the whole batch, ``[T, B, 4]``."""
    return _dyadic((STEPS, BATCH, INPUTS), 99, 2.0).to(case.dtype)


def reset(case: Case, net: nn.Module) -> None:
    """Forget the membranes; the snnTorch nets do so themselves."""
    if case.style.startswith("spikingjelly"):
        from spikingjelly.activation_based import functional

        functional.reset_net(net)


def train(
    case: Case, net: nn.Module, x: Tensor, after_descent: Callable[[], None] = lambda: None
) -> list[float]:
    """Train ``net`` in place; the loss of each step.

    The first step is plain descent, ``w - RATE * gradient``, so that the weights after it tell the gradients,
    also those of parameters that lie in shards; ``after_descent`` is called there. Adam takes the others.
    """
    descent = torch.optim.SGD(net.parameters(), lr=RATE)
    adam = torch.optim.Adam(net.parameters(), lr=0.05)
    losses = []
    # In float32 later steps would be those of weights that differ by rounding, and of other spikes.
    for step in range(4 if case.dtype == torch.float64 else 1):
        reset(case, net)
        descent.zero_grad()
        loss = (net(x).mean(0) - 0.3).square().mean()
        loss.backward()
        if step == 0:
            descent.step()
            after_descent()
        else:
            adam.step()
        losses.append(loss.item())
    return losses
