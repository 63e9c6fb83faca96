"""What spikeDE's documentation says, with its import lines changed to ours: calls and their results."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spikede_plugins import BaseNeuron, ClassificationHead, IFNeuron, LIFNeuron, SNNWrapper, VotingLayer
from spikede_plugins.errors import OptionError


class CNNExample(nn.Module):
    def __init__(self, tau, threshold, surrogate_grad_scale):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, kernel_size=3, padding=1)
        self.lif1 = LIFNeuron(tau, threshold, surrogate_grad_scale)
        self.pool1 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(8 * 14 * 14, 32)
        self.lif2 = LIFNeuron(tau, threshold, surrogate_grad_scale)
        self.fc2 = nn.Linear(32, 10)
        self.lif3 = LIFNeuron(tau, threshold, surrogate_grad_scale)

    def forward(self, x):
        out = self.pool1(self.lif1(self.conv1(x)))
        out = self.lif2(self.fc1(self.flatten(out)))
        return self.lif3(self.fc2(out))


class MLPExample(nn.Module):
    def __init__(self, tau, threshold, surrogate_grad_scale):
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(28 * 28, 64, bias=False)
        self.lif1 = LIFNeuron(tau, threshold, surrogate_grad_scale)
        self.fc2 = nn.Linear(64, 10, bias=False)
        self.lif2 = LIFNeuron(tau, threshold, surrogate_grad_scale)

    def forward(self, x):
        x = self.flatten(x)
        x = self.lif1(self.fc1(x))
        return self.lif2(self.fc2(x))


class MySNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(10, 20)
        self.lif1 = LIFNeuron(tau=2.0)
        self.fc2 = nn.Linear(20, 5)
        self.lif2 = LIFNeuron(tau=2.0)

    def forward(self, x):
        x = self.lif1(self.fc1(x))
        return self.lif2(self.fc2(x))


class CustomNeuron(BaseNeuron):
    """A quadratic leak instead of a linear one."""

    def forward(self, v_mem, current_input):
        if current_input is None:
            return v_mem
        tau = self.get_tau()
        dv_no_reset = (-(v_mem**2) + current_input) / tau
        v_post_charge = v_mem + dv_no_reset
        spike = self.surrogate_f(v_post_charge - self.threshold, self.surrogate_grad_scale)
        dv_dt = dv_no_reset - (spike.detach() * self.threshold) / tau
        return dv_dt, spike


TIME_STEPS = 12


def spike_converter(x, time_steps=TIME_STEPS):
    p = x.unsqueeze(1).repeat(1, time_steps, 1, 1, 1)
    return torch.bernoulli(p).permute(1, 0, 2, 3, 4)


@pytest.mark.parametrize("example", [CNNExample, MLPExample])
def test_introduction_by_example(example):
    torch.manual_seed(0)
    model = SNNWrapper(
        example(tau=2.0, threshold=1.0, surrogate_grad_scale=0.3),
        integrator="fdeint",
        alpha=0.8,
        multi_coefficient=None,
        learn_alpha=True,
        learn_coefficient=False,
    )
    model._set_neuron_shapes(input_shape=(1, 28, 28))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    data, target = torch.rand(4, 1, 28, 28), torch.randint(0, 10, (4,))
    data_time = torch.linspace(0, 0.01 * TIME_STEPS, TIME_STEPS + 1).float()
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        output_seq = model(
            10 * spike_converter(data), data_time, method="gl", options={"step_size": 1.0, "memory": -1}
        )
        assert output_seq.shape == (TIME_STEPS, 4, 10)
        loss = nn.functional.cross_entropy(output_seq.mean(0), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None for p in model.parameters())
    assert any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    model.eval()
    with torch.no_grad():
        assert model(data.expand(5, 4, 1, 28, 28), torch.linspace(0, 1.0, 6), method="gl").shape == (5, 4, 10)


def test_per_layer_orders_learn():
    torch.manual_seed(0)
    net = SNNWrapper(
        MySNN(), integrator="fdeint", alpha=[0.3, 0.7], alpha_mode="per_layer", learn_alpha=True
    )
    net._set_neuron_shapes(input_shape=(1, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    x, target = 9 * torch.randn(8, 4, 10), torch.randint(0, 5, (4,))
    x_time = torch.linspace(0, 1, 8)
    for _ in range(3):
        loss = nn.CrossEntropyLoss()(net(x, x_time, method="gl").mean(0), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    alphas = [a.tolist() for a in net.get_per_layer_alpha()]
    assert [len(a) for a in alphas] == [1, 1]
    assert alphas[0][0] != pytest.approx(0.3, abs=1e-4)
    assert [c.tolist() for c in net.get_per_layer_coefficient()] == [[1.0], [1.0]]


def test_several_terms_in_every_layer_with_learned_weights():
    net = SNNWrapper(
        MySNN(), integrator="fdeint", alpha=[0.3, 0.5, 0.7], multi_coefficient=[1.0, 0.5, 0.2],
        alpha_mode="multiterm", learn_coefficient=True,
    )  # fmt: skip
    x = 9 * torch.randn(8, 4, 10)
    net(x, torch.linspace(0, 1, 8), method="gl").sum().backward()
    assert [order.coefficients.grad is not None for order in net.orders] == [True, True]


def test_every_layer_its_own_terms():
    net = SNNWrapper(
        MySNN(), integrator="fdeint", alpha=[[0.3, 0.5], [0.4, 0.6, 0.8]],
        multi_coefficient=[[1.0, 0.5], [1.0, 0.3, 0.1]],
    )  # fmt: skip
    assert [len(a) for a in net.get_per_layer_alpha()] == [2, 3]
    assert net(torch.randn(8, 4, 10), torch.linspace(0, 1, 8)).shape == (8, 4, 5)


@pytest.mark.parametrize("method", ["gl", "pred", "l1", "trap", "glmulti"])
def test_methods_in_the_constructor(method):
    net = SNNWrapper(MySNN(), integrator="fdeint", alpha=0.8, method=method)
    assert net(torch.randn(8, 4, 10), torch.linspace(0, 1, 8)).shape == (8, 4, 5)


def test_the_shorter_calls():
    x, x_time = torch.randn(8, 4, 10), torch.linspace(0, 1, 8)
    model = MySNN()
    nets = [
        SNNWrapper(model, integrator="odeint", method="euler"),
        SNNWrapper(model, interpolation_method="cubic"),
        SNNWrapper(base=model, alpha=0.85, method="gl", memory=-1),
        SNNWrapper(model, alpha=0.7, method="gl", options={"memory": 50}),
        SNNWrapper(base=model, alpha=0.7, method="gl", memory=50),
    ]
    assert all(net(x, x_time).shape == (8, 4, 5) for net in nets)


def test_a_short_memory_is_another_result():
    x, x_time = 9 * torch.randn(40, 4, 10), torch.linspace(0, 4, 40)
    torch.manual_seed(0)
    net = SNNWrapper(nn.Sequential(nn.Linear(10, 20), LIFNeuron(tau=2.0)), alpha=0.4, method="gl")
    assert not torch.equal(net(x, x_time), net(x, x_time, options={"memory": 2}))
    assert torch.equal(net(x, x_time), net(x, x_time, options={"memory": 50}))


def test_neurons_by_their_documented_arguments():
    lif = LIFNeuron(tau=2.0, threshold=1.0, surrogate_opt="arctan", tau_learnable=False)
    rest = IFNeuron(tau=1.5, threshold=0.8, surrogate_opt="sigmoid", tau_learnable=True)
    assert (lif.tau, lif.threshold) == (2.0, 1.0)
    assert rest.get_tau().item() == pytest.approx(1.5)
    v, current = torch.tensor([0.2, 0.9]), torch.tensor([0.4, 2.0])
    rate, spike = lif(v, current)
    assert spike.tolist() == [0.0, 1.0]
    torch.testing.assert_close(rate, torch.tensor([0.1, (2.0 - 0.9) / 2 - 0.5]))


def test_a_quadratic_neuron():
    base = nn.Sequential(nn.Linear(10, 20), CustomNeuron(tau=2.0), nn.Linear(20, 5), CustomNeuron(tau=2.0))
    for arguments in ({"integrator": "fdeint", "alpha": 0.7}, {"integrator": "odeint"}):
        out = SNNWrapper(base, **arguments)(torch.rand(8, 4, 10), torch.linspace(0, 1, 8))
        assert out.shape == (8, 4, 5) and out.isfinite().all()


def test_heads():
    votes = nn.Sequential(nn.Linear(10, 30), LIFNeuron(), VotingLayer(10))
    assert SNNWrapper(votes, "fdeint")(torch.rand(6, 2, 10), range(6)).shape == (6, 2, 3)
    with pytest.raises(OptionError, match="no multiple of voting_size=10"):
        VotingLayer()(torch.rand(4, 25))
    assert VotingLayer(strict=False)(torch.arange(25.0)).tolist() == [4.5, 14.5]

    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.lif, self.head = nn.Conv1d(3, 8, 1), LIFNeuron(), ClassificationHead(8, 4)

        def forward(self, x):
            return self.head(self.lif(self.conv(x)))

    net = SNNWrapper(Patches(), "fdeint", alpha=0.7)
    x = 5 * torch.rand(6, 2, 3, 7)
    scores = net(x, range(6))
    assert scores.shape == (2, 4)  # averaged over time
    spikes = SNNWrapper(nn.Sequential(net.base.conv, net.base.lif), "fdeint", alpha=0.7)(x, range(6))
    torch.testing.assert_close(scores, net.base.head(spikes))
