"""convert_to_fractional(surrogate=...): the same spikes, another slope, and the way back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from spikede_plugins import Surrogate, convert_to_fractional, plan_conversion, restore_native
from spikede_plugins.errors import ConversionError, OptionError, OptionTypeError, UnknownNameError

X = 2 * torch.rand(10, 4, 6, generator=torch.Generator().manual_seed(0))


def jelly():
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), neuron.LIFNode(step_mode="m"), nn.Linear(16, 3), neuron.IFNode(step_mode="m")
    )


def torchy():
    snn = pytest.importorskip("snntorch")
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), snn.Leaky(0.7, init_hidden=True), nn.Linear(16, 3), snn.Leaky(0.8, init_hidden=True)
    )


def run(net):
    """SpikingJelly takes the whole sequence, snnTorch a step at a time."""
    return net(X) if hasattr(net[1], "step_mode") else torch.stack([net(x) for x in X])


def slopes(net):
    weight = net[0].weight
    spikes = run(net)
    return spikes, torch.autograd.grad(spikes.sum(), weight)[0]


@pytest.mark.parametrize("make", [jelly, torchy], ids=["spikingjelly", "snntorch"])
def test_the_same_spikes_with_another_slope(make):
    spikes, gradient = slopes(convert_to_fractional(make(), alpha=0.7))
    for name in ("gaussian", "piecewise_linear", "arctan", "sigmoid"):
        found, other = slopes(convert_to_fractional(make(), alpha=0.7, surrogate=Surrogate(name, 0.7)))
        assert torch.equal(found, spikes)
        assert not torch.allclose(other, gradient)
        by_name = slopes(convert_to_fractional(make(), alpha=0.7, surrogate=name))[1]
        assert by_name.isfinite().all() and not torch.equal(by_name, other)


@pytest.mark.parametrize("make", [jelly, torchy], ids=["spikingjelly", "snntorch"])
def test_one_for_some_layers_and_the_way_back(make):
    net = make()
    fnet = convert_to_fractional(net, surrogate={"1": "gaussian", "*": None})
    names = [
        type(getattr(m, "surrogate_function", None) or m.spike_grad).__name__ for m in (fnet[1], fnet[3])
    ]
    assert names[0] in ("Surrogate", "method") and names[1] not in ("Surrogate", "method")
    new = fnet.state_dict().keys() - net.state_dict().keys()
    assert new == {"1.fractional._extra_state", "3.fractional._extra_state"}  # the settings of the layers
    back = restore_native(copy.deepcopy(fnet))
    for a, b in zip(back, net, strict=True):
        assert type(a) is type(b) and vars(a).keys() == vars(b).keys()
    assert torch.equal(slopes(back)[1], slopes(net)[1])


@pytest.mark.parametrize("make", [jelly, torchy], ids=["spikingjelly", "snntorch"])
def test_the_fused_engine_knows_it(make):
    fnet = convert_to_fractional(make(), surrogate="gaussian")
    engine = plan_conversion(make()).rows[0].engine
    from spikede_plugins import conversion_report

    assert conversion_report(fnet).rows[0].engine == engine


def test_surrogates_that_cannot_be():
    with pytest.raises(UnknownNameError, match="did you mean 'gaussian'"):
        convert_to_fractional(jelly(), surrogate="gausian")
    with pytest.raises(OptionTypeError, match="surrogate must be a name"):
        plan_conversion(jelly(), surrogate=torch.sigmoid)
    with pytest.raises(OptionError, match="1: a fixed order of 1 leaves the neuron as it is"):
        convert_to_fractional(jelly(), alpha={"1": 1.0, "*": 0.5}, surrogate="atan")
    with pytest.raises(OptionError, match="finite and positive"):
        Surrogate("atan", 0.0)


def test_counts_of_spikes_are_no_slope():
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    if not hasattr(neuron, "ILIFNode"):
        pytest.skip("a release without ILIFNode")
    net = nn.Sequential(neuron.ILIFNode(step_mode="m"))
    with pytest.raises((OptionError, ConversionError), match="is no step"):
        convert_to_fractional(net, surrogate="atan")
    assert type(net[0]) is neuron.ILIFNode
