"""Coming from spikeDE: a test for each row of docs/coming-from-spikede.md, and for what its scripts do.

What spikeDE computes is written out once more in plain numbers (its package is not needed here).
"""

from __future__ import annotations

import itertools
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import spikede_plugins
from spikede_plugins import (
    ClassificationHead,
    HardResetLIFNeuron,
    LIFNeuron,
    SNNWrapper,
    SpikedeError,
    SpikedeWarning,
    convert_to_fractional,
    fdeint,
    interpolate,
)
from spikede_plugins.errors import OptionError, OrderError, UnknownNameError
from spikede_plugins.from_spikede import ATTRIBUTES, METHODS, NAMES

PAGE = (Path(__file__).parent.parent / "docs" / "coming-from-spikede.md").read_text(encoding="utf-8")
H, TAU = 0.5, 2.0
CURRENT = [1.5 + 4.0 * math.sin(0.7 * k) ** 2 for k in range(30)]


def rate_of(v, current, tau=TAU, threshold=1.0):
    """``(dv/dt, spike)`` of spikeDE's LIFNeuron."""
    drive = (current - v) / tau
    fired = float(v + drive >= threshold)
    return drive - fired * threshold / tau, fired


def gl_weights(alpha, n):
    w = [1.0]
    for m in range(1, n + 1):
        w.append((1 - (1 + alpha) / m) * w[-1])
    return w


def l1_weights(alpha, n):
    b = [(m + 1) ** (1 - alpha) - m ** (1 - alpha) for m in range(n + 1)]
    return [1.0, *(b[m] - b[m - 1] for m in range(1, n + 1))]


def there(method, alpha, memory=None, rate=rate_of, current=CURRENT, h=H):
    """Potentials and spikes of one neuron as spikeDE integrates it, in float64."""
    v, states, rates, potentials, spikes = 0.0, [], [], [], []
    gain = h**alpha * (math.gamma(2 - alpha) if method == "l1" else 1.0)
    w = (l1_weights if method == "l1" else gl_weights)(alpha, len(current))
    for k, i in enumerate(current):
        f, fired = rate(v, i)
        potentials.append(v)
        spikes.append(fired)
        rates.append(f)
        first = 0 if memory is None else max(0, k + 1 - memory)
        if method == "pred":
            scale = h**alpha / math.gamma(1 + alpha)
            v = scale * sum(((k + 1 - j) ** alpha - (k - j) ** alpha) * rates[j] for j in range(first, k + 1))
        else:
            v = gain * f - sum(w[k - j] * states[j] for j in range(first, k))
        states.append(v)
    return potentials, spikes


def here(net, current=CURRENT, h=H, **options):
    """Potentials and spikes of one neuron here."""
    x = torch.tensor(current, dtype=torch.float64).reshape(-1, 1, 1)
    times = h * torch.arange(len(current), dtype=torch.float64)
    out, potentials = net(x, times, return_potentials=True, options=options or None)
    (v,) = potentials.values()
    return v.flatten().tolist(), out.flatten().tolist()


def one(method="gl", alpha=0.6, neuron=None, **settings):
    return SNNWrapper(neuron or LIFNeuron(TAU), "fdeint", alpha=alpha, method=method, **settings)


def close(a, b):
    return all(math.isclose(x, y, rel_tol=1e-9, abs_tol=1e-9) for x, y in zip(a, b, strict=True))


def test_every_row_of_the_page_has_its_test():
    rows = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    tests = [name.removeprefix("test_row_") for name in globals() if name.startswith("test_row_")]
    assert sorted(rows) == sorted(tests)
    assert len(rows) == len(set(rows))


def test_code_of_the_page_runs():
    scope: dict = {}
    for code in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        exec(compile(code, "coming-from-spikede.md", "exec"), scope)


@pytest.mark.parametrize(
    ("method", "alpha"),
    [("gl", 0.3), ("gl", 0.7), ("gl", 1.0), ("l1", 0.3), ("l1", 0.7), ("pred", 0.3), ("pred", 1.0)],
)
def test_what_agrees(method, alpha):
    potentials, spikes = there(method, alpha)
    assert 0 < sum(spikes) < len(spikes)
    v, s = here(one(method, alpha), memory=-1)
    assert close(v, potentials) and s == spikes


