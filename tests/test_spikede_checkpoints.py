"""A checkpoint of spikeDE is taken over: built by hand here as its wrapper lays it out."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from spikede_plugins import LIFNeuron, LoadError, SNNWrapper, load_spikede_state_dict
from spikede_plugins.errors import OptionTypeError

H, STEPS, TAU = 0.5, 25, 1.5


class Net(nn.Module):
    """Registered in another order than it is called, with buffers, a trained tau and a head."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)
        self.second, self.first = LIFNeuron(2.0, 0.6), LIFNeuron(TAU, tau_learnable=True)
        self.fc1, self.bn, self.fc2 = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x):
        spikes = self.first(self.bn(self.fc1(x)) + torch.tensor(0.3))
        return self.head(self.second(3.0 * self.fc2(spikes)))


BEHIND = ("head.weight", "head.bias")  # behind the last neuron
BEFORE = (
    "fc1.weight", "fc1.bias", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var",
    "bn.num_batches_tracked", "first.tau_param", "fc2.weight", "fc2.bias",
)  # fmt: skip


def numbers():
    """The model's numbers in spikeDE, by their names in the model."""
    g = torch.Generator().manual_seed(3)
    shapes = {
        "fc1.weight": (5, 4), "fc1.bias": (5,), "bn.weight": (5,), "bn.bias": (5,), "bn.running_mean": (5,),
        "fc2.weight": (3, 5), "fc2.bias": (3,), "head.weight": (2, 3), "head.bias": (2,),
    }  # fmt: skip
    values = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    for name in ("fc1.weight", "bn.weight", "fc2.weight"):  # so that both layers fire
        values[name] = 0.5 * values[name].abs()
    values["bn.bias"] += 2.0
    values["fc2.bias"] = 0.1 * values["fc2.bias"].abs()
    values["bn.running_var"] = 0.5 + torch.rand(5, generator=g)
    values["bn.num_batches_tracked"] = torch.tensor(7)
    values["first.tau_param"] = torch.tensor(-0.4)  # tau = 1.5 (1 + exp(-0.4))
    return values


def checkpoint(values, alphas, coefficients=None, compiled="_orig_mod."):
    """The state_dict of spikeDE's SNNWrapper: parts of the model under every graph that it traces."""
    state = {}
    whole, upto = (*BEFORE, *BEHIND), (*BEFORE, *BEHIND)  # its copies take what their root has
    for place, names in (
        (f"ode_func.{compiled}post_neuron_module", BEHIND),
        (f"ode_func.{compiled}traced", whole),
        ("traced_backbone", whole),
        ("post_neuron_module", BEHIND),
        ("_ode_gm", upto),
        ("_ode_func_uncompiled.ode_gm", upto),
        ("_ode_func_uncompiled.post_neuron_module", BEHIND),
        ("_ode_func_uncompiled.traced", whole),
    ):
        state |= {f"{place}.{name}": values[name] for name in names}
        state[f"{place}._tensor_constant0"] = torch.tensor(0.3)
    for i, alpha in enumerate(alphas):
        factors = [1.0] * len(alpha) if coefficients is None else coefficients[i]
        state[f"per_layer_alpha_params.{i}"] = torch.tensor(alpha)
        state[f"per_layer_coefficient_params.{i}"] = torch.tensor(factors)
    return state


def terms(alpha, factors, n):
    """Gain and weights of ``sum_j c_j D^{a_j}``, Grünwald-Letnikov, in float64."""
    total = [0.0] * n
    for a, c in zip(alpha, factors, strict=True):
        w = 1.0
        for m in range(n):
            w = w * (1 - (1 + a) / m) if m else 1.0
            total[m] += c * H**-a * w
    return 1.0 / total[0], [w / total[0] for w in total]


