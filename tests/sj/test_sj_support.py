"""Which neurons are recognised, which are supported, and what is said of the others."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

pytest.importorskip("spikingjelly.activation_based")

import torch
from sj_cases import ADAPTER, AVAILABLE, build, convert, drive, fractional, operator
from spikede_spikingjelly import FractionalNode
from spikede_spikingjelly.release import EXPLICIT_STATES
from spikingjelly.activation_based import base, encoding, functional, layer, neuron
from torch import nn

from spikede_plugins import restore_native
from spikede_plugins.errors import UnsupportedNeuronError

CHARGE_BASE = neuron.SimpleBaseNode if EXPLICIT_STATES else neuron.BaseNode

UNSUPPORTED = {
    "PSN": (lambda: neuron.PSN(4), "matrix"),
    "MaskedPSN": (lambda: neuron.MaskedPSN(2, 4), "matrix"),
    "SlidingPSN": (lambda: neuron.SlidingPSN(2), "weights"),
    "GatedLIFNode": (lambda: neuron.GatedLIFNode(4), "gates"),
    "DSRIFNode": (lambda: neuron.DSRIFNode(4), "firing rate"),
    "DSRLIFNode": (lambda: neuron.DSRLIFNode(4), "firing rate"),
    "RAFNode": (lambda: neuron.RAFNode(), "resonate"),
    "OTTTLIFNode": (lambda: neuron.OTTTLIFNode(), "online"),
    "SLTTLIFNode": (lambda: neuron.SLTTLIFNode(), "online"),
    "NonSpikingIFNode": (lambda: neuron.NonSpikingIFNode(), "never fires"),
    "NonSpikingLIFNode": (lambda: neuron.NonSpikingLIFNode(), "never fires"),
    "MPBNLIFNode": (lambda: neuron.MPBNLIFNode(out_features=3), "batch"),
    "NoisyCUBALIFNode": (lambda: neuron.NoisyCUBALIFNode(3), "noise"),
    "NoisyNonSpikingIFNode": (lambda: neuron.NoisyNonSpikingIFNode(3), "never fires"),
    "ILCIFNode": (lambda: neuron.ILCIFNode(2, 3), "each other"),
    "ActivationAwareIFNode": (lambda: neuron.ActivationAwareIFNode(), "calibrated"),
    "BaseNode": (lambda: neuron.BaseNode(), "base class"),
    "AdaptBaseNode": (lambda: neuron.AdaptBaseNode(), "base class"),
    "SimpleBaseNode": (lambda: neuron.SimpleBaseNode(), "base class"),
}


@pytest.mark.parametrize("name", AVAILABLE)
def test_supported(name):
    native = build(name)
    assert ADAPTER.is_neuron(native)
    assert not ADAPTER.is_fractional(native)
    found = ADAPTER.support(native)
    assert found.supported, found.reason
    assert found.kind == name
    node = ADAPTER.to_fractional(native, operator())
    assert ADAPTER.is_fractional(node)
    assert not ADAPTER.is_neuron(node)
    assert ADAPTER.operator(node) is node.fractional
    node(drive(2, 2, 3))
    ADAPTER.reset_state(node)
    assert node.history is None


@pytest.mark.parametrize("name", [name for name in UNSUPPORTED if hasattr(neuron, name)])
def test_unsupported_with_its_reason(name):
    make, reason = UNSUPPORTED[name]
    native = make()
    assert ADAPTER.is_neuron(native)
    found = ADAPTER.support(native)
    assert not found.supported
    assert found.kind == name
    assert reason in found.reason
    with pytest.raises(UnsupportedNeuronError, match=name):
        ADAPTER.to_fractional(native, operator())


def test_every_class_of_the_framework_is_decided():
    """No neuron class of this release is left to chance: a dynamics or a specific reason."""
    from spikede_spikingjelly.dynamics import DYNAMICS
    from spikede_spikingjelly.support import _BASES, _REASONS

    for name, kind in vars(neuron).items():
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            known = kind in DYNAMICS or name in _BASES
            assert known or any(one.__name__ in _REASONS for one in kind.__mro__), name


def test_layers_containers_and_encoders_are_no_neurons():
    others = [
        nn.Linear(2, 3),
        layer.Linear(2, 3),
        layer.BatchNorm2d(3),
        layer.SynapseFilter(),
        layer.Dropout(0.5),
        layer.SeqToANNContainer(nn.Linear(2, 3)),
        layer.LinearRecurrentContainer(neuron.IFNode(), 3, 3),
        layer.ElementWiseRecurrentContainer(neuron.IFNode(), torch.add),
        encoding.PoissonEncoder(),
        nn.Sequential(neuron.IFNode()),
        neuron.IFNode().surrogate_function,
    ]
    for module in others:
        assert not ADAPTER.is_neuron(module), type(module).__name__


# Subclasses


class Renamed(neuron.LIFNode):
    """The same dynamics with a constructor and text of its own."""

    def __init__(self, extra=3):
        super().__init__(tau=1.5, step_mode="m")
        self.extra = extra

    def extra_repr(self):
        return f"extra={self.extra}"

    def helper(self):
        return self.extra + 1


class OtherFire(neuron.IFNode):
    def neuronal_fire(self):
        return super().neuronal_fire()


class OtherStep(neuron.LIFNode):
    def single_step_functional_forward(self, inputs, states, **kwargs):
        raise NotImplementedError

    def single_step_forward(self, x):
        raise NotImplementedError


class LearnedTau(neuron.LIFNode):
    @property
    def tau(self):
        return 2.0

    @tau.setter
    def tau(self, value):
        pass


def test_subclass_with_the_same_dynamics():
    native = Renamed(5)
    assert ADAPTER.support(native).supported
    node = fractional(native)
    assert repr(node).startswith("FractionalRenamed(\n  extra=5\n")
    twin = fractional(neuron.LIFNode(tau=1.5, step_mode="m"))
    x = drive(5, 2, 3)
    assert torch.equal(node(x), twin(x))
    back = ADAPTER.to_native(node)
    assert type(back) is Renamed
    assert back.helper() == 6


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (OtherFire, "neuronal_fire"),
        (OtherStep, "single_step"),
        (LearnedTau, "tau"),
    ],
)
def test_subclass_with_changed_dynamics(kind, method):
    found = ADAPTER.support(kind())
    assert not found.supported
    assert "changes the dynamics" in found.reason
    assert method in found.reason


def test_method_replaced_on_the_instance():
    native = neuron.IFNode()
    native.single_step_forward = types.MethodType(lambda self, x: x, native)
    found = ADAPTER.support(native)
    assert not found.supported
    assert "single_step_forward" in found.reason
    assert "changed dynamics" in found.reason


def test_state_of_the_same_name():
    native = neuron.IFNode()
    native.register_memory("history", None)
    assert "history" in ADAPTER.support(native).reason


# Neurons that users write


class Leak(CHARGE_BASE):
    """Nothing but a charge, with a learned leak and a helper."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.leak = nn.Parameter(torch.tensor(0.4))
        self.calls = 0

    def current(self, x):
        return 2.0 * x

    def neuronal_charge(self, x):
        self.calls += 1
        self.v = self.v * self.leak.sigmoid() + self.current(x)


