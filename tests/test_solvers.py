"""Every registered solver keeps the contract; the numbers of each are those of the literature."""

from __future__ import annotations

import math

import pytest
import torch

from spikede_plugins import ExplicitSolver, OptionError, OrderError, available_solvers, get_solver
from spikede_plugins.engine.reference import integrate
from spikede_plugins.errors import StateError
from spikede_plugins.solvers.base import CorrectorSolver
from spikede_plugins.solvers.gl import GrunwaldLetnikov
from spikede_plugins.solvers.trap import Trapezoidal
from spikede_plugins.testing import ALPHAS, ContractError, check_solver, measure_accuracy

SOLVERS = sorted(available_solvers())


def order(alpha: float) -> torch.Tensor:
    return torch.tensor(alpha, dtype=torch.float64)


# -- the contract ---------------------------------------------------------------------------------


def test_every_registered_solver_is_explicit_or_a_corrector():
    assert all(isinstance(get_solver(name), (ExplicitSolver, CorrectorSolver)) for name in SOLVERS)
    assert {"gl", "l1", "pred", "glmulti", "abm", "trap"} <= set(SOLVERS)


@pytest.mark.parametrize("name", SOLVERS)
def test_every_registered_solver_keeps_the_contract(name):
    """Limits, shapes, gradients, and the declared accuracy, two-sided, on smooth and t^alpha solutions."""
    check_solver(get_solver(name))


def test_all_six_are_registered():
    assert {"gl", "l1", "pred", "abm", "trap", "glmulti"} <= set(SOLVERS)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_wrong_weight_is_found(alpha):
    """The order test is worth something: one weight off by a percent, and the scheme no longer converges."""

    class OneWrongWeight(GrunwaldLetnikov):
        name = "wrong"

        def weights(self, alpha, n):
            weights = super().weights(alpha, n)
            return torch.cat([weights[:2], weights[2:3] * 1.01, weights[3:]])

    with pytest.raises(ContractError, match=r"'wrong' at alpha = .* declares accuracy 1.00 on smooth"):
        check_solver(OneWrongWeight(), alphas=[alpha])


def test_a_declared_accuracy_that_is_too_modest_is_found_too():
    class Modest(Trapezoidal):
        name = "modest"

        def accuracy(self, alpha):
            return 1.0

    with pytest.raises(ContractError, match=r"declares accuracy 1.00 on smooth solutions, but 2.00"):
        check_solver(Modest(), alphas=[0.7])


def test_wrong_limits_shapes_and_gradients_are_found():
    class NoLimit(GrunwaldLetnikov):
        def gain(self, alpha, step_size):
            return 1.001 * super().gain(alpha, step_size)

    class Forgetful(GrunwaldLetnikov):
        def weights(self, alpha, n):
            return super().weights(alpha, n) * (1 + 1e-3 * n * (1 - alpha))

    class NoGradient(GrunwaldLetnikov):
        def weights(self, alpha, n):
            return super().weights(alpha.detach(), n) + 0 * alpha

    class NotASolver:
        name = "nothing"

    with pytest.raises(ContractError, match=r"gain\(1, 1.0\) must be exactly 1.0"):
        check_solver(NoLimit())
    with pytest.raises(ContractError, match=r"the first 66 at alpha = .* change if 200 are asked for"):
        check_solver(Forgetful())
    with pytest.raises(ContractError, match="gradient of weights"):
        check_solver(NoGradient())
    with pytest.raises(ContractError, match="does not derive from ExplicitSolver"):
        check_solver(NotASolver())


def test_accuracy_on_a_rough_solution_is_what_the_trapezoid_loses():
    smooth = measure_accuracy(get_solver("trap"), 0.5)
    rough = measure_accuracy(get_solver("trap"), 0.5, rough=True)
    assert smooth == pytest.approx(2.0, abs=0.05)
    assert rough == pytest.approx(1.5, abs=0.05)


# -- a physical solution --------------------------------------------------------------------------


def mittag_leffler(z: float, alpha: float) -> float:
    """E_alpha(z) by its power series; good for the moderate negative z used here."""
    return math.fsum(z**k / math.gamma(alpha * k + 1) for k in range(120) if alpha * k < 165)


@pytest.mark.parametrize("name", [n for n in SOLVERS if n != "glmulti"])
@pytest.mark.parametrize("alpha", [0.4, 0.7, 1.0])
def test_a_membrane_without_input_decays_like_mittag_leffler(name, alpha):
    """``tau D^a v = -v`` from v = 1: v(t) = E_a(-t^a / tau), a slow power law for a < 1."""
    tau = 2.0
    path = integrate(
        lambda t, v: -v / tau, torch.ones((), dtype=torch.float64), 2.0, 400, alpha, get_solver(name)
    )
    for k in (100, 200, 400):
        t = 2.0 * k / 400
        assert float(path[k]) == pytest.approx(mittag_leffler(-(t**alpha) / tau, alpha), abs=2e-3)


def test_order_one_half_decays_like_the_scaled_error_function():
    """E_{1/2}(-z) = exp(z^2) erfc(z): a closed form, independent of any series."""
    path = integrate(lambda t, v: -v, torch.ones((), dtype=torch.float64), 1.0, 1000, 0.5, get_solver("abm"))
    assert float(path[-1]) == pytest.approx(math.e * math.erfc(1.0), abs=1e-4)


