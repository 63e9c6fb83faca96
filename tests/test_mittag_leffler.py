"""E_{a,b}(z) against mpmath, its closed forms, its identities and its own derivatives."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from spikede_plugins import OptionError, OptionTypeError, OrderError
from spikede_plugins.mittag_leffler import _contour, mittag_leffler

mpmath = pytest.importorskip("mpmath")
mp, mpf = mpmath.mp, mpmath.mpf

ALPHAS = (
    *(0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.99, 0.999),
    *(1.0, 1.001, 1.01, 1.2, 1.5, 1.8, 1.99, 2.0),
)
BETAS = (0.3, 0.5, 1.0, 1.5, 2.0, 3.0)
INF, NAN = math.inf, math.nan


def grid(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Reference:
    """E_{a,b}(z) to 25 digits, by what the module does not use: two series.

    Up to ``rho = |z|^(1/a) = 50`` the defining one, in enough digits for its cancellation, e^rho; beyond,
    the asymptotic one ``-sum_k z^-k / Gamma(b - a k)`` and its exponentials, whose error is below e^-rho.
    """

    LIMIT = 50

    def __init__(self, alpha: float, beta: float, limit: float = LIMIT) -> None:
        self.a, self.b, self.limit = mpf(alpha), mpf(beta), limit
        with mp.workdps(30 + int(limit)):
            self.ahead = [mp.rgamma(self.a * k + self.b) for k in range(int((4 * limit + 40) / alpha) + 20)]
            self.behind = [mp.rgamma(self.b - self.a * k) for k in range(1, int(min(300, limit / alpha)) + 1)]

    def __call__(self, z: float, derivative: bool = False) -> mpf:
        with mp.workdps(30 + int(self.limit)):
            rho = abs(mpf(z)) ** (1 / self.a)
            if rho <= self.limit:
                return self.series(mpf(z), rho, int(derivative))
            assert not derivative, "the reference knows derivatives near zero only"
            return self.asymptotic(mpf(z), rho)

    def series(self, z: mpf, rho: mpf, order: int) -> mpf:
        total, power = mpf(0), mpf(1)
        for k in range(order, len(self.ahead)):
            term = power * self.ahead[k] * (k if order else 1)
            total += term
            power *= z
            if self.a * k > rho + 5 and abs(term) < mpf(10) ** -36 * min(1, abs(total)):
                return total
        raise AssertionError("the reference series has too few terms")

    def asymptotic(self, z: mpf, rho: mpf) -> mpf:
        total, power = mpf(0), mpf(1)
        for k, coefficient in enumerate(self.behind, 1):
            power /= z
            total -= power * coefficient
            if abs(power) * mp.gamma(self.a * k + 1) < mpf(10) ** -36:
                break
        if z > 0:
            return total + rho ** (1 - self.b) * mp.exp(rho) / self.a
        pole = rho * mp.expjpi(1 / self.a)  # and its mirror image; at a = 1 there is one, at -rho
        share = (pole ** (1 - self.b) * mp.exp(pole) / self.a).real
        return total + share * (2 if self.a > 1 else 1 if self.a == 1 else 0)


def errors(alpha: float, beta: float, z: list[float]) -> list[tuple[float, float, float]]:
    """For each z: z, the error relative to max(1, |E|), and relative to |E| (unless that underflows)."""
    reference, rows = Reference(alpha, beta), []
    for x, value in zip(z, mittag_leffler(grid(*z), alpha, beta).tolist(), strict=True):
        exact = reference(x)
        error = abs(value - exact)
        rows.append((x, float(error / max(1, abs(exact))), float(error / max(1e-300, abs(exact)))))
    return rows


def arguments(alpha: float) -> list[float]:
    """From -1e4 to where the function overflows, and close to where its parts change over."""
    end = 700.0**alpha  # E is about exp(z^(1/alpha)) there
    negative = [1e-9, 1e-3, 0.1, 0.5, 0.99, 1.0, 1.01, 2.0, 5.0, 10.0, 20.0, 50.0, 200.0, 1e3, 1e4]
    positive = [1e-9, 1e-3, 0.1, 0.5, 0.99, 1.0, 1.01]
    positive += [end * part for part in (0.01, 0.1, 0.3, 0.6, 0.8, 0.9, 1.0)]
    return [-x for x in negative] + [x for x in positive if x <= end]


# -- the values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", ALPHAS)
def test_values_against_mpmath(alpha):
    for beta in {*BETAS, alpha}:
        for z, mixed, relative in errors(alpha, beta, arguments(alpha)):
            assert mixed < 1e-12, (beta, z, mixed)
            assert relative < 1e-10, (beta, z, relative)


@pytest.mark.parametrize("alpha", [0.05, 0.5, 0.9, 1.0, 1.2, 1.8, 2.0])
def test_the_tolerance_tells_neighbouring_orders_apart(alpha):
    """The table above is worth something: an order that is off by 1e-9 fails it."""
    z, reference = arguments(alpha), Reference(alpha, 1.5)
    wrong = mittag_leffler(grid(*z), alpha - 1e-9, 1.5).tolist()
    exact = [reference(x) for x in z]
    caught = [abs(w - e) > 1e-12 * max(1, abs(e)) for w, e in zip(wrong, exact, strict=True)]
    assert sum(caught) > len(z) / 2


@pytest.mark.parametrize(
    ("alpha", "beta"), [(0.3, 1.0), (0.8, 2.5), (1.0, 0.7), (1.3, 1.0), (1.9, 0.4), (2.0, 1.0)]
)
def test_values_where_the_method_changes_over(alpha, beta):
    """A pole on the parabola, on nodes and between them, at the edge of the strip; |z| at the radius."""
    contour = _contour(alpha, beta)
    edges = [
        contour.mu**alpha,  # z > 0: the pole is on the parabola
        (contour.mu * (1.0 - contour.strip) ** 2) ** alpha,
        contour.radius,
        -contour.radius,
        -1.0,
    ]
    if alpha > 1.0:  # z < 0: w* = i (1 - sqrt(s*/mu)), s* at the angle pi/alpha
        angle = 0.5 * math.pi / alpha
        roots = [1.0 / math.cos(angle), (1.0 - contour.strip) / math.cos(angle)]
        nodes = (4.0, 4.25, 4.5, 4.75, 5.0, 7.0, 9.5, 12.25)
        roots += [node * contour.step / math.sin(angle) for node in nodes]
        edges += [-((contour.mu * root * root) ** alpha) for root in roots]
    both_sides = [edge * (1.0 + shift) for edge in edges for shift in (-1e-6, 0.0, 1e-6)]
    for z, mixed, _ in errors(alpha, beta, both_sides):
        assert mixed < 1e-12, (z, mixed)


@pytest.mark.parametrize("node", [8.0, 8.25, 8.5, 9.5, 12.5])
def test_a_pole_that_sits_on_a_node(node):
    """Where the pair of poles crosses the parabola, at w = tan(pi / 2a), is a matter of alpha alone."""
    low, high = 1.05, 2.0
    for _ in range(60):
        alpha = 0.5 * (low + high)
        above = math.tan(0.5 * math.pi / alpha) > node * _contour(alpha, 1.0).step
        low, high = (alpha, high) if above else (low, alpha)
    crossing = -((_contour(alpha, 1.0).mu / math.cos(0.5 * math.pi / alpha) ** 2) ** alpha)
    assert 1.1 < alpha < 2.0
    for z, mixed, _ in errors(alpha, 1.0, [crossing * (1.0 + shift) for shift in (-1e-9, 0.0, 1e-15, 1e-4)]):
        assert mixed < 1e-12, (z, mixed)


@pytest.mark.parametrize("alpha", [0.1, 0.3, 1.0, 1.6])
@pytest.mark.parametrize("beta", [0.1, 4.0, 8.0, 30.0])
def test_other_beta_keep_their_relative_accuracy(alpha, beta):
    reference = Reference(alpha, beta, limit=140.0)  # the asymptotic series holds for rho well beyond beta
    z = [x for x in arguments(alpha) if not 140.0 < abs(x) ** (1 / alpha) < 200.0]
    for x, value in zip(z, mittag_leffler(grid(*z), alpha, beta).tolist(), strict=True):
        assert value == pytest.approx(float(reference(x)), rel=1e-11, abs=0.0), x


def test_a_very_small_order():
    reference = Reference(0.01, 1.0, limit=32.0)
    for z in (-1e4, -2.0, -1.0, 0.5, 0.99, 1.0, 1.03, 1.06):
        assert mittag_leffler(z, 0.01).item() == pytest.approx(float(reference(z)), rel=2e-12)


def test_power_law_tails_keep_their_relative_accuracy():
    """E_{a,a}(z) ~ -1/(Gamma(-a) z^2): the tail's first term is zero, and must not leave its rounding."""
    for alpha in (0.05, 0.3, 0.7, 0.95, 1.4):
        for z in (-1e4, -1e6, -1e9):
            value = mittag_leffler(z, alpha, alpha).item()
            assert value == pytest.approx(float(Reference(alpha, alpha)(z)), rel=1e-12, abs=0.0)