def by_hand(values, alphas, coefficients, x):
    """The output and the potentials of spikeDE's network step by step, all layers together, in float64."""
    v = {name: value.double() for name, value in values.items()}
    taus = [TAU * (1 + math.exp(float(v["first.tau_param"]))), 2.0]
    thresholds, rules = [1.0, 0.6], [terms(a, c, STEPS) for a, c in zip(alphas, coefficients, strict=True)]
    u, past, out = [torch.zeros(3, 5), torch.zeros(3, 3)], [[], []], []
    u = [t.double() for t in u]
    for step in x.double():
        current = step @ v["fc1.weight"].T + v["fc1.bias"]
        scale = v["bn.weight"] / (v["bn.running_var"] + 1e-5).sqrt()
        current = (current - v["bn.running_mean"]) * scale + v["bn.bias"] + 0.3
        for layer in range(2):
            drive = (current - u[layer]) / taus[layer]
            spike = (u[layer] + drive >= thresholds[layer]).double()
            rate = drive - spike * thresholds[layer] / taus[layer]
            gain, w = rules[layer]
            new = gain * rate - sum(w[m] * s for m, s in enumerate(reversed(past[layer]), 1))
            past[layer].append(new)
            u[layer] = new
            if layer == 0:
                current = 3.0 * (spike @ v["fc2.weight"].T + v["fc2.bias"])
        out.append(spike @ v["head.weight"].T + v["head.bias"])
    zeros = [torch.zeros_like(us[0]) for us in past]
    return torch.stack(out), [torch.stack([z, *us[:-1]]) for z, us in zip(zeros, past, strict=True)]


def sample():
    x = 2.0 * torch.rand(STEPS, 3, 4, generator=torch.Generator().manual_seed(5))
    return x, H * torch.arange(float(STEPS))


