"""``fdeint`` against closed forms, declared accuracies and other packages."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fdeint_cases import ALPHAS, EXPLICIT, SOLVERS, number, numbers, off, times

from spikede_plugins import (
    ExplicitSolver,
    MultiTerm,
    OptionError,
    OptionTypeError,
    OrderError,
    PerChannel,
    SpikedeError,
    SpikedeWarning,
    StateError,
    SumOfExponentials,
    UnknownNameError,
    get_solver,
)
from spikede_plugins.engine import FRESH, FractionalOperator, HistoryLog, charge_step
from spikede_plugins.engine.reference import integrate
from spikede_plugins.fdeint import fdeint
from spikede_plugins.memory import as_memory
from spikede_plugins.mittag_leffler import mittag_leffler
from spikede_plugins.orders import FractionalOrder

# -- solutions that are known ---------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("alpha", [0.3, 0.7, 1.0])
def test_relaxation_is_the_mittag_leffler_function(name, alpha):
    """D^a y = -y / tau from 1 and 2: y = y0 E_a(-t^a / tau); half the step, about half the error or less."""
    tau, errors = 2.0, []
    for steps in (200, 400):
        t = times(2.0, steps)
        y = fdeint(lambda t, y: -y / tau, numbers(1.0, 2.0), t, alpha=alpha, method=name)
        exact = mittag_leffler(-(t**alpha) / tau, alpha)[:, None] * numbers(1.0, 2.0)
        errors.append(off(y[steps // 4 :], exact[steps // 4 :]))
    assert errors[1] < 4e-3
    assert errors[0] / errors[1] > 1.8


def test_the_time_is_that_of_the_rate():
    """y = s^2 solves D^a y = 2 / Gamma(3-a) s^(2-a) + s^2 - y with s = t - t[0]: memory begins at t[0]."""
    seen: dict[str, list[float]] = {"gl": [], "abm": [], "trap": []}
    for name, visited in seen.items():

        def f(t, y, visited=visited):
            assert t.shape == () and t.dtype == torch.float64 and y.shape == (2, 1)
            visited.append(round(float(t), 6))
            return torch.zeros_like(y)

        fdeint(f, torch.ones(2, 1), times(1.0, 4), alpha=0.5, method=name)
    assert seen["gl"] == [0.0, 0.25, 0.5, 0.75]
    assert seen["abm"] == [0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1.0]
    assert seen["trap"][0] == 0.0 and max(seen["trap"]) == 1.0


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_power_of_time_as_drive(alpha):
    """D^a y = t^a: y = Gamma(1+a) / Gamma(1+2a) t^(2a), whatever the start adds."""
    t = times(1.0, 400)
    y = fdeint(lambda t, y: t**alpha + 0.0 * y, number(3.0), t, alpha=alpha, method="abm")
    exact = 3.0 + math.gamma(1 + alpha) / math.gamma(1 + 2 * alpha) * t ** (2 * alpha)
    assert off(y[40:], exact[40:]) < 1e-3


@pytest.mark.parametrize("start", [0.0, 5.0])
def test_a_drive_that_depends_on_time_and_state_from_any_first_time(start):
    """y = s^2, s = t - t[0], solves D^a y = 2 / Gamma(3-a) s^(2-a) + s^2 - y: the memory begins at t[0]."""
    alpha = 0.6

    def f(t, y):
        s = t - start
        return 2.0 / math.gamma(3 - alpha) * s ** (2 - alpha) + s**2 - y

    for name, tolerance in (("gl", 5e-3), ("abm", 2e-4), ("trap", 2e-5)):
        y = fdeint(f, number(0.0), start + times(1.0, 200), alpha=alpha, method=name)
        assert off(y, times(1.0, 200) ** 2) < tolerance


def test_a_coupled_system_with_one_order():
    """D^a y = A y with A = S diag(-1, -3) S^-1: y = S diag(E_a(-t^a), E_a(-3 t^a)) S^-1 y0."""
    s = torch.tensor([[1.0, 2.0], [1.0, -1.0]], dtype=torch.float64)
    rates = numbers(-1.0, -3.0)
    a, t, alpha = s @ rates.diag() @ s.inverse(), times(1.0, 256), 0.8
    modes = torch.stack([mittag_leffler(rate * t**alpha, alpha) for rate in rates], 1)
    exact = (modes * (s.inverse() @ numbers(1.0, 0.5))) @ s.T
    assert off(fdeint(lambda t, y: a @ y, numbers(1.0, 0.5), t, alpha=alpha, method="trap"), exact) < 2e-3


def test_a_coupled_system_with_two_orders_converges_to_that_of_a_fine_grid():
    """A tuple as state, an order for each; the error of pred falls with h, to what abm finds when fine."""

    def f(t, y):
        a, b = y
        return -a * b + torch.cos(t), a.sum() - b

    def end(steps, method):
        y = fdeint(f, (numbers(1.0, 0.5), number(0.2)), times(1.0, steps), alpha=[0.9, 0.6], method=method)
        return torch.cat([y[0][-1], y[1][-1:]])

    fine = end(1024, "abm")
    errors = [off(end(steps, "pred"), fine) for steps in (64, 128, 256)]
    assert errors[2] < 5e-3
    assert all(1.7 < errors[i] / errors[i + 1] < 2.3 for i in range(2))


# -- accuracy -------------------------------------------------------------------------------------


def measured_order(name: str, alpha: float, rough: bool) -> float:
    """From two step sizes, at t = 1: D^a y = DY(t) + cos(t) (Y(t) - y), Y = t^2 + t^3 or t^a + t^2a."""
    powers = (alpha, 2.0 * alpha) if rough else (2.0, 3.0)

    def f(t, y):
        solution = sum(t**p for p in powers)
        derivative = sum(math.gamma(1 + p) / math.gamma(1 + p - alpha) * t ** (p - alpha) for p in powers)
        return derivative + torch.cos(t) * (solution - y)

    errors = []
    for steps in (128, 256):
        with torch.no_grad():
            y = fdeint(f, number(0.0), times(1.0, steps), alpha=alpha, method=name)
        errors.append(abs(float(y[-1]) - 2.0))
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize("rough", [False, True], ids=["smooth", "rough"])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", SOLVERS)
def test_the_measured_order_is_the_declared_one(name, alpha, rough):
    solver = get_solver(name)
    declared = solver.accuracy_rough(alpha) if rough else solver.accuracy(alpha)
    assert measured_order(name, alpha, rough) == pytest.approx(declared, abs=0.15)


# -- against what others compute ------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
def test_the_engine_computes_what_the_definition_says(name):
    """Blocks of steps, with and without gradients, against the plain loop over the whole history."""

    def f(t, y):
        return torch.cos(t) * y.flip(0) - y**2

    start, steps, solver = numbers(1.0, 0.3, -0.2), 75, get_solver(name)
    expected = integrate(lambda t, y: f(number(t), y), start, 1.5, steps, 0.6, solver)
    with torch.no_grad():
        plain = fdeint(f, start, times(1.5, steps), alpha=0.6, method=name)
    with_graph = fdeint(f, start.requires_grad_(), times(1.5, steps), alpha=0.6, method=name)
    assert with_graph.requires_grad and not plain.requires_grad
    assert off(plain, expected) < 1e-12
    assert off(with_graph, expected) < 1e-12


@pytest.mark.parametrize("memory", ["full", 20, 1])
@pytest.mark.parametrize("name", SOLVERS)
def test_neurons_take_the_same_steps(name, memory):
    """The step engine of spiking neurons with the charge y + f(y); a window forgets the first rate too."""
    operator = FractionalOperator(FractionalOrder(0.6), get_solver(name), as_memory(memory), step_size=0.05)
    y0, history, log = numbers(1.0, 0.4), FRESH, HistoryLog()
    expected = [y0]
    for _ in range(50):
        y, history = charge_step(operator, lambda y: y + 0.5 - y**2, expected[-1], history, log)
        expected.append(y)
    y = fdeint(lambda t, y: 0.5 - y**2, y0, times(2.5, 50), alpha=0.6, method=name, memory=memory)
    assert off(y, torch.stack(expected)) < 1e-13


def test_a_solver_of_ones_own_is_integrated_as_it_is():
    class Share(ExplicitSolver):
        """A share of an Euler step, and a constant memory."""

        name = "share"
        share = 0.5

        def accuracy(self, alpha):
            return 0.0

        def gain(self, alpha, step_size):
            return self.share * step_size + 0.0 * alpha

        def weights(self, alpha, n):
            return torch.cat([-torch.ones(1), 0.1 * torch.ones(n - 1)]).double() + 0.0 * alpha

    solver = Share()
    y = fdeint(lambda t, y: y, number(1.0), times(3.0, 3), alpha=0.5, method=solver)
    # u_1 = 0.5; u_2 = u_1 + 0.5 * 1.5; u_3 = u_2 + 0.5 * 2.25 - 0.1 u_1
    assert y.tolist() == pytest.approx([1.0, 1.5, 2.25, 3.325])
    solver.share = 1.0
    y = fdeint(lambda t, y: y, number(1.0), times(3.0, 3), alpha=0.5, method=solver)
    assert y.tolist() == pytest.approx([1.0, 2.0, 4.0, 7.9])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["gl", "glmulti"])
def test_order_one_is_eulers_method_bit_for_bit(name, dtype):
    """Also where alpha is learned and happens to be 1."""
    odeint = pytest.importorskip("torchdiffeq").odeint
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(4, 4, generator=generator).to(dtype)
    t = torch.arange(129, dtype=dtype) / 128

    def f(t, y):
        return torch.tanh(y @ matrix) + torch.sin(3.0 * t)

    def run(solve, **options):
        y0 = torch.linspace(-1.0, 1.0, 8, dtype=dtype).reshape(2, 4).requires_grad_()
        y = solve(f, y0, t, **options)
        return y, torch.autograd.grad(y.square().sum(), y0)[0]

    euler, euler_grad = run(odeint, method="euler")
    fixed, fixed_grad = run(fdeint, alpha=1.0, method=name)
    learned, _ = run(fdeint, alpha=torch.ones((), requires_grad=True), method=name)
    assert torch.equal(fixed, euler) and torch.equal(learned, euler)
    # Backward adds what a state got in another order, once a step.
    torch.testing.assert_close(fixed_grad, euler_grad, rtol=len(t) * torch.finfo(dtype).eps, atol=0.0)
    assert not torch.equal(run(fdeint, alpha=0.999, method=name)[0], euler)


@pytest.mark.parametrize("name", EXPLICIT)
def test_order_one_is_eulers_method_for_every_explicit_solver(name):
    y = fdeint(lambda t, y: t - y**2, numbers(1.0, 2.0), times(1.0, 60), alpha=1.0, method=name)
    euler = [numbers(1.0, 2.0)]
    for k in range(60):
        euler.append(euler[-1] + (k / 60 - euler[-1] ** 2) / 60)
    assert off(y, torch.stack(euler)) < 1e-14


def test_times_between_the_steps_are_those_of_torchdiffeqs_fixed_grid():
    odeint = pytest.importorskip("torchdiffeq").odeint
    t, options = numbers(0.0, 0.1, 0.6, 0.625, 1.0), {"step_size": 0.125}
    euler = odeint(lambda t, y: -y + t, numbers(1.0, 2.0), t, method="euler", options=options)
    y = fdeint(lambda t, y: -y + t, numbers(1.0, 2.0), t, alpha=1.0, options=options)
    assert off(y, euler) < 1e-14


def test_pycaputo_computes_the_same():
    """Its explicit Euler method is the scheme pred, written on rates instead of states."""
    np = pytest.importorskip("numpy")
    fode = pytest.importorskip("pycaputo.fode.caputo")
    from pycaputo.controller import make_fixed_controller
    from pycaputo.derivatives import CaputoDerivative
    from pycaputo.events import StepAccepted
    from pycaputo.stepping import evolve

    def f(t, y):
        return np.stack([y[1], np.cos(t) - y[0] * y[1]])

    problem = fode.ForwardEuler(
        ds=(CaputoDerivative(0.7), CaputoDerivative(0.4)), source=f, y0=(np.array([1.0, 0.5]),),
        control=make_fixed_controller(0.01, tstart=0.0, tfinal=1.0),
    )  # fmt: skip
    events = evolve(problem, dtinit=0.01)
    expected = torch.tensor(np.array([event.y for event in events if isinstance(event, StepAccepted)]))
    y = fdeint(
        lambda t, y: torch.stack([y[1], torch.cos(t) - y[0] * y[1]]), numbers(1.0, 0.5), times(1.0, 100),
        alpha=numbers(0.7, 0.4), method="pred",
    )  # fmt: skip
    assert off(y, expected) < 1e-12


# -- orders and states ----------------------------------------------------------------------------


def test_a_tuple_with_an_order_each_is_as_many_solves():
    starts = (torch.ones(2, 3, dtype=torch.float64), numbers(0.5), number(2.0))
    t, alphas = times(1.0, 40), (0.4, 0.7, 1.0)
    together = fdeint(lambda t, y: tuple(torch.sin(t) - x for x in y), starts, t, alpha=alphas)
    assert isinstance(together, tuple) and [y.shape for y in together] == [(41, 2, 3), (41, 1), (41,)]
    for y, start, alpha in zip(together, starts, alphas, strict=True):
        assert off(y, fdeint(lambda t, y: torch.sin(t) - y, start, t, alpha=alpha)) < 1e-15
        assert torch.equal(y[0], start)


def test_a_tuple_with_one_order():
    def f(t, y):
        return y[1], -y[0]

    both = fdeint(f, (number(1.0), number(0.0)), times(1.0, 40), alpha=0.8)
    stacked = fdeint(lambda t, y: torch.stack([y[1], -y[0]]), numbers(1.0, 0.0), times(1.0, 40), alpha=0.8)
    assert off(torch.stack(both, 1), stacked) < 1e-14


@pytest.mark.parametrize("name", SOLVERS)
def test_an_order_for_each_component(name):
    """A tensor of orders goes along the last dimension, PerChannel along any."""
    t, orders, start = times(1.0, 40), (0.4, 0.7, 0.9), torch.ones(2, 3, dtype=torch.float64)
    single = [fdeint(lambda t, y: t - y, start[:, i], t, alpha=a, method=name) for i, a in enumerate(orders)]
    by_tensor = fdeint(lambda t, y: t - y, start, t, alpha=numbers(*orders), method=name)
    assert off(by_tensor, torch.stack(single, -1)) < 1e-13
    across = fdeint(lambda t, y: t - y, start.T, t, alpha=PerChannel(orders, dim=0), method=name)
    assert off(across, by_tensor.mT) < 1e-13


def test_several_terms():
    """D^1 y + 2 D^0.5 y = 2 t + 4 Gamma(3) / Gamma(2.5) / 2 t^1.5 has y = t^2; gl finds glmulti by itself."""
    alpha = MultiTerm([1.0, 0.5], [1.0, 2.0])

    def f(t, y):
        return 2.0 * t + 4.0 / math.gamma(2.5) * t**1.5 + 0.0 * y

    by_gl = fdeint(f, number(0.0), times(1.0, 500), alpha=alpha)
    assert off(by_gl, times(1.0, 500) ** 2) < 5e-3
    assert torch.equal(by_gl, fdeint(f, number(0.0), times(1.0, 500), alpha=alpha, method="glmulti"))


def test_dtypes_single_times_and_starts_without_dimensions():
    y = fdeint(lambda t, y: -y, torch.ones(2), torch.linspace(0.0, 1.0, 33), alpha=0.5)
    assert y.dtype == torch.float32
    assert torch.equal(fdeint(lambda t, y: -y, number(2.0), numbers(0.5), alpha=0.5), numbers(2.0))
    assert fdeint(lambda t, y: -y, number(2.0), times(1.0, 1), alpha=0.5).shape == (2,)


def test_under_autocast_the_state_keeps_its_dtype():
    layer = torch.nn.Linear(3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fdeint(lambda t, y: layer(y), torch.ones(2, 3), torch.linspace(0.0, 1.0, 33), alpha=0.5)
    assert y.dtype == torch.float32 and torch.isfinite(y).all()


# -- memory ---------------------------------------------------------------------------------------


def relaxation(steps: int, **options):
    return fdeint(lambda t, y: torch.cos(t) - y, numbers(1.0, -1.0), times(6.0, steps), alpha=0.6, **options)


@pytest.mark.parametrize("name", EXPLICIT)
def test_a_sum_of_exponentials_stays_within_its_tolerance(name):
    full = relaxation(600, method=name)
    for memory in ("soe", "auto", SumOfExponentials(tolerance=1e-9, horizon=600)):
        error = off(relaxation(600, method=name, memory=memory), full)
        assert 0.0 < error < (1e-9 if isinstance(memory, SumOfExponentials) else 1e-6)


@pytest.mark.parametrize("name", ["gl", "abm", "trap"])
def test_a_window_sums_the_newest_states_only(name):
    full, window = relaxation(60, method=name), relaxation(60, method=name, memory=20)
    assert off(window[:21], full[:21]) < 1e-13 < 1e-3 < off(window[-1], full[-1])
    assert off(relaxation(60, method=name, memory=60), full) < 1e-13
    assert off(relaxation(60, method=name, memory=1), full) > off(window, full)


@pytest.mark.parametrize("memory", [None, -1])
def test_other_words_for_the_full_memory(memory):
    assert torch.equal(relaxation(60, memory=memory), relaxation(60, memory="full"))


def test_the_words_for_exponentials_reach_as_far_as_the_run():
    """No warning for "soe" in a run longer than its usual horizon, and the known solution at its end."""
    steps, alpha = 12_000, 0.5
    t = times(1200.0, steps)
    with torch.no_grad():
        y = fdeint(lambda t, y: -y, number(1.0), t, alpha=alpha, memory="soe")
        assert float(y[-1]) == pytest.approx(float(mittag_leffler(-(t[-1] ** alpha), alpha)), rel=1e-3)
        with pytest.warns(SpikedeWarning, match="longer than the horizon"):
            fdeint(lambda t, y: -y, number(1.0), t[:301], alpha=alpha, memory=SumOfExponentials(horizon=200))


# -- steps of a size of one's own -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["gl", "abm", "trap"])
def test_a_step_size_gives_the_solution_at_any_times(name):
    def solve(t, **options):
        return fdeint(lambda t, y: torch.cos(t) - y, numbers(1.0, 2.0), t, alpha=0.6, method=name, **options)

    grid = solve(0.5 + times(1.0, 20))
    some = 0.5 + numbers(0.0, 0.05, 0.1625, 0.6, 1.0)
    y = solve(some, options={"step_size": 0.05})
    between = grid[3] + 0.25 * (grid[4] - grid[3])
    assert off(y, torch.stack([grid[0], grid[1], between, grid[12], grid[20]])) < 1e-13


def test_the_last_step_may_end_behind_the_last_time():
    fine = fdeint(lambda t, y: -y, numbers(1.0), times(1.2, 4), alpha=0.5)
    y = fdeint(lambda t, y: -y, numbers(1.0), numbers(0.0, 1.0), alpha=0.5, options={"step_size": 0.3})
    assert off(y[1], fine[3] + (fine[4] - fine[3]) / 3) < 1e-13


def test_times_that_are_steps_but_for_rounding_are_steps():
    """0.3 / 0.1 is less than 3 in floating point: still no step is taken beyond the third, and none mixed."""
    seen, grid = [], fdeint(lambda t, y: -y, numbers(1.0), 0.1 * times(3.0, 3), alpha=0.5, method="abm")

    def f(t, y):
        seen.append(float(t))
        return -y

    t, options = numbers(0.0, 0.2, 0.1 + 0.2), {"step_size": 0.1}
    assert torch.equal(fdeint(f, numbers(1.0), t, alpha=0.5, method="abm", options=options), grid[[0, 2, 3]])
    assert max(seen) < 0.35


def test_times_made_in_single_precision_are_even_enough():
    t = torch.linspace(0.0, 30.0, 1001)
    assert float((t.double().diff() - 0.03).abs().max()) > 1e-7
    for at in (t, t.double()):
        assert fdeint(lambda t, y: -y, torch.ones(1), at, alpha=0.5).shape == (1001, 1)


# -- the implicit method --------------------------------------------------------------------------


def test_an_implicit_step_that_is_not_solved_says_where_and_what_helps():
    t = times(1.0, 10)
    with pytest.raises(StateError, match=r"'trap': step 1 \(t = 0\.1, step size 0\.1\).* smaller options"):
        fdeint(lambda t, y: -50.0 * y, numbers(1.0), t, alpha=0.5, method="trap")
    with pytest.raises(StateError, match="after 3 fixed-point iterations"):
        fdeint(lambda t, y: -y, numbers(1.0), t, alpha=0.5, method="trap", options={"max_iterations": 3})
    with pytest.raises(StateError, match=r"step 4 .* changed a number by nan"):
        fdeint(
            lambda t, y: (-y[0], 0.0 * y[1] / (t < 0.35)), (numbers(1.0), numbers(1.0)), t, alpha=0.5,
            method="trap",
        )  # fmt: skip


def test_a_looser_tolerance_takes_fewer_evaluations_and_costs_no_more_than_it_says():
    calls = [0]

    def f(t, y):
        calls[0] += 1
        return -(y**3)

    def run(**options):
        calls[0] = 0
        y = fdeint(f, numbers(1.0), times(1.0, 20), alpha=0.7, method="trap", options=options)
        return y, calls[0]

    (tight, many), (loose, few) = run(), run(tolerance=1e-4)
    assert few < many / 2
    assert 0.0 < off(tight, loose) < 1e-3


# -- what cannot be ------------------------------------------------------------------------------


GOOD = {
    "func": lambda t, y: -y,
    "y0": torch.ones(3),
    "t": torch.linspace(0.0, 1.0, 5),
    "alpha": 0.5,
}
PAIR = (torch.ones(3), torch.ones(2))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"func": 3}, OptionTypeError, r"func must be callable as func\(t, y\), got int"),
        ({"func": lambda t, y: y[:2]}, OptionError, r"shape \(2,\) for a y of shape \(3,\).*reshape or"),
        ({"func": lambda t, y: y.double()}, OptionError, r"float64 for a y of torch.float32.*to\(y.dtype\)"),
        ({"func": lambda t, y: None}, OptionTypeError, "must return a tensor .*got NoneType"),
        ({"func": lambda t, y: (y, y)}, OptionTypeError, "got a tuple of 2"),
        ({"func": lambda t, y: y[0], "y0": PAIR}, OptionTypeError, "a tuple of 2 tensors.*got a tensor"),
        ({"y0": torch.ones(3).long()}, OptionTypeError, r"int64; pass y0.to\(torch.float32\)"),
        ({"y0": (torch.ones(1), torch.ones(1).half())}, OptionTypeError, r"y0\[1\] must be float32 or"),
        ({"y0": torch.tensor([1.0, math.nan])}, OptionError, "y0 must be finite"),
        ({"y0": torch.ones(0)}, OptionError, "no entries"),
        ({"y0": [torch.ones(1)]}, OptionTypeError, "a tensor or a tuple of tensors, got a list"),
        ({"y0": (1.0,)}, OptionTypeError, r"y0\[0\] must be a tensor, got float"),
        ({"y0": ()}, OptionError, "empty tuple"),
        ({"t": [0.0, 1.0]}, OptionTypeError, "floating-point times, got list"),
        ({"t": torch.arange(4)}, OptionTypeError, "floating-point times, got torch.int64"),
        ({"t": torch.ones(2, 2)}, OptionError, r"one-dimensional.*\(2, 2\)"),
        ({"t": torch.ones(0)}, OptionError, "at least one time"),
        ({"t": torch.tensor([0.0, math.inf])}, OptionError, "t must be finite"),
        ({"t": torch.tensor([0.0, 1.0, 1.0])}, OptionError, r"increase strictly, but t\[1\] = 1 is followed"),
        ({"t": torch.tensor([0.0, 0.1, 0.3])}, OptionError, r'not evenly spaced.*"step_size": 0.1'),
        ({"t": 1e6 + torch.linspace(0.0, 1.0, 9)}, OptionError, r"cannot tell steps .*t.double\(\)"),
        ({"t": torch.linspace(0.0, 1.0, 5, requires_grad=True)}, OptionError, r"t.detach\(\)"),
        ({"alpha": 1.5}, OrderError, r"alpha must lie in \(0, 1\]"),
        ({"alpha": "0.5"}, OptionTypeError, "alpha must be a number"),
        ({"alpha": torch.tensor(0.0, requires_grad=True)}, OrderError, r"alpha must lie in \(0, 1\]"),
        ({"alpha": [0.5, 0.5, 0.5]}, OptionTypeError, r"y0 is one tensor; .*torch.tensor\(\[...\]\)"),
        ({"alpha": torch.tensor([0.5, 0.6])}, OrderError, r"2 orders, but y0 has shape \(3,\)"),
        ({"alpha": [0.5], "y0": PAIR}, OrderError, "1 order, y0 has 2 tensors"),
        ({"alpha": [0.5, 2.0], "y0": PAIR}, OrderError, r"alpha\[1\] must lie in"),
        ({"alpha": PerChannel([0.5, 0.6], dim=0)}, OptionError, "PerChannel has 2 orders for dimension 0"),
        ({"alpha": MultiTerm([0.5, 1.0], [1.0, 1.0]), "method": "abm"}, OptionError, "the solver 'glmulti'"),
        ({"alpha": MultiTerm([0.5], [1.0], learn_coefficients=True)}, OptionError, r"FractionalOrder\(Mul"),
        ({"method": "gll"}, UnknownNameError, "did you mean 'gl'"),
        ({"method": 3}, OptionTypeError, "name of a solver"),
        ({"memory": 0}, OptionError, "at least 1 step"),
        ({"memory": "soo"}, OptionError, "did you mean 'soe'"),
        ({"memory": "soe", "method": "abm"}, OptionError, "needs a solver that is a gain and weights"),
        ({"options": {"stepsize": 0.1}}, OptionError, "unknown option 'stepsize'; did you mean 'step_size'"),
        ({"options": {"step_size": 0.0}}, OptionError, "'step_size' must be finite and positive"),
        ({"options": {"step_size": "h"}}, OptionTypeError, "'step_size' must be a number"),
        ({"options": {"max_iterations": 1.5}, "method": "trap"}, OptionTypeError, "must be an int"),
        ({"options": {"tolerance": 1e-3}}, OptionError, "for implicit methods"),
        ({"options": 0.1}, OptionTypeError, "options must be a dict"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_said(changed, error, message):
    assert fdeint(**GOOD).shape == (5, 3)
    with pytest.raises(error, match=message) as caught:
        fdeint(**{**GOOD, **changed})
    assert isinstance(caught.value, SpikedeError)


def test_the_benchmark_runs(tmp_path):
    """All its groups, in tiny sizes; no time is checked."""
    script = Path(__file__).resolve().parent.parent / "benchmarks" / "solve.py"
    command = [sys.executable, str(script), "--smoke", "--repeat", "1", "--threads", "1", "--out", tmp_path]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    groups = json.loads((tmp_path / "solve.json").read_text(encoding="utf-8"))["groups"]
    assert list(groups) == ["loop", "packages", "growth"]
    for row in groups["loop"]["rows"]:
        assert row["faster"] > 0 and row["own_error"]["run"] == pytest.approx(row["other_error"]["run"], 1e-2)
    tables = (tmp_path / "solve.md").read_text(encoding="utf-8")
    assert "≥ 50" in tables and tables.count("must reach") == 3
