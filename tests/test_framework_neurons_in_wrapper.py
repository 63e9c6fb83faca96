"""Neurons of SpikingJelly and snnTorch in a model that SNNWrapper runs: as convert_to_fractional makes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spikede_plugins import SNNWrapper, convert_to_fractional
from spikede_plugins.errors import ConversionError, OptionError, UnsupportedNeuronError

X = 3 * torch.rand(12, 4, 6, generator=torch.Generator().manual_seed(0))


def strong(net):
    """Weights that make the last layer fire."""
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight.copy_(layer.weight.abs() * 2)
    return net


def jelly():
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    torch.manual_seed(0)
    return strong(nn.Sequential(nn.Linear(6, 16), neuron.LIFNode(tau=2.0), nn.Linear(16, 3), neuron.IFNode()))


def torchy(**options):
    snn = pytest.importorskip("snntorch")
    torch.manual_seed(0)
    options = {"init_hidden": True, **options}
    return strong(
        nn.Sequential(
            nn.Linear(6, 16), snn.Leaky(beta=0.7, **options), nn.Linear(16, 3), snn.Leaky(0.8, **options)
        )
    )


def run_jelly(net, x):
    functional = pytest.importorskip("spikingjelly.activation_based.functional")
    functional.set_step_mode(net, "m")
    return net(x)


def run_torchy(net, x):
    return torch.stack([net(step) for step in x])


@pytest.mark.parametrize(
    ("make", "run"), [(jelly, run_jelly), (torchy, run_torchy)], ids=["spikingjelly", "snntorch"]
)
def test_the_same_as_a_converted_model(make, run):
    base = make()
    net = SNNWrapper(base, "fdeint", alpha=[0.5, 0.8], alpha_mode="per_layer", learn_alpha=True)
    assert net.neuron_names == ["1", "3"]
    assert not any(p is q for p in net.parameters() for q in base.parameters())  # a copy: base stays
    converted = convert_to_fractional(make(), alpha=[0.5, 0.8], learn_alpha=True)
    out, expected = net(X, range(12)), run(converted, X)
    assert torch.equal(out, expected) and out.mean() > 0.02
    assert torch.equal(net(X, range(12)), out)  # nothing is carried over
    out.sum().backward()
    expected.sum().backward()
    for ours, theirs in zip(
        net.get_per_layer_alpha(), (m for m in converted.modules() if hasattr(m, "alphas")), strict=True
    ):
        assert torch.equal(ours, theirs.alphas().reshape(-1))
    grads = [order.alpha.grad for order in net.orders]
    known = [m.alpha.grad for m in converted.modules() if hasattr(m, "alphas")]
    for a, b in zip(grads, known, strict=True):
        torch.testing.assert_close(a, b)


def test_a_neuron_that_hands_its_membrane_out_is_refused():
    with pytest.raises(
        UnsupportedNeuronError, match=r"1 \(Leaky\): it hands its membrane in and out.*init_hidden"
    ):
        SNNWrapper(torchy(init_hidden=False), "fdeint")


def test_a_model_that_is_fractional_already_is_refused():
    with pytest.raises(ConversionError, match="made fractional already"):
        SNNWrapper(convert_to_fractional(jelly()), "fdeint")


def test_jumps_and_adaptive_solvers_do_not_go_together():
    pytest.importorskip("torchdiffeq")
    with pytest.raises(OptionError, match="reset by a jump"):
        SNNWrapper(jelly(), method="rk4")(X, range(12))


def test_a_single_neuron_is_a_model():
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    assert SNNWrapper(neuron.LIFNode(), "fdeint")(X, range(12)).shape == X.shape


def test_an_adapter_that_does_not_run_sequences_is_named(monkeypatch):
    from spikede_plugins import Adapter

    base = jelly()
    from spikede_spikingjelly import SpikingJellyAdapter

    monkeypatch.setattr(SpikingJellyAdapter, "sequence_obstacle", Adapter.sequence_obstacle)
    with pytest.raises(UnsupportedNeuronError, match=r"1 \(LIFNode\): the adapter 'spikingjelly' does"):
        SNNWrapper(base, "fdeint")


class Mixing(nn.Module):
    """A net whose samples are centred over the batch between its layers."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        for layer in self.net:
            x = layer(x - x.mean(0, keepdim=True)) if isinstance(layer, nn.Linear) else layer(x)
        return x


@pytest.mark.parametrize("kind", ["jelly", "torchy"])
@pytest.mark.parametrize("step", [False, True], ids=["steps by itself", "told to step"])
def test_models_that_mix_samples_are_stepped_as_a_loop_over_time(kind, step):
    net = jelly() if kind == "jelly" else torchy()
    wrapped = SNNWrapper(
        Mixing(net), "fdeint", alpha=[0.5, 0.8], alpha_mode="per_layer", learn_alpha=True,
        time="step" if step else "auto",
    )  # fmt: skip
    converted = convert_to_fractional(Mixing(net), alpha=[0.5, 0.8], learn_alpha=True)
    if kind == "jelly":
        functional = pytest.importorskip("spikingjelly.activation_based.functional")
        functional.set_step_mode(converted, "s")
    expected = torch.stack([converted(x) for x in X])
    out, potentials = wrapped(X, range(12), return_potentials=True)
    assert torch.equal(out, expected) and 0.02 < out.mean() < 0.98
    assert torch.equal(wrapped(X, range(12)), out)  # nothing is carried over
    assert [v.shape for v in potentials.values()] == [(12, 4, 16), (12, 4, 3)]
    assert list(potentials) == ["net.1", "net.3"]
    last = converted.net[3]
    assert torch.equal(potentials["net.3"][-1], last.v if kind == "jelly" else last.mem)
    out.sum().backward()
    expected.sum().backward()
    known = [m.alpha.grad for m in converted.modules() if hasattr(m, "alphas")]
    for order, grad in zip(wrapped.orders, known, strict=True):
        torch.testing.assert_close(order.alpha.grad, grad)
        assert grad.abs() > 0


@pytest.mark.parametrize("make", [jelly, torchy])
def test_potentials_are_the_same_all_at_once_and_step_by_step(make):
    folded, stepped = (
        SNNWrapper(make(), "fdeint", time=time)(X, range(12), return_potentials=True)
        for time in ("fold", "step")
    )
    assert torch.equal(folded[0], stepped[0])
    for name, v in folded[1].items():
        torch.testing.assert_close(v, stepped[1][name])