# -- the reference itself -------------------------------------------------------------------------


def test_the_reference_agrees_with_closed_forms():
    assert abs(Reference(1.0, 1.0)(-30.0) / mp.exp(-30) - 1) < 1e-15
    assert abs(Reference(0.5, 1.0)(-5.0) / (mp.exp(25) * mp.erfc(5)) - 1) < 1e-15
    assert abs(Reference(2.0, 2.0)(-900.0) / (mp.sin(30) / 30) - 1) < 1e-15


@pytest.mark.parametrize(("alpha", "beta"), [(0.65, 0.65), (0.99, 1.0), (1.01, 1.0), (1.5, 0.3), (1.99, 3.0)])
def test_the_two_series_of_the_reference_agree_where_they_meet(alpha, beta):
    one, other = Reference(alpha, beta, limit=70.0), Reference(alpha, beta, limit=50.0)
    for z in (-(60.0**alpha), 60.0**alpha):
        assert abs(one(z) - other(z)) < 1e-20 * max(1, abs(one(z)))


# -- closed forms and identities ------------------------------------------------------------------


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 5e-13) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_closed_forms():
    x = torch.linspace(-30.0, 30.0, 601, dtype=torch.float64)
    short = x[x.abs() < 26.0]  # e^(x^2) overflows beyond
    assert torch.equal(mittag_leffler(x, 1.0), torch.exp(x))
    close(mittag_leffler(x, 1.0, 2.0), torch.where(x == 0.0, 1.0, torch.expm1(x) / x))
    close(mittag_leffler(x * x, 2.0), torch.cosh(x))
    close(mittag_leffler(-x * x, 2.0), torch.cos(x))
    close(mittag_leffler(-x * x, 2.0, 2.0), torch.sinc(x / math.pi))
    close(mittag_leffler(short, 0.5), torch.special.erfcx(-short))
    close(mittag_leffler(short, 0.5), torch.exp(short * short) * torch.special.erfc(-short), 2e-12)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_recurrence(alpha):
    """E_{a,b}(z) = z E_{a,a+b}(z) + 1/Gamma(b)."""
    positive = torch.linspace(0.0, 600.0**alpha, 400, dtype=torch.float64)
    z = torch.cat([-torch.logspace(-3, 4, 400, dtype=torch.float64), positive])
    for beta in BETAS:
        known = mittag_leffler(z, alpha, beta)
        other = z * mittag_leffler(z, alpha, alpha + beta) + 1.0 / math.gamma(beta)
        size = 1.0 + known.abs()
        assert ((known - other).abs() / size).max() < 2e-12
        assert ((known - z * other).abs() / size).max() > 1e-3  # and not by accident