# -- solvers and memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gl", "l1"])
def test_row_memory_of_gl_and_l1(method):
    for n in (2, 3, 6):
        potentials, _ = there(method, 0.6, memory=n)
        assert close(here(one(method), memory=n - 1)[0], potentials)
        assert not close(here(one(method), memory=n)[0], potentials)


def test_row_memory_of_pred():
    potentials, _ = there("pred", 0.6, memory=4)
    for n in (3, 4, 5):
        assert not close(here(one("pred"), memory=n)[0], potentials)
    assert close(here(one("pred"), memory="full")[0], there("pred", 0.6)[0])


def test_row_memory_by_default():
    current = CURRENT * 7
    default, full = here(one(), current)[0], here(one(), current, memory=-1)[0]
    assert default[:128] == full[:128]
    assert default != full and max(abs(a - b) for a, b in zip(default, full, strict=True)) < 1e-5


def test_row_trap_is_l1():
    """Its trapezoidal weights A_{j,k+1}, with the lag that its loop gives them."""
    alpha, v, states, potentials = 0.6, 0.0, [], []
    for k, i in enumerate(CURRENT):
        potentials.append(v)
        f, _ = rate_of(v, i)
        total = 0.0
        for j in range(k):
            lag = k - (j + 1)  # the entry behind that of j
            total += states[j] * (
                (lag + 2) ** (1 - alpha) + lag ** (1 - alpha) - 2 * (lag + 1) ** (1 - alpha)
            )
        v = H**alpha * math.gamma(2 - alpha) * f - total
        states.append(v)
    assert close(here(one("l1"), memory=-1)[0], potentials)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpikedeWarning)  # where the rate jumps
        assert not close(here(one("trap"), memory=-1)[0], potentials)


def test_row_l1_at_order_one():
    """There w_1 = 2^0 - 2 * 1^0 + 0^0 = 0, which is -1 in the limit: nothing is left of the state."""
    assert l1_weights(1.0, 3) == [1.0, 0.0, 0.0, 0.0]
    euler = there("gl", 1.0)[0]
    for method in ("l1", "gl"):
        assert close(here(one(method, 1.0), memory=-1)[0], euler)
    assert not close(there("l1", 1.0)[0], euler)


def test_row_gradient_of_alpha():
    """After one step v = h^a Gamma(2 - a) f; there only h^a has a derivative."""
    net = one("l1", neuron=LIFNeuron(TAU, threshold=99.0), learn_alpha=True)
    x = torch.full((2, 1, 1), 3.0)
    _, potentials = net(x, H * torch.arange(2.0), return_potentials=True)
    (v,) = potentials.values()
    v[1].sum().backward()

    def value(a):
        return H**a * math.gamma(2 - a) * 3.0 / TAU

    ours, theirs = (value(0.6 + 1e-5) - value(0.6 - 1e-5)) / 2e-5, math.log(H) * value(0.6)
    assert net.per_layer_alpha_params[0].grad.item() == pytest.approx(ours, rel=1e-4)
    assert abs(ours - theirs) > 0.05


def test_row_several_terms_beside_one_order():
    """The second layer, of one order, takes the method that was asked for; there GL in any case."""
    nets = [
        SNNWrapper(nn.Sequential(LIFNeuron(TAU), LIFNeuron(TAU, 0.3)), "fdeint", alpha=[[0.3, 0.8], 0.6])
        for _ in range(2)
    ]
    x = torch.tensor(CURRENT, dtype=torch.float64).reshape(-1, 1, 1)
    times = H * torch.arange(len(CURRENT), dtype=torch.float64)
    out = {}
    for net, method in zip(nets, ("gl", "l1"), strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SpikedeWarning)  # it says so
            out[method] = net(x, times, method=method, options={"memory": -1}, return_potentials=True)[1]
    first = SNNWrapper(LIFNeuron(TAU), "fdeint", alpha=[0.3, 0.8], alpha_mode="multiterm", method="gl")
    spikes = here(first, memory=-1)[1]
    for method in ("gl", "l1"):
        want = there(method, 0.6, current=spikes, rate=lambda v, i: rate_of(v, i, threshold=0.3))[0]
        assert close(out[method]["1"].flatten().tolist(), want)


