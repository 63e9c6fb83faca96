"""Settings travel with a checkpoint: a model of other settings refuses it as a whole and says both."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from small_nets import each_framework, frames
from torch import nn

from spikede_plugins import (
    LoadError,
    MultiTerm,
    PerChannel,
    SpikedeWarning,
    SumOfExponentials,
    WindowMemory,
    alphas,
    convert_to_fractional,
    ignore_settings,
    restore_native,
)
from spikede_plugins.settings import EXTRA_STATE, pack, unpack

#: Settings of a model, other ones, and what is said of the difference, of the layer ``lif``.
OTHERS = [
    ({"alpha": 0.5}, {"alpha": 0.9}, "alpha is 0.5 in the checkpoint and 0.9 in this model"),
    ({"method": "l1"}, {"method": "pred"}, "method is 'l1' in the checkpoint and 'pred' in this model"),
    ({"memory": "full"}, {"memory": 4}, "memory is 'full' in the checkpoint and 4 in this model"),
    (
        {"memory": SumOfExponentials(1e-5, 500)},
        {"memory": SumOfExponentials(1e-5, 900)},
        r"memory is 'SumOfExponentials\(tolerance=1e-05, horizon=500\)' in .* horizon=900\)' in this model",
    ),
    ({"step_size": 0.5}, {}, "step_size is 0.5 in the checkpoint and 1 in this model"),
    ({"memory_reset": "spike"}, {}, "memory_reset is 'spike' in the checkpoint and 'never' in this model"),
    (
        {"alpha": MultiTerm([0.4, 0.9], [1.0, 2.0])},
        {"alpha": MultiTerm([0.4, 0.9], [1.0, 3.0])},
        r"coefficients is \[1, 2\] in the checkpoint and \[1, 3\] in this model",
    ),
    (
        {"alpha": {"lif": PerChannel([0.3] * 8 + [0.8] * 8), "*": 0.5}},
        {"alpha": {"lif": PerChannel([0.8] * 8 + [0.3] * 8), "*": 0.5}},
        r"alpha is \[0.3, 0.3, 0.3, 0.3, 0.3, 0.3, ...\] in the checkpoint",
    ),
    ({"alpha": PerChannel(0.6)}, {"alpha": 0.7}, "alpha is 0.6 in the checkpoint and 0.7 in this model"),
]


def through_a_file(checkpoint):
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def moved(net):
    """The net with other weights."""
    with torch.no_grad():
        for p in (net.fc.weight, net.block[0].weight):
            p.add_(0.1)
    return net


def values(net):
    return {key: value.clone() for key, value in net.state_dict().items()}


def same(net, before):
    return all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@each_framework
@pytest.mark.parametrize(("saved", "own", "message"), OTHERS, ids=lambda v: str(v)[:40])
def test_other_settings_are_refused_and_nothing_is_loaded(framework, saved, own, message):
    source = moved(convert_to_fractional(framework.net(), **saved))
    checkpoint = through_a_file(source.state_dict())
    net = convert_to_fractional(framework.net(), **own)
    before = values(net)
    with pytest.raises(LoadError, match=rf"nothing of it was loaded:\n  lif: .*{message}") as caught:
        net.load_state_dict(checkpoint)
    assert isinstance(caught.value, RuntimeError)  # what load_state_dict raises by itself
    assert "ignore_settings()" in str(caught.value)
    assert same(net, before)
    # The same settings load, and the override keeps the model's own.
    equal = convert_to_fractional(framework.net(), **saved)
    equal.load_state_dict(checkpoint)
    assert torch.equal(framework.run(equal, frames()), framework.run(source, frames()))
    with ignore_settings():
        net.load_state_dict(checkpoint)
    assert torch.equal(net.fc.weight, source.fc.weight)
    assert same(net, {**checkpoint, **{k: v for k, v in before.items() if k.endswith(EXTRA_STATE)}})


@each_framework
def test_not_strict_loads_what_fits_and_says_that_the_settings_are_the_models(framework):
    source = moved(convert_to_fractional(framework.net(), alpha=0.5))
    net = convert_to_fractional(framework.net(), alpha=0.9)
    with pytest.warns(SpikedeWarning, match=r"lif: alpha is 0.5 in .*; block.1: alpha is 0.5") as caught:
        found = net.load_state_dict(source.state_dict(), strict=False)
    assert len(caught) == 1 and not found.missing_keys and not found.unexpected_keys
    assert torch.equal(net.fc.weight, source.fc.weight)
    twin = convert_to_fractional(framework.net(), alpha=0.5)
    twin.load_state_dict(source.state_dict(), strict=False)  # nothing to say


@each_framework
def test_checkpoints_without_settings_load(framework):
    """Those of the native model, and of converted models of earlier releases."""
    native = moved(framework.net())
    net = convert_to_fractional(framework.net(), alpha=0.5, learn_alpha=True)
    old = {k: v for k, v in net.state_dict().items() if not k.endswith(EXTRA_STATE)}
    for checkpoint in (native.state_dict(), {**old, **native.state_dict()}):
        fresh = convert_to_fractional(framework.net(), alpha=0.9, learn_alpha=True)
        assert not fresh.load_state_dict(checkpoint).missing_keys
        assert torch.equal(fresh.fc.weight, native.fc.weight)
    assert fresh.lif.fractional.order.alpha.item() == pytest.approx(0.5)
    assert [k for k in net.state_dict() if "fractional" not in k] == list(native.state_dict())


@each_framework
def test_a_learned_order_is_loaded_and_no_setting(framework):
    source = convert_to_fractional(framework.net(), alpha=0.3, learn_alpha=True)
    net = convert_to_fractional(framework.net(), alpha=0.9, learn_alpha=True)
    net.load_state_dict(source.state_dict())
    assert net.lif.fractional.order.alpha.item() == pytest.approx(0.3)
    other = convert_to_fractional(framework.net(), alpha=0.9, method="l1", learn_alpha=True)
    with pytest.raises(LoadError, match="lif: method is 'gl' in the checkpoint and 'l1' in this model"):
        other.load_state_dict(source.state_dict())


@each_framework
def test_a_fixed_order_in_the_checkpoint_and_a_learned_one_in_the_model(framework):
    """Where the learned one starts from the fixed one there is no difference yet."""
    source = convert_to_fractional(framework.net(), alpha=0.3)
    convert_to_fractional(framework.net(), alpha=0.3, learn_alpha=True).load_state_dict(source.state_dict())
    net = convert_to_fractional(framework.net(), alpha=0.9, learn_alpha=True)
    with pytest.raises(LoadError, match=r"lif: alpha is 0.3 in the checkpoint and learned \(now \[0.9\]\)"):
        net.load_state_dict(source.state_dict())


@each_framework
def test_layers_that_are_fractional_on_one_side_only(framework):
    """An order of 1 leaves the native neuron, which has no settings to save."""
    half = moved(convert_to_fractional(framework.net(), alpha={"lif": 1.0, "*": 0.5}))
    whole = convert_to_fractional(framework.net(), alpha=0.5)
    none = convert_to_fractional(framework.net(), alpha=1.0)
    for net, checkpoint, message in (
        (whole, half, "lif: it is an integer neuron in the checkpoint and fractional in this model"),
        (half, whole, r"lif: it is fractional \(alpha 0.5\) in the checkpoint and not in this model"),
        (none, half, r"block.1: it is fractional \(alpha 0.5\) in the checkpoint and not in this model"),
    ):
        before = values(net)
        with pytest.raises(LoadError, match=message):
            net.load_state_dict(checkpoint.state_dict())
        assert same(net, before)
        with ignore_settings():
            copy.deepcopy(net).load_state_dict(checkpoint.state_dict())
    assert not restore_native(none)._load_state_dict_pre_hooks


@each_framework
def test_a_layer_taken_out_of_its_model_looks_by_itself(framework):
    source = convert_to_fractional(framework.net(), alpha=0.5).block[1]
    layer = nn.Sequential(convert_to_fractional(framework.net(), alpha=0.9).block[1])
    checkpoint = {f"0.{key}": value for key, value in source.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"0.fractional: alpha is 0.5 in the checkpoint and 0.9"):
        layer.load_state_dict(checkpoint)
    with pytest.warns(SpikedeWarning, match="alpha is 0.5 in the checkpoint"):
        layer.load_state_dict(checkpoint, strict=False)
    with ignore_settings():
        layer.load_state_dict(checkpoint)


@each_framework
def test_a_model_that_holds_the_converted_one(framework):
    whole = nn.ModuleDict({"net": convert_to_fractional(framework.net(), alpha=0.9)})
    checkpoint = {f"net.{k}": v for k, v in convert_to_fractional(framework.net()).state_dict().items()}
    with pytest.raises(LoadError, match=r"net.lif: alpha is 0.7 in the checkpoint and 0.9"):
        whole.load_state_dict(checkpoint)


@each_framework
def test_copies_and_pickles_keep_their_settings(framework):
    net = convert_to_fractional(framework.net(), alpha=0.4, memory=WindowMemory(5))
    operators = [copy.deepcopy(net).lif.fractional, pickle.loads(pickle.dumps(net.lif.fractional))]
    for operator in operators:
        assert operator.settings() == net.lif.fractional.settings()
        assert torch.equal(operator.get_extra_state(), net.lif.fractional.get_extra_state())


def test_the_override_ends_with_its_block_also_after_an_error():
    from spikede_plugins.settings import settings_are_ignored

    with pytest.raises(KeyError), ignore_settings():
        assert settings_are_ignored()
        raise KeyError
    assert not settings_are_ignored()


def test_settings_are_bytes_that_survive_casts_and_averages():
    settings = {"alpha": 0.1 + 0.2, "memory": "auto", "coefficients": [1.0, None]}
    packed = pack(settings)
    assert packed.dtype == torch.uint8
    for value in (packed, packed.half(), packed.bfloat16(), packed.float(), 0.999 * packed + 0.001 * packed):
        assert unpack(value) == settings
    for other in (None, {}, 3, torch.rand(4), torch.zeros(0), packed[:-4], packed.to("meta"), packed[None]):
        assert unpack(other) is None


@each_framework
def test_the_extra_state_of_other_modules_is_theirs(framework):
    class Counter(nn.Module):
        seen = 0

        def get_extra_state(self):
            return {"seen": self.seen}

        def set_extra_state(self, state):
            self.seen = state["seen"]

    def make():
        net = framework.net()
        net.counter = Counter()
        return convert_to_fractional(net, alpha=0.5)

    source, net = make(), make()
    source.counter.seen = 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net.load_state_dict(through_a_file(source.state_dict()))
    assert net.counter.seen == 7


def _layers(**options):
    snn = pytest.importorskip("snntorch")
    net = nn.Sequential(nn.Linear(2, 2), snn.Leaky(beta=0.5), nn.Linear(2, 2), snn.Leaky(beta=0.5))
    return convert_to_fractional(net, **options)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"alpha": 0.5, "learn_alpha": True}, {"alpha": 0.9}),
        ({"alpha": 0.5, "include": "1"}, {"alpha": 0.5}),
        ({"alpha": 0.5}, {"alpha": 0.5, "include": "1"}),
        ({"alpha": 0.5, "learn_alpha": True}, {"alpha": 0.5, "include": "1"}),
        ({"alpha": 0.5, "learn_alpha": True}, {"alpha": 1.0}),
    ],
)
def test_orders_that_are_learned_or_present_on_one_side_only(theirs, ours):
    """They are settings as well: strict=False says it or names the key, ignore_settings loads the rest."""
    source, net = _layers(**theirs), _layers(**ours)
    before = {path: order.clone() for path, order in alphas(net).items()} if ours["alpha"] != 1.0 else {}
    with pytest.raises(LoadError):
        net.load_state_dict(source.state_dict())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        keys = net.load_state_dict(source.state_dict(), strict=False)
    unexpected = [key for key in keys.unexpected_keys if key.endswith("order.alpha")]
    assert unexpected or any("keeps its own" in str(warning.message) for warning in said)
    net = _layers(**ours)
    with ignore_settings():
        net.load_state_dict(source.state_dict())
    assert torch.equal(net[0].weight, source[0].weight) and torch.equal(net[2].weight, source[2].weight)
    for path, order in before.items():
        assert torch.equal(alphas(net)[path], order)