# -- closed forms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gl_weights_are_signed_binomial_coefficients(alpha):
    expected, binomial = [], 1.0
    for m in range(1, 6):
        binomial *= (alpha - m + 1) / m
        expected.append((-1) ** m * binomial)
    torch.testing.assert_close(
        get_solver("gl").weights(order(alpha), 5), torch.tensor(expected, dtype=torch.float64)
    )
    assert float(get_solver("gl").gain(order(alpha), 0.1)) == pytest.approx(0.1**alpha)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_l1_weights_are_differences_of_b(alpha):
    b = [(m + 1) ** (1 - alpha) - m ** (1 - alpha) for m in range(6)]
    expected = torch.tensor([b[m] - b[m - 1] for m in range(1, 6)], dtype=torch.float64)
    torch.testing.assert_close(get_solver("l1").weights(order(alpha), 5), expected)
    gain = float(get_solver("l1").gain(order(alpha), 0.1))
    assert gain == pytest.approx(0.1**alpha * math.gamma(2 - alpha))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_pred_weights_undo_its_quadrature_weights(alpha):
    """(1 + w_1 z + ...) (q_0 + q_1 z + ...) = 1, with q_m = (m+1)^a - m^a the weights on past rates."""
    weights = [1.0, *get_solver("pred").weights(order(alpha), 30).tolist()]
    q = [(m + 1) ** alpha - m**alpha for m in range(31)]
    for n in range(1, 31):
        assert sum(weights[m] * q[n - m] for m in range(n + 1)) == pytest.approx(0.0, abs=1e-12)


def test_pred_weights_of_a_long_history_agree_with_those_of_a_short_one():
    """Beyond 64 terms the reciprocal series is computed by Newton doubling: same numbers."""
    solver = get_solver("pred")
    torch.testing.assert_close(
        solver.weights(order(0.6), 5000)[:64], solver.weights(order(0.6), 64), rtol=1e-10, atol=1e-14
    )


def test_several_terms_add_up_and_one_term_is_plain_gl():
    multi, single = get_solver("glmulti"), get_solver("gl")
    alphas = torch.tensor([0.9, 0.4], dtype=torch.float64)
    factors = torch.tensor([1.5, 0.5], dtype=torch.float64)
    gain, weights = multi.terms(alphas, factors, 0.5, 6)
    leading = sum(c * 0.5**-a for c, a in zip(factors.tolist(), alphas.tolist(), strict=True))
    assert float(gain) == pytest.approx(1 / leading)
    expected = sum(
        c * 0.5 ** -float(a) * single.weights(a, 6) for c, a in zip(factors.tolist(), alphas, strict=True)
    )
    torch.testing.assert_close(weights, expected / leading)
    gain, weights = multi.terms(order(0.4).reshape(1), torch.ones(1, dtype=torch.float64), 0.5, 6)
    torch.testing.assert_close(weights, single.weights(order(0.4), 6))


# -- the reference integrator ---------------------------------------------------------------------


def test_the_integrator_takes_any_shape_and_passes_gradients():
    start = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    for name in ("gl", "abm", "trap"):
        path = integrate(lambda t, y: t - y, start, 1.0, 8, alpha, get_solver(name))
        assert path.shape == (9, 2, 3)
        grads = torch.autograd.grad(path[-1].sum(), (start, alpha))
        assert all(torch.isfinite(g).all() and (g != 0).all() for g in grads)


def test_the_integrator_refuses_what_it_cannot_use():
    one = torch.ones(())
    with pytest.raises(OrderError, match="alpha must lie in"):
        integrate(lambda t, y: y, one, 1.0, 8, 1.5, get_solver("gl"))
    with pytest.raises(OptionError, match="must be positive"):
        integrate(lambda t, y: y, one, 1.0, 0, 0.5, get_solver("gl"))
    with pytest.raises(StateError, match=r"a step is unsolved after 200 .* take more steps"):
        integrate(lambda t, y: -50.0 * y, one, 1.0, 8, 0.5, get_solver("trap"))


def test_a_solver_needs_no_more_than_gain_and_weights():
    """The whole of a third-party solver; it says what it measures and integrates at once."""

    class Mine(ExplicitSolver):
        name = "mine"

        def accuracy(self, alpha):
            return 1.0

        def gain(self, alpha, step_size):
            return step_size**alpha

        def weights(self, alpha, n):
            m = torch.arange(1, n + 1, dtype=alpha.dtype).reshape(-1, *[1] * alpha.dim())
            return torch.cumprod(1 - (1 + alpha) / m, 0)

    check_solver(Mine(), alphas=[0.5])


@pytest.mark.parametrize("name", ["gl", "l1", "pred", "glmulti"])
@pytest.mark.parametrize("step_size", [1.0, 0.1, 1 / 128, 3.7])
def test_the_gain_at_order_one_is_the_step_to_the_last_bit(name, step_size):
    one = torch.ones((), dtype=torch.float64)
    assert get_solver(name).gain(one, step_size).item() == step_size


# -- learning an order of one -----------------------------------------------------------------------


def test_gl_weights_have_their_derivative_at_order_one_too():
    alpha = order(1.0).requires_grad_()
    weights = GrunwaldLetnikov().weights(alpha, 60)
    assert weights.tolist() == [-1.0] + 59 * [0.0]
    slopes = [torch.autograd.grad(w, alpha, retain_graph=True)[0].item() for w in weights]
    assert slopes == pytest.approx([-1.0] + [1.0 / (m * (m - 1)) for m in range(2, 61)], rel=1e-12)


def test_their_derivative_at_order_one_does_not_take_a_pass_for_each_weight():
    """At order one all weights but the first vanish; torch goes through a product with zeros one by one."""
    alpha = order(1.0).requires_grad_()
    weights = GrunwaldLetnikov().weights(alpha, 1000)
    upstream = torch.ones_like(weights, requires_grad=True)  # as the engine does: the kernel's derivatives
    with torch.autograd.profiler.profile() as seen:
        torch.autograd.grad(weights, alpha, upstream, create_graph=True)
    assert 10 < len(seen.function_events) < 200