def test_row_coefficient_of_one_order():
    theirs = there("gl", 0.6)[0]
    assert close(here(one(), memory=-1)[0], theirs)
    counted = here(one(multi_coefficient=[2.0]), memory=-1)[0]
    assert counted[1] == pytest.approx(theirs[1] / 2.0)


def test_row_flat_list_of_orders():
    base = nn.Sequential(LIFNeuron(), LIFNeuron())
    for alpha in ([0.3, 0.7], [0.3, 0.5, 0.7]):
        with pytest.raises(OrderError, match='alpha_mode="multiterm"'):
            SNNWrapper(base, "fdeint", alpha=alpha)
    assert SNNWrapper(base, "fdeint", alpha=[0.3, 0.7], alpha_mode="per_layer")._alpha_case == "A"
    assert SNNWrapper(base, "fdeint", alpha=[0.3, 0.7], alpha_mode="multiterm")._alpha_case == "B"


def test_row_orders_out_of_range():
    for alpha in (0.0, 1.2):
        with pytest.raises(OrderError):
            SNNWrapper(LIFNeuron(), "fdeint", alpha=alpha)


# -- neurons --------------------------------------------------------------------------------------


def test_row_learned_tau_starts_at_twice_tau():
    theirs = 3.0 * (1.0 + math.exp(0.0))
    assert LIFNeuron(tau=3.0, tau_learnable=True).get_tau().item() == 3.0
    assert LIFNeuron(tau=2 * 3.0, tau_learnable=True).get_tau().item() == pytest.approx(theirs)


def test_row_hard_reset_never_resets():
    def rate(v, i):
        return (i - v) / TAU, float(v >= 1.0)

    potentials, spikes = there("gl", 0.6, rate=rate)
    without = one(neuron=HardResetLIFNeuron(TAU, reset_strength=1e-30))
    v, s = here(without, memory=-1)
    assert close(v, potentials) and s == spikes
    assert not close(here(one(neuron=HardResetLIFNeuron(TAU, reset_strength=2.0)), memory=-1)[0], potentials)


def test_row_spikes_are_float32():
    for dtype in (torch.float32, torch.float64):
        assert one()(torch.ones(3, 1, 1, dtype=dtype), torch.arange(3.0)).dtype == dtype


def test_row_surrogate_names():
    z = 0.3
    slopes = {
        "sigmoid": 5 * (lambda s: s * (1 - s))(1 / (1 + math.exp(-5 * z))),
        "arctan": 5 / 2 / (1 + (math.pi / 2 * 5 * z) ** 2),
        "piecewise_linear": 1 / (2 * 5),
        "linear": 1 / (2 * 5),
        "gaussian": math.exp(-(z**2) / (2 * 25)) / (5 * math.sqrt(2 * math.pi)),
    }
    for name, slope in slopes.items():
        for written in (name, f"{name}_surrogate"):
            at = torch.tensor(z, dtype=torch.float64, requires_grad=True)
            LIFNeuron(surrogate_opt=written).surrogate_f(at, 5.0).backward()
            assert at.grad.item() == pytest.approx(slope), written


@pytest.mark.parametrize(("memory", "theirs"), [("full", None), (3, 3)])
def test_row_names_that_update_themselves(memory, theirs):
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    lif = neuron.LIFNode(tau=TAU, v_reset=None, detach_reset=True, step_mode="m").double()
    x = torch.tensor(CURRENT, dtype=torch.float64).reshape(-1, 1)
    # LIFNeuronFDE: all states, or the newest `memory`, after the reset
    w, v, states, spikes = gl_weights(0.6, len(CURRENT)), 0.0, [], []
    for k, i in enumerate(CURRENT):
        first = 0 if theirs is None else max(0, k - theirs)
        charged = (i - v) / TAU - sum(w[k - j] * states[j] for j in range(first, k))
        spikes.append(float(charged >= 1.0))
        v = charged - spikes[-1]
        states.append(v)
    net = convert_to_fractional(lif, alpha=0.6, method="gl", step_size=1.0, memory=memory)
    assert net(x).flatten().tolist() == spikes
    # LIFNeuron_OrderOne
    v, spikes = 0.0, []
    for i in CURRENT:
        v += (i - v) / TAU
        spikes.append(float(v >= 1.0))
        v -= spikes[-1]
    net = SNNWrapper(lif, "odeint", method="euler")
    assert here(net, h=1.0)[1] == spikes
    for name, ours in (("odeint_mem", 'integrator="odeint"'), ("fdeint_mem", 'integrator="fdeint"')):
        with pytest.raises(UnknownNameError, match=rf"LIFNode.*{ours}"):
            SNNWrapper(LIFNeuron(), name)