class Adapting(CHARGE_BASE):
    """A charge with a second state variable, and firing of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.register_memory("z", 0.0)

    def neuronal_charge(self, x):
        self.z = 0.8 * self.z + 0.2 * x
        self.v = self.v + (x - self.v) / 2.0 - 0.5 * self.z

    def neuronal_fire(self):
        return self.surrogate_function(self.v - self.v_threshold + 0.1 * self.z)


class InPlace(CHARGE_BASE):
    def neuronal_charge(self, x):
        self.v += x


def in_turn(node, x):
    node.step_mode = "s"
    return torch.stack([node(one) for one in x])


@pytest.mark.parametrize("kind", [Leak, Adapting, InPlace])
@pytest.mark.parametrize("v_reset", [0.0, None])
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_user_neuron_at_alpha_one_is_native(kind, v_reset, step_mode):
    native = kind(v_reset=v_reset, step_mode=step_mode)
    if kind is InPlace:
        native.v = torch.zeros(2, 3)  # += on a number makes the native one write into its input
    assert ADAPTER.support(native).supported
    node = fractional(native, alpha=1.0, learn_alpha=True)
    outcomes = []
    for one in (native, node):
        x = drive(5, 2, 3).requires_grad_()
        y = one(x) if step_mode == "m" else in_turn(one, x)
        outcomes.append((y, one.v, *torch.autograd.grad(y.sum() + one.v.sum(), x)))
    assert outcomes[0][0].sum() > 0
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert torch.equal(outcomes[0][1], outcomes[1][1])
    torch.testing.assert_close(outcomes[0][2], outcomes[1][2])


@pytest.mark.parametrize("kind", [Leak, Adapting, InPlace])
@pytest.mark.parametrize("method", ["gl", "abm", "trap"])
def test_user_neuron_fractional(kind, method):
    node = fractional(kind(step_mode="m"), method=method)
    x = drive(6, 2, 3)
    whole = node(x)
    node.reset()
    assert torch.equal(in_turn(node, x), whole)
    linear = fractional(kind(step_mode="m"), alpha=1.0, learn_alpha=True, method=method)
    assert not torch.equal(linear(x), whole) or not torch.equal(linear.v, node.v)
    node.reset()
    if kind is Adapting:
        assert node.z == 0.0
    assert type(ADAPTER.to_native(node)) is kind


def test_user_neuron_writes_its_plain_attributes():
    node = fractional(Leak(step_mode="m"))
    node(drive(5, 2, 3))
    assert node.calls == 5


def test_user_neuron_equals_the_same_native_neuron():
    class Same(CHARGE_BASE):
        def neuronal_charge(self, x):
            self.v = self.v + (x - (self.v - self.v_reset)) / 2.0

    x = drive(6, 2, 3)
    theirs, ours = fractional(Same(step_mode="m")), fractional(neuron.LIFNode(step_mode="m"))
    assert torch.equal(theirs(x), ours(x))
    # Up to the order in which an engine for known neurons adds up the history.
    torch.testing.assert_close(theirs.v, ours.v, rtol=1e-5, atol=1e-6)


def test_user_neuron_that_writes_its_own_step_is_unsupported():
    class Own(neuron.BaseNode):
        def single_step_forward(self, x):
            return x

        def single_step_functional_forward(self, inputs, states, **kwargs):
            return inputs, states

    found = ADAPTER.support(Own())
    assert not found.supported
    assert "single_step" in found.reason
    assert "neuronal_charge" in found.reason


def test_user_adaptive_neuron():
    if EXPLICIT_STATES:
        pytest.skip("this release has no neuronal_adaptation step")

    class Adaptive(neuron.AdaptBaseNode):
        def neuronal_charge(self, x):
            self.v = self.v + (x - self.v - self.w) / 2.0

    native = Adaptive(a=0.2, b=0.3, step_mode="m")
    node = fractional(native, alpha=1.0, learn_alpha=True)
    x = drive(6, 2, 3)
    assert torch.equal(node(x), native(x))
    assert torch.equal(node.w, native.w)


def test_all_unsupported_are_listed_and_the_model_is_left():
    net = nn.Sequential(OtherFire(), neuron.IFNode(), nn.Sequential(OtherStep()))
    with pytest.raises(UnsupportedNeuronError) as caught:
        convert(net)
    for word in ("OtherFire", "OtherStep", "2.0"):
        assert word in str(caught.value)
    assert type(net[1]) is neuron.IFNode


def test_memory_module_of_a_user_is_no_neuron():
    class Counter(base.MemoryModule):
        def single_step_forward(self, x):
            return x

    assert not ADAPTER.is_neuron(Counter())


def test_restore():
    net = nn.Sequential(neuron.IFNode(), Renamed())
    native = restore_native(convert(net))
    assert [type(one) for one in native] == [neuron.IFNode, Renamed]
    assert not any(isinstance(one, FractionalNode) for one in native.modules())
    functional.reset_net(native)


def test_missing_framework_names_the_pip_command():
    """In a process where SpikingJelly cannot be imported."""
    code = (
        "import sys; sys.modules['spikingjelly'] = None\n"
        "from spikede_plugins.errors import MissingExtraError\n"
        "try:\n    import spikede_spikingjelly\n"
        "except MissingExtraError as error:\n    print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install" in run.stdout


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("name", AVAILABLE)
def test_adapter_contract(name, step_mode):
    """The suite that plugin authors run, on every neuron."""
    from spikede_plugins.testing import check_adapter

    def make_model():
        options = {"threshold_related": False} if name == "LIAFNode" else {}
        first, last = (build(name, step_mode, **options) for _ in range(2))
        net = nn.Sequential(layer.Linear(4, 6), first, layer.Linear(6, 3), last)
        with torch.no_grad():
            net[2].weight.abs_().mul_(2.0)
        return net

    def run(model, x):
        return model(x) if step_mode == "m" else torch.stack([model(one) for one in x])

    check_adapter(ADAPTER, make_model, lambda: torch.rand(8, 2, 4) * 4, run)
