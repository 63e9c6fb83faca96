"""SNNWrapper against its definition: the whole network, step by step, over lists of all that was."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn

from spikede_plugins.errors import (
    ConversionError,
    OptionError,
    OptionTypeError,
    OrderError,
    SpikedeWarning,
    StateError,
    UnknownNameError,
)
from spikede_plugins.neurons import BaseNeuron, HardResetLIFNeuron, IFNeuron, LIFNeuron, NoisyLIFNeuron
from spikede_plugins.orders import MultiTerm, PerChannel
from spikede_plugins.wrapper import SNNWrapper

T, B = 20, 3


class Mlp(nn.Module):
    def __init__(self, first=None, second=None):
        super().__init__()
        torch.manual_seed(1)
        self.fc1 = nn.Linear(6, 20)
        self.lif1 = first or LIFNeuron(tau=2.0)
        self.fc2 = nn.Linear(20, 4)
        self.lif2 = second or IFNeuron(tau=1.5, threshold=0.8)
        with torch.no_grad():  # so that the second layer fires
            self.fc2.weight.mul_(6.0)
            self.fc2.bias.add_(0.4)

    def forward(self, x):
        return self.lif2(self.fc2(self.lif1(self.fc1(x))))


class QuadraticNeuron(BaseNeuron):
    """The custom neuron of the tutorial, which test_tutorial.py has as a user writes it."""

    def forward(self, v_mem, current_input):
        if current_input is None:
            return v_mem
        tau = self.get_tau()
        dv_no_reset = (-(v_mem**2) + current_input) / tau
        v_post_charge = v_mem + dv_no_reset
        spike = self.surrogate_f(v_post_charge - self.threshold, self.surrogate_grad_scale)
        dv_dt = dv_no_reset - (spike.detach() * self.threshold) / tau
        return dv_dt, spike


def sample(steps=T, end=1.9, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = 4 + 8 * torch.randn(steps, B, 6, generator=generator, dtype=dtype)
    return x.requires_grad_(), torch.linspace(0, end, steps, dtype=dtype)


def weights_of(method, alpha, h, n):
    """Gain and weights of ``y_k = gain f - sum_m w_m y_{k-m}``, written down directly."""
    if method == "gl":
        w = [1.0]
        for m in range(1, n):
            w.append((1 - (1 + alpha) / m) * w[-1])
        return h**alpha, w
    if method == "l1":
        b = [(m + 1) ** (1 - alpha) - m ** (1 - alpha) for m in range(n)]
        return h**alpha * math.gamma(2 - alpha), [1.0, *(b[m] - b[m - 1] for m in range(1, n))]
    raise ValueError(method)


def whole_network(base, method, alphas, x, h, memory=None):
    """All layers together, one step after the other (methods on states; ``pred`` on rates)."""
    layers = [base.lif1, base.lif2]
    past, v, out = [[], []], [torch.zeros(B, 20).to(x), torch.zeros(B, 4).to(x)], []
    for x_k in x:
        current, rates = base.fc1(x_k), []
        for neuron, v_l in zip(layers, v, strict=True):
            rate, spike = neuron.forward(v_l, current)
            rates.append(rate)
            current = base.fc2(spike) if neuron is layers[0] else spike
        out.append(current)
        for layer, (rate, alpha) in enumerate(zip(rates, alphas, strict=True)):
            if method == "pred":
                past[layer].append(rate)
                n = len(past[layer])
                scale = h**alpha / math.gamma(1 + alpha)
                v[layer] = scale * sum(
                    ((n - j) ** alpha - (n - 1 - j) ** alpha) * f for j, f in enumerate(past[layer])
                )
                continue
            gain, w = weights_of(method, alpha, h, len(x) + 1)
            kept = past[layer][-memory:] if memory else past[layer]
            v[layer] = gain * rate - sum(
                (w[m] * y for m, y in enumerate(reversed(kept), 1)), torch.zeros_like(rate)
            )
            past[layer].append(v[layer])
    return torch.stack(out)


def gradients(out, x, net):
    scale = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    return torch.autograd.grad((out * scale).sum(), [x, *net.base.parameters()])


@pytest.mark.parametrize("memory", [None, 5], ids=["full", "window"])
@pytest.mark.parametrize("end", [19.0, 1.9], ids=["h = 1", "h = 0.1"])
@pytest.mark.parametrize("method", ["gl", "l1", "pred"])
def test_layer_by_layer_is_the_whole_network_step_by_step(method, end, memory):
    if memory and method == "pred":
        pytest.skip("a window of rates is not a window of states")
    x, times = sample(end=end)
    net = SNNWrapper(Mlp().double(), "fdeint", alpha=[0.4, 0.8], alpha_mode="per_layer", method=method)
    out = net(x, times, options={"memory": memory})
    expected = whole_network(net.base, method, [0.4, 0.8], x, end / (T - 1), memory)
    assert out.shape == (T, B, 4)
    assert torch.equal(out, expected)
    assert 0.02 < out.mean() < 0.9
    for found, known in zip(gradients(out, x, net), gradients(expected, x, net), strict=True):
        torch.testing.assert_close(found, known, rtol=1e-8, atol=1e-8 * known.abs().max().item())


@pytest.mark.filterwarnings("ignore:an implicit step has no solution")  # where rates jump, by trap
@pytest.mark.parametrize("method", ["gl", "l1", "pred", "glmulti", "abm", "trap"])
def test_an_order_of_one_is_an_euler_step(method):
    """But for abm and trap, which ask for rates twice, to the last bit."""
    x, times = sample(end=T - 1.0)
    net = SNNWrapper(Mlp().double(), "fdeint", alpha=1.0, method=method)
    euler = SNNWrapper(net.base, "odeint", method="euler")
    if method in ("abm", "trap"):
        assert net(x, times).shape == (T, B, 4)
    else:
        assert torch.equal(net(x, times), euler(x, times))
        for a, b in zip(gradients(net(x, times), x, net), gradients(euler(x, times), x, net), strict=True):
            assert torch.equal(a, b)


def test_euler_on_a_grid_is_that_of_torchdiffeq():
    pytest.importorskip("torchdiffeq")
    x, times = sample()
    net = SNNWrapper(Mlp().double(), method="euler")
    uneven = times.clone()
    uneven[3] += 1e-3  # no longer uniform: torchdiffeq's
    assert torch.equal(net(x, times), net(x, uneven))


@pytest.mark.parametrize("integrator", ["odeint", "odeint_adjoint"])
@pytest.mark.parametrize("method", ["rk4", "dopri5", "midpoint"])
def test_solvers_with_times_of_their_own(method, integrator):
    """Below the threshold nothing fires: the potentials then are those of a linear equation."""
    pytest.importorskip("torchdiffeq")

    class Readout(LIFNeuron):
        def forward(self, v_mem, current_input):
            return (current_input - v_mem) / self.get_tau(), v_mem

    net = SNNWrapper(Mlp(Readout(tau=2.0), Readout(tau=1.0)).double(), integrator)
    constant = torch.ones(T, B, 6, dtype=torch.float64, requires_grad=True)
    times = torch.linspace(0, 3, T, dtype=torch.float64)
    out = net(
        constant, times, method=method, options={"rtol": 1e-9, "atol": 1e-9} if method == "dopri5" else None
    )
    drive = net.base.fc1(constant[0])
    first = (1 - torch.exp(-times / 2)).reshape(-1, 1, 1) * drive
    # The second layer: tau = 1 after tau = 2, each in closed form.
    t = times.reshape(-1, 1, 1)
    second = net.base.fc2.bias * (1 - torch.exp(-t)) + (drive @ net.base.fc2.weight.T) * (
        1 - 2 * torch.exp(-t / 2) + torch.exp(-t)
    )
    assert first.shape == (T, B, 20)
    torch.testing.assert_close(out, second, rtol=2e-3, atol=2e-3)
    found = torch.autograd.grad(out.sum(), [net.base.fc1.weight, constant])
    known = torch.autograd.grad(second.sum(), [net.base.fc1.weight, constant])
    torch.testing.assert_close(found[0], known[0], rtol=5e-3, atol=5e-3)
    assert found[1].abs().sum() > 0


def test_outputs_at_times_of_your_own():
    pytest.importorskip("torchdiffeq")
    x, times = sample()
    net = SNNWrapper(Mlp().double(), "fdeint", alpha=0.7)
    assert torch.equal(net(x, times, output_time=times[[3, 7]]), net(x, times)[[3, 7]])
    with pytest.raises(OptionError, match=r"output_time\[1\] = 0.123 is none of the times"):
        net(x, times, output_time=[0.1, 0.123])
    ode = SNNWrapper(net.base, method="rk4")
    assert ode(x, times, output_time=[0.05, 0.5, 1.85]).shape == (3, B, 4)


# -- orders -----------------------------------------------------------------------------------------


def test_several_terms_in_every_layer_and_learned_coefficients():
    x, times = sample()
    net = SNNWrapper(
        Mlp().double(), "fdeint", alpha=[0.3, 0.5, 0.7], multi_coefficient=[1.0, 0.5, 0.2],
        alpha_mode="multiterm", learn_coefficient=True, learn_alpha=[False, True],
    ).double()  # fmt: skip
    assert [a.tolist() for a in net.get_per_layer_coefficient()] == [pytest.approx([1.0, 0.5, 0.2])] * 2
    assert [len(list(order.parameters())) for order in net.orders] == [1, 2]
    out = net(x, times)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.orders.parameters())


@pytest.mark.parametrize("method", ["gl", "l1", "pred"])
def test_gradients_of_orders_against_finite_differences(method):
    """Potentials are read out, which are smooth in the order as long as no spike moves."""

    class Readout(LIFNeuron):
        def forward(self, v_mem, current_input):
            return (current_input - v_mem) / self.get_tau(), v_mem

    def make(first, second):
        net = SNNWrapper(
            Mlp(Readout(tau=2.0), Readout(tau=1.5)).double(), "fdeint", alpha=[first, second],
            alpha_mode="per_layer", learn_alpha=True, method=method,
        ).double()  # fmt: skip
        for p, value in zip(net.orders.parameters(), (first, second), strict=True):
            p.data.fill_(value)
        return net

    x, times = sample()
    net = make(0.4, 0.8)
    found = torch.autograd.grad(net(x, times).square().sum(), list(net.orders.parameters()))
    step = 1e-5
    for layer, gradient in enumerate(found):
        change = [step * (layer == i) for i in range(2)]
        up, down = (make(0.4 + s * change[0], 0.8 + s * change[1])(x, times).square().sum() for s in (1, -1))
        assert gradient.item() == pytest.approx(((up - down) / (2 * step)).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("alpha", "more", "expected"),
    [
        (0.6, {}, ["0.6", "0.6"]),
        ([0.3, 0.8], {"alpha_mode": "per_layer"}, ["0.3", "0.8"]),
        ([0.3, 0.8], {"alpha_mode": "multiterm"}, ["1 D^0.3 + 1 D^0.8"] * 2),
        ([0.3, 0.8], {"multi_coefficient": [2.0, 0.5]}, ["2 D^0.3 + 0.5 D^0.8"] * 2),
        ([0.3, 0.8], {"multi_coefficient": [[2.0, 0.5], None]}, ["2 D^0.3 + 0.5 D^0.8", "1 D^0.3 + 1 D^0.8"]),
        ([[0.3, 0.5], 0.8], {}, ["1 D^0.3 + 1 D^0.5", "0.8"]),
        ([[0.3], [0.7]], {}, ["0.3", "0.7"]),
        (0.6, {"multi_coefficient": [2.0]}, ["2 D^0.6"] * 2),
        (0.6, {"multi_coefficient": [2.0, 1.0]}, ["2 D^0.6", "0.6"]),
        ([[0.3, 0.5], [0.8]], {"multi_coefficient": [[1.0, 0.5], [3.0]]}, ["1 D^0.3 + 0.5 D^0.5", "3 D^0.8"]),
        ([[0.3, 0.5], [0.4, 0.6, 0.8]], {"multi_coefficient": [[1.0, 0.5], [1.0, 0.3, 0.1]]},
         ["1 D^0.3 + 0.5 D^0.5", "1 D^0.4 + 0.3 D^0.6 + 0.1 D^0.8"]),
        ([PerChannel([0.2] * 20), MultiTerm([0.5, 0.9], [1.0, 1.0])], {},
         ["20 channels [0.2, 0.2, 0.2, 0.2, ...]", "1 D^0.5 + 1 D^0.9"]),
        (torch.tensor([0.25, 0.75]), {"alpha_mode": "per_layer"}, ["0.25", "0.75"]),
    ],
)  # fmt: skip
def test_ways_to_write_orders(alpha, more, expected, capsys):
    net = SNNWrapper(Mlp(), "fdeint", alpha=alpha, **more)
    assert [order.describe() for order in net.orders] == expected
    net.print_alpha_info()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2
    for name, line, text in zip(("lif1", "lif2"), printed, expected, strict=True):
        assert line.startswith(name) and line.endswith(text)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"alpha": [0.3, 0.7]}, OrderError, "one order for each of the 2 neuron .*, or 2 terms.*alpha_mode"),
        ({"alpha": [0.3, 0.5, 0.7]}, OrderError, r"3 orders, .* 2 neuron layers \(lif1, lif2\)"),
        ({"alpha": [0.3], "alpha_mode": "per_layer"}, OrderError, "1 entries, but the model has 2"),
        ({"alpha": [[0.3], [0.5], [0.7]]}, OrderError, "3 entries, but"),
        ({"alpha": 1.5}, OrderError, r"must lie in \(0, 1\]"),
        ({"alpha": []}, OrderError, "alpha is empty"),
        ({"alpha_mode": "per-layer"}, UnknownNameError, "did you mean 'per_layer'"),
        ({"multi_coefficient": [1.0, 2.0, 3.0]}, OrderError, "3 entries for layers with one order each"),
        ({"multi_coefficient": [[1.0], [2.0, 3.0]]}, OrderError, "'lif2' has one order but 2 coefficients"),
        ({"alpha": PerChannel([0.5]), "multi_coefficient": [2.0]}, OptionError, "scale tau instead"),
        ({"time": "steps"}, UnknownNameError, "did you mean 'step'"),
        ({"alpha": [0.3, 0.7], "multi_coefficient": [1.0]}, OrderError, "2 orders but 1 coefficient;"),
        ({"alpha": [0.3, 0.7], "multi_coefficient": [[1.0, 1.0]]}, OrderError, "multi_coefficient has 1"),
        ({"multi_coefficient": 0.5}, OptionTypeError, "multi_coefficient must be a sequence"),
        ({"learn_alpha": [True]}, OptionError, "learn_alpha has 1 entries, but the model has 2"),
        ({"learn_alpha": "yes"}, OptionTypeError, "learn_alpha must be True, False"),
        ({"learn_coefficient": True}, OptionError, "no layer has coefficients"),
        ({"learn_coefficient": [True, False]}, OptionError, "layer 'lif1', which has one order only"),
        ({"integrator": "fdeintt"}, UnknownNameError, "did you mean 'fdeint'"),
        ({"interpolation_method": "cubik"}, UnknownNameError, "did you mean 'cubic'"),
        ({"dropout": "steps"}, UnknownNameError, "did you mean 'step'"),
        ({"method": "prd"}, UnknownNameError, "did you mean 'pred'"),
        ({"method": 3}, OptionTypeError, "method must be a name"),
        ({"integrator": "fdeint", "method": "rk4"}, OptionError, "integrates order one"),
        ({"method": "gl", "options": {"memry": 5}}, UnknownNameError, "did you mean 'memory'"),
        ({"method": "gl", "options": {"memory": 0}}, OptionError, "at least 1 step"),
        ({"base": nn.Linear(2, 2)}, ConversionError, "Linear has no neuron"),
        ({"base": "model"}, OptionTypeError, "base must be a torch.nn.Module"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be_used(arguments, error, message):
    if arguments.get("method") == "rk4":
        pytest.importorskip("torchdiffeq")
    with pytest.raises(error, match=message):
        SNNWrapper(**{"base": Mlp(), **arguments})


@pytest.mark.parametrize(
    ("x", "x_time", "error", "message"),
    [
        (torch.rand(5, 2, 6), [0, 1, 2, 2, 3], OptionError, r"x_time\[2\] = 2 is followed by 2"),
        (torch.rand(5, 2, 6), [0.0, 1.0, 2.0], OptionError, "5 time points, but x_time has 3"),
        (torch.rand(5, 2, 6), [0, 1, math.nan, 3, 4], OptionError, "x_time has NaN"),
        (torch.rand(5, 2, 6), torch.rand(5, 2), OptionError, "one-dimensional"),
        (torch.rand(5, 2, 6), [0, 1, 2, 4, 5], OptionError, "needs a uniform grid.*euler"),
        (torch.full((5, 2, 6), math.nan), range(5), OptionError, "x has NaN"),
        (torch.full((5, 2, 6), math.inf), range(5), OptionError, "infinite numbers"),
        (torch.rand(5), range(5), OptionError, r"must be \[T, B, ...\]"),
        (torch.rand(0, 2, 6), [], OptionError, "at least one time point"),
        (torch.ones(5, 2, 6, dtype=torch.int64), range(5), OptionTypeError, "floating point"),
    ],
)  # fmt: skip
def test_inputs_that_cannot_be_used(x, x_time, error, message):
    with pytest.raises(error, match=message):
        SNNWrapper(Mlp(), "fdeint")(x, torch.as_tensor(x_time, dtype=torch.float64))


@pytest.mark.parametrize(("method", "fewest"), [("cubic", 4), ("akima", 5)])
def test_too_few_points_to_interpolate(method, fewest):
    net = SNNWrapper(Mlp(), "fdeint", method)
    net(torch.rand(fewest, 2, 6), range(fewest))
    with pytest.raises(OptionError, match=f"needs {fewest} time points, x has {fewest - 1}"):
        net(torch.rand(fewest - 1, 2, 6), range(fewest - 1))


def test_several_orders_take_the_solver_that_can():
    net = SNNWrapper(Mlp(), "fdeint", alpha=[0.3, 0.7], alpha_mode="multiterm", method="l1")
    with pytest.warns(SpikedeWarning, match="'l1' takes one order"):
        out = net(*sample(dtype=torch.float32))
    assert torch.equal(out, net(*sample(dtype=torch.float32), method="gl"))


# -- neurons ----------------------------------------------------------------------------------------


def test_an_implicit_step_over_the_jump_of_a_rate_says_so():
    """v_k = v_{k-1} + (f_{k-1} + f_k) / 2, f = (1.3 - v - s) / 2, s = [v >= 0.7]: by hand, at alpha = 1.

    v_1 = 0.52. The next step has no solution: 0.832 without the spike, 0.632 with it. It takes f_1 twice, and
    v_2 = 0.91 fires; v_3 = 0.944 solves its equation with the spike, and fires again.
    """
    net = SNNWrapper(nn.Sequential(LIFNeuron(tau=2.0)).double(), "fdeint", alpha=1.0, method="trap")
    x = torch.full((4, 1, 1), 1.3, dtype=torch.float64)
    with pytest.warns(SpikedeWarning, match="or their rate jumps where they fire"):
        spikes = net(x, torch.arange(4.0, dtype=torch.float64))
    assert spikes.flatten().tolist() == [0.0, 0.0, 1.0, 1.0]  # each at the potential before its step


@pytest.mark.filterwarnings("ignore:an implicit step has no solution")
@pytest.mark.parametrize("method", ["gl", "abm", "trap"])
def test_a_neuron_of_your_own(method):
    x, times = sample()
    kind = QuadraticNeuron
    if method == "trap":  # an implicit step is solved for each element alone
        net = SNNWrapper(Mlp(kind(tau=2.0)).double(), "fdeint", method=method)
        with pytest.raises(OptionError, match="QuadraticNeuron has not said"):
            net(x, times)
        kind = type("Quadratic", (QuadraticNeuron,), {"elementwise": True})
    net = SNNWrapper(Mlp(kind(tau=2.0)).double(), "fdeint", alpha=0.6, method=method)
    out = net(x, times)
    assert 0.02 < out.mean() < 0.9
    if method == "gl":
        expected = whole_network(net.base, "gl", [0.6, 0.6], x, 0.1)
        assert torch.equal(out, expected)
        for found, known in zip(gradients(out, x, net), gradients(expected, x, net), strict=True):
            torch.testing.assert_close(found, known, rtol=1e-8, atol=1e-8 * known.abs().max().item())


def test_saying_that_a_neuron_is_elementwise_changes_nothing_but_the_speed():
    class Fast(QuadraticNeuron):
        elementwise = True

    assert QuadraticNeuron().as_elementwise() is None
    x, times = sample()
    slow = SNNWrapper(Mlp(QuadraticNeuron(2.0, tau_learnable=True)).double(), "fdeint", alpha=0.6)
    fast = SNNWrapper(Mlp(Fast(2.0, tau_learnable=True)).double(), "fdeint", alpha=0.6)
    x = (0.2 * x.detach()).requires_grad_()  # a stronger drive, and -v^2 runs away
    assert fast.base.lif1.as_elementwise() is not None
    assert torch.equal(fast(x, times), slow(x, times))
    for a, b in zip(gradients(fast(x, times), x, fast), gradients(slow(x, times), x, slow), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * b.abs().max().item())


def test_a_subclass_with_another_forward_is_not_taken_for_its_parent():
    class Doubled(LIFNeuron):
        def forward(self, v_mem, current_input):
            return super().forward(v_mem, 2 * current_input)

    class Hard(HardResetLIFNeuron):
        def forward(self, v_mem, current_input):
            return super().forward(v_mem, 2 * current_input)

    assert Doubled().as_elementwise() is None and Hard().as_elementwise() is None
    x, times = sample()
    net = SNNWrapper(Mlp(Doubled(tau=2.0)).double(), "fdeint", alpha=0.6)
    assert torch.equal(net(x, times), whole_network(net.base, "gl", [0.6, 0.6], x, 0.1))


def test_tau_starts_where_it_was_set_and_learns():
    x, times = sample()
    fixed = SNNWrapper(Mlp(LIFNeuron(tau=2.0)).double(), "fdeint", alpha=0.6)
    net = SNNWrapper(Mlp(LIFNeuron(tau=2.0, tau_learnable=True)).double(), "fdeint", alpha=0.6)
    assert net.base.lif1.tau.item() == 2.0
    assert torch.equal(net(x, times), fixed(x, times))
    expected = whole_network(net.base, "gl", [0.6, 0.6], x, 0.1)
    found, known = gradients(net(x, times), x, net), gradients(expected, x, net)
    names = ["x", *(name for name, _ in net.base.named_parameters())]
    for name, a, b in zip(names, found, known, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * b.abs().max().item(), msg=name)
    assert known[names.index("lif1.tau_param")].abs() > 0


@pytest.mark.parametrize(
    "surrogate", ["arctan", "arctan_surrogate", "sigmoid", "piecewise_linear", "gaussian", "noisy"]
)
def test_surrogates_by_short_and_long_name(surrogate):
    net = SNNWrapper(Mlp(LIFNeuron(2.0, surrogate_opt=surrogate, surrogate_grad_scale=1.0)), "fdeint")
    x, times = sample(dtype=torch.float32)
    net(x, times).sum().backward()
    assert x.grad.abs().sum() > 0
    with pytest.raises(UnknownNameError, match="did you mean 'arctan'"):
        LIFNeuron(surrogate_opt="arctann")


@pytest.mark.parametrize("mode", ["meanfield", "soft_noisy", "hard_st", "concrete", "hard_concrete"])
def test_noisy_thresholds(mode):
    net = SNNWrapper(Mlp(NoisyLIFNeuron(tau=2.0, train_spike_mode=mode)), "fdeint", alpha=0.8)
    x, times = sample(dtype=torch.float32)
    net(x, times).sum().backward()
    assert x.grad.abs().sum() > 0
    net.eval()
    assert torch.equal(net(x, times), net(x, times))
    with pytest.raises(UnknownNameError, match="did you mean 'soft_noisy'"):
        NoisyLIFNeuron(train_spike_mode="softnoisy")


def test_a_hard_reset_draws_the_potential_to_rest():
    neuron = HardResetLIFNeuron(tau=1.0, reset_strength=5.0)
    v = torch.tensor([0.5, 2.0])
    rate, spike = neuron(v, torch.tensor([1.0, 1.0]))
    assert spike.tolist() == [0.0, 1.0]
    assert rate.tolist() == [0.5, 1.0 - 2.0 - 10.0]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [({"tau": 0.0}, OptionError), ({"tau": "2"}, OptionTypeError), ({"threshold": math.inf}, OptionError),
     ({"surrogate_grad_scale": -1.0}, OptionError), ({"tau_learnable": 1}, OptionTypeError)],
)  # fmt: skip
def test_neurons_that_cannot_be(arguments, error):
    with pytest.raises(error):
        LIFNeuron(**arguments)


def test_a_neuron_called_outside_says_how_to_call_it():
    with pytest.raises(StateError, match=r"SNNWrapper\(model, ...\)"):
        LIFNeuron()(torch.rand(3))


def test_a_neuron_that_returns_something_else():
    class Wrong(BaseNeuron):
        def forward(self, v_mem, current_input):
            return v_mem

    with pytest.raises(OptionError, match=r"Wrong.forward must return \(dv_dt, spike\)"):
        SNNWrapper(Mlp(Wrong()), "fdeint")(*sample(dtype=torch.float32))


# -- models -----------------------------------------------------------------------------------------


class Skipping(nn.Module):
    """Skip connection, control flow, a neuron used twice, several outputs, batch norm and dropout."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.lif = LIFNeuron(tau=2.0)
        self.fc = nn.Linear(4 * 16, 5)
        self.depth = 2

    def forward(self, x):
        current = self.norm(self.conv(x))
        for _ in range(self.depth):
            current = current + self.drop(self.lif(current))
        if current.shape[0] > 0:
            scores = self.fc(current.flatten(1))
        return {"scores": scores, "maps": (current, None)}


