"""A fractional neuron is an instance of its native class: methods, monitors, copies, exchanges."""

from __future__ import annotations

import copy
import gc
import importlib
import pickle
import weakref

import pytest

pytest.importorskip("spikingjelly.activation_based")

import torch
from sj_cases import ADAPTER, AVAILABLE, build, drive, fractional
from spikede_spikingjelly import FractionalNode, fractional_class
from spikede_spikingjelly.release import EXPLICIT_STATES
from spikingjelly.activation_based import functional, layer, neuron
from torch import fx, nn

from spikede_plugins import convert_to_fractional, restore_native
from spikede_plugins.errors import ExportError, OptionError, OptionTypeError, StateError


class Leaking(neuron.LIFNode):
    """A user's neuron with a method of its own."""

    def leak(self) -> float:
        return 1.0 / self.tau


class Counting(neuron.LIFNode):
    """A user's neuron that keeps books in its reset."""

    def reset(self) -> None:
        super().reset()
        self.resets = getattr(self, "resets", 0) + 1


def test_a_reset_of_the_users_own_runs_and_the_history_is_forgotten():
    node, x = fractional(Counting(tau=2.0, step_mode="m")), drive(5, 2, 3)
    first, before = node(x), node.resets
    functional.reset_net(node)
    assert node.resets == before + 1
    assert torch.equal(node(x), first)
    assert torch.equal(first, fractional(neuron.LIFNode(tau=2.0, step_mode="m"))(x))
    native = ADAPTER.to_native(node)
    assert type(native) is Counting
    assert torch.equal(native(x), neuron.LIFNode(tau=2.0, step_mode="m")(x))


def test_a_reset_put_on_the_instance_is_refused():
    native = neuron.LIFNode()
    native.reset = lambda: None
    assert "reset was replaced" in ADAPTER.support(native).reason


@pytest.mark.parametrize("name", AVAILABLE)
def test_the_fractional_class_comes_first_and_the_native_one_next(name):
    native = build(name)
    node = fractional(native)
    kind = type(node)
    assert kind.__mro__[:3] == (kind, FractionalNode, type(native))
    assert kind is fractional_class(type(native)) is type(fractional(build(name)))
    assert kind.__name__ == f"Fractional{name}"
    assert ADAPTER.is_fractional(node) and not ADAPTER.is_neuron(node)
    assert type(restore_native(nn.Sequential(node))[0]) is type(native)
    added = set(node._memories) - set(native._memories)
    assert len(added) <= 2, added


@pytest.mark.parametrize("memory", ["soe", "auto", "full", 7])
@pytest.mark.parametrize("memory_reset", ["never", "spike"])
def test_two_entries_hold_every_memory(memory, memory_reset):
    """Sequences, single steps with a cut graph, and states taken from copies: the same spikes."""
    x = drive(150, 2, 3)
    node = fractional(build("LIFNode"), memory=memory, memory_reset=memory_reset)
    expected, v = node(x), node.v
    node.reset()
    node.step_mode = "s"
    spikes = []
    for k, one in enumerate(x):
        spikes.append(node(one))
        node.detach()
        if k == 140:
            node = pickle.loads(pickle.dumps(node))
    assert torch.equal(torch.stack(spikes), expected)
    torch.testing.assert_close(node.v, v)
    assert list(node._memories) == ["v", "history", "history_start"]


def test_methods_of_a_users_subclass():
    node = convert_to_fractional(nn.Sequential(Leaking(tau=4.0)), alpha=0.7)[0]
    assert isinstance(node, Leaking)
    assert node.leak() == 0.25
    node.tau = 2.0
    assert node.leak() == 0.5
    for other in (copy.deepcopy(node), pickle.loads(pickle.dumps(node))):
        assert type(other) is type(node)
        assert other.leak() == 0.5


def test_a_class_of_which_nothing_is_left_is_let_go():
    class Passing(neuron.IFNode):
        pass

    fractional(Passing())
    reference = weakref.ref(Passing)
    del Passing
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", AVAILABLE)
def test_no_step_of_the_native_class_runs(name, training, step_mode, monkeypatch):
    """Every method of the native class that takes a step, or a part of one, is made to fail."""
    node = fractional(build(name, step_mode)).train(training)
    other = fractional(build(name, step_mode)).train(training)
    x = drive(5, 2, 3)
    expected = node(x) if step_mode == "m" else torch.stack([node(one) for one in x])

    def fails(*args, **kwargs):
        raise AssertionError("a native step ran")

    for kind in type(other).__mro__:
        if kind.__module__.startswith("spikingjelly.activation_based.neuron"):
            for method in list(vars(kind)):
                if method.startswith(("neuronal_", "jit_", "single_step", "multi_step", "materialize")):
                    monkeypatch.setattr(kind, method, fails)
    found = other(x) if step_mode == "m" else torch.stack([other(one) for one in x])
    assert torch.equal(found, expected)


def test_code_that_asks_for_the_native_class():
    net = nn.Sequential(layer.Linear(4, 3), neuron.ParametricLIFNode(), neuron.LIFNode())
    functional.set_step_mode(net, "m")
    net = convert_to_fractional(net, alpha=0.7, learn_alpha=True)
    x = drive(4, 2, 4) * 3
    first = net(x)
    for module in net.modules():
        if isinstance(module, (neuron.LIFNode, neuron.ParametricLIFNode)):
            module.reset()
    assert torch.equal(net(x), first)
    leaks = [m.w for m in net.modules() if isinstance(m, neuron.ParametricLIFNode)]
    assert len(leaks) == 1 and isinstance(leaks[0], nn.Parameter)


