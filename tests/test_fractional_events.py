"""Fractional neurons with spike times inside their steps: Teka's table, orders, memory, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from test_teka import simulate
from torch import Tensor

from spikede_plugins import (
    FractionalLIFDynamics,
    ODELIFDynamics,
    OptionError,
    PerChannel,
    SpikingODELayer,
    get_solver,
    mittag_leffler,
)

F64 = torch.float64
#: First spike: the root of 120 (1 - E_a(-t^a / 20)) = 20.
FIRST = {1.0: 3.6464, 0.8: 4.728, 0.6: 7.6846, 0.4: 22.1426, 0.2: 639.888}


def teka(
    alpha: float | PerChannel, step: float, neurons: int = 1, method: str = "l1", **options
) -> SpikingODELayer:
    """tau = 20 ms, R I = 120 mV, V_rest = V_reset = -70, V_th = -50 mV."""
    peak = options.pop("v_peak", None)
    dynamics = FractionalLIFDynamics(alpha, 20.0, -70.0, -50.0, -70.0, v_peak=peak, method=method)
    layer = SpikingODELayer(1, neurons, dynamics, step, dtype=F64, **options)
    layer.weight.data.fill_(120.0 / 20.0)
    return layer


def first_spike(alpha: float) -> float:
    """The root at the head of this file, by bisection."""
    low, high = 1.0, 1000.0
    for _ in range(60):
        t = 0.5 * (low + high)
        reached = 120.0 * (1.0 - mittag_leffler(torch.tensor(-(t**alpha) / 20.0, dtype=F64), alpha)) >= 20.0
        low, high = (low, t) if reached else (t, high)
    return low


@torch.no_grad()
def first_of(alpha: float, steps: int, method: str) -> float:
    duration = float(math.ceil(1.3 * FIRST[alpha]))
    layer = teka(alpha, duration / steps, method=method, refractory=math.inf)
    assert layer(torch.ones(1, 1, dtype=F64), interval=duration).item() == 1
    return float(layer.spike_times.times[0, 0])


@pytest.mark.parametrize("alpha", FIRST)
@pytest.mark.parametrize(("method", "steps"), [("l1", 800), ("gl", 500), ("trap", 100)])
def test_first_spikes_of_the_published_table(alpha, method, steps):
    assert first_of(alpha, steps, method) == pytest.approx(FIRST[alpha], rel=1e-3)


@pytest.mark.parametrize("alpha", FIRST)
@pytest.mark.parametrize("method", ["l1", "gl", "pred", "trap"])
def test_first_spikes_converge_at_the_order_of_the_solver(alpha, method):
    """The potential begins like t^a; a parabola through its points is of second order and more."""
    exact = first_spike(alpha)
    assert exact == pytest.approx(FIRST[alpha], rel=2e-5)
    coarse, fine = (first_of(alpha, steps, method) - exact for steps in (150, 300))
    solver = get_solver(method)
    declared = solver.accuracy(alpha) if alpha == 1.0 else solver.accuracy_rough(alpha)
    assert math.log2(coarse / fine) == pytest.approx(declared, abs=0.15)


@torch.no_grad()
def test_spikes_with_peak_and_plateau_are_those_of_the_published_protocol():
    """Teka's neuron on the grid of 0.1 ms (tests/test_teka.py) fires so often in 150 ms.

    There plateaus end on the grid, here inside a step, so spikes come up to 0.1 ms a spike later.
    """
    layer = teka(PerChannel((1.0, 0.8, 0.6, 0.4), dim=-1), 0.1, 4, v_peak=30.0, refractory=8.0)
    counts = sum(layer.step(torch.ones(1, dtype=F64), interval=50.0) for _ in range(3))
    _, on_grid = simulate(120.0, 150.0)
    assert counts.tolist() == [len(each) for each in on_grid[:4]]


@torch.no_grad()
def test_intervals_lengthen_only_with_memory():
    layer = teka(PerChannel((1.0, 0.4), dim=-1), 0.1, 2, v_peak=30.0, refractory=8.0)
    layer(torch.ones(1, 1, dtype=F64), interval=90.0)
    integer, fractional = (row[torch.isfinite(row)].diff() for row in layer.spike_times.times)
    assert integer.max() - integer.min() < 1e-3
    assert fractional.max() - fractional.min() > 1.0


@torch.no_grad()
@pytest.mark.parametrize("refractory", [0.0, 1.73])
def test_order_one_is_the_integer_neuron_to_the_order_of_the_steps(refractory):
    """Every spike, and the potential: half the step, half the error."""
    x = torch.tensor([[1.0], [0.4], [1.6]], dtype=F64)
    exact = SpikingODELayer(1, 2, ODELIFDynamics(), dtype=F64, refractory=refractory)
    exact.weight.data = torch.tensor([[0.1], [0.3]], dtype=F64)
    counts, errors = exact(x, interval=16.0), []
    fired = torch.isfinite(exact.spike_times.times)
    assert fired.sum() > 10
    for step in (0.05, 0.025):
        layer = SpikingODELayer(1, 2, FractionalLIFDynamics(1.0), step, dtype=F64, refractory=refractory)
        layer.weight.data = exact.weight.data
        assert torch.equal(layer(x, interval=16.0), counts)
        errors.append(float((layer.spike_times.times - exact.spike_times.times)[fired].abs().max()))
    assert errors[1] < 0.1 and errors[0] / errors[1] == pytest.approx(2.0, abs=0.3)


@torch.no_grad()
@pytest.mark.parametrize("interpolation", ["hold", "linear"])
def test_pieces_of_a_sequence_make_the_whole(interpolation):
    x = torch.rand(6, 2, 3, generator=torch.Generator().manual_seed(0), dtype=F64)

    def fresh() -> SpikingODELayer:
        layer = SpikingODELayer(
            3, 4, FractionalLIFDynamics(0.6), 0.125, dtype=F64, refractory=0.8, interpolation=interpolation
        )
        layer.weight.data = torch.linspace(0.1, 0.6, 12, dtype=F64).reshape(4, 3)
        return layer

    whole, parts = fresh(), fresh()
    counts = whole(x, interval=2.0)
    pieces = [parts(x[:2], interval=2.0), parts.step(x[2], interval=2.0)[None], parts(x[3:], interval=2.0)]
    assert torch.equal(torch.cat(pieces), counts) and counts.sum() > 5
    assert (parts.voltage - whole.voltage).abs().max() < 1e-12
    long, short = fresh(), fresh()
    if interpolation == "hold":
        assert torch.equal(long(x[:1], interval=10.0)[0], short(x[:1].expand(5, 2, 3), interval=2.0).sum(0))


@pytest.mark.parametrize("refractory", [0.0, 0.83])
def test_gradients_of_times_and_potential_against_finite_differences(refractory):
    """To input, weight, parameters and the order, behind several spikes, where none crosses a grid point."""
    dynamics = FractionalLIFDynamics(0.7, learn=["alpha", "tau_mem", "v_threshold"])
    layer = SpikingODELayer(1, 2, dynamics, 0.5, dtype=F64, refractory=refractory)
    layer.weight.data = torch.tensor([[0.45], [0.31]], dtype=F64)
    values = list(layer.parameters())

    def run(x: Tensor) -> Tensor:
        layer.reset()
        layer(x, 4.0)
        times = layer.spike_times.times
        assert torch.isfinite(times).sum() >= 4
        return times[torch.isfinite(times)].sum() + layer.voltage.sum()

    x = torch.tensor([[1.0], [0.8], [1.3]], dtype=F64, requires_grad=True)
    grads = torch.autograd.grad(run(x), [x, *values])
    with torch.no_grad():
        for tensor, grad in zip([x, *values], grads, strict=True):
            flat = tensor.view(-1)
            for i, found in enumerate(grad.reshape(-1).tolist()[:2]):
                kept, ends = flat[i].item(), []
                for shift in (1e-6, -1e-6):
                    flat[i] = kept + shift
                    ends.append(float(run(x)))
                flat[i] = kept
                assert found == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: teka(0.5, 0.1, method="trap"), "refractory=math.inf"),
        (lambda: teka(0.5, 0.1, v_peak=30.0), "refractory period"),
        (lambda: teka(0.5, 0.1, v_peak=-60.0, refractory=8.0), "v_peak"),
        (lambda: teka(0.5, 0.3)(torch.ones(1, 1, dtype=F64), interval=1.0), "whole number of steps"),
    ],
)
def test_what_cannot_be_run_is_refused(call, words):
    with pytest.raises(OptionError, match=words):
        call()