def test_models_are_called_as_they_are():
    net = SNNWrapper(Skipping(), "fdeint", alpha=0.7)
    x = torch.randn(6, 2, 1, 4, 4)
    out = net(x, torch.arange(6.0))
    assert out["scores"].shape == (6, 2, 5) and out["maps"][0].shape == (6, 2, 4, 4, 4)
    assert out["maps"][1] is None
    assert net.neuron_names == ["lif"]
    assert int(net.base.norm.num_batches_tracked) == 1  # statistics over T * B, once
    net.eval()
    whole, half = net(x, torch.arange(6.0)), net(x[:3], torch.arange(3.0))
    torch.testing.assert_close(whole["scores"][:3], half["scores"])  # no step knows of a later one


@pytest.mark.parametrize("dropout", ["step", "sequence"])
def test_dropout_masks(dropout):
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.lif = nn.Dropout(0.5), LIFNeuron()

        def forward(self, x):
            dropped = self.drop(x)
            self.lif(dropped)
            return dropped

    net = SNNWrapper(Dropping(), "fdeint", dropout=dropout)
    out = net(torch.ones(30, 2, 8), range(30))
    assert set(out.unique().tolist()) == {0.0, 2.0}
    assert bool((out == out[0]).all()) == (dropout == "sequence")
    assert not net.base.drop._forward_hooks
    assert torch.equal(net.eval()(torch.ones(3, 2, 8), range(3)), torch.ones(3, 2, 8))


