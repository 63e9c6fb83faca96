"""Damaged and foreign checkpoints: each loads as a whole, or not at all, and the message says why."""

from __future__ import annotations

import copy
import io

import pytest
import scale
import torch
from small_nets import each_framework, frames
from torch import nn

from spikede_plugins import (
    FractionalLIFDynamics,
    LIFNeuron,
    LoadError,
    MultiTerm,
    PerChannel,
    SNNWrapper,
    SpikingODELayer,
    convert_to_fractional,
    restore_native,
)

ORDER = "lif.fractional.order.alpha"


def learned(framework, alpha=0.7, **options):
    return convert_to_fractional(framework.net(), alpha=alpha, learn_alpha=True, **options)


def trained(framework, **options):
    """Weights and orders that are nobody's initial ones."""
    net = learned(framework, **options)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        framework.run(net, frames()).mean().backward()
        optimizer.step()
    return net


def values(net):
    return {key: value.clone() for key, value in net.state_dict().items()}


def same(net, before):
    return all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def damaged(checkpoint):
    """Checkpoints with one order that is none, by what the message says of it."""
    for value, message in (
        (torch.tensor(float("nan")), r"it must lie in \(0, 1\], but has nan"),
        (torch.tensor(float("inf")), r"it must lie in \(0, 1\], but has inf"),
        (torch.tensor(0.0), r"it must lie in \(0, 1\], but has 0"),
        (torch.tensor(-0.3), r"it must lie in \(0, 1\], but has -0.3"),
        (torch.tensor(1.5), r"it must lie in \(0, 1\], but has 1.5"),
        (torch.tensor([0.3, 0.5, 0.7]), r"it has the shape \(3,\), this model's has \(1,\)"),
        (0.7, "it is no tensor but float"),
        (None, "it is no tensor but NoneType"),
    ):
        yield {**checkpoint, ORDER: value}, message


@each_framework
@pytest.mark.parametrize("strict", [True, False])
def test_an_order_that_is_none_is_refused_before_anything_is_copied(framework, strict):
    net = learned(framework)
    before, faults = values(net), 0
    for checkpoint, message in damaged(trained(framework).state_dict()):
        with pytest.raises(LoadError, match=rf"nothing of it was loaded:\n  {ORDER}: {message}"):
            net.load_state_dict(checkpoint, strict=strict)
        assert same(net, before)
        faults += 1
    scale.record("faults injected and survived", faults, "faults")


@each_framework
def test_a_whole_checkpoint_loads_into_a_whole_model(framework):
    source, net = trained(framework), learned(framework)
    assert not same(net, source.state_dict())
    net.load_state_dict(source.state_dict())
    assert same(net, source.state_dict())
    assert torch.equal(framework.run(net, frames()), framework.run(source, frames()))


@each_framework
def test_a_model_of_which_the_converted_one_is_a_part(framework):
    """As a LightningModule holds its net: what comes before it may be loaded, of itself nothing is."""
    whole = nn.ModuleDict({"net": learned(framework), "head": nn.Linear(2, 2)})
    before = values(whole)
    checkpoint = {f"net.{key}": value for key, value in trained(framework).state_dict().items()}
    checkpoint.update({f"head.{key}": value + 1 for key, value in whole["head"].state_dict().items()})
    checkpoint[f"net.{ORDER}"] = torch.tensor(float("nan"))
    with pytest.raises(LoadError, match=f"net.{ORDER}: it must lie"):
        whole.load_state_dict(checkpoint)
    assert same(whole, before)


@each_framework
@pytest.mark.parametrize("strict", [True, False])
def test_a_fractional_neuron_alone_refuses_its_order(framework, strict):
    """Taken out of the model that looks at the orders first: torch's own error, and no copy."""
    source = trained(framework)
    net = nn.Sequential(source.fc, learned(framework).lif)
    checkpoint = {**net.state_dict(), "1.fractional.order.alpha": torch.tensor(float("nan"))}
    with pytest.raises(RuntimeError, match=r"1.fractional.order.alpha: it must lie in"):
        net.load_state_dict(checkpoint, strict=strict)
    assert net[1].fractional.order.alpha.item() == pytest.approx(0.7)


@each_framework
def test_learned_orders_and_a_model_that_keeps_them_fixed(framework):
    source = trained(framework)
    net = convert_to_fractional(framework.net(), alpha=0.5)
    before = values(net)
    with pytest.raises(LoadError, match=r"fixed in this model \(0.5\); convert with learn_alpha=True"):
        net.load_state_dict(source.state_dict())
    assert same(net, before)
    found = net.load_state_dict(source.state_dict(), strict=False)  # keeps its own orders
    assert torch.equal(net.fc.weight, source.fc.weight) and ORDER in found.unexpected_keys


@each_framework
def test_a_checkpoint_that_lost_one_order_of_two(framework):
    source, net = trained(framework).state_dict(), learned(framework)
    del source[ORDER]
    before = values(net)
    with pytest.raises(LoadError, match=f"{ORDER}: learned in this model, but missing in the checkpoint"):
        net.load_state_dict(source)
    assert same(net, before)
    assert net.load_state_dict(source, strict=False).missing_keys == [ORDER]
    assert net.lif.fractional.order.alpha.item() == pytest.approx(0.7)
    assert torch.equal(net.fc.weight, source["fc.weight"])