@pytest.mark.parametrize("alpha", ALPHAS)
def test_orders_next_to_each_other_have_values_next_to_each_other(alpha):
    """No special case stands apart: at 1, 2 and 1/2 least of all."""
    z = torch.linspace(-20.0, min(20.0, 100.0**alpha), 300, dtype=torch.float64)
    here = mittag_leffler(z, alpha, 1.0)
    nearby = mittag_leffler(z, alpha * (1.0 - 1e-12), 1.0)
    further = mittag_leffler(z, alpha * (1.0 - 1e-6), 1.0)
    size = 1.0 + here.abs()
    assert ((here - nearby).abs() / size).max() < 1e-8
    assert ((here - further).abs() / size).max() > 1e-8


def derivatives(alpha: float, beta: float, count: int) -> list[torch.Tensor]:
    """E(-x) and its first derivatives in z = -x, for x from 0 to 100."""
    z = -torch.logspace(-3, 2, 200, dtype=torch.float64).requires_grad_()
    found = [mittag_leffler(z, alpha, beta)]
    for _ in range(count):
        found += torch.autograd.grad(found[-1].sum(), z, create_graph=True)
    return [value.detach() for value in found]


@pytest.mark.parametrize(
    ("alpha", "beta"), [(0.05, 1.0), (0.3, 0.3), (0.5, 1.0), (0.7, 0.9), (0.99, 1.0), (1.0, 1.0)]
)
def test_complete_monotonicity_for_small_orders(alpha, beta):
    """x -> E(-x) is completely monotone for alpha <= 1, beta >= alpha (Schneider 1996): d^n E / dz^n > 0."""
    for value in derivatives(alpha, beta, 3):
        assert (value > 0.0).all()