# -- integrators ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gl", "pred"])
def test_row_adjoint_output(method):
    """The spikes as a rate, without a leak: y_{k+1} = h^a s_k - sum_m w_m y_{k+1-m}."""
    x = torch.tensor(CURRENT, dtype=torch.float64).reshape(-1, 1, 1)
    times = H * torch.arange(len(CURRENT) + 1, dtype=torch.float64)
    spikes = SNNWrapper(LIFNeuron(TAU), "fdeint_adjoint", alpha=0.6)(x, times, method=method)
    assert spikes.shape == (30, 1, 1)
    listed = spikes.flatten().tolist()
    want = there(method, 0.6, rate=lambda y, s: (s, 0.0), current=[*listed, 0.0])[0][-1]
    got = fdeint(
        lambda t, y: spikes[round(float(t) / H)], torch.zeros(1, 1, dtype=torch.float64), times, alpha=0.6,
        method=method,
    )[-1:]  # fmt: skip
    assert got.item() == pytest.approx(want, rel=1e-9)


def test_row_adjoint_orders():
    base = nn.Sequential(LIFNeuron(TAU), LIFNeuron(TAU, 0.3))
    x = torch.tensor(CURRENT, dtype=torch.float64).reshape(-1, 1, 1)
    times = H * torch.arange(30.0, dtype=torch.float64)
    out = {}
    for alpha in (0.4, 0.8):
        net = SNNWrapper(base, "fdeint_adjoint", alpha=[0.4, alpha], alpha_mode="per_layer")
        out[alpha] = net(x, times, return_potentials=True)[1]
        spikes = there("gl", 0.4)[1]
        want = there("gl", alpha, current=spikes, rate=lambda v, i: rate_of(v, i, threshold=0.3))[0]
        assert close(out[alpha]["1"].flatten().tolist(), want)


@pytest.mark.parametrize("name", METHODS)
def test_row_adjoint_method_names(name):
    net = SNNWrapper(LIFNeuron(TAU), "fdeint_adjoint", alpha=0.6)
    x, times = torch.tensor(CURRENT).reshape(-1, 1, 1), H * torch.arange(30.0)
    ours = {"gl": "gl", "l1": "l1", "trap": "l1", "pred": "pred"}[name[:-2]]
    with pytest.warns(SpikedeWarning, match=rf"method='{name}' is run as method='{ours}'"):
        out = net(x, times, method=name)
    assert torch.equal(out, net(x, times, method=ours))


def test_row_ode_output():
    """There the integral of the spikes: the sum of h s over all steps."""
    x, times = torch.tensor(CURRENT).reshape(-1, 1, 1), H * torch.arange(31.0)
    out = SNNWrapper(LIFNeuron(TAU), "odeint")(x, times, method="euler")
    spikes = there("gl", 1.0)[1]
    assert out.flatten().tolist() == spikes
    assert (H * out).sum(0, keepdim=True).item() == pytest.approx(H * sum(spikes))
    pytest.importorskip("torchdiffeq")
    assert SNNWrapper(LIFNeuron(TAU), "odeint")(x, times, method="rk4").shape == (30, 1, 1)
    assert SNNWrapper(LIFNeuron(TAU), "odeint_adjoint")(x, times).shape == (30, 1, 1)


