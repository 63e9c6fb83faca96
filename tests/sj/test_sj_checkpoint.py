"""Gradient checkpoints (memopt, torch.utils.checkpoint) and counters of operations."""

from __future__ import annotations

import pytest

pytest.importorskip("spikingjelly.activation_based")

import torch
from sj_cases import drive
from spikede_spikingjelly.release import EXPLICIT_STATES
from spikingjelly.activation_based import base, functional, layer, neuron
from torch import nn
from torch.utils.checkpoint import checkpoint

from spikede_plugins import convert_to_fractional
from spikede_plugins.errors import StateError

explicit = pytest.mark.skipif(not EXPLICIT_STATES, reason="this release has no functional forward")

SETTINGS = [
    {"method": "gl", "memory": "auto"},
    {"method": "gl", "memory": "full", "learn_alpha": True},
    {"method": "gl", "memory": "soe", "learn_alpha": True, "memory_reset": "spike"},
    {"method": "l1", "memory": 7, "learn_alpha": True},
    {"method": "abm", "memory": "full", "learn_alpha": True},
    {"method": "trap", "memory": "full"},
]


def network(step_mode="m", **settings) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(layer.Linear(6, 8), nn.Sequential(neuron.LIFNode()), layer.Linear(8, 3))
    with torch.no_grad():
        net[0].weight.mul_(4.0)
    net = convert_to_fractional(net, **{"alpha": 0.7, **settings})
    functional.set_step_mode(net, step_mode)
    return net


def train(net: nn.Module, x: torch.Tensor, calls: int) -> list[torch.Tensor]:
    """All gradients of two training steps, each of several calls behind one another."""
    optimiser, found = torch.optim.SGD(net.parameters(), lr=0.05), []
    for _ in range(2):
        functional.reset_net(net)
        optimiser.zero_grad()
        total = torch.zeros((), dtype=x.dtype)
        for part in x.chunk(calls):
            y = net(part) if net[0].step_mode == "m" else torch.stack([net(one) for one in part])
            total = total + y.square().sum()
        total.backward()
        found += [p.grad.clone() for p in net.parameters()]
        optimiser.step()
    return found


