"""``SpikingODELayer``: counts, times and potentials against closed forms and fine steps; state; bad input."""

from __future__ import annotations

import copy
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spikede_plugins import (
    FractionalLIFDynamics,
    ODEIFDynamics,
    ODELIFDynamics,
    OptionError,
    OptionTypeError,
    SpikedeError,
    SpikingDynamics,
    SpikingODELayer,
    StateError,
    UnknownNameError,
)
from spikede_plugins.engine import cpu
from spikede_plugins.engine import events as fused

F64 = torch.float64


def layer_of(currents: Tensor, dynamics: SpikingDynamics | None = None, **options) -> SpikingODELayer:
    """Neurons that a constant input of 1 drives with these currents."""
    layer = SpikingODELayer(1, len(currents), dynamics, dtype=currents.dtype, **options)
    layer.weight.data = currents[:, None].clone()
    return layer


def ones(steps: int, dtype=F64) -> Tensor:
    return torch.ones(steps, 1, dtype=dtype)


@pytest.fixture(params=["torch", "fused"])
def engine(request, monkeypatch):
    """Each test with it runs on both engines."""
    if request.param == "torch":
        monkeypatch.setattr(fused, "serves", lambda v: False)
    elif cpu.missing():
        pytest.skip(cpu.missing())
    return request.param


def lif_period(current: Tensor, tau: float = 20.0) -> Tensor:
    """Threshold 1, reset 0, C 1."""
    return tau * torch.log(tau * current / (tau * current - 1.0))


# -- against what is known ------------------------------------------------------------------------


@torch.no_grad()
def test_counts_of_the_analytic_rate(engine):
    """In 1 000 ms; fixed steps of 0.1 ms and event-driven ones that guess their crossings miss them."""
    layer = layer_of(torch.tensor([0.06, 0.1, 0.3, 1.0, 0.05, 0.04, -1.0], dtype=F64))
    assert layer(ones(1), interval=1000.0).tolist() == [[27, 72, 274, 974, 0, 0, 0]]
    layer.reset()
    assert layer(ones(1000)).sum(0).tolist() == [27, 72, 274, 974, 0, 0, 0]


@torch.no_grad()
@pytest.mark.parametrize("refractory", [0.0, 2.5])
def test_every_time_is_that_of_the_closed_form(engine, refractory):
    currents = torch.linspace(0.051, 3.0, 60, dtype=F64)
    layer = layer_of(currents, refractory=refractory)
    counts = layer(ones(1), interval=500.0)[0]
    times, number = layer.spike_times
    period = lif_period(currents)
    expected = period[:, None] + (period + refractory)[:, None] * torch.arange(times.shape[1], dtype=F64)
    fires = expected <= 500.0
    assert torch.equal(counts, fires.sum(1).to(F64)) and torch.equal(number, fires.sum(1))
    assert (times - expected)[fires].abs().max() < 1e-9
    assert torch.isinf(times[~fires]).all()
    last = expected.gather(1, (number - 1)[:, None])[:, 0]
    since = torch.where(number > 0, 500.0 - last - refractory, 500.0)
    v = 20.0 * currents * -torch.expm1(-since.clamp_min(0.0) / 20.0)
    assert (layer.voltage - v).abs().max() < 1e-9


@torch.no_grad()
def test_parameters_for_each_neuron_and_in_any_unit(engine):
    """C dv/dt = -C (v - v_rest) / tau + I in mV."""
    tau = torch.tensor([5.0, 10.0, 30.0], dtype=F64)
    layer = layer_of(torch.tensor([8.0, 6.0, 2.0], dtype=F64), ODELIFDynamics(tau, -65.0, -50.0, -70.0, 2.0))
    layer(ones(1), interval=200.0)
    level = -65.0 + tau * layer.weight[:, 0] / 2.0
    first = tau * torch.log((level + 65.0) / (level + 50.0))
    period = tau * torch.log((level + 70.0) / (level + 50.0))
    times = layer.spike_times.times
    assert torch.allclose(times[:, 0], first, atol=1e-9) and torch.allclose(
        times[:, 1] - times[:, 0], period, atol=1e-9
    )


