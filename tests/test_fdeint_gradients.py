"""Gradients of ``fdeint`` against finite differences, and ``fdeint_adjoint``, which keeps the states only."""

from __future__ import annotations

import pytest
import torch
from fdeint_cases import SOLVERS, number, numbers, off, times
from torch import Tensor

from spikede_plugins import MultiTerm, StateError
from spikede_plugins.fdeint import fdeint, fdeint_adjoint
from spikede_plugins.orders import FractionalOrder


def gradients_are_right(run, *inputs: Tensor) -> bool:
    return torch.autograd.gradcheck(run, inputs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("solve", [fdeint, fdeint_adjoint])
@pytest.mark.parametrize("name", SOLVERS)
def test_gradients_to_start_parameters_and_order(name, solve):
    """Over more than two blocks of steps, of a coupled nonlinear system; the order is no leaf."""
    t = times(1.0, 37)

    def run(y0, matrix, raw):
        return solve(
            lambda t, y: torch.tanh(matrix @ y) + t * matrix[0], y0, t, alpha=torch.sigmoid(raw), method=name
        )[[5, 20, 37]]

    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(2, 2, dtype=torch.float64, generator=generator).requires_grad_()
    assert gradients_are_right(run, numbers(1.0, -0.5, learn=True), matrix, number(0.5, learn=True))


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("kind", ["last dimension", "members"])
def test_gradients_to_an_order_each(name, kind):
    """One order for each component, or for each member of a tuple."""

    def run(y0, alpha):
        if kind == "last dimension":
            return fdeint(lambda t, y: y.flip(0) * t - y, y0, times(1.0, 20), alpha=alpha, method=name)[-1]
        first, second = fdeint(
            lambda t, y: (y[1] * t - y[0], y[0].sum() * t - y[1]), (y0[:1], y0[1]), times(1.0, 20),
            alpha=[alpha[0], alpha[1]], method=name,
        )  # fmt: skip
        return torch.cat([first[-1], second[-1:]])

    assert gradients_are_right(run, numbers(1.0, -0.5, learn=True), numbers(0.4, 0.8, learn=True))


@pytest.mark.parametrize("memory", ["soe", "auto", 9])
@pytest.mark.parametrize("name", ["gl", "l1", "pred"])
def test_gradients_through_every_memory(name, memory):
    def run(y0, alpha):
        return fdeint(lambda t, y: t - y**2, y0, times(2.0, 150), alpha=alpha, method=name, memory=memory)[-1]

    y0, alpha = numbers(1.0, 0.2, learn=True), number(0.6, learn=True)
    assert torch.autograd.gradcheck(run, (y0, alpha), rtol=1e-5, atol=1e-7)


def test_gradients_to_the_coefficients_and_orders_of_several_terms():
    """A FractionalOrder as alpha holds its parameters; against differences of whole solves."""
    torch.set_default_dtype(torch.float64)
    try:
        order = FractionalOrder(MultiTerm([0.9, 0.4], [1.0, 0.5], learn_coefficients=True), learn_alpha=True)
    finally:
        torch.set_default_dtype(torch.float32)

    def run():
        return fdeint(lambda t, y: t - y, number(1.0), times(1.0, 40), alpha=order)[-1]

    found = torch.autograd.grad(run(), list(order.parameters()))
    for parameter, gradient in zip(order.parameters(), found, strict=True):
        for i in range(2):
            ends = []
            for change in (1e-5, -1e-5):
                with torch.no_grad():
                    parameter[i] += change
                    ends.append(float(run()))
                    parameter[i] -= change
            assert float(gradient[i]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("name", ["gl", "abm", "trap"])
@pytest.mark.parametrize("late", [1, 16, 21, 40])
def test_a_graph_that_begins_in_the_middle_of_a_run(name, late):
    """Parameters that enter late: nothing is kept of the steps before, the solution is the same."""
    t = times(2.0, 50)
    factor = number(-1.5, learn=True)

    def f(t, y):
        return factor * y if t >= 0.04 * late - 1e-9 else -1.5 * y

    y = fdeint(f, numbers(1.0, 2.0), t, alpha=0.7, method=name)
    assert off(y, fdeint(lambda t, y: -1.5 * y, numbers(1.0, 2.0), t, alpha=0.7, method=name)) < 1e-14
    (gradient,) = torch.autograd.grad(y[-1].sum(), factor)
    ends = []
    for value in (-1.5 + 1e-5, -1.5 - 1e-5):
        with torch.no_grad():
            factor.fill_(value)
            ends.append(float(fdeint(f, numbers(1.0, 2.0), t, alpha=0.7, method=name)[-1].sum()))
    assert float(gradient) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


def test_second_derivatives_for_a_fixed_order():
    def run(y0):
        return fdeint(lambda t, y: -(y**2), y0, times(1.0, 20), alpha=0.7)[-1]

    assert torch.autograd.gradgradcheck(run, (numbers(1.0, 0.5, learn=True),))


def test_second_derivatives_for_a_learned_order_are_refused():
    alpha, y0 = number(0.7, learn=True), numbers(1.0, learn=True)
    y = fdeint(lambda t, y: -(y**2), y0, times(1.0, 20), alpha=alpha)[-1]
    with pytest.raises(StateError, match="second derivatives with a learned order"):
        torch.autograd.grad(y.sum(), y0, create_graph=True)


def test_gradients_through_the_interpolation():
    def run(y0):
        t, options = numbers(0.0, 0.33, 1.0), {"step_size": 0.1}
        return fdeint(lambda t, y: -(y**2), y0, t, alpha=0.7, options=options)

    assert gradients_are_right(run, numbers(1.0, 0.5, learn=True))


# -- keeping the states only ----------------------------------------------------------------------


class Wide(torch.nn.Module):
    """A right-hand side with a hidden layer of any width."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 4)
        ).double()  # fmt: skip

    def forward(self, t, y):
        return self.net(y) - y


def kept_bytes(solve, hidden: int, method: str) -> int:
    """What autograd keeps for backward of a solve, parameters not counted."""
    f, kept = Wide(hidden), {}
    parameters = {p.data_ptr() for p in f.parameters()}

    def pack(x: Tensor) -> Tensor:
        if x.data_ptr() not in parameters:
            kept[x.data_ptr()] = x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y0 = torch.ones(8, 4, dtype=torch.float64, requires_grad=True)
        y = solve(f, y0, times(1.0, 40), alpha=0.7, method=method)
    assert y.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("method", ["gl", "abm", "trap"])
def test_the_adjoint_keeps_states_and_no_activations(method):
    narrow, wide = (kept_bytes(fdeint_adjoint, hidden, method) for hidden in (4, 400))
    assert wide == narrow <= 40 * 3 * 8 * 4 * 8  # at most three tensors of the size of the state a step
    assert kept_bytes(fdeint, 400, method) > 40 * 8 * 400 * 8


@pytest.mark.parametrize("method", ["gl", "abm", "trap"])
def test_the_adjoint_has_the_solution_and_gradients_of_fdeint(method):
    found = []
    for solve in (fdeint, fdeint_adjoint):
        f, alpha = Wide(16), number(0.7, learn=True)
        y0 = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
        y = solve(f, y0, times(1.0, 40), alpha=alpha, method=method)
        y.square().sum().backward()
        found.append([y, y0.grad, alpha.grad, *(p.grad for p in f.parameters())])
    for a, b in zip(*found, strict=True):
        assert off(a, b) < 1e-13 * float(a.detach().abs().max()) and float(a.detach().abs().max()) > 0


def test_the_adjoint_draws_the_same_random_numbers_again():
    y0 = torch.ones(50, requires_grad=True)
    t = torch.linspace(0.0, 1.0, 17)

    def f(t, y):
        return -torch.nn.functional.dropout(y)

    found = []
    for solve in (fdeint, fdeint_adjoint):
        torch.manual_seed(0)
        y = solve(f, y0, t, alpha=0.7)
        found.append((y, torch.autograd.grad(y[-1].sum(), y0)[0]))
    assert torch.equal(found[0][0], found[1][0])
    assert off(found[0][1], found[1][1]) < 1e-6