@pytest.mark.parametrize("integrator", ["fdeint", "fdeint_adjoint", "odeint", "odeint_adjoint"])
def test_row_output_time(integrator):
    if integrator == "odeint_adjoint":
        pytest.importorskip("torchdiffeq")
    x, times = torch.tensor(CURRENT[:8]).reshape(-1, 1, 1), torch.linspace(0, 1, 9)
    net = SNNWrapper(nn.Sequential(LIFNeuron(TAU), nn.Linear(1, 3)), integrator, alpha=0.6)
    whole = net(x, times)
    for given, wanted in ((times, times), (times, times[:8]), (times[:8], times), (times[:8], times[:8])):
        assert torch.equal(net(x, given, output_time=wanted), whole)
    assert torch.equal(net(x, times, output_time=times[[2, 5]]), whole[[2, 5]])
    head = SNNWrapper(
        nn.Sequential(LIFNeuron(TAU), nn.Unflatten(1, (1, 1)), ClassificationHead(1, 3)), integrator
    )
    assert head(x, times, output_time=times).shape == (1, 3)


def test_row_longer_x_time():
    x, times = torch.tensor(CURRENT[:8]).reshape(-1, 1, 1), H * torch.arange(12.0)
    with pytest.raises(OptionError, match="x has 8 time points, but x_time has 12"):
        one()(x, times)
    assert one()(x, times[:8]).flatten().tolist() == there("gl", 0.6)[1][:8]


@pytest.mark.parametrize("integrator", ["fdeint", "fdeint_adjoint"])
@pytest.mark.parametrize("method", ["gl", "l1", "pred", "abm", "trap", "glmulti"])
def test_row_uneven_times(method, integrator):
    x, times = torch.tensor(CURRENT[:4]).reshape(-1, 1, 1), [0.0, 0.5, 0.8, 1.6]
    with pytest.raises(OptionError, match=r"needs a uniform grid.*resample the input"):
        SNNWrapper(LIFNeuron(TAU), integrator, alpha=0.6)(x, times, method=method)
    pytest.importorskip("torchdiffeq")
    v, want = 0.0, []
    for i, h in zip(CURRENT, [0.5, 0.3, 0.8, 0.0], strict=False):
        f, fired = rate_of(v, i)
        want.append(fired)
        v += h * f
    assert SNNWrapper(LIFNeuron(TAU), "odeint")(x, times, method="euler").flatten().tolist() == want


def test_row_unknown_options():
    x, times = torch.tensor(CURRENT[:8]).reshape(-1, 1, 1), H * torch.arange(8.0)
    idle = {"step_size": 1.0, "memory": -1, "glmulti_chunk": 4, "glmulti_detach_conv": False}
    with pytest.warns(SpikedeWarning, match="nothing reads glmulti_chunk, glmulti_detach_conv"):
        out = one()(x, times, options=idle)
    assert torch.equal(out, one()(x, times))
    with pytest.raises(UnknownNameError, match="unknown option 'memori'"):
        one()(x, times, options={"memori": 3})


# -- interpolation --------------------------------------------------------------------------------


def test_row_cubic_interpolation():
    """A straight line through uneven times: there Catmull-Rom leaves it."""
    times = [0.0, 1.0, 2.0, 4.0]
    p = times
    theirs = -0.0625 * p[0] + 0.5625 * p[1] + 0.5625 * p[2] - 0.0625 * p[3]  # halfway between p1 and p2
    assert theirs == 1.4375
    ours = interpolate(torch.tensor(times, dtype=torch.float64), times, 1.5, "cubic").item()
    assert ours == pytest.approx(1.5)


def test_row_akima_interpolation():
    x = [0.0, 1.0, 1.5, 4.0, 3.0, 5.0]
    m = [b - a for a, b in itertools.pairwise(x)]  # chords of times one apart

    def between(d, e):  # halfway between samples 2 and 3
        return x[2] / 2 + x[3] / 2 + (d - e) / 8

    def akima(i):
        f, g = abs(m[i - 1] - m[i - 2]), abs(m[i + 1] - m[i])
        return (g * m[i - 1] + f * m[i]) / (f + g)

    def theirs(a, b, c, first):  # the slope at an end of the interval, of three chords in a row
        f, g = abs(b - a), abs(c - b)
        return (g * a + f * b) / (f + g) if first else (f * c + g * b) / (f + g)

    ours = interpolate(torch.tensor(x, dtype=torch.float64), list(range(6)), 2.5, "akima").item()
    assert ours == pytest.approx(between(akima(2), akima(3)))
    other = between(theirs(m[0], m[1], m[2], True), theirs(m[1], m[2], m[3], False))
    assert abs(other - ours) > 0.001


