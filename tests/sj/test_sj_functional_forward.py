"""Explicit-state (functional) forward of the releases that have it: pure, and the same numbers."""

from __future__ import annotations

import pytest

pytest.importorskip("spikingjelly.activation_based")

import torch
from sj_cases import AVAILABLE, build, convert, drive, fractional
from spikede_spikingjelly.release import EXPLICIT_STATES
from spikingjelly.activation_based import base, layer, neuron
from torch import nn

from spikede_plugins.errors import StateError

pytestmark = pytest.mark.skipif(not EXPLICIT_STATES, reason="this release has no functional forward")


def frozen(values):
    """Each value, and a copy of what it holds now."""
    return [(value, value.clone() if isinstance(value, torch.Tensor) else value) for value in values]


def unchanged(values):
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a is b for a, b in values)


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("name", AVAILABLE)
def test_one_neuron(name, step_mode):
    node = fractional(build(name, step_mode))
    forward = base.to_functional_forward(node)
    fresh = tuple(base.extract_memories(node))
    x = drive(4, 2, 3)
    if step_mode == "s":
        expected = torch.stack([node(one) for one in x])
    else:
        expected = torch.cat([node(x[:1]), node(x[1:])])
    before = frozen(node.memories())
    states, outputs = fresh, []
    for part in x if step_mode == "s" else (x[:1], x[1:]):
        given = frozen(states)
        (y,), states = forward((part,), states)
        outputs.append(y)
        assert unchanged(given)
    y = torch.stack(outputs) if step_mode == "s" else torch.cat(outputs)
    assert torch.equal(y, expected)
    assert torch.equal(states[0], node.v)
    assert all(a is b for (a, _), b in zip(before, node.memories(), strict=True))
    assert unchanged(before)


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Linear(4, 6), neuron.LIFNode(), layer.Linear(6, 3), neuron.IzhikevichNode(), neuron.IFNode()
    )
    for module in net:
        module.step_mode = "m"
    return convert(net)


class Branches(nn.Module):
    """Not a Sequential: functional forward falls back to loading the states."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x) + 1.0


@pytest.mark.parametrize("wrapped", [False, True])
def test_networks(wrapped):
    net = Branches(network()) if wrapped else network()
    forward = base.to_functional_forward(net)
    states = tuple(base.extract_memories(net))
    assert None in states  # the history before the first step
    x = drive(6, 2, 4) * 3
    (first,), middle = forward((x[:2],), states)
    (second,), _ = forward((x[2:],), middle)
    (again,), _ = forward((x[2:],), middle)  # an older state, taken up twice
    assert torch.equal(second, again)
    assert all(m is None or isinstance(m, float) for m in base.extract_memories(net))
    assert torch.equal(torch.cat([first, second]), net(x))


def test_states_interleave():
    """Two runs of one network never disturb each other's history."""
    net = network()
    forward = base.to_functional_forward(net)
    a = b = tuple(base.extract_memories(net))
    xa, xb = drive(6, 2, 4, seed=1) * 3, drive(6, 2, 4, seed=2) * 3
    ya, yb = [], []
    for t in range(6):
        (y,), a = forward((xa[t : t + 1],), a)
        ya.append(y)
        (y,), b = forward((xb[t : t + 1],), b)
        yb.append(y)
    assert torch.equal(torch.cat(ya), net(xa))
    for module in net.modules():
        if isinstance(module, base.MemoryModule):
            module.reset()
    assert torch.equal(torch.cat(yb), net(xb))


def test_gradients_through_states():
    node = fractional(build("LIFNode").double(), alpha=0.6, learn_alpha=True).double()
    forward = base.to_functional_forward(node)
    x = drive(4, 2, 3, dtype=torch.float64).requires_grad_()
    (y1,), states = forward((x[:2],), tuple(base.extract_memories(node)))
    (y2,), _ = forward((x[2:],), states)
    (split,) = torch.autograd.grad(y1.sum() + y2.sum(), x)
    (whole,) = torch.autograd.grad(node(x).sum(), x)
    torch.testing.assert_close(split, whole)


def test_wrong_number_of_states():
    node = fractional(build("LIFNode"))
    with pytest.raises(StateError, match="history"):
        node.functional_forward((drive(3, 2, 3),), (0.0,))