def test_a_monitor_of_the_native_class():
    monitor = pytest.importorskip("spikingjelly.activation_based.monitor")
    net = nn.Sequential(layer.Linear(4, 3), neuron.LIFNode())
    functional.set_step_mode(net, "m")
    net = convert_to_fractional(net, alpha=0.7)
    recorder = monitor.OutputMonitor(net, neuron.LIFNode)
    y = net(drive(4, 2, 4))
    assert torch.equal(recorder.records[0], y)


def test_the_class_alone_makes_no_neuron():
    with pytest.raises(OptionTypeError, match="convert_to_fractional"):
        fractional_class(neuron.LIFNode)(tau=3.0)


# What takes the neuron for an integer one


class Leaves(fx.Tracer):
    """As nirtorch traces: neurons that it knows by class are not looked into."""

    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        return isinstance(m, (neuron.LIFNode, nn.Linear))


def test_an_exporter_that_knows_the_native_class_is_refused():
    net = convert_to_fractional(nn.Sequential(nn.Linear(4, 3), neuron.LIFNode()), alpha=0.7)
    with pytest.raises(ExportError, match=r"1: the fractional LIFNode.*restore_native\(model\)"):
        Leaves().trace(net)
    Leaves().trace(restore_native(net))


def test_hardware_exchanges_are_refused():
    exchange = importlib.import_module("spikingjelly.activation_based.lynxi_exchange")
    for native in (neuron.LIFNode(), neuron.IFNode(), Leaking()):
        node = fractional(native)
        with pytest.raises(ExportError, match=r"lynxi_exchange.*restore_native\(model\)"):
            exchange.to_lynxi_supported_module(node, 4)
        assert exchange.to_lynxi_supported_module(ADAPTER.to_native(node), 4).v_threshold == 1.0
        assert node.step_mode == "s"  # everybody else may read it
        assert node.lava_s_cale == native.lava_s_cale


# Settings that are tensors, and transforms


@pytest.mark.parametrize("name", [n for n in AVAILABLE if hasattr(build(n), "tau")])
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_a_tau_for_each_channel(name, step_mode):
    """Channel by channel the neuron with that number; the gradient reaches each tau (finite differences)."""
    taus = torch.tensor([1.5, 2.0, 3.5], dtype=torch.float64)
    x = drive(6, 2, 3, dtype=torch.float64)

    def potential(node):
        node.reset()
        node(x) if step_mode == "m" else [node(one) for one in x]
        return node.v

    node = fractional(build(name, step_mode, v_threshold=50.0)).double()
    node.tau, node.detach_reset = nn.Parameter(taus.clone()), True
    v = potential(node)
    for channel, tau in enumerate(taus.tolist()):  # (without a spike, resets are out of this)
        one = fractional(build(name, step_mode, v_threshold=50.0)).double()
        one.tau = tau
        torch.testing.assert_close(v[:, channel], potential(one)[:, channel])
    v.square().sum().backward()
    with torch.no_grad():
        slopes = []
        for channel in range(3):
            ends = []
            for step in (1e-6, -1e-6):
                node.tau[channel] += step
                ends.append(potential(node).square().sum())
                node.tau[channel] -= step
            slopes.append((ends[0] - ends[1]) / 2e-6)
    torch.testing.assert_close(node.tau.grad, torch.stack(slopes), rtol=1e-5, atol=1e-7)


def test_a_tau_that_does_not_fit_is_named():
    node = fractional(build("LIFNode"))
    node.tau = torch.tensor([2.0, 3.0, 4.0, 5.0])
    with pytest.raises(OptionError, match=r"tau of the fractional LIFNode has shape \(4,\)"):
        node(drive(5, 2, 3))


def test_an_ensemble_by_vmap_is_refused_by_name():
    nets = [convert_to_fractional(nn.Sequential(nn.Linear(4, 3), neuron.LIFNode()), alpha=0.7) for _ in "ab"]
    parameters, buffers = torch.func.stack_module_state(nets)
    base = copy.deepcopy(nets[0])

    def one(p, b, x):
        functional.reset_net(base)
        return torch.func.functional_call(base, (p, b), (x,))

    with pytest.raises(StateError, match=r"fractional LIFNode.*torch\.func"):
        torch.vmap(one, (0, 0, None))(parameters, buffers, drive(2, 4))


@pytest.mark.skipif(not EXPLICIT_STATES, reason="this release has no functional forward")
def test_functional_forward_of_a_recording_analog_neuron_is_the_native_one():
    from spikingjelly.activation_based import base

    native = build("LIAFNode")
    native.store_v_seq = True
    node = fractional(copy.deepcopy(native), alpha=1.0, learn_alpha=True)
    x = drive(4, 2, 3)
    (expected,), _ = base.to_functional_forward(native)((x,), tuple(native.memories()))
    (found,), _ = base.to_functional_forward(node)((x,), tuple(node.memories()))
    assert torch.equal(found, expected)
    assert torch.equal(node(x), native(x))
