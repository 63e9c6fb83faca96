"""Gradients of spike times, potentials and counts: closed forms, finite differences, the surrogate."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from spikede_plugins import (
    ODEIFDynamics,
    ODELIFDynamics,
    SpikingDynamics,
    SpikingODELayer,
    Surrogate,
)
from spikede_plugins.surrogate import slope

F64 = torch.float64


class Leaky(SpikingDynamics):
    """ODELIFDynamics with a trained tau, as anyone would write it."""

    values = ("tau", "v_threshold", "v_reset", "v_rest")
    positive = ("tau",)

    def __init__(self, tau, **options):
        super().__init__(**options)
        self.keep("tau", tau)

    def dvdt(self, v, current):
        return (self.v_rest - v) / self.tau + current


def one(current: float, dynamics: SpikingDynamics | None = None, **options) -> SpikingODELayer:
    layer = SpikingODELayer(1, 1, dynamics, dtype=F64, **options)
    layer.weight.data.fill_(current)
    return layer


def test_the_gradient_of_a_time_is_that_of_its_closed_form():
    """t_k = k tau log(v_oo / (v_oo - 1)), v_oo = tau w: to the weight, and to tau."""
    layer = one(0.3, ODELIFDynamics(learn=["tau_mem"]))
    layer(torch.ones(5, 1, dtype=F64), interval=4.0)
    times = layer.spike_times.times[0]
    assert len(times) == 5
    tau, w = (torch.tensor(x, dtype=F64, requires_grad=True) for x in (20.0, 0.3))
    exact = torch.arange(1, 6) * tau * torch.log(tau * w / (tau * w - 1.0))
    for k in range(5):
        found = torch.autograd.grad(times[k], [layer.weight, layer.dynamics.tau_mem], retain_graph=True)
        known = torch.autograd.grad(exact[k], [w, tau], retain_graph=True)
        assert [float(g) for g in found] == pytest.approx([float(g) for g in known], rel=1e-10)


@pytest.mark.parametrize("refractory", [0.0, 1.5])
@pytest.mark.parametrize("interpolation", ["hold", "linear"])
@pytest.mark.parametrize("kind", [ODELIFDynamics, ODEIFDynamics])
def test_times_and_potentials_against_finite_differences(kind, interpolation, refractory):
    """To the input, the weight and every parameter, over four intervals."""
    generator = torch.Generator().manual_seed(0)
    layer = SpikingODELayer(
        3, 4, kind(learn=True), dtype=F64, refractory=refractory, interpolation=interpolation
    )
    layer.weight.data.uniform_(0.02, 0.12, generator=generator)
    x = torch.rand(4, 2, 3, generator=generator, dtype=F64) + 0.5
    parameters = dict(layer.named_parameters())

    def run(x: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        layer.reset()
        torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x, 7.0))
        times = layer.spike_times.times
        assert times.shape[-1] > 2
        return times.masked_fill(torch.isinf(times), 0.0), layer.voltage

    values = [p.detach().clone().requires_grad_() for p in parameters.values()]
    assert gradcheck(run, [x.requires_grad_(), *values], eps=1e-6, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("adjoint", [False, True], ids=["steps", "adjoint"])
@pytest.mark.parametrize("interpolation", ["hold", "linear"])
def test_dynamics_of_ones_own_have_the_gradients_of_the_closed_form(interpolation, adjoint):
    pytest.importorskip("torchdiffeq")
    results = []
    for dynamics in (ODELIFDynamics(learn=["tau_mem"]), Leaky(20.0, learn=["tau"])):
        layer = SpikingODELayer(
            2, 3, dynamics, dtype=F64, refractory=1.5, interpolation=interpolation, adjoint=adjoint
        )
        generator = torch.Generator().manual_seed(1)
        layer.weight.data.uniform_(0.04, 0.2, generator=generator)
        x = (torch.rand(2, 2, generator=generator, dtype=F64) + 0.5).requires_grad_()
        counts, times = layer(x, 12.0), layer.spike_times.times
        assert counts.sum() >= 3
        (counts.sum() + times[torch.isfinite(times)].square().sum() + layer.voltage.sum()).backward()
        tau = next(dynamics.parameters())
        times = times.masked_fill(torch.isinf(times), 0.0)
        results.append((counts, times, x.grad, layer.weight.grad, tau.grad))
    for known, found in zip(*results, strict=True):
        torch.testing.assert_close(found, known, rtol=1e-5, atol=1e-6)


def test_a_potential_that_grazes_its_threshold_sends_back_no_more_than_the_floor_allows():
    """Just above rheobase dt/dw = -(v_oo / (v_oo - 1)) / w ... grows without bound; here it does not."""
    gradients = []
    for excess in (1e-2, 1e-4, 1e-6, 1e-8):
        layer = one((1.0 + excess) / 20.0, slope_floor=1e-3)
        layer(torch.ones(1, 1, dtype=F64), interval=1000.0)
        first = layer.spike_times.times[0, 0]
        gradients.append(float(torch.autograd.grad(first, layer.weight)[0]))
    # dv(t*)/dw is at most tau = 20; 1 / floor is 1000.
    assert all(-20.0 * 1000.0 <= g < 0.0 for g in gradients)
    assert gradients[-1] == pytest.approx(-20_000.0, rel=1e-3)
    exact = one((1.0 + 1e-2) / 20.0, slope_floor=1e-9)
    exact(torch.ones(1, 1, dtype=F64), interval=1000.0)
    v = 1.01
    known = 20.0 * 20.0 * (1.0 / v - 1.0 / (v - 1.0))
    assert float(torch.autograd.grad(exact.spike_times.times[0, 0], exact.weight)[0]) == pytest.approx(known)


@pytest.mark.parametrize("current", [0.03, 0.2])
def test_a_count_of_one_at_most_has_the_usual_surrogate_gradient(current):
    """dv/dt = w for 8: a potential of 8 w - 1 beyond the threshold, had it not been reset.

    The potential moves by 8 a unit of w, or by the time to the spike where there is one.
    """
    surrogate = Surrogate("sigmoid", 4.0)
    layer = one(current, ODEIFDynamics(), surrogate=surrogate, refractory=math.inf)
    layer(torch.ones(1, 1, dtype=F64), interval=8.0).sum().backward()
    over = torch.tensor(8.0 * current - 1.0, dtype=F64)
    assert float(layer.weight.grad) == pytest.approx(
        min(8.0, 1.0 / current) * float(slope(over, "sigmoid", 4.0))
    )


def test_every_spike_adds_its_own_slope_to_the_gradient_of_a_count():
    """w = 0.3 for 8: spikes at 1/w, 2/w; overshoots 8 w - k, each of which moves by t_k a unit of w."""
    layer = one(0.3, ODEIFDynamics(), surrogate=Surrogate("atan", 2.0))
    count = layer(torch.ones(1, 1, dtype=F64), interval=8.0)
    assert count.item() == 2
    count.sum().backward()
    z = 2.4 - torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    # However often it was reset, the potential at a fixed time t moves by t a unit of w.
    lever = torch.tensor([1.0 / 0.3, 2.0 / 0.3, 8.0], dtype=F64)
    assert float(layer.weight.grad) == pytest.approx(float((slope(z, "atan", 2.0) * lever).sum()))


def test_second_derivatives_are_refused():
    layer = one(0.3)
    layer(torch.ones(1, 1, dtype=F64), interval=8.0)
    (grad,) = torch.autograd.grad(layer.spike_times.times.square().sum(), layer.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("refractory", [0.0, 5.0, math.inf])
@pytest.mark.parametrize("interpolation", ["hold", "linear"])
def test_gradients_stay_finite_where_neurons_wait_or_never_fire(interpolation, refractory):
    """Also for starts at and above the threshold, and for input that drives nothing."""
    dynamics = ODELIFDynamics(learn=True)
    layer = SpikingODELayer(1, 4, dynamics, dtype=F64, refractory=refractory, interpolation=interpolation)
    layer.weight.data = torch.tensor([[0.4], [0.05], [-0.3], [0.0]], dtype=F64)
    start = torch.tensor([1.0, 0.9, 1.5, 0.0], dtype=F64, requires_grad=True)
    layer.reset(start)
    x = torch.tensor([[1.0], [-0.5], [2.0], [1.0]], dtype=F64, requires_grad=True)
    counts, times = layer(x, 3.0), layer.spike_times.times
    assert counts[0].tolist()[0] >= 1 and counts[0].tolist()[2] == 1
    (counts.sum() + times[torch.isfinite(times)].sum() + layer.voltage.sum()).backward()
    for tensor in (x, start, *layer.parameters()):
        assert torch.isfinite(tensor.grad).all()


def test_detach_cuts_the_graph_between_two_pieces():
    layer = one(0.04)
    x = torch.ones(2, 1, dtype=F64, requires_grad=True)
    layer(x)
    layer.detach()
    later = torch.ones(2, 1, dtype=F64, requires_grad=True)
    layer(later)
    layer.voltage.sum().backward()
    assert x.grad is None and later.grad.abs().sum() > 0