def test_a_layer_that_loses_the_batch_is_named():
    class Losing(nn.Module):
        def __init__(self):
            super().__init__()
            self.lif = LIFNeuron()

        def forward(self, x):
            return self.lif(x.mean(0, keepdim=True))

    with pytest.raises(OptionError, match="keep the batch in dimension 0"):
        SNNWrapper(Losing(), "fdeint", time="fold")(torch.rand(3, 2, 4), range(3))
    assert SNNWrapper(Losing(), "fdeint", time="step")(torch.rand(3, 2, 4), range(3)).shape == (3, 1, 4)


def test_options_of_a_call_override_those_of_the_model():
    x, times = sample()
    net = SNNWrapper(Mlp().double(), "fdeint", alpha=0.5, method="l1", options={"memory": 3})
    direct = SNNWrapper(net.base, "fdeint", alpha=0.5)
    assert torch.equal(net(x, times), direct(x, times, method="l1", options={"memory": 3}))
    assert torch.equal(net(x, times, method="gl", options={"memory": -1}), direct(x, times))
    assert torch.equal(
        SNNWrapper(net.base, alpha=0.5, method="gl", memory=3)(x, times),
        direct(x, times, options={"memory": 3}),
    )
    soe = direct(x, times, options={"memory": "soe"})
    assert torch.equal(soe, direct(x, times))


