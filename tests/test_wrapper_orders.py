"""Which neuron takes which order, coefficients of single terms, trained thresholds, potentials."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from spikede_plugins import BaseNeuron, HardResetLIFNeuron, IFNeuron, LIFNeuron, MultiTerm, SNNWrapper
from spikede_plugins.errors import OptionError, OptionTypeError, OrderError
from spikede_plugins.surrogate import spike

T = 14
TIMES = torch.arange(float(T), dtype=torch.float64)


def samples(*shape):
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.rand(T, *(shape or (3, 6)), generator=generator, dtype=torch.float64)


def gl(orders, coefficients=(1.0,), n=T + 1):
    """Weights of ``sum_i c_i D^{a_i}`` at step 1."""
    total = [0.0] * n
    for alpha, c in zip(orders, coefficients, strict=True):
        w = [1.0]
        for m in range(1, n):
            w.append((1 - (1 + alpha) / m) * w[-1])
        total = [t + c * v for t, v in zip(total, w, strict=True)]
    return total


def by_hand(layers, x, between):
    """LIF layers ``(weights, tau, threshold)`` in a row, ``between`` times a spike: spikes and potentials."""
    v = [torch.zeros_like(x[0]) for _ in layers]
    past, out, reached = [[] for _ in layers], [], [[] for _ in layers]
    for current in x:
        for n, (weights, tau, threshold) in enumerate(layers):
            reached[n].append(v[n])
            drive = current - v[n]
            fired = spike(v[n] + drive / tau - threshold, "atan", 5.0)
            rate = (drive - fired.detach() * threshold) / tau
            memory = sum((weights[m] * u for m, u in enumerate(reversed(past[n]), 1)), torch.zeros_like(rate))
            past[n].append((rate - memory) / weights[0])
            current = fired if n + 1 == len(layers) else between * fired
        v = [one[-1] for one in past]
        out.append(current)
    return torch.stack(out), [torch.stack(one) for one in reached]


class Backwards(nn.Module):
    """Registered in one order, called in the other."""

    def __init__(self):
        super().__init__()
        self.last, self.first = LIFNeuron(2.0, 0.5), LIFNeuron(2.0)

    def forward(self, x):
        return self.last(0.6 * self.first(x))


class Untraceable(Backwards):
    def forward(self, x):
        return super().forward(x) if x.shape[1] > int(x.isnan().sum()) else x


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.lif = LIFNeuron(2.0, 0.5)

    def forward(self, x):
        return self.lif(0.6 * self.lif(x))


@pytest.mark.parametrize("integrator", ["fdeint", "fdeint_adjoint"])
@pytest.mark.parametrize("time", ["fold", "step"])
@pytest.mark.parametrize("kind", [Backwards, Untraceable, Twice])
def test_orders_go_by_calls(kind, time, integrator):
    threshold = 0.5 if kind is Twice else 1.0
    expected, potentials = by_hand([(gl([0.3]), 2.0, threshold), (gl([0.9]), 2.0, 0.5)], samples(), 0.6)
    net = SNNWrapper(kind(), integrator, alpha=[0.3, 0.9], alpha_mode="per_layer", time=time)
    out, found = net(samples(), TIMES, return_potentials=True)
    assert torch.equal(out, expected) and 0.05 < out.mean() < 0.95
    names = ["lif", "lif (call 2)"] if kind is Twice else ["first", "last"]
    assert list(found) == names
    for name, known in zip(names, potentials, strict=True):
        torch.testing.assert_close(found[name], known)


def test_a_neuron_called_twice_has_one_order_or_one_a_call(capsys):
    x = samples()
    same = SNNWrapper(Twice(), "fdeint", alpha=[0.3], alpha_mode="per_layer")
    assert torch.equal(same(x, TIMES), SNNWrapper(Twice(), "fdeint", alpha=0.3)(x, TIMES))
    two = SNNWrapper(Twice(), "fdeint", alpha=[0.3, 0.9], alpha_mode="per_layer", learn_alpha=[False, True])
    two.print_alpha_info()
    assert capsys.readouterr().out.splitlines()[1].startswith("lif (call 2)")
    two(x, TIMES).sum().backward()
    assert [name for name, p in two.named_parameters() if p.grad is not None] == ["orders.1.alpha"]
    with pytest.raises(OrderError, match="3 entries, but the model has 1 neuron layer"):
        SNNWrapper(Twice(), "fdeint", alpha=[[0.3], [0.5], [0.7]])


def test_a_count_that_only_the_first_run_can_check():
    net = SNNWrapper(Untraceable(), "fdeint", alpha=[0.3, 0.5, 0.7], alpha_mode="per_layer")
    with pytest.raises(OrderError, match="3 orders, but 2 neurons, called 2 times"):
        net(samples(), TIMES)


def test_names_of_what_is_learned_stay_as_they_are():
    net = SNNWrapper(Backwards(), "fdeint", alpha=[0.3, 0.9], alpha_mode="per_layer", learn_alpha=True)
    keys = list(net.state_dict())
    assert keys == ["orders.0.alpha", "orders.1.alpha"]
    assert [a.item() for a in net.get_per_layer_alpha()] == pytest.approx([0.3, 0.9])
    net(samples(), TIMES)
    other = SNNWrapper(Backwards(), "fdeint", alpha=[0.5, 0.5], alpha_mode="per_layer", learn_alpha=True)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(samples(), TIMES), net(samples(), TIMES))


# -- coefficients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [0.4, 1.0, 3.0])
def test_a_coefficient_of_a_single_term_counts(c):
    """The potentials show it; spikes need not (an input of 1.5 makes the second layer fire at any)."""
    net = SNNWrapper(Backwards(), "fdeint", alpha=[[0.3, 0.5], [0.8]], multi_coefficient=[[1.0, 0.5], [c]])
    out, found = net(samples(), TIMES, return_potentials=True)
    layers = [(gl([0.3, 0.5], [1.0, 0.5]), 2.0, 1.0), (gl([0.8], [c]), 2.0, 0.5)]
    expected, (first, last) = by_hand(layers, samples(), 0.6)
    assert torch.equal(out, expected)
    torch.testing.assert_close(found["first"], first)
    torch.testing.assert_close(found["last"], last)


def test_one_order_with_a_learned_coefficient():
    net = SNNWrapper(
        Backwards(), "fdeint", alpha=0.6, multi_coefficient=[2.0], learn_coefficient=True, learn_alpha=True
    ).double()
    _, found = net(samples(), TIMES, return_potentials=True)
    (slope,) = torch.autograd.grad(found["first"].sum(), net.orders[1].coefficients)

    def at(c):
        options = {"alpha": 0.6, "multi_coefficient": [c]}
        return SNNWrapper(Backwards(), "fdeint", **options)(samples(), TIMES, return_potentials=True)[1]

    step = 1e-6
    by_difference = (at(2.0 + step)["first"].sum() - at(2.0 - step)["first"].sum()) / (2 * step)
    assert slope.item() == pytest.approx(by_difference.item(), rel=1e-5)
    assert [c.tolist() for c in net.get_per_layer_coefficient()] == [[2.0], [2.0]]
    with pytest.raises(OptionError, match="layer 'last', which has one order only and no coefficient"):
        SNNWrapper(Backwards(), "fdeint", learn_coefficient=[True, True], multi_coefficient=[[2.0], None])
    one = SNNWrapper(Backwards(), "fdeint", alpha=[MultiTerm([0.6], [2.0]), 0.6])
    assert [order.describe() for order in one.orders] == ["2 D^0.6", "0.6"]


# -- thresholds and time constants ------------------------------------------------------------------


@pytest.mark.parametrize("time", ["fold", "step"])
@pytest.mark.parametrize("integrator", ["fdeint", "fdeint_adjoint"])
@pytest.mark.parametrize("shape", [(), (6,)], ids=["one", "one a neuron"])
def test_a_trained_threshold_against_the_loop(shape, integrator, time):
    """spikeDE's DRSGNN: a linear layer, a neuron whose threshold is trained; and messages between nodes."""
    source, target = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])

    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.fc = nn.Linear(6, 6, bias=False)
            self.lif = LIFNeuron(0.9, nn.Parameter(torch.full(shape, 0.7)))

        def messages(self, x):
            return x + torch.zeros_like(x).index_add(0, target, x[source])

        def forward(self, x):
            x = self.fc(x)
            return self.lif(self.messages(x) if time == "step" else x)

    base, x = Graph().double(), samples().requires_grad_()
    net = SNNWrapper(base, integrator, alpha=0.6)
    net._set_neuron_shapes(input_shape=(1, 6))
    out = net(x, TIMES)
    current = torch.stack([base.messages(base.fc(s)) if time == "step" else base.fc(s) for s in x])
    expected, _ = by_hand([(gl([0.6]), 0.9, base.lif.threshold)], current, 1.0)
    assert torch.equal(out, expected) and 0.05 < out.mean() < 0.95
    scale = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    wanted = [x, base.fc.weight, base.lif.threshold]
    found, known = (torch.autograd.grad((o * scale).sum(), wanted) for o in (out, expected))
    for a, b in zip(found, known, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * b.abs().max().item())
    assert known[2].abs().sum() > 0


