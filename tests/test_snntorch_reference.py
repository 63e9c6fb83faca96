"""The fractional snnTorch neurons against their equations, written out in plain torch."""

from __future__ import annotations

import pytest
import torch

snn = pytest.importorskip("snntorch")

from snntorch import surrogate
from snntorch_cases import MECHANISMS, build, inputs, loss, run

from spikede_plugins.conversion import convert_to_fractional
from spikede_plugins.orders import MultiTerm, PerChannel

F64 = torch.float64
SPIKE = surrogate.atan()


def gl_weights(alpha, n):
    """Grünwald-Letnikov: w_0 = 1, w_m = (1 - (1 + a) / m) w_{m-1}."""
    weights = [torch.ones_like(alpha)]
    for m in range(1, n + 1):
        weights.append((1 - (1 + alpha) / m) * weights[-1])
    return weights


class Past:
    """u_k = gain rate - sum_m w_m u_{k-m}, with every state kept in a list."""

    def __init__(self, start, alpha, h=1.0, window=None):
        self.start, self.alpha, self.h, self.window, self.us = start, alpha, h, window, []

    def step(self, rate, jump):
        """The next potential: ``rate`` after an impulse ``jump`` at this step."""
        k = len(self.us)
        weights = gl_weights(self.alpha, k)
        u = self.h**self.alpha * rate + jump
        for m in range(1, k + 1):
            if self.window is None or m <= self.window:
                u = u - weights[m] * self.us[-m]
        return self.start + u

    def carry(self, v):
        self.us.append(v - self.start)


def leaky(x, mem, alpha, beta, threshold, mechanism, delay, graded=1.0, h=1.0, window=None):
    past, out = Past(mem, alpha, h, window), []
    for xk in x:
        old = (SPIKE(mem - threshold)).detach()
        base = (1 - old) * mem if mechanism == "zero" else mem
        charged = past.step(beta * base + xk - base, base - mem)
        if mechanism == "subtract":
            charged = charged - old * threshold
        spike = SPIKE(charged - threshold) * graded
        mem = charged
        if not delay:
            due = spike / graded - old
            if mechanism == "subtract":
                mem = mem - due * threshold
            elif mechanism == "zero":
                mem = mem - due * mem
        past.carry(mem)
        out += [spike, mem]
    return out


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, check_dtype=False)


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("delay", [True, False])
@pytest.mark.parametrize("h", [1.0, 0.5])
def test_leaky_values_and_gradients(mechanism, delay, h):
    x = inputs(10, F64)
    mem = (torch.randn(2, 4, dtype=F64, generator=torch.Generator().manual_seed(0)) * 0.5).requires_grad_()
    native = snn.Leaky(
        0.85, learn_beta=True, learn_threshold=True, reset_mechanism=mechanism, reset_delay=delay
    ).double()
    made = convert_to_fractional(native, alpha=0.6, learn_alpha=True, step_size=h)
    ours = [x, mem, made.fractional.order.alpha, made.beta, made.threshold]
    theirs = [x, mem, *(p.detach().clone().requires_grad_() for p in ours[2:])]
    found, _ = run(made, x, (mem,))
    expected = leaky(x, mem, *theirs[2:], mechanism, delay, h=h)
    assert torch.stack(expected[::2]).sum() > 5
    close(found, expected)
    close(torch.autograd.grad(loss(found), ours), torch.autograd.grad(loss(expected), theirs))


@pytest.mark.parametrize("window", [1, 3])
def test_window(window):
    x = inputs(10, F64)
    made = convert_to_fractional(snn.Leaky(0.85).double(), alpha=0.6, memory=window)
    zero, alpha = torch.zeros(2, 4, dtype=F64), torch.tensor(0.6, dtype=F64)
    expected = leaky(x, zero, alpha, made.beta, 1.0, "subtract", True, window=window)
    close(run(made, x)[0], expected)


def test_lapicque_zero_reset_gives_exact_zeros():
    x = inputs(12, F64)
    native = snn.Lapicque(beta=0.6, threshold=0.5, reset_mechanism="zero").double()
    made = convert_to_fractional(native, alpha=0.6)
    found, _ = run(made, x)
    mem = torch.zeros(2, 4, dtype=F64)
    past, expected = Past(mem, torch.tensor(0.6, dtype=F64)), []
    decay = 1 - made.time_step / (made.R * made.C)
    for xk in x:
        old = SPIKE(mem - 0.5).detach()
        charged = past.step(xk / made.C * made.time_step + decay * mem - mem, 0.0)
        mem = charged * (1 - old)
        past.carry(mem)
        expected += [SPIKE(mem - 0.5), mem]
    close(found, expected)
    fired = torch.stack(found[::2])[:-1] != 0
    assert fired.any()
    assert (torch.stack(found[1::2])[1:][fired] == 0).all()


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_synaptic(mechanism):
    x = inputs(10, F64)
    made = convert_to_fractional(build("Synaptic", mechanism=mechanism).double(), alpha=0.7)
    zero = torch.zeros(2, 4, dtype=F64)
    past, syn, mem, expected = Past(zero, torch.tensor(0.7, dtype=F64)), zero, zero, []
    for xk in x:
        old = SPIKE(mem - 1).detach()
        syn = made.alpha * syn + xk
        mem = past.step(made.beta * mem + syn - mem, 0.0)
        if mechanism == "subtract":
            mem = mem - old
        elif mechanism == "zero":
            mem = mem * (1 - old)
        past.carry(mem)
        expected += [SPIKE(mem - 1), syn, mem]
    close(run(made, x)[0], expected)