@pytest.mark.parametrize(("alpha", "beta"), [(1.1, 1.0), (1.5, 1.0), (2.0, 2.0), (0.5, 0.3), (0.9, 0.5)])
def test_and_for_no_others(alpha, beta):
    assert any((value < -1e-9).any() for value in derivatives(alpha, beta, 3))


@pytest.mark.parametrize(
    ("alpha", "milliseconds", "digits"),
    [
        (1.0, 3.6464, 1e-4),
        (0.8, 4.728, 1e-3),
        (0.6, 7.6846, 1e-4),
        (0.4, 22.1426, 1e-4),
        (0.2, 639.888, 1e-3),
    ],
)
def test_the_first_spike_of_teka_2014(alpha, milliseconds, digits):
    """120 (1 - E_a(-t^a / 20)) = 20 mV at the first spike."""
    t = grid(milliseconds - digits, milliseconds + digits)
    before, after = (120.0 * (1.0 - mittag_leffler(-(t**alpha) / 20.0, alpha))).tolist()
    assert before < 20.0 < after


# -- ends of the range ----------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("beta", [0.3, 1.0, 3.0])
def test_ends_of_the_range(alpha, beta):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        z = grid(0.0, -0.0, 1e-320, -1e-320, 800.0**alpha, 1e8, 1e308, INF, NAN)
        value = mittag_leffler(z, alpha, beta)
    assert value[:2].tolist() == [1.0 / math.gamma(beta)] * 2
    close(value[2:4], value[:2])
    assert value[4:8].tolist() == [INF] * 4
    assert value[8].isnan()


@pytest.mark.parametrize("alpha", [0.05, 0.5, 0.8, 1.3, 1.9])
def test_far_down_the_negative_axis(alpha):
    z = grid(-1e12, -1e100, -1e250, -1e308)
    tail = -1.0 / z / math.gamma(1.0 - alpha)
    torch.testing.assert_close(mittag_leffler(z, alpha), tail, rtol=1e-10, atol=0.0)
    assert mittag_leffler(-INF, alpha).item() == 0.0


def test_far_down_the_negative_axis_an_oscillation_keeps_its_amplitude():
    z = -torch.logspace(4, 300, 500, dtype=torch.float64)
    amplitude = mittag_leffler(z, 2.0).abs().max().item()
    assert 0.99 < amplitude < 1.0 + 1e-12
    assert mittag_leffler(-INF, 2.0, 1.5).item() == 0.0
    assert math.isnan(mittag_leffler(-INF, 2.0).item())  # a cosine has no limit


def test_the_last_value_before_overflow():
    """E_{1/2}(z) is about 2 e^(z^2): finite up to z^2 = log(max / 2)."""
    last = math.sqrt(math.log(torch.finfo(torch.float64).max / 2.0))
    below, above = mittag_leffler(grid(last * (1 - 1e-6), last * (1 + 1e-6)), 0.5).tolist()
    assert math.isfinite(below) and below > 1e307
    assert above == INF