@pytest.mark.parametrize("kind", [LIFNeuron, IFNeuron, HardResetLIFNeuron])
def test_a_threshold_put_in_by_hand_is_trained(kind):
    hand, given = kind(2.0), kind(2.0, nn.Parameter(torch.tensor(0.5)))
    del hand.threshold
    hand.threshold = nn.Parameter(torch.tensor(0.5))
    x, grads = 0.2 * samples().float(), []
    for neuron in (hand, given):
        SNNWrapper(neuron, "fdeint", alpha=0.7)(x, TIMES).sum().backward()
        grads.append(neuron.threshold.grad)
    assert torch.equal(*grads) and grads[0].abs() > 0
    assert "threshold=0.5 (learned)" in repr(hand) or kind is HardResetLIFNeuron


def test_the_gradient_of_a_threshold_against_finite_differences():
    """A smooth spike and the potential read out, so that a small step moves nothing by a jump."""

    class Smooth(BaseNeuron):
        elementwise = True

        def forward(self, v_mem, current_input):
            fired = torch.sigmoid(4 * (v_mem - self.threshold))
            return (current_input - v_mem - fired * self.threshold) / self.get_tau(), fired

    def total(threshold, tau=1.7):
        return SNNWrapper(Smooth(tau, threshold), "fdeint", alpha=0.7)(samples(), TIMES).square().sum()

    threshold = nn.Parameter(torch.tensor(0.6, dtype=torch.float64))
    tau = nn.Parameter(torch.tensor(1.7, dtype=torch.float64))
    found = torch.autograd.grad(total(threshold, tau), [threshold, tau])
    step = 1e-6
    known = [(total(0.6 + step) - total(0.6 - step)) / (2 * step),
             (total(0.6, 1.7 + step) - total(0.6, 1.7 - step)) / (2 * step)]  # fmt: skip
    for a, b in zip(found, known, strict=True):
        assert a.item() == pytest.approx(b.item(), rel=1e-6)