ORDERS = {
    "one for all": ([[0.7], [0.4]], None, {"alpha": 0.5}),
    "one a layer, learned": (
        [[0.7], [0.4]], None, {"alpha": [0.5, 0.5], "alpha_mode": "per_layer", "learn_alpha": True},
    ),
    "terms": (
        [[0.3, 0.8], [0.6]], [[1.0, 0.5], [2.0]],
        {"alpha": [[0.5, 0.6], [0.5]], "multi_coefficient": [[1.0, 1.0], [3.0]], "learn_coefficient": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("compiled", ["_orig_mod.", ""], ids=["compiled", "not compiled"])
@pytest.mark.parametrize("orders", ORDERS)
def test_outputs_are_those_of_spikede(orders, compiled):
    alphas, coefficients, settings = ORDERS[orders]
    net = SNNWrapper(Net(), "fdeint", **settings).double().eval()
    x, times = sample()
    net(x.double(), times)  # orders that were used before are forgotten
    state = checkpoint(numbers(), alphas, coefficients, compiled)
    load_spikede_state_dict(net, state)
    out, potentials = net(x.double(), times, options={"memory": -1}, return_potentials=True)
    # The orders of the checkpoint are float32 numbers.
    exact = [[float(torch.tensor(a)) for a in layer] for layer in alphas]
    want, reached = by_hand(numbers(), exact, coefficients or [[1.0], [1.0]], x)
    assert len(want[..., 0].flatten().unique()) > 1, "neurons of the last layer fire, and not always"
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-6)
    for name, v in zip(("first", "second"), reached, strict=True):
        torch.testing.assert_close(potentials[name], v, rtol=1e-6, atol=1e-6)
    assert [round(a.item(), 6) for a in net.get_per_layer_alpha()[0]] == alphas[0 if len(settings) > 1 else 1]


def test_what_is_trained_is_trained_on():
    net = SNNWrapper(Net(), "fdeint", **ORDERS["one a layer, learned"][2])
    load_spikede_state_dict(net, checkpoint(numbers(), [[0.7], [0.4]]))
    assert float(net.base.first.get_tau().detach()) == pytest.approx(TAU * (1 + math.exp(-0.4)))
    assert net.base.bn.num_batches_tracked.item() == 7
    x, times = sample()
    net(x, times).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_a_checkpoint_of_distributed_training_and_one_without_orders():
    net = SNNWrapper(Net(), "fdeint", alpha=0.5)
    state = checkpoint(numbers(), [], compiled="")
    load_spikede_state_dict(net, {f"module.{name}": value for name, value in state.items()})
    assert torch.equal(net.base.fc1.weight, numbers()["fc1.weight"])
    assert [a.item() for a in net.get_per_layer_alpha()] == [0.5, 0.5]


def lost(state):
    return {key: value for key, value in state.items() if not key.endswith("fc2.bias")}


UNFIT = {
    "an odd name": (lambda s: {**s, "odd": torch.ones(1)}, r"odd: spikeDE's wrapper has nothing"),
    "a layer that is not here": (
        lambda s: {**s, "traced_backbone.fc3.weight": torch.ones(1)}, r"fc3.weight: the model here has none",
    ),
    "a lost weight": (lost, r"fc2.bias: it is not in the checkpoint"),
    "another shape": (
        lambda s: {k: torch.ones(9) if k.endswith("fc2.bias") else v for k, v in s.items()},
        r"fc2.bias: it has the shape \(9,\), this model's has \(3,\)",
    ),
    "copies that differ": (
        lambda s: {**s, "_ode_gm.fc2.bias": torch.zeros(3)}, r"fc2.bias: the checkpoint holds it twice",
    ),
    "no tensor": (lambda s: {**s, "traced_backbone.fc2.bias": "x"}, r"it is no tensor but str"),
    "more orders": (
        lambda s: {**s, "per_layer_alpha_params.2": torch.tensor([0.3])},
        r"there are 3 entries, and the model calls its neurons 2 times \(first, second\)",
    ),
    "several terms": (
        lambda s: {
            **s, "per_layer_alpha_params.1": torch.tensor([0.3, 0.4]),
            "per_layer_coefficient_params.1": torch.ones(2),
        },
        r"per_layer_alpha_params.1 \(second\): it has 2 in the checkpoint and 1 order here",
    ),
    "an order out of range": (
        lambda s: {**s, "per_layer_alpha_params.0": torch.tensor([1.3])}, r"orders lie in \(0, 1\]",
    ),
    "a coefficient": (
        lambda s: {**s, "per_layer_coefficient_params.0": torch.tensor([2.0])},
        r"the layer here none; build the wrapper with the same multi_coefficient",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", UNFIT)
def test_all_or_nothing(what):
    spoil, text = UNFIT[what]
    net = SNNWrapper(Net(), "fdeint", alpha=[0.5, 0.6], alpha_mode="per_layer", learn_alpha=[True, False])
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(LoadError, match=text):
        load_spikede_state_dict(net, spoil(checkpoint(numbers(), [[0.7], [0.4]])))
    after = net.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if torch.is_tensor(value))
    assert [a.item() for a in net.get_per_layer_alpha()] == pytest.approx([0.5, 0.6])


def test_all_problems_are_listed_at_once():
    net = SNNWrapper(Net(), "fdeint", alpha=0.5)
    state = {**lost(checkpoint(numbers(), [[0.7], [1.4]])), "odd": torch.ones(1)}
    with pytest.raises(LoadError) as caught:
        load_spikede_state_dict(net, state)
    assert all(name in str(caught.value) for name in ("odd", "fc2.bias", "per_layer_alpha_params.1"))


def test_a_neuron_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.lif = nn.Linear(2, 2), LIFNeuron(2.0)

        def forward(self, x):
            return self.lif(self.fc(self.lif(x)))

    weights = {"traced_backbone.fc.weight": torch.eye(2), "traced_backbone.fc.bias": torch.zeros(2)}
    orders = {f"per_layer_alpha_params.{i}": torch.tensor([a]) for i, a in enumerate((0.25, 0.75))}
    by_call = SNNWrapper(Twice(), "fdeint", alpha=[0.5, 0.5], alpha_mode="per_layer")
    load_spikede_state_dict(by_call, {**weights, **orders})
    assert [a.item() for a in by_call.get_per_layer_alpha()] == [0.25, 0.75]
    with pytest.raises(LoadError, match="give this wrapper an order for each of the 2 calls"):
        load_spikede_state_dict(SNNWrapper(Twice(), "fdeint", alpha=0.5), {**weights, **orders})


def test_what_is_no_wrapper_and_no_checkpoint():
    with pytest.raises(OptionTypeError, match="an SNNWrapper takes spikeDE's checkpoints, got Net"):
        load_spikede_state_dict(Net(), {})
    with pytest.raises(OptionTypeError, match="must map names to tensors, got int"):
        load_spikede_state_dict(SNNWrapper(Net()), 3)