@torch.no_grad()
def test_integrate_and_fire_counts_the_charge(engine):
    layer = layer_of(torch.tensor([0.25, 0.03125, -1.0], dtype=F64), ODEIFDynamics())
    assert layer(ones(10), interval=8.0).sum(0).tolist() == [20, 2, 0]
    assert layer.spike_times.times[1].tolist()[:2] == [32.0, 64.0]
    assert layer.voltage.tolist() == [0.0, 0.5, -80.0]


@torch.no_grad()
@pytest.mark.parametrize("dynamics", [ODELIFDynamics(), ODEIFDynamics()], ids=["lif", "if"])
def test_random_input_against_steps_of_1e_5(engine, dynamics):
    """Exponential Euler between samples; spikes of the fine grid lie within one of its steps."""
    generator = torch.Generator().manual_seed(3)
    samples = torch.rand(3, 40, generator=generator, dtype=F64) * 0.8 - 0.15
    layer = SpikingODELayer(40, 40, dynamics, dtype=F64, refractory=0.5)
    layer.weight.data = torch.eye(40, dtype=F64)
    h, held, found = 1e-5, np.zeros(40), [[] for _ in range(40)]
    decay = math.exp(-h / 20.0) if isinstance(dynamics, ODELIFDynamics) else 1.0
    gain = 20.0 * (1.0 - decay) if decay < 1.0 else h
    v = np.linspace(0.5, 0.99, 40)
    layer.reset(torch.from_numpy(v))
    counts = layer(samples, interval=0.5)
    for k in range(150_000):
        free = held <= h / 2
        v = np.where(free, decay * v + gain * samples[k // 50_000].numpy(), v)
        held = np.where(free, 0.0, held - h)
        if v.max() >= 1.0:
            for i in np.flatnonzero(v >= 1.0):
                found[i].append((k + 1) * h)
                v[i], held[i] = 0.0, 0.5
    times = layer.spike_times
    assert counts.sum() >= 10 and times.counts.tolist() == [len(each) for each in found]
    for i, each in enumerate(found):
        assert times.times[i, : len(each)].tolist() == pytest.approx(each, abs=5e-5)


@torch.no_grad()
def test_under_a_ramp_a_spike_is_a_unit_of_charge(engine):
    """Integrate-and-fire, threshold 1, reset 0: the charge since the latest spike is 1 at each spike.

    The leaky neuron under a ramp is held against its integrated twin below.
    """
    samples = torch.tensor([0.1, 0.9, -0.4, 0.6], dtype=F64)
    layer = SpikingODELayer(1, 1, ODEIFDynamics(), dtype=F64, interpolation="linear")
    layer.weight.data.fill_(1.0)
    counts = layer(samples[:, None], interval=10.0)

    def charge(t):
        """Of the first sample, which holds, and of the trapezoids behind it."""
        k = min(int(t // 10.0), 3)
        low = samples[max(k - 1, 0)]
        now = low + (samples[k] - low) * (t - 10.0 * k) / 10.0
        whole = sum(10.0 * (samples[max(j - 1, 0)] + samples[j]) / 2.0 for j in range(k))
        return float(whole + (t - 10.0 * k) * (low + now) / 2.0)

    times = layer.spike_times.times[0].tolist()
    assert counts.sum() == len(times) == 9
    spent = 0.0
    for t in times:
        assert charge(t) - spent == pytest.approx(1.0, abs=1e-12)
        spent = charge(t)
    assert float(layer.voltage) == pytest.approx(charge(40.0) - spent, abs=1e-12)


# -- no neuron disturbs another -------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("interpolation", ["hold", "linear"])
def test_spikes_are_the_same_alone_and_beside_10_000_others(engine, interpolation):
    generator = torch.Generator().manual_seed(0)
    currents = torch.rand(10_001, generator=generator, dtype=F64)
    drive = torch.rand(5, 1, generator=generator, dtype=F64) * 2.0
    crowd = layer_of(currents, interpolation=interpolation, refractory=0.3)
    together = crowd(drive, interval=20.0)
    for i in (0, 777, 9_999, 10_000):
        alone = layer_of(currents[i : i + 1], interpolation=interpolation, refractory=0.3)
        assert torch.equal(alone(drive, interval=20.0)[:, 0], together[:, i])
        number = int(alone.spike_times.counts)
        same, other = alone.spike_times.times[0, :number], crowd.spike_times.times[i, :number]
        if engine == "fused":
            assert torch.equal(same, other) and torch.equal(alone.voltage[0], crowd.voltage[i])
        else:  # torch's vector instructions may round otherwise than its scalar ones
            assert (same - other).abs().max() < 1e-11


# -- time in pieces -------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("interpolation", ["hold", "linear"])
@pytest.mark.parametrize("refractory", [0.0, 3.0, math.inf])
def test_pieces_of_a_sequence_make_the_whole(engine, interpolation, refractory):
    x = torch.rand(12, 3, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
    layer = SpikingODELayer(4, 5, dtype=F64, refractory=refractory, interpolation=interpolation)
    layer.weight.data.uniform_(0.0, 0.2, generator=torch.Generator().manual_seed(2))
    whole = layer(x, interval=7.0)
    times, v = layer.spike_times.times, layer.voltage
    layer.reset()
    parts = [layer(x[:5], interval=7.0)]
    early = layer.spike_times
    parts += [layer.step(each, interval=7.0)[None] for each in x[5:9]] + [layer(x[9:], interval=7.0)]
    assert torch.equal(torch.cat(parts), whole) and whole.sum() > 10
    assert (layer.voltage - v).abs().max() < 1e-12 and layer.elapsed == 84.0
    for b in range(3):
        for i in range(5):
            n = int(early.counts[b, i])
            assert early.times[b, i, :n].tolist() == pytest.approx(times[b, i, :n].tolist(), abs=1e-11)


@torch.no_grad()
def test_an_interval_that_ends_at_a_spike_holds_it_once(engine):
    """dv/dt = 1/4: a spike every 4, exactly."""
    layer = layer_of(torch.tensor([0.25], dtype=F64), ODEIFDynamics())
    assert layer(ones(6), interval=4.0).tolist() == [[1]] * 6
    layer.reset()
    assert layer(ones(12), interval=2.0).flatten().tolist() == [0, 1] * 6
    period = float(lif_period(torch.tensor(0.3, dtype=F64)))
    leaky = layer_of(torch.tensor([0.3], dtype=F64))
    assert leaky(ones(50), interval=period).sum() in (49, 50)  # the last may round to after the end
    assert leaky.spike_times.times[0, 0] == pytest.approx(period, abs=1e-12)


@torch.no_grad()
def test_a_start_above_threshold_fires_at_once(engine):
    layer = layer_of(torch.tensor([0.0, -1.0, 0.1], dtype=F64))
    layer.reset(torch.tensor([1.0, 5.0, 1.2], dtype=F64))
    assert layer(ones(2), interval=1.0).tolist() == [[1, 1, 1], [0, 0, 0]]
    assert layer.spike_times.times[:, 0].tolist() == [0.0, 0.0, 0.0]


@torch.no_grad()
def test_a_refractory_period_may_outlast_intervals(engine):
    layer = layer_of(torch.tensor([1.0], dtype=F64), ODEIFDynamics(), refractory=5.5)
    assert layer(ones(16)).flatten().tolist() == [1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0]
    assert layer.spike_times.times[0].tolist() == [1.0, 7.5, 14.0]


@torch.no_grad()
@pytest.mark.parametrize("interval", [1e-9, 1e7])
def test_very_short_and_very_long_intervals(engine, interval):
    layer = layer_of(torch.tensor([0.0501, 0.049], dtype=F64))
    found = layer(ones(1), interval=interval)[0]
    assert found[1] == 0 and found[0] == int(interval / lif_period(torch.tensor(0.0501, dtype=F64)))


# -- dynamics of one's own ------------------------------------------------------------------------


class Leaky(SpikingDynamics):
    """What ODELIFDynamics is, as anyone would write it."""

    def dvdt(self, v, current):
        return -v / 20.0 + current


class Quadratic(SpikingDynamics):
    """dv/dt = v^2 + I, which leaves to infinity soon after its threshold."""

    def dvdt(self, v, current):
        return v**2 + current


@torch.no_grad()
@pytest.mark.parametrize("interpolation", ["hold", "linear"])
def test_dynamics_of_ones_own_are_integrated_and_searched(interpolation):
    pytest.importorskip("torchdiffeq")
    x = torch.tensor([[1.0], [0.4], [1.3]], dtype=F64)
    currents = torch.tensor([0.02, 0.06, 0.1, 0.5], dtype=F64)
    known, own = (layer_of(currents, d, interpolation=interpolation) for d in (ODELIFDynamics(), Leaky()))
    assert torch.equal(known(x, interval=9.0), own(x, interval=9.0))
    fired = torch.isfinite(known.spike_times.times)
    assert fired.sum() > 8
    assert (known.spike_times.times - own.spike_times.times)[fired].abs().max() < 1e-8
    assert (known.voltage - own.voltage).abs().max() < 1e-8


@torch.no_grad()
def test_a_quadratic_neuron_fires_at_the_time_of_its_closed_form():
    """From 0: v = sqrt(I) tan(sqrt(I) t)."""
    pytest.importorskip("torchdiffeq")
    currents = torch.tensor([0.04, 0.25, 1.0, -0.25], dtype=F64)
    layer = layer_of(currents, Quadratic(v_threshold=4.0))
    counts = layer(ones(1), interval=9.0)[0]
    root = currents[:3].sqrt()
    period = torch.atan(4.0 / root) / root
    assert counts.tolist() == [*torch.floor(9.0 / period).tolist(), 0.0]
    assert (layer.spike_times.times[:3, 0] - period).abs().max() < 1e-8


@torch.no_grad()
def test_a_subclass_with_other_dynamics_is_not_taken_for_its_parent():
    pytest.importorskip("torchdiffeq")

    class Half(ODEIFDynamics):
        def dvdt(self, v, current):
            return 0.5 * current + 0.0 * v

    layer = layer_of(torch.tensor([0.5], dtype=F64), Half())
    layer(ones(1), interval=10.0)
    assert layer.spike_times.times[0].tolist() == pytest.approx([4.0, 8.0], abs=1e-8)


# -- a layer like others --------------------------------------------------------------------------


def test_numpy_in_numpy_out_and_both_dtypes():
    for dtype in (torch.float32, torch.float64):
        layer = SpikingODELayer(1, 4, dtype=dtype)
        layer.weight.data = torch.tensor([[0.06], [0.1], [0.3], [1.0]], dtype=dtype)
        found = layer(np.ones((1000, 1)), interval=1.0)
        assert isinstance(found, np.ndarray) and found.sum(0).tolist() == [27, 72, 274, 974]
        assert layer.voltage.dtype == layer.spike_times.times.dtype == dtype
        assert layer.step(torch.ones(1, dtype=dtype)).dtype == dtype


def test_trains_inside_a_sequential():
    """Two layers learn to fire 5 and 10 times."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), SpikingODELayer(8, 6), SpikingODELayer(6, 2))
    for spiking in net[2:]:
        spiking.weight.data = spiking.weight.data.abs() * 0.4
    optimiser = torch.optim.Adam(net.parameters(), lr=0.02)
    x, losses = torch.rand(4, 8, 3), []
    for _ in range(15):
        for spiking in net[2:]:
            spiking.reset()
        counts = net[3](net[2](net[1](net[0](x)), 10.0), 10.0).sum(0)
        loss = (counts - torch.tensor([5.0, 10.0])).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert net(x).shape == (4, 8, 2)  # as a Sequential calls it: intervals of 1


def test_copies_pickles_checkpoints_and_moves_right_after_a_forward_pass():
    x = torch.rand(6, 2, 3) * 0.5
    layer = SpikingODELayer(3, 4, ODELIFDynamics(learn=["tau_mem"]))
    layer.weight.data.uniform_(0.05, 0.3)
    layer(x, 5.0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other.voltage, layer.voltage) and not other.voltage.requires_grad
        assert torch.equal(other(x, 5.0), copy.deepcopy(layer)(x, 5.0))
    assert layer.voltage.requires_grad
    assert sorted(layer.state_dict()) == ["dynamics.tau_mem", "weight"]
    SpikingODELayer(3, 4, ODELIFDynamics(learn=["tau_mem"])).load_state_dict(layer.state_dict())
    assert layer.double().voltage.dtype == F64
    layer(x.double(), 5.0)
    layer.detach()
    assert not layer.voltage.requires_grad


def test_another_batch_shape_starts_a_new_sequence():
    layer = layer_of(torch.tensor([0.04, 0.03], dtype=F64))
    layer(ones(3))
    assert layer.elapsed == 3.0
    layer(torch.ones(2, 5, 1, dtype=F64))
    assert layer.elapsed == 2.0 and layer.voltage.shape == (5, 2)
    fresh = layer_of(torch.tensor([0.04, 0.03], dtype=F64))
    fresh(torch.ones(2, 5, 1, dtype=F64))
    assert torch.allclose(layer.voltage, fresh.voltage, atol=1e-14)
    assert fresh.spike_times.times.tolist() == [[[math.inf]] * 2] * 5


def test_compiles_as_one_graph():
    layer = layer_of(torch.linspace(0.0, 0.5, 7), max_spikes=4)
    x = ones(3, torch.float32)
    eager = layer(x, 5.0)
    eager_grad = torch.autograd.grad(eager.sum() + layer.voltage.sum(), layer.weight)[0]
    layer.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, 5.0)
    assert torch.equal(compiled, eager)
    grad = torch.autograd.grad(compiled.sum() + layer.voltage.sum(), layer.weight)[0]
    torch.testing.assert_close(grad, eager_grad)


def test_empty_batches_and_sequences():
    layer = SpikingODELayer(3, 4)
    assert layer(torch.rand(5, 0, 3)).shape == (5, 0, 4)
    assert layer(torch.rand(0, 2, 3)).shape == (0, 2, 4)
    assert layer.spike_times.times.tolist() == [[[math.inf]] * 4] * 2


# -- the first spike ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_first_spike_is_infinity_where_a_neuron_was_silent(engine, dtype):
    layer = layer_of(torch.tensor([0.04, 0.1, -1.0, 0.06], dtype=dtype))
    first = layer.first_spike  # before any call
    assert first.tolist() == [math.inf] * 4 and first.dtype == dtype
    with torch.no_grad():
        layer(ones(3, dtype), interval=20.0)
    known = [math.inf, *lif_period(torch.tensor([0.1, 0.06], dtype=F64)).tolist()]
    assert layer.first_spike.tolist() == pytest.approx([known[0], known[1], math.inf, known[2]], rel=1e-6)
    assert layer.first_spike.dtype == dtype
    layer.reset()
    assert torch.isinf(layer.first_spike).all()


@torch.no_grad()
@pytest.mark.parametrize("shape", [(4, 2), (4, 5, 2)])
@pytest.mark.parametrize("options", [{}, {"max_spikes": 3}, {"interpolation": "linear"}], ids=str)
def test_where_nothing_fires_there_is_a_column_of_infinity(engine, shape, options):
    layer = SpikingODELayer(2, 3, ODELIFDynamics(tau_mem=20.0), **options)
    layer(torch.zeros(shape), interval=1.0)
    times, number = layer.spike_times
    assert times.shape == (*shape[1:-1], 3, 1) and number.shape == (*shape[1:-1], 3)
    assert torch.isinf(times[..., 0]).all() and torch.isinf(layer.first_spike).all() and not number.any()
    # The first spikes of the latest call, from the latest reset: at 20 ln 2 after 4 silent ms.
    layer.weight.data.fill_(0.05)
    layer(torch.ones(*shape[:-1], 2), interval=10.0)
    if not options:
        known = 4.0 + 20.0 * math.log(2.0)
        assert layer.first_spike.flatten().tolist() == pytest.approx([known] * number.numel())


def test_of_fractional_dynamics_and_of_ones_own():
    class Own(SpikingDynamics):
        def dvdt(self, v, current):
            return current - v

    for dynamics in (FractionalLIFDynamics(0.7, tau_mem=20.0), Own()):
        layer = layer_of(torch.tensor([0.1, 30.0], dtype=F64), dynamics)
        layer(ones(2), interval=0.5)
        assert layer.first_spike[0] == math.inf and 0 < layer.first_spike[1] < 1.0
        layer.reset()
        layer.weight.data.zero_()
        layer(ones(2), interval=0.5)
        assert torch.isinf(layer.first_spike).all()


def test_the_gradient_of_a_first_spike_is_that_of_its_time_and_none_where_silent():
    """The time is tau ln(tau I / (tau I - 1)), whose derivative is -1 / (I (I - 1 / tau))."""
    layer = layer_of(torch.tensor([0.1, 0.02], dtype=F64))
    layer(ones(2), interval=20.0)
    layer.first_spike[0].backward()
    assert layer.weight.grad.flatten().tolist() == pytest.approx([-1.0 / (0.1 * (0.1 - 1.0 / 20.0)), 0.0])
    # Nothing fires at all: a training goes on, with a gradient of zero.
    layer = layer_of(torch.tensor([0.01, 0.02], dtype=F64))
    layer(ones(2), interval=20.0)
    layer.first_spike.clamp_max(100.0).sum().backward()
    assert layer.weight.grad.tolist() == [[0.0], [0.0]]


def test_the_benchmark_runs(tmp_path):
    script = Path(__file__).resolve().parent.parent / "benchmarks" / "spiking_ode.py"
    options = ["--smoke", "--repeat", "1", "--only", "speed", "--out", str(tmp_path)]
    command = [sys.executable, str(script), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    group = json.loads((tmp_path / "spiking_ode.json").read_text(encoding="utf-8"))["groups"]["speed"]
    rows = [row for row in group["rows"] if "own_s" in row]
    assert group["smoke"] and len(rows) >= 2
    assert all(row["own_s"] > 0 and row["own_error"] < 1e-6 and row["own_wrong"] == 0 for row in rows)
    assert "must reach" in (tmp_path / "spiking_ode.md").read_text(encoding="utf-8")


# -- what cannot be used --------------------------------------------------------------------------


class WrongShape(SpikingDynamics):
    def dvdt(self, v, current):
        return (current - v).sum()


class NotFinite(SpikingDynamics):
    def dvdt(self, v, current):
        return current / (v - v)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: SpikingODELayer(2, 3)(torch.tensor([[1.0, math.nan]])), OptionError, "finite"),
        (lambda: SpikingODELayer(2, 3)(np.array([[1.0, np.inf]])), OptionError, "finite"),
        (lambda: ODELIFDynamics(v_reset=1.0), OptionError, "below v_threshold"),
        (lambda: ODEIFDynamics(v_reset=2.0), OptionError, "below v_threshold"),
        (lambda: ODELIFDynamics(tau_mem=0.0), OptionError, "tau_mem must be positive"),
        (lambda: ODELIFDynamics(C_mem=-1.0), OptionError, "C_mem must be positive"),
        (lambda: ODELIFDynamics(tau_mem=math.nan), OptionError, "tau_mem must be finite"),
        (lambda: ODELIFDynamics(tau_mem="20"), OptionTypeError, "tau_mem must be a number"),
        (lambda: ODELIFDynamics(learn=["tau"]), OptionError, "tau_mem"),
        (lambda: SpikingODELayer(2, 3, ODELIFDynamics(torch.ones(4))), OptionError, "4 entries"),
        (lambda: SpikingODELayer(2, 3)(torch.rand(5, 4)), OptionError, "n_inputs=2"),
        (lambda: SpikingODELayer(2, 3)(torch.rand(2)), OptionError, "step"),
        (lambda: SpikingODELayer(2, 3)(torch.rand(5, 2), interval=0.0), OptionError, "positive"),
        (lambda: SpikingODELayer(2, 3)(torch.rand(5, 2), interval=-1.0), OptionError, "positive"),
        (lambda: SpikingODELayer(2, 3)(torch.rand(5, 2), interval=math.inf), OptionError, "finite"),
        (lambda: SpikingODELayer(2, 3)(torch.rand(5, 2), interval="1"), OptionTypeError, "number"),
        (lambda: SpikingODELayer(2, 3)([[1.0, 2.0]]), OptionTypeError, "tensor or a NumPy"),
        (lambda: SpikingODELayer(2, 3)(torch.rand(5, 2).double()), OptionTypeError, "layer.to"),
        (lambda: SpikingODELayer(0, 3), OptionError, "n_inputs"),
        (lambda: SpikingODELayer(2, 3, dynamics="lif"), OptionTypeError, "SpikingDynamics"),
        (lambda: SpikingODELayer(2, 3, refractory=-1.0), OptionError, "refractory"),
        (lambda: SpikingODELayer(2, 3, dt_init=0.0), OptionError, "dt_init"),
        (lambda: SpikingODELayer(2, 3, interpolation="cubic"), UnknownNameError, "hold"),
        (lambda: SpikingODELayer(2, 3, solver="rk4"), UnknownNameError, "dopri5"),
        (lambda: SpikingODELayer(2, 3, surrogate="atam"), UnknownNameError, "atan"),
        (lambda: layer_of(torch.tensor([1e9]))(ones(1, torch.float32)), StateError, "refractory"),
        (lambda: layer_of(torch.tensor([1.0]), max_spikes=3)(ones(1).float(), 9.0), StateError, "max_spikes"),
        (lambda: SpikingODELayer(1, 2, SpikingDynamics())(torch.rand(1, 1)), NotImplementedError, "dvdt"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
    assert issubclass(error, (SpikedeError, NotImplementedError))


@pytest.mark.parametrize(
    ("dynamics", "error", "words"),
    [(WrongShape(), OptionError, "one rate for each neuron"), (NotFinite(), StateError, "not finite")],
)
def test_dynamics_that_return_what_they_must_not(dynamics, error, words):
    pytest.importorskip("torchdiffeq")
    with pytest.raises(error, match=words):
        SpikingODELayer(1, 2, dynamics)(torch.rand(1, 1))


def test_a_search_that_needs_too_many_steps_ends():
    pytest.importorskip("torchdiffeq")

    class Stiff(SpikingDynamics):
        def dvdt(self, v, current):
            return 1e7 * (current - v)

    with pytest.raises(StateError, match="max_steps"):
        SpikingODELayer(1, 2, Stiff(), max_steps=50)(torch.rand(1, 1))


def test_a_failed_call_leaves_the_state_as_it_was():
    layer = layer_of(torch.tensor([0.04, 1.0]), max_spikes=2)
    layer(ones(1, torch.float32), 1.0)
    before = layer.voltage.clone()
    with pytest.raises(StateError):
        layer(ones(1, torch.float32), 100.0)
    assert torch.equal(layer.voltage, before) and layer.elapsed == 1.0


def test_parameters_trained_out_of_bounds_are_named():
    layer = SpikingODELayer(1, 2, ODELIFDynamics(learn=["tau_mem"]))
    layer.dynamics.tau_mem.data.fill_(-1.0)
    with pytest.raises(StateError, match="tau_mem"):
        layer(torch.rand(1, 1))