def test_huge_beta():
    z = grid(-1e3, -1.0, 0.0, 1.0, 10.0)
    for beta in (150.0, 175.0, 1e4, 1e300):
        value = mittag_leffler(z, 1.5, beta)
        assert (value >= 0.0).all() and (value <= 1.0 / math.gamma(150.0) * 1.01).all()
    # The pole's share does not depend on the sum: e^(s*) s*^(1-b) / a.
    exact = math.exp(2000.0 - 299.0 * math.log(2000.0) + math.log(1.0 / 0.5))
    assert mittag_leffler(2000.0**0.5, 0.5, 300.0).item() == pytest.approx(exact, rel=1e-10)


# -- shapes, types --------------------------------------------------------------------------------


def test_shapes_and_dtypes():
    numpy = pytest.importorskip("numpy")
    value = mittag_leffler(-1.5, 0.7)
    assert value.shape == () and value.dtype == torch.float64
    for z in (-1.5, numpy.float64(-1.5), numpy.array(-1.5), grid(-1.5)[0]):
        assert torch.equal(mittag_leffler(z, 0.7), value)
    assert torch.equal(mittag_leffler(-2, 0.7), mittag_leffler(-2.0, 0.7))
    assert mittag_leffler(torch.tensor([[1, 2, 3]]), 0.7).dtype == torch.float64

    z = torch.linspace(-5.0, 3.0, 24, dtype=torch.float64).reshape(2, 3, 4)
    assert mittag_leffler(z, 0.7).shape == (2, 3, 4)
    close(mittag_leffler(z, 0.7)[1, 2, 3], mittag_leffler(z[1, 2, 3].item(), 0.7), 1e-14)
    close(mittag_leffler(z.transpose(0, 2), 0.7), mittag_leffler(z, 0.7).transpose(0, 2), 1e-14)
    assert mittag_leffler(torch.zeros(0, 3), 0.7).shape == (0, 3)

    array = z.numpy()[::-1]
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(mittag_leffler(array, 0.7), mittag_leffler(z, 0.7).flip(0), 1e-14)
    assert mittag_leffler(array.astype("float32"), 0.7).dtype == torch.float64

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        short = z.to(dtype)
        assert mittag_leffler(short, 0.7).dtype == dtype
        assert torch.equal(mittag_leffler(short, 0.7), mittag_leffler(short.double(), 0.7).to(dtype))


def test_alpha_and_beta_may_be_anything_that_is_one_number():
    numpy = pytest.importorskip("numpy")
    expected = mittag_leffler(-1.5, 0.5, 2.0)
    for half in (grid(0.5), torch.tensor(0.5), numpy.float32(0.5), numpy.array([0.5])):
        assert torch.equal(mittag_leffler(-1.5, half, 2.0), expected)
    for two in (2, grid(2.0)[0], torch.tensor(2), numpy.int64(2)):
        assert torch.equal(mittag_leffler(-1.5, 0.5, two), expected)


def test_many_values_are_the_single_values():
    z = torch.cat([torch.linspace(-60.0, 10.0, 20_001, dtype=torch.float64), grid(NAN, 0.0)])
    for alpha in (0.6, 1.4):
        together = mittag_leffler(z, alpha)
        for i in (0, 4095, 4096, 12_345, 17_142, 20_000, 20_001, 20_002):
            alone = mittag_leffler(z[i], alpha)
            torch.testing.assert_close(alone, together[i], rtol=1e-14, atol=1e-14, equal_nan=True)


# -- derivatives ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "beta"),
    [(0.05, 1.0), (0.3, 0.3), (0.5, 2.5), (0.8, 1.0), (1.0, 1.0), (1.0, 0.4), (1.5, 1.0), (2.0, 1.0)],
)
def test_gradcheck(alpha, beta):
    top = min(3.0, 3.0**alpha)
    z = grid(-40.0, -7.3, -1.2, -1.0, -0.8, -1e-3, 0.0, 1e-3, 0.3 * top, 0.9 * top, top).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: mittag_leffler(z, alpha, beta), z)
    assert torch.autograd.gradgradcheck(lambda z: mittag_leffler(z, alpha, beta), z)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.99, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("beta", [0.3, 1.0, 3.0])
