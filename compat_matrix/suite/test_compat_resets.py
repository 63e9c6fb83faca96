"""Resets: the framework's own reset forgets potential and history together, and nothing else does."""

from __future__ import annotations

import copy

import torch
from small_nets import each_framework, frames
from torch import Tensor, nn

from spikede_plugins import convert_to_fractional
from spikede_plugins.registry import get_adapter


def go_on(net: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([net(x_k) for x_k in x])


@each_framework
def test_a_reset_forgets_everything(framework) -> None:
    net = convert_to_fractional(framework.net(), alpha=0.5)
    fresh = framework.run(net, frames())
    assert not torch.equal(go_on(net, frames()), fresh)  # without a reset the past counts
    assert torch.equal(framework.run(net, frames()), fresh)


@each_framework
def test_a_sequence_in_two_parts_is_the_sequence(framework) -> None:
    net = convert_to_fractional(framework.net(), alpha=0.5)
    whole = framework.run(net, frames())
    first, second = frames()[:2], frames()[2:]
    assert torch.equal(torch.cat([framework.run(net, first), go_on(net, second)]), whole)


@each_framework
def test_another_batch_size_after_a_reset(framework) -> None:
    net = convert_to_fractional(framework.net(), alpha=0.5)
    whole = framework.run(net, frames())
    assert torch.equal(framework.run(net, frames()[:, :2]), whole[:, :2])


@each_framework
def test_a_copy_made_during_a_run_goes_its_own_way(framework) -> None:
    net = convert_to_fractional(framework.net(), alpha=0.5)
    whole = framework.run(net, frames())
    framework.run(net, frames()[:2])
    twin = copy.deepcopy(net)
    adapter = get_adapter(framework.name)
    for module in twin.modules():  # utils.reset of snnTorch does not reach copies
        if adapter.is_fractional(module):
            adapter.reset_state(module)
    assert torch.equal(go_on(twin, frames()), whole)
    assert torch.equal(go_on(net, frames()[2:]), whole[2:])


@each_framework
def test_the_framework_cuts_the_graph(framework) -> None:
    """detach_net / detach_hidden: the values go on, the gradient stops."""
    net = convert_to_fractional(framework.net(), alpha=0.5)
    x = frames().requires_grad_()
    whole = framework.run(net, x)
    framework.run(net, x[:2])
    if framework.name == "spikingjelly":
        from spikingjelly.activation_based import functional

        functional.detach_net(net)
    else:
        for module in (net.lif, net.block[1]):
            module.detach_hidden()
    rest = go_on(net, x[2:])
    assert torch.equal(rest, whole[2:])
    (gradient,) = torch.autograd.grad(rest.sum(), x)
    assert not gradient[:2].any() and gradient[2:].any()
