"""What the snnTorch adapter converts, what it refuses and why, and snnTorch's own book-keeping."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

snn = pytest.importorskip("snntorch")

from snntorch import surrogate
from snntorch_cases import NEURONS, build, inputs, run
from spikede_snntorch import FractionalLeaky, FractionalNeuron, SnnTorchAdapter

from spikede_plugins.conversion import convert_to_fractional, plan_conversion, restore_native
from spikede_plugins.errors import OptionError, OptionTypeError, SpikedeWarning, UnsupportedNeuronError

ADAPTER = SnnTorchAdapter()


class Renamed(snn.Leaky):
    """A subclass that adds settings and helpers, and leaves the dynamics alone."""

    def __init__(self, label, **options):
        super().__init__(**options)
        self.label = label

    def describe(self):
        return f"{self.label}: {float(self.beta):.2f}"


class Noisy(snn.Leaky):
    def _base_state_function(self, input_):
        return super()._base_state_function(input_) + 0.1


class Adaptive(Renamed):
    def fire(self, mem):
        return super().fire(mem * 2)


class Decaying(Renamed):
    @property
    def beta(self):
        return torch.tensor(0.5)


class Own(snn.SpikingNeuron):
    def forward(self, x):
        return x


def refused(module):
    said = ADAPTER.support(module)
    assert ADAPTER.is_neuron(module)
    assert not said.supported
    return said.reason


# -- what is converted ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NEURONS)
def test_everything_is_kept(name):
    native = build(name, "learned")
    native.spike_grad = surrogate.fast_sigmoid(slope=10)
    calls = []
    handle = native.register_forward_hook(lambda *_: calls.append(1))
    native.eval()
    before = {k: v for k, v in vars(native).items() if k != "state_function"}
    made = convert_to_fractional(native, alpha=0.6, learn_alpha=True)
    model = nn.Sequential(native)
    assert convert_to_fractional(model, alpha=0.6, learn_alpha=True, inplace=True) is model
    inside = model[0]
    assert isinstance(inside, type(native)) and isinstance(inside, FractionalNeuron)
    assert type(made) is type(inside)
    assert all(inside.get_parameter(n) is p for n, p in native.named_parameters())
    assert not inside.training and not made.training
    assert inside.spike_grad is native.spike_grad
    added = {"fractional.order.alpha", "fractional._extra_state"}
    assert set(inside.state_dict()) == set(native.state_dict()) | added
    assert all(vars(native)[key] is value for key, value in before.items())
    run(inside, inputs())
    assert len(calls) == 8
    handle.remove()
    run(inside, inputs())
    assert len(calls) == 8
    restored = restore_native(model)[0]
    assert type(restored) is type(native)
    assert set(vars(restored)) - {"reset"} == set(vars(native))  # set by the first forward pass
    assert restored.state_function.__self__ is restored
    assert set(restored.state_dict()) == set(native.state_dict())


def test_support_of_every_class():
    assert ADAPTER.name == "snntorch"
    for name in NEURONS:
        native = build(name)
        said = ADAPTER.support(native)
        assert said.supported and said.kind == type(native).__name__ and not said.reason
        made = convert_to_fractional(native)
        assert ADAPTER.is_fractional(made) and not ADAPTER.is_neuron(made)
        assert ADAPTER.operator(made) is made.fractional
    assert not ADAPTER.is_neuron(nn.Linear(2, 2))
    assert not ADAPTER.is_neuron(build("RLeakyOne").recurrent)


def test_fractional_classes_are_not_built_by_hand():
    before = len(snn.SpikingNeuron.instances)
    with pytest.raises(OptionTypeError, match=r"convert_to_fractional\(snntorch.Leaky"):
        FractionalLeaky(beta=0.9)
    assert len(snn.SpikingNeuron.instances) == before


def test_per_channel_must_fit():
    from spikede_plugins.orders import PerChannel

    made = convert_to_fractional(snn.Leaky(0.9), alpha=PerChannel([0.5, 0.6]))
    with pytest.raises(OptionError, match="2 orders"):
        made(torch.zeros(1, 3))
    made(torch.zeros(1, 2))


def test_original_checkpoint_loads():
    native = build("RSynaptic", "learned")
    checkpoint = copy.deepcopy(native.state_dict())
    made = convert_to_fractional(native, alpha=0.6, learn_alpha=True)
    run(made, inputs())
    made.load_state_dict(checkpoint)
    native.load_state_dict(checkpoint)
    assert made.fractional.order.alpha.item() == pytest.approx(0.6)


def test_lapicque_copy_still_trains_beta():
    native = build("Lapicque", "learned")
    made = convert_to_fractional(native, alpha=0.6)
    run(made, inputs())[0][-1].sum().backward()
    assert made.beta.grad.abs() > 0


# -- subclasses -----------------------------------------------------------------------------------


def test_subclass_without_new_dynamics_is_its_parent():
    native = Renamed("hidden", beta=0.8, init_hidden=True, output=True)
    made = convert_to_fractional(native, alpha=0.6)
    assert isinstance(made, Renamed) and made.describe() == "hidden: 0.80"
    parent = snn.Leaky(0.8, init_hidden=True, output=True)
    expected, _ = run(convert_to_fractional(parent, alpha=0.6), inputs())
    for other in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert type(other) is type(made)
        assert all(torch.equal(a, b) for a, b in zip(run(other, inputs())[0], expected, strict=True))
    assert type(restore_native(made)) is Renamed


@pytest.mark.parametrize(
    ("module", "changed"),
    [
        (lambda: Noisy(0.9), "_base_state_function"),
        (lambda: Adaptive("a", beta=0.9), "fire"),
    ],
)
def test_subclass_with_new_dynamics_is_refused(module, changed):
    reason = refused(module())
    assert "Leaky" in reason and changed in reason


def test_class_level_state_is_refused():
    class Mixed(snn.Leaky):
        threshold_scale = 1.0

    assert ADAPTER.support(Mixed(0.9)).supported
    native = Renamed("x", beta=0.9)
    native.__class__ = Decaying
    assert "beta" in refused(native)


def test_object_with_its_own_methods_is_refused():
    native = snn.Leaky(0.9)
    native.state_function = lambda x: x
    assert "state_function" in refused(native)
    other = snn.Leaky(0.9)
    other.fire = lambda mem: mem
    assert "fire" in refused(other)


def test_foreign_spiking_neuron_is_refused():
    assert "none of the neurons with a known charge" in refused(Own())


def test_neurons_without_a_stepwise_membrane_are_refused_with_their_reason():
    made = {
        "SLSTM": lambda: snn.SLSTM(3, 4),
        "SConv2dLSTM": lambda: snn.SConv2dLSTM(1, 2, kernel_size=3),
        "LeakyParallel": lambda: snn.LeakyParallel(3, 4),
        "DeltaLeaky": lambda: snn.DeltaLeaky(beta=0.9),
        "LinearLeaky": lambda: snn.LinearLeaky(beta=0.9, in_features=3, out_features=4),
        "StateLeaky": lambda: snn.StateLeaky(beta=0.9, channels=4),
        "AssociativeLeaky": lambda: snn.AssociativeLeaky(3, 2, 2, 4),
    }
    known = {name: make() for name, make in made.items() if hasattr(snn, name)}
    assert {"SLSTM", "SConv2dLSTM", "LeakyParallel"} <= set(known)
    reasons = {name: refused(module) for name, module in known.items()}
    assert len({r for r in reasons.values()}) >= len(reasons) - 1
    net = nn.ModuleDict({**known, "Leaky": snn.Leaky(0.9)})
    with pytest.raises(UnsupportedNeuronError) as error:
        convert_to_fractional(net)
    for name in known:
        assert f"{name} ({name})" in str(error.value)
    with pytest.warns(SpikedeWarning, match=f"{len(known)} spiking"):
        left = convert_to_fractional(net, strict=False)
    assert isinstance(left["Leaky"], FractionalLeaky)
    assert type(left["SLSTM"]) is snn.SLSTM
    assert len(plan_conversion(net).unsupported) == len(known)
    _drop(net, left)


def test_every_neuron_of_the_release_is_known():
    names = [n for n in dir(snn) if isinstance(getattr(snn, n), type)]
    for name in names:
        cls = getattr(snn, name)
        if issubclass(cls, snn.SpikingNeuron) and cls not in (snn.SpikingNeuron, snn.LIF):
            native = cls.__new__(cls)
            nn.Module.__init__(native)
            reason = ADAPTER.support(native).reason
            assert "none of the neurons" not in reason and "defines" not in reason, name


# -- instance lists -------------------------------------------------------------------------------


def _drop(*models):
    gone = {id(m) for model in models for m in model.modules()}
    lists = snn.SpikingNeuron.instances
    lists[:] = [n for n in lists if id(n) not in gone]


def listed():
    return [id(n) for n in snn.SpikingNeuron.instances]


def test_instance_lists_follow_in_place():
    net = nn.Sequential(snn.Leaky(0.9), nn.ModuleList([snn.Synaptic(alpha=0.9, beta=0.8)]))
    native = [net[0], net[1][0]]
    before = len(listed())
    convert_to_fractional(net, inplace=True)
    assert len(listed()) == before
    assert id(net[0]) in listed() and id(net[1][0]) in listed()
    assert not {id(n) for n in native} & set(listed())
    restore_native(net, inplace=True)
    assert len(listed()) == before == len(set(listed()))
    assert id(net[0]) in listed()


def test_instance_lists_of_copies():
    net = nn.Sequential(snn.Leaky(0.9), snn.Leaky(0.8))
    before = listed()
    made = convert_to_fractional(net, alpha={"0": 0.5, "1": 1.0})
    assert listed()[: len(before)] == before
    assert {id(made[0]), id(made[1])} == set(listed()[len(before) :])
    _drop(made)


def test_instance_lists_after_a_failure(monkeypatch):
    net = nn.Sequential(snn.Leaky(0.9), snn.Leaky(0.8))
    before = listed()
    build_one, count = ADAPTER.to_fractional, []

    def failing(self, module, operator):
        count.append(1)
        if len(count) == 2:
            raise RuntimeError("no")
        return build_one(module, operator)

    monkeypatch.setattr(SnnTorchAdapter, "to_fractional", failing)
    for inplace in (True, False):
        count.clear()
        with pytest.raises(Exception, match="no"):
            convert_to_fractional(net, inplace=inplace)
        assert listed() == before
        assert type(net[0]) is snn.Leaky


def test_root_neuron_in_place_is_listed_once():
    neuron = snn.Leaky(0.9, init_hidden=True)
    before = len(listed())
    assert convert_to_fractional(neuron, inplace=True) is neuron
    assert isinstance(neuron, FractionalLeaky)
    assert listed().count(id(neuron)) == 1 and len(listed()) == before
    x = inputs()
    first, _ = run(neuron, x)
    snn.Leaky.reset_hidden()
    assert all(torch.equal(a, b) for a, b in zip(run(neuron, x)[0], first, strict=True))


def test_a_list_of_its_own_after_init():
    saved = snn.SpikingNeuron.instances
    try:
        snn.SpikingNeuron.init()
        net = nn.Sequential(snn.Leaky(0.9))
        convert_to_fractional(net, inplace=True)
        assert listed() == [id(net[0])]
    finally:
        snn.SpikingNeuron.instances = saved


def test_reset_state_touches_this_neuron_only():
    native, other = (snn.Leaky(0.9, init_hidden=True) for _ in range(2))
    for neuron in (native, other):
        run(neuron, inputs())
    kept = other.mem
    ADAPTER.reset_state(native)
    assert not native.mem.any() and other.mem is kept
    made = convert_to_fractional(native)
    run(made, inputs())
    ADAPTER.reset_state(made)
    assert not made.mem.any()