@explicit
@pytest.mark.parametrize(
    "step_mode, chunks, calls, steps",
    [("m", 5, 1, 60), ("m", 3, 2, 24), ("s", 1, 1, 20)],
)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_memopt_gives_the_gradients_of_the_run_without(settings, step_mode, chunks, calls, steps):
    memopt = pytest.importorskip("spikingjelly.activation_based.memopt")
    plain, saving = network(step_mode, **settings).double(), network(step_mode, **settings).double()
    saving[1] = memopt.checkpoint_module(saving[1], chunks=chunks)
    if chunks == 5 and settings["memory"] in ("auto", "soe"):
        steps = 140  # such a memory folds
    x = drive(steps, 4, 6, dtype=torch.float64)
    for expected, found in zip(train(plain, x, calls), train(saving, x, calls), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    assert expected.abs().sum() > 0


@explicit
def test_optimize_memory_finds_the_converted_neurons():
    memopt = pytest.importorskip("spikingjelly.activation_based.memopt")
    plain, saving = network(learn_alpha=True), network(learn_alpha=True)
    x = drive(20, 4, 6)
    saving = memopt.optimize_memory(saving, neuron.LIFNode, lambda model: model(x), level=1)
    assert type(saving[1][0]).__name__ == "CheckpointWrapper"
    for expected, found in zip(train(plain, x, 1), train(saving, x, 1), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@explicit
def test_a_model_with_checkpoints_is_converted():
    """The wrapper keeps a function of the native neuron, which would run on."""
    memopt = pytest.importorskip("spikingjelly.activation_based.memopt")
    torch.manual_seed(0)
    native = nn.Sequential(layer.Linear(6, 8), neuron.LIFNode())
    functional.set_step_mode(native, "m")
    with torch.no_grad():
        native[0].weight.mul_(4.0)
    expected = convert_to_fractional(native, alpha=0.5)
    native[1] = memopt.checkpoint_module(native[1], chunks=2)
    found = convert_to_fractional(native, alpha=0.5)
    x = drive(20, 4, 6)
    assert torch.equal(found(x), expected(x))
    assert not torch.equal(found(x), native(x))


@explicit
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_functional_forward_under_a_checkpoint(step_mode, reentrant):
    node = network(step_mode, learn_alpha=True)[1][0]
    forward = base.to_functional_forward(node)
    x = drive(20, 4, 6)

    def part(c, *states):
        outputs = []
        for one in c if step_mode == "s" else [c]:
            (y,), states = forward((one,), states)
            outputs.append(y)
        return (torch.stack(outputs) if step_mode == "s" else outputs[0], *states)

    def gradients(how):
        given, states, outputs = x.clone().requires_grad_(), tuple(base.extract_memories(node)), []
        for c in given.split(5):
            y, *states = part(c, *states) if how is None else checkpoint(part, c, *states, use_reentrant=how)
            outputs.append(y)
        alpha = node.fractional.order.alpha
        alpha.grad = None
        torch.cat(outputs).square().sum().backward()
        return given.grad, alpha.grad.clone()

    for expected, found in zip(gradients(None), gradients(reentrant), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_a_repetition_from_another_state_is_refused(step_mode, reentrant):
    node = network(step_mode)[1][0]

    def part(c):
        return node(c) if step_mode == "m" else torch.stack([node(one) for one in c])

    x = drive(12, 4, 6).requires_grad_()
    y = torch.cat([checkpoint(part, c, use_reentrant=reentrant) for c in x.split(6)])
    with pytest.raises(StateError, match=r"fractional LIFNode again.*checkpoint_module\(net\)"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_repetition_that_starts_with_a_reset_is_right(reentrant):
    node = network("m")[1][0]

    def whole(c):
        functional.reset_net(node)
        return node(c)

    x = drive(12, 4, 6).requires_grad_()
    checkpoint(whole, x, use_reentrant=reentrant).square().sum().backward()
    (expected,) = torch.autograd.grad(whole(x).square().sum(), x)
    torch.testing.assert_close(x.grad, expected)


# Counters


def sums_by_hand(steps: int, neurons: int) -> int:
    """A multiplication and an addition for each neuron and each earlier step of each step."""
    return sum(2 * neurons * lag for lag in range(steps))


@pytest.mark.parametrize("memory", ["full", "auto"])
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_counters_count_the_history_sums(step_mode, memory):
    counter = pytest.importorskip("spikingjelly.activation_based.op_counter")
    steps, shape = 40, (4, 50)
    x, totals = drive(steps, *shape), {}
    for alpha in (1.0, 0.7):
        node = convert_to_fractional(neuron.LIFNode(step_mode=step_mode), alpha=alpha, memory=memory)
        flops = counter.FlopCounter()
        with counter.DispatchCounterMode([flops]), torch.no_grad():
            y = node(x) if step_mode == "m" else torch.stack([node(one) for one in x])
        totals[alpha] = flops.get_total()
        node.reset()
        with torch.no_grad():  # counted or not, the numbers are the same
            again = node(x) if step_mode == "m" else torch.stack([node(one) for one in x])
        assert torch.equal(y, again)
    most = sums_by_hand(steps + 32, 200)  # sums are formed to the end of a block
    assert sums_by_hand(steps, 200) <= totals[0.7] - totals[1.0] <= most


def test_torchs_own_counter_counts_forward_and_backward():
    from torch.utils.flop_counter import FlopCounterMode

    node = convert_to_fractional(neuron.LIFNode(step_mode="m"), alpha=0.7, memory="full")
    x = drive(40, 4, 50).requires_grad_()
    with FlopCounterMode(display=False) as forward:
        y = node(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert forward.get_total_flops() >= sums_by_hand(40, 200)
    assert backward.get_total_flops() >= sums_by_hand(40, 200)