def test_alpha_neuron_relaxes_to_its_currents():
    x = inputs(10, F64)
    made = convert_to_fractional(build("Alpha", mechanism="none").double(), alpha=0.7)
    a, b = made.alpha, made.beta
    tau = torch.log(a) / (torch.log(b) - torch.log(a)) + 1
    zero = torch.zeros(2, 4, dtype=F64)
    past, exc, inh, mem, expected = Past(zero, torch.tensor(0.7, dtype=F64)), zero, zero, zero, []
    for xk in x:
        exc, inh = a * exc + xk, b * inh - xk
        mem = past.step(tau * (exc + inh) - mem, 0.0)
        past.carry(mem)
        expected += [SPIKE(mem - 1), exc, inh, mem]
    close(run(made, x)[0], expected)


def test_recurrent_leaky():
    x = inputs(10, F64)
    made = convert_to_fractional(build("RLeakyOne").double(), alpha=0.7)
    zero = torch.zeros(2, 4, dtype=F64)
    past, spike, mem, expected = Past(zero, torch.tensor(0.7, dtype=F64)), zero, zero, []
    for xk in x:
        old = SPIKE(mem - 1).detach()
        mem = past.step(made.beta * mem + xk + made.V * spike - mem, 0.0) - old
        past.carry(mem)
        spike = SPIKE(mem - 1)
        expected += [spike, mem]
    close(run(made, x)[0], expected)


def test_per_channel_is_each_channel_alone():
    x = inputs(8, F64)
    orders = [0.3, 0.5, 0.8, 1.0]
    made = convert_to_fractional(snn.Leaky(0.9).double(), alpha=PerChannel(orders), learn_alpha=True)
    found, _ = run(made, x)
    for c, order in enumerate(orders):
        alone = convert_to_fractional(snn.Leaky(0.9).double(), alpha=order, learn_alpha=True)
        expected, _ = run(alone, x[..., c : c + 1])
        close([f[..., c : c + 1] for f in found], expected)
    loss(found).backward()
    assert made.fractional.order.alpha.grad.abs().min() > 0


@pytest.mark.parametrize("method", ["gl", "l1", "pred", "abm", "trap"])
@pytest.mark.parametrize("name", ["Leaky", "Synaptic", "Alpha", "RLeakyOne", "Lapicque"])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_every_solver_runs_and_trains(method, name, mechanism):
    x = inputs(6, F64)
    native = build(name, mechanism=mechanism).double()
    made = convert_to_fractional(native, alpha=0.6, method=method, learn_alpha=True)
    found, _ = run(made, x)
    gradient, by_x = torch.autograd.grad(loss(found), [made.fractional.order.alpha, x])
    assert torch.isfinite(by_x).all()
    assert gradient.isfinite() and gradient != 0


def test_multi_term():
    terms = MultiTerm([0.9, 0.4], [1.0, 0.5], learn_coefficients=True)
    made = convert_to_fractional(snn.Leaky(0.9), alpha=terms)
    loss(run(made, inputs())[0]).backward()
    assert made.fractional.order.coefficients.grad.abs().min() > 0


def test_implicit_zero_reset_is_an_impulse():
    """``v = known + jump + gain (beta - 1) v``: the reset enters as a jump, not through the rate."""
    second = {}
    for mechanism in ("zero", "none"):
        native = snn.Leaky(0.8, reset_mechanism=mechanism).double()
        made = convert_to_fractional(native, alpha=0.6, method="trap")
        _, first = made(torch.full((1, 1), 3.0, dtype=F64), torch.zeros(1, 1, dtype=F64))
        _, second[mechanism] = made(torch.full((1, 1), 3.0, dtype=F64), first)
    gain = made.fractional.kernel(1, first).corrector_gain
    expected = -first / (1 + gain * (1 - made.beta))
    assert first > 1
    torch.testing.assert_close(second["zero"] - second["none"], expected)


@pytest.mark.parametrize("delay", [True, False])
def test_memory_reset_by_spikes(delay):
    """After its reset a neuron goes on as a fresh one that starts from the potential it was reset to."""
    x = inputs(14, F64)
    options = {"alpha": 0.6, "memory_reset": "spike"}
    native = snn.Leaky(0.9, threshold=0.8, reset_delay=delay).double()
    found, _ = run(convert_to_fractional(native, **options), x)
    spikes, mems = torch.stack(found[::2]), torch.stack(found[1::2])
    checked = 0
    for b in range(2):
        for n in range(4):
            fired = spikes[:, b, n].nonzero().flatten()
            for first, second in zip(fired, [*fired[1:], torch.tensor(len(x))], strict=True):
                begin = int(first) + (1 if delay else 0)  # the step in which the reset acted
                if begin >= int(second) - 1:
                    continue
                part = x[begin + 1 : int(second), b, n].reshape(-1, 1, 1)
                start = mems[begin, b, n].reshape(1, 1)
                alone, _ = run(convert_to_fractional(native, alpha=0.6), part, (start,))
                expected = torch.stack(alone[1::2]).flatten()
                torch.testing.assert_close(mems[begin + 1 : int(second), b, n], expected)
                checked += 1
    assert checked > 3


def test_nan_propagates():
    x = inputs(6).detach().clone()
    x[2, 0, 1] = float("nan")
    found, _ = run(convert_to_fractional(snn.Leaky(0.9), alpha=0.6), x)
    mems = torch.stack(found[1::2])
    assert mems[2:, 0, 1].isnan().all()
    assert mems[:, 1].isfinite().all()