def test_a_threshold_that_another_layer_computes():
    scale = nn.Parameter(torch.tensor(0.5))
    net = SNNWrapper(LIFNeuron(2.0, 2 * scale), "fdeint", alpha=0.7)
    net(0.5 * samples().float(), TIMES).sum().backward()
    assert scale.grad.abs() > 0


@pytest.mark.parametrize("two", [np.float32(2.0), np.array(2.0), torch.tensor(2.0), torch.tensor([2.0]), 2])
def test_numbers_of_numpy_and_tensors(two):
    plain, given = LIFNeuron(2.0, 2.0), LIFNeuron(two, two)
    assert type(given.threshold) is float and type(given.tau) is float
    x = 3 * samples()
    run = [SNNWrapper(neuron, "fdeint", alpha=0.7)(x, TIMES) for neuron in (plain, given)]
    assert torch.equal(*run) and run[0].sum() > 0


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"tau": torch.tensor(-1.0)}, OptionError),
        ({"tau": nn.Parameter(torch.tensor([1.0, -1.0]))}, OptionError),
        ({"threshold": nn.Parameter(torch.tensor(math.nan))}, OptionError),
        ({"threshold": torch.tensor([1, 2])}, OptionTypeError),
        ({"tau": np.bool_(True)}, OptionTypeError),
        ({"tau": np.array([1.0, 2.0])}, OptionTypeError),
    ],
)
def test_numbers_that_cannot_be_used(arguments, error):
    with pytest.raises(error):
        LIFNeuron(**arguments)


