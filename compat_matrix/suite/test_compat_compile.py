"""A compiled sequence is the sequence, without a graph break, as the installed torch captures it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from spikede_plugins import convert_to_fractional


@pytest.mark.parametrize("learn_alpha", [False, True])
def test_a_compiled_multi_step_network_equals_the_eager_one(learn_alpha: bool) -> None:
    pytest.importorskip("spikingjelly.activation_based")
    from spikingjelly.activation_based import functional, layer, neuron

    torch.manual_seed(0)
    net = nn.Sequential(layer.Linear(5, 8), neuron.LIFNode(), layer.Linear(8, 4), neuron.IFNode())
    functional.set_step_mode(net, "m")
    net = convert_to_fractional(net, alpha=0.6, learn_alpha=learn_alpha)
    twin = copy.deepcopy(net)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x = 6.0 * torch.rand(10, 3, 5, generator=torch.Generator().manual_seed(1))
    expected, found = net(x), compiled(x)
    assert torch.equal(found, expected) and expected.any()
    expected.sum().backward()
    found.sum().backward()
    for (name, ours), theirs in zip(twin.named_parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
