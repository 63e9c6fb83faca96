"""At alpha = 1 the fractional neuron is the native one: spikes and membrane to the last bit, and gradients.

A learnable alpha at 1 runs the fractional engine (a fixed alpha = 1 keeps the native neuron itself).
"""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("spikingjelly.activation_based")

import torch
from sj_cases import AVAILABLE, build, case_id, combinations, convert, drive, fractional
from torch import nn

CASES = [
    pytest.param(name, arguments, id=f"{name}-{case_id(arguments)}")
    for name in AVAILABLE
    for arguments in combinations(name)
]


def run(node, x, step_mode):
    node.step_mode = step_mode
    if step_mode == "m":
        return node(x)
    return torch.stack([node(one) for one in x])


def outcome(node, x, step_mode, weights):
    """Output, state, gradients to the input and to each native parameter."""
    x = x.clone().requires_grad_()
    y = run(node, x, step_mode)
    loss = (y * weights).sum() + node.v.square().sum()
    names = [name for name, _ in node.named_parameters() if "fractional" not in name]
    grads = torch.autograd.grad(loss, [x, *(node.get_parameter(name) for name in names)])
    return y, node.v, grads


@pytest.mark.parametrize(("name", "arguments"), CASES)
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_native_to_the_last_bit(name, arguments, step_mode):
    for dtype in (torch.float32, torch.float64):
        native = build(name, step_mode, **arguments).to(dtype)
        node = fractional(copy.deepcopy(native), alpha=1.0, learn_alpha=True)
        x = drive(6, 3, 4, dtype=dtype)
        weights = drive(6, 3, 4, seed=1, dtype=dtype)
        y, v, grads = outcome(native, x, step_mode, weights)
        y1, v1, grads1 = outcome(node, x, step_mode, weights)
        assert y.abs().sum() > 0
        if name == "ILIFNode" and step_mode == "s":
            # The native single step rounds its leak differently from the native sequence, which is followed.
            torch.testing.assert_close(v1, v)
        else:
            assert torch.equal(v1, v)
        assert torch.equal(y1, y)
        # The adjoint recursion and the framework's own backward add the same terms in another order.
        tolerance = {"rtol": 2e-5, "atol": 2e-5} if dtype is torch.float32 else {"rtol": 1e-11, "atol": 1e-11}
        for one, other in zip(grads1, grads, strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("name", AVAILABLE)
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_fixed_order_one_is_the_native_neuron(name, step_mode):
    """Forward and gradients, nothing rounded differently."""
    native = nn.Sequential(nn.Linear(4, 5), build(name, step_mode), nn.Linear(5, 3), build(name, step_mode))
    converted = convert(native, alpha=1.0)
    x = drive(5, 2, 4) * 2
    results = []
    for net in (native, converted):
        y = net(x) if step_mode == "m" else torch.stack([net(one) for one in x])
        y.sum().backward()
        results.append((y, net[1].v, [p.grad for p in net.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    for a, b in zip(results[0][2], results[1][2], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("name", AVAILABLE)
def test_native_in_eval_mode(name):
    native = build(name).eval()
    node = fractional(copy.deepcopy(native), alpha=1.0, learn_alpha=True)
    x = drive(6, 3, 4)
    assert torch.equal(run(node, x, "m"), run(native, x, "m"))
    assert torch.equal(node.v, native.v)