# -- potentials -------------------------------------------------------------------------------------


class Readout(LIFNeuron):
    """Hands its potential on as its spike."""

    def forward(self, v_mem, current_input):
        return (current_input - v_mem) / self.get_tau(), v_mem


@pytest.mark.parametrize(
    ("integrator", "method"),
    [("fdeint", "gl"), ("fdeint", "abm"), ("fdeint", "l1"), ("fdeint_adjoint", "pred"), ("odeint", "euler"),
     ("odeint", "rk4"), ("odeint_adjoint", "rk4"), ("odeint_adjoint", "euler")],
)  # fmt: skip
@pytest.mark.parametrize("time", ["fold", "step"])
def test_potentials_are_those_that_the_output_is_of(integrator, method, time):
    if method == "rk4" or integrator == "odeint_adjoint":
        pytest.importorskip("torchdiffeq")
    base = nn.Sequential(Readout(2.0), Readout(1.5))
    net = SNNWrapper(base, integrator, alpha=0.7, method=method, time=time)
    out, potentials = net(samples(), TIMES, return_potentials=True)
    assert list(potentials) == ["0", "1"] and potentials["0"].shape == (T, 3, 6)
    assert torch.equal(potentials["1"], out) and not potentials["0"][0].any()
    assert potentials["0"][1:].abs().min() > 0
    assert torch.equal(net(samples(), TIMES), out)
    chosen, some = net(samples(), TIMES, TIMES[[2, 5]], return_potentials=True)
    assert torch.equal(some["0"], potentials["0"][[2, 5]]) and torch.equal(chosen, out[[2, 5]])


def test_potentials_have_gradients():
    x = samples().requires_grad_()
    for time in ("fold", "step"):
        net = SNNWrapper(LIFNeuron(2.0), "fdeint", alpha=0.7, time=time)
        _, potentials = net(x, TIMES, return_potentials=True)
        (grad,) = torch.autograd.grad(potentials["base"][-1].sum(), x)
        assert grad[:-1].abs().min() > 0 and not grad[-1].any()  # the last input comes after it
    with pytest.raises(OptionTypeError, match="return_potentials must be True or False"):
        net(x, TIMES, return_potentials="yes")


@pytest.mark.parametrize("name", ["tau", "threshold"])
@pytest.mark.parametrize("kind", [LIFNeuron, HardResetLIFNeuron])
def test_numbers_that_do_not_fit_the_layer_are_told(name, kind):
    x, times = torch.ones(4, 2, 3), torch.arange(4.0)
    fitting = SNNWrapper(nn.Sequential(kind(**{name: torch.tensor([0.5, 0.7, 0.9])})), integrator="fdeint")
    assert fitting(x, times).shape == (4, 2, 3)
    unfit = SNNWrapper(nn.Sequential(kind(**{name: torch.tensor([0.5, 0.7])})), integrator="fdeint")
    with pytest.raises(OptionError, match=rf"{name} of {kind.__name__} has shape \(2,\)"):
        unfit(x, times)