def test_one_more_time_is_the_end_of_the_last_step():
    x, times = sample()
    net = SNNWrapper(Mlp().double(), "fdeint")
    assert torch.equal(net(x, torch.cat([times, times[-1:] + 0.1])), net(x, times))


def test_copies_checkpoints_and_precision():
    x, times = sample(dtype=torch.float32)
    net = SNNWrapper(Mlp(), "fdeint", alpha=0.6, learn_alpha=True)
    net(x, times).sum().backward()
    again = copy.deepcopy(net)
    assert torch.equal(again(x, times), net(x, times))
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    fresh = SNNWrapper(Mlp(), "fdeint", alpha=0.9, learn_alpha=True)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh(x, times), net(x, times))
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x, times), net(x, times))
    with torch.autocast("cpu", torch.bfloat16):
        half = net(x, times)
    assert half.isfinite().all() and (half.float() - net(x, times)).abs().mean() < 0.1


def test_the_adjoint_gives_the_same_and_keeps_less():
    x, times = sample()
    direct = SNNWrapper(Mlp().double(), "fdeint", alpha=0.6, learn_alpha=True)
    adjoint = SNNWrapper(direct.base, "fdeint_adjoint", alpha=0.6, learn_alpha=True)
    out, expected = adjoint(x, times), direct(x, times)
    assert torch.equal(out, expected)
    for a, b in zip(gradients(out, x, adjoint), gradients(expected, x, direct), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * b.abs().max().item())
    (by_alpha,) = torch.autograd.grad(adjoint(x, times).sum(), adjoint.orders[0].alpha)
    (known,) = torch.autograd.grad(direct(x, times).sum(), direct.orders[0].alpha)
    torch.testing.assert_close(by_alpha, known, rtol=1e-4, atol=1e-6)
    with pytest.raises(OptionError, match="rates twice a step"):
        adjoint(x, times, method="abm")