def test_row_linear_interpolation():
    """At a sample's own time spikeDE comes from the interval before, at h / (h + 1e-10) of it."""
    x = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    assert interpolate(x, [0.0, 0.001, 0.002], 0.001).item() == 1.0
    assert 0.001 / (0.001 + 1e-10) != 1.0


# -- the model ------------------------------------------------------------------------------------


def test_row_batch_norm():
    torch.manual_seed(0)
    x, times = 3 * torch.rand(6, 4, 2), H * torch.arange(6.0)

    def made(time):
        return SNNWrapper(nn.Sequential(nn.BatchNorm1d(2), LIFNeuron(TAU)), "fdeint", alpha=0.6, time=time)

    stepped, folded = made("step"), made("fold")
    by_step = torch.stack([nn.functional.batch_norm(s, None, None, training=True) for s in x])
    at_once = nn.functional.batch_norm(x.flatten(0, 1), None, None, training=True).unflatten(0, (6, 4))
    lif = SNNWrapper(LIFNeuron(TAU), "fdeint", alpha=0.6)
    for net, current in ((stepped, by_step), (folded, at_once)):
        got, want = (n(i, times, return_potentials=True)[1] for n, i in ((net, x), (lif, current)))
        torch.testing.assert_close(got["1"], want["base"])
    assert not torch.allclose(by_step, at_once)


def test_row_behind_the_last_neuron():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.lif = LIFNeuron(TAU)

        def forward(self, x):
            return self.lif(x).mean(0, keepdim=True)

    x = torch.tensor(CURRENT).reshape(-1, 1, 1) + torch.tensor([[0.0], [1.0]])
    times = H * torch.arange(30.0)
    spikes = one()(x, times)
    assert torch.equal(SNNWrapper(Mean(), "fdeint", alpha=0.6)(x, times), spikes.mean(1, keepdim=True))
    assert spikes.mean(0, keepdim=True).shape == (1, 2, 1)  # theirs: over time, outside of the model


def test_row_input_that_is_not_finite():
    with pytest.raises(OptionError, match="NaN or infinite"):
        one()(torch.tensor([1.0, float("nan")]).reshape(2, 1, 1), torch.arange(2.0))


def test_row_arguments_of_the_constructor():
    x, times = torch.tensor(CURRENT).reshape(-1, 1, 1), H * torch.arange(30.0)
    given = SNNWrapper(LIFNeuron(TAU), "fdeint", alpha=0.6, method="l1", options={"memory": 5})
    called = SNNWrapper(LIFNeuron(TAU), "fdeint", alpha=0.6)
    assert torch.equal(given(x, times), called(x, times, method="l1", options={"memory": 5}))


def test_row_initial_potentials():
    x, times = torch.tensor(CURRENT).reshape(-1, 1, 1), H * torch.arange(30.0)
    assert one()(x, times, return_potentials=True)[1]["base"][0].item() == 0.0
    assert one()(x, times, v0=0.25, return_potentials=True)[1]["base"][0].item() == 0.25


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_row_attributes(name):
    net = one(learn_alpha=True)
    assert not hasattr(net, name)
    with pytest.raises(AttributeError, match=re.escape(ATTRIBUTES[name].split(";")[0])) as caught:
        getattr(net, name).nfe = 0
    assert isinstance(caught.value, SpikedeError)
    with pytest.raises(AttributeError, match="no attribute 'odd'"):
        net.odd  # noqa: B018
    assert net.per_layer_alpha_params[0] is net.orders[0].alpha
    assert [c.tolist() for c in net.per_layer_coefficient_params] == [[1.0]]
    assert net._alpha_case == "A_scalar"


@pytest.mark.parametrize("name", NAMES)
def test_row_absent_names(name):
    assert not hasattr(spikede_plugins, name)
    hint = re.escape(NAMES[name])
    with pytest.raises(AttributeError, match=hint) as caught:
        getattr(spikede_plugins, name)
    assert isinstance(caught.value, SpikedeError)
    with pytest.raises(ImportError, match=hint):
        exec(f"from spikede_plugins import LIFNeuron, {name}")
    with pytest.raises(ImportError, match="cannot import name 'nothing_of_anybody'"):
        exec("from spikede_plugins import nothing_of_anybody")