@each_framework
def test_a_checkpoint_of_the_integer_model_loads(framework):
    native = framework.net()
    nn.init.normal_(native.fc.weight)
    net = learned(framework)
    net.load_state_dict(native.state_dict())
    assert torch.equal(net.fc.weight, native.fc.weight)
    assert net.lif.fractional.order.alpha.item() == pytest.approx(0.7)


@each_framework
def test_orders_a_channel_and_several_terms(framework):
    channels = {"lif": PerChannel([0.3] * 8 + [0.8] * 8), "*": MultiTerm([0.4, 0.9], [1.0, 2.0], True)}
    net = learned(framework, alpha=channels)
    again = learned(framework, alpha=channels)
    again.load_state_dict(net.state_dict())
    before = values(net)
    for key, value, message in (
        (ORDER, torch.rand(4), r"has the shape \(4,\), this model's has \(16,\)"),
        (ORDER, torch.tensor([0.5] * 15 + [1.25]), "but has 1.25"),
        ("block.1.fractional.order.coefficients", torch.tensor([1.0, -2.0]), r"in \(0, inf\), but has -2"),
    ):
        with pytest.raises(LoadError, match=f"{key}: .*{message}"):
            net.load_state_dict({**before, key: value})
        assert same(net, before)


@each_framework
def test_an_order_that_an_optimiser_pushed_out_is_saved_on_the_edge(framework):
    """Between a step of the optimiser and the next forward pass a raw order may lie outside of (0, 1]."""
    net = learned(framework, alpha=0.99)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    for order in (net.lif.fractional.order, net.block[1].fractional.order):
        order.alpha.grad = torch.full_like(order.alpha, -0.3 if order is net.lif.fractional.order else 3.0)
    optimizer.step()
    assert net.lif.fractional.order.alpha > 1
    checkpoint = net.state_dict()
    assert checkpoint[ORDER] == 1 and 0 < checkpoint["block.1.fractional.order.alpha"] < 0.001
    learned(framework).load_state_dict(checkpoint)


@each_framework
def test_models_copied_pickled_and_restored_look_as_well(framework):
    net = learned(framework)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    again = learned(framework)
    restore_native(again, inplace=True)
    convert_to_fractional(again, learn_alpha=True, inplace=True)
    bad = {**net.state_dict(), ORDER: torch.tensor(2.0)}
    for model in (copy.deepcopy(net), torch.load(file, weights_only=False), again):
        assert len(model._load_state_dict_pre_hooks) == 1
        with pytest.raises(LoadError, match="but has 2"):
            model.load_state_dict(bad)
    assert not restore_native(net)._load_state_dict_pre_hooks


def wrapper():
    torch.manual_seed(0)
    return SNNWrapper(nn.Sequential(nn.Linear(4, 5), LIFNeuron(tau=2.0)), alpha=0.5, learn_alpha=True)


def event_layer():
    torch.manual_seed(0)
    return SpikingODELayer(2, 3, FractionalLIFDynamics(0.6, learn=["alpha"]))


@pytest.mark.parametrize("make", [wrapper, event_layer])
def test_wrapper_and_event_driven_layer(make):
    net = make()
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    make().load_state_dict(checkpoint)
    (key,) = (key for key in checkpoint if key.endswith("alpha"))
    before = values(net)
    wrong = {name: value + 1.0 for name, value in checkpoint.items()}
    with pytest.raises(LoadError, match=key):
        net.load_state_dict(wrong)
    assert same(net, before)


@each_framework
def test_everything_that_is_saved_loads_with_weights_only(framework, tmp_path):
    net = trained(framework)
    optimizer = torch.optim.Adam(net.parameters())
    framework.run(net, frames()).mean().backward()
    optimizer.step()
    framework.run(net, frames())  # state and history are no part of a checkpoint
    saved = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    torch.save(saved, tmp_path / "checkpoint.pt")
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    learned(framework).load_state_dict(loaded["net"])
    optimizer.load_state_dict(loaded["optimizer"])


@each_framework
def test_truncated_and_garbled_files(framework, tmp_path):
    """torch's own errors, and a model as it was."""
    net, file = learned(framework), tmp_path / "checkpoint.pt"
    torch.save(trained(framework).state_dict(), file)
    before, whole = values(net), file.read_bytes()
    places = range(0, len(whole), max(1, len(whole) // scale.scale(20, 500)))
    refused = 0
    for place in places:
        garbled = (
            whole[:place] + bytes(255 - byte for byte in whole[place : place + 64]) + whole[place + 64 :]
        )
        for content in (whole[:place], garbled):
            file.write_bytes(content)
            try:
                net.load_state_dict(torch.load(file, weights_only=True))
            except Exception:
                assert same(net, before)
                refused += 1
            else:  # other numbers of the same shape: torch has no checksum over them
                assert content is garbled
                net.load_state_dict(before)
    assert refused > len(places)
    scale.record("faults injected and survived", refused, "faults")