@pytest.mark.parametrize("integrator", ["fdeint", "odeint", "fdeint_adjoint"])
def test_compiles_for_any_length_and_step(integrator):
    """The model between its neurons is compiled; another length or step neither fails nor changes a spike."""
    x, _ = sample(steps=20, dtype=torch.float32)
    net = SNNWrapper(Mlp(), integrator, alpha=0.6, method="euler" if integrator == "odeint" else "gl")
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(net, backend=count)
    for steps, h in ((12, 1.0), (12, 0.1), (12, 0.02), (6, 1.0), (20, 0.3), (12, 1.0)):
        times = h * torch.arange(steps)
        expected, out = net(x[:steps], times), compiled(x[:steps], times)
        assert torch.equal(out, expected)
        (a,) = torch.autograd.grad(out.sum(), net.base.fc1.weight)
        (b,) = torch.autograd.grad(expected.sum(), net.base.fc1.weight)
        assert torch.equal(a, b)
    if integrator != "fdeint_adjoint":
        assert len(graphs) >= 2  # the two linear layers, which a neuron stands between
    else:
        assert not graphs


@pytest.mark.slow
def test_compiles_with_the_default_backend():
    x, times = sample(dtype=torch.float32)
    net = SNNWrapper(Mlp(), "fdeint", alpha=0.6)
    torch.testing.assert_close(torch.compile(net)(x, times), net(x, times))