def test_derivative_against_mpmath(alpha, beta):
    """Finite differences see six digits; the series of the derivative sees all, on both sides of z = -1."""
    end = 45.0**alpha
    inside = (-20.0, -5.0, -1.001, -1.0, -0.999, -0.1, 0.0, 1e-12, 0.5, 1.0, 2.0)
    z = grid(-end, *(x for x in inside if abs(x) < end), end).requires_grad_()
    (found,) = torch.autograd.grad(mittag_leffler(z, alpha, beta).sum(), z)
    reference = Reference(alpha, beta)
    for x, value in zip(z.tolist(), found.tolist(), strict=True):
        exact = reference(x, derivative=True)
        assert abs(value - exact) < 2e-12 * max(1, abs(exact)), (x, value)


def test_derivative_far_out():
    """Where E decays like 1/z its derivative decays like 1/z^2, digits and all; out of range it is inf."""
    z = grid(-1e4, -1e6, -1e8).requires_grad_()
    (found,) = torch.autograd.grad(mittag_leffler(z, 0.6, 1.0).sum(), z)
    tail = sum(k * z.detach() ** (-k - 1) / math.gamma(1.0 - 0.6 * k) for k in range(1, 5))
    torch.testing.assert_close(found, tail, rtol=1e-12, atol=0.0)

    z = grid(-INF, 709.5, 720.0, INF, NAN).requires_grad_()
    for beta in (0.5, 1.0, 3.0):
        (found,) = torch.autograd.grad(mittag_leffler(z, 1.0, beta).sum(), z)
        assert found[0] == 0.0 and found[3] == INF and found[4].isnan()
        assert not found[1:3].isnan().any()
    (found,) = torch.autograd.grad(mittag_leffler(z, 1.0).sum(), z)
    assert torch.equal(found[:4], torch.exp(z.detach())[:4])


def test_gradients_reach_single_precision_and_any_shape():
    z = torch.linspace(-3.0, 1.0, 6).reshape(2, 3).requires_grad_()
    mittag_leffler(z, 1.0).sum().backward()
    assert z.grad is not None and z.grad.dtype == torch.float32
    torch.testing.assert_close(z.grad, torch.exp(z.detach()))


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, -0.5, 2.0001, INF, NAN])
def test_orders_outside_the_interval(alpha):
    with pytest.raises(OrderError, match=r"alpha must lie in \(0, 2\], got .* Pass e.g. alpha=0.7"):
        mittag_leffler(1.0, alpha)


@pytest.mark.parametrize("beta", [0.0, -1.0, INF, NAN])
def test_beta_that_is_not_positive(beta):
    with pytest.raises(OptionError, match=r"beta must be positive and finite, got .* Pass e.g. beta=1.0"):
        mittag_leffler(1.0, 0.5, beta)


@pytest.mark.parametrize("wrong", ["0.5", None, True, 0.5j, [0.5]])
def test_what_is_not_a_number(wrong):
    with pytest.raises(OptionTypeError, match="alpha must be one real number, got"):
        mittag_leffler(1.0, wrong)
    with pytest.raises(OptionTypeError, match="beta must be one real number, got"):
        mittag_leffler(1.0, 0.5, wrong)


def test_more_than_one_order():
    with pytest.raises(OptionTypeError, match=r"of shape \(2,\); call mittag_leffler once for each alpha"):
        mittag_leffler(1.0, grid(0.5, 0.6))


def test_a_gradient_that_would_be_dropped():
    order = torch.tensor(0.5, requires_grad=True)
    for arguments in ((1.0, order), (1.0, 0.5, order)):
        with pytest.raises(OptionError, match=r"requires grad, but .*; pass (alpha|beta).detach\(\)"):
            mittag_leffler(*arguments)
        with torch.no_grad():
            assert not mittag_leffler(*arguments).requires_grad
    assert not mittag_leffler(1.0, order.detach()).requires_grad


@pytest.mark.parametrize("z", [1j, torch.tensor([1j])])
def test_complex_arguments(z):
    numpy = pytest.importorskip("numpy")
    for complex_z in (z, numpy.asarray(z)):
        with pytest.raises(OptionTypeError, match=r"z must be real, got .* Pass z\.real"):
            mittag_leffler(complex_z, 0.5)


@pytest.mark.parametrize("z", ["1.0", None, [1.0, 2.0]])
def test_arguments_that_are_not_numbers(z):
    with pytest.raises(OptionTypeError, match=r"z must be a real number, a NumPy array or a tensor .* pass"):
        mittag_leffler(z, 0.5)
