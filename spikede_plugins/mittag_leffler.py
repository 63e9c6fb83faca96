"""The two-parameter Mittag-Leffler function of a real argument,

    E_{a,b}(z) = sum_k z^k / Gamma(a k + b),        0 < a <= 2,  b > 0,

the exponential of fractional calculus: ``D^a y = lambda y``, ``y(0) = 1`` has the solution
``y(t) = E_{a,1}(lambda t^a)``.

One formula serves every z. The inverse Laplace transform

    E_{a,b}(z) = 1/(2 pi i) int e^s F(s) ds,        F(s) = s^(a-b) / (s^a - z),

runs over the parabola ``s(w) = mu (1 + i w)^2`` and is summed by the trapezoidal rule: nodes ``w_j``, step h.
The parabola, its nodes and its weights do not depend on z, so for many z this is one rational function with
about twenty terms. What does depend on z are the poles of F, ``s*^a = z``. A pole may lie on either side of
the parabola or right on it: what it takes from the trapezoidal sum is known exactly, and added back:

    E_{a,b}(z) = sum_j h e^(s_j) F(s_j) s'(w_j) / (2 pi i)  +  sum_* R_* / (1 - e^(-2 pi i (w* - w_0) / h)),

with ``R_* = s*^(1-b) e^(s*) / a`` and ``w* = i (1 - sqrt(s* / mu))``. For a pole far to the right of the
parabola the factor is 1 (the residue theorem), far to the left it vanishes. What then limits the accuracy is
the branch cut of F alone, which is always the same distance away.

Sources: the integral, Gorenflo, Loutchko & Luchko, *Fract. Calc. Appl. Anal.* 5 (2002) 491-518; the parabola,
Weideman & Trefethen, *Math. Comp.* 76 (2007) 1341-1356, and, for this function, Garrappa, *SIAM J. Numer.
Anal.* 53 (2015) 1350-1369; a pole's share in a trapezoidal sum, Chiarella & Reichel, *Math. Comp.* 22 (1968)
137-143.
"""

from __future__ import annotations

import cmath
import math
import numbers
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from spikede_plugins.checks import is_readable
from spikede_plugins.errors import OptionError, OptionTypeError, OrderError

#: The trapezoidal sum is cut off, and its step chosen, at exp(-this) of the integrand's largest value.
_DIGITS = 38.0
#: The parabola crosses the real axis here (further left it would need more nodes, further right
#: e^s costs digits), and at beta where that is more.
_CROSSING = 4.0
#: Beyond this beta all but the poles' share is below the smallest number.
_BETA_MAX = 1000.0
#: Below -1 the derivative is read from E_{a,b-1}, elsewhere from E_{a,a+b-1}: see :func:`_derivative`.
_DERIVATIVE_SWITCH = -1.0
#: So many values at a time: the [values, nodes] table of a chunk stays in the cache.
_CHUNK = 4096
#: Stands in for infinity where infinity would meet a zero or another infinity.
_HUGE = 1e300
#: Its square is still finite.
_FAR_OUT = 1e150


def mittag_leffler(z: Any, alpha: float | Tensor, beta: float | Tensor = 1.0) -> Tensor:
    """``E_{alpha,beta}(z) = sum_k z^k / Gamma(alpha k + beta)``, for each element of a real ``z``.

    Args:
        z: a number, a NumPy array or a tensor, of any shape.
        alpha: one order in (0, 2].
        beta: one positive number.

    Returns:
        The values, of the shape of ``z`` and on its device; float64, except that a floating tensor keeps its
        dtype (the computation is in float64 all the same). Values beyond the range are inf, NaN stays NaN.

    Differentiable in ``z``, any number of times; not in ``alpha`` and ``beta``.

    The error is below 1e-12 of the value; most of that is rounding in the exponential of a large positive z,
    where the value itself moves, with the last bit of z, by ``z^(1/alpha) / alpha`` of its own. Where the
    value is smaller than its parts the error is still below 1e-12, but not of the value: next to zeros, and
    where alpha is so close to 1, but not 1, that an exponential is small and yet hides the power of 1/z.

    Raises:
        OrderError: if alpha lies outside (0, 2] or is not finite.
        OptionError: if beta is not positive and finite, or alpha or beta asks for a gradient.
        OptionTypeError: if alpha or beta is not one real number, or z is not real numbers.

    Source: see the module; integral representation of Gorenflo, Loutchko & Luchko (2002).
    """
    a, b = _check_order(alpha), _check_beta(beta)
    values, dtype = _real(z)
    result: Tensor = _MittagLeffler.apply(values, a, min(b, _HUGE))
    return result.to(dtype)


# -- what comes in --------------------------------------------------------------------------------


def _number(value: Any, what: str, example: str) -> float:
    """``value`` as a float, if it is one real number and wants no gradient."""
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise OptionError(
            f"{what} requires grad, but mittag_leffler has no derivative in {what} and would drop it; "
            f"pass {what}.detach() if no gradient is wanted."
        )
    if hasattr(value, "item"):  # tensors, NumPy arrays and scalars of one element
        try:
            value = value.item()
        except (RuntimeError, ValueError, TypeError) as error:
            raise OptionTypeError(
                f"{what} must be one real number for all z, got {type(value).__name__} of shape "
                f"{tuple(getattr(value, 'shape', ()))}; call mittag_leffler once for each {what}."
            ) from error
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise OptionTypeError(
            f"{what} must be one real number, got {value!r} ({type(value).__name__}); pass e.g. {example}."
        )
    try:
        return float(value)
    except OverflowError:  # an int that no float can be
        return math.inf if value == abs(value) else -math.inf


def _check_order(alpha: Any) -> float:
    a = _number(alpha, "alpha", "alpha=0.7")
    if not 0.0 < a <= 2.0:
        raise OrderError(
            f"alpha must lie in (0, 2], got {a}; other orders of E_(alpha,beta) are not covered. "
            "Pass e.g. alpha=0.7."
        )
    return a


def _check_beta(beta: Any) -> float:
    b = _number(beta, "beta", "beta=1.0")
    if not 0.0 < b < math.inf:
        raise OptionError(
            f"beta must be positive and finite, got {b}; for another beta use "
            "E_(alpha,beta)(z) = z E_(alpha,alpha+beta)(z) + 1/Gamma(beta). Pass e.g. beta=1.0."
        )
    return b


def _real(z: Any) -> tuple[Tensor, torch.dtype]:
    """``z`` as a float64 tensor, and the dtype that the caller gets back."""
    if isinstance(z, Tensor):
        is_complex, kind = z.is_complex(), str(z.dtype)
    elif isinstance(z, numbers.Number) or not hasattr(z, "__array__"):
        is_complex, kind = isinstance(z, numbers.Number) and not isinstance(z, numbers.Real), type(z).__name__
    else:
        import numpy  # whoever holds such an object has it

        z = numpy.asarray(z)
        is_complex, kind = numpy.iscomplexobj(z), f"an array of {z.dtype}"
    if is_complex:
        raise OptionTypeError(
            f"z must be real, got {kind}; a complex argument of the Mittag-Leffler function is not covered. "
            "Pass z.real if the imaginary part is zero."
        )
    if not is_readable(z):
        raise OptionTypeError("z must hold numbers, got a meta or sparse tensor; pass z.to_dense().")
    if isinstance(z, Tensor):
        return z.to(torch.float64), z.dtype if z.is_floating_point() else torch.float64
    if isinstance(z, numbers.Real):
        return torch.tensor(_number(z, "z", "z=-1.0"), dtype=torch.float64), torch.float64
    try:
        # A copy: torch takes neither read-only arrays nor negative strides.
        return torch.from_numpy(z.astype("float64", order="C", copy=True)), torch.float64
    except (AttributeError, TypeError, ValueError) as error:
        raise OptionTypeError(
            f"z must be a real number, a NumPy array or a tensor of real numbers, got {kind}; "
            "pass e.g. torch.tensor([-1.0, 0.5])."
        ) from error


# -- differentiation in z -------------------------------------------------------------------------


class _MittagLeffler(torch.autograd.Function):
    """E_{a,b} of a float64 tensor; b may be any real number here, as derivatives need."""

    @staticmethod
    def forward(z: Tensor, a: float, b: float) -> Tensor:
        return _evaluate(z.detach().reshape(-1), a, b).reshape(z.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, float], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.orders = inputs[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (z,) = ctx.saved_tensors
        return grad * _derivative(z, *ctx.orders), None, None


def _derivative(z: Tensor, a: float, b: float) -> Tensor:
    """``d/dz E_{a,b}(z)``, itself differentiable.

    Two forms of one identity, equal by ``E_{a,b} = z E_{a,a+b} + 1/Gamma(b)``:

        a E'(z) = E_{a,a+b-1}(z) - (b-1) E_{a,a+b}(z)  =  (E_{a,b-1}(z) - (b-1) E_{a,b}(z)) / z.

    The second loses all digits at z = 0. The first loses them for z -> -inf, where its leading terms cancel.
    """
    left = z < _DERIVATIVE_SWITCH
    below, above = z[left], z[~left]
    slopes = torch.zeros_like(z).masked_scatter(left, _difference(below, a, b, b) / (a * below))
    return slopes.masked_scatter(~left, _difference(above, a, a + b, b) / a)


def _difference(z: Tensor, a: float, c: float, b: float) -> Tensor:
    """``E_{a,c-1}(z) - (b-1) E_{a,c}(z)``; where the first, which is the larger one, overflows, it is inf."""
    first: Tensor = _MittagLeffler.apply(z, a, c - 1.0)
    if b == 1.0:
        return first
    second: Tensor = _MittagLeffler.apply(z, a, c)
    return torch.where(first == math.inf, first, first - (b - 1.0) * second)


# -- the value ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Nodes:
    """The trapezoidal sum over one set of nodes: ``sum_j Re(weight_j / (s_j^a - z))``.

    Attributes:
        powers: ``s_j^a - 1``, so that ``z - 1``, exact for z near 1, can be taken off: for small a all the
            s_j^a crowd around 1.
        near: weights of the sum for E_{a,b} itself.
        far: weights of the sum for E_{a,b-2a}, which is what is left of E_{a,b} after two terms in 1/z.
    """

    powers: tuple[complex, ...]
    near: tuple[complex, ...]
    far: tuple[complex, ...]


@dataclass(frozen=True)
class _Contour:
    """The parabola ``s = mu (1 + i w)^2``, its nodes and where things change over.

    Attributes:
        mu: where it crosses the real axis.
        step: distance h of the nodes in w.
        strip: poles with ``Im w* < strip`` are accounted for; those beyond leave less than rounding.
        radius: ``|z|`` beyond which two terms in 1/z are taken out.
        shifted: nodes ``(j + 1/2) h``.
        centred: nodes ``j h``, for poles that come close to one of the shifted.
    """

    mu: float
    step: float
    strip: float
    radius: float
    shifted: _Nodes
    centred: _Nodes


@lru_cache(maxsize=128)
def _contour(a: float, b: float) -> _Contour:
    b = min(b, _BETA_MAX)
    mu = max(_CROSSING, b)  # e^s s^(-b) has its saddle at s = b: through it nothing cancels
    step, strip = _step_and_strip(a, b, mu)
    # Beyond the last node e^(-mu w^2) times the largest power of s in use is below the cut-off.
    growth, width = max(3.0 * a - b, 0.0) + 0.5, math.sqrt(_DIGITS / mu)
    for _ in range(4):
        width = math.sqrt((_DIGITS + growth * math.log1p(width * width)) / mu)
    count = math.ceil(width / step)
    return _Contour(
        mu=mu, step=step, strip=strip, radius=(2.0 * mu) ** a,
        shifted=_nodes(a, b, mu, step, [j + 0.5 for j in range(count)]),
        centred=_nodes(a, b, mu, step, [float(j) for j in range(count + 1)]),
    )  # fmt: skip


def _step_and_strip(a: float, b: float, mu: float) -> tuple[float, float]:
    """The widest step whose error is below the cut-off, and the height of the line that bounds it.

    The trapezoidal sum errs by ``e^(-2 pi c / h)`` times what the integrand grows to on ``Im w = +-c``, for
    every c up to the nearest singularity: above, the branch cut at c = 1; below, none, but e^s grows.
    """

    def growth(side: float, power: float) -> float:  # of e^s s^power, in logarithm, from Im w = 0
        return mu * (side * side - 1.0) + 2.0 * power * math.log(side)

    heights = [2.0 ** (-i / 16.0) for i in range(-64, 400)]
    above = [(c, growth(1.0 - c, -max(b, 0.0))) for c in heights if c < 0.99]
    below = [(c, growth(1.0 + c, 2.0 * a - b)) for c in heights]
    step = min(
        max(2.0 * math.pi * c / (_DIGITS + grown) for c, grown in side if _DIGITS + grown > 0.0)
        for side in (above, below)
    )
    strip = max(above, key=lambda line: 2.0 * math.pi * line[0] / step - line[1])[0]
    return step, strip


def _nodes(a: float, b: float, mu: float, step: float, places: list[float]) -> _Nodes:
    powers, near, far = [], [], []
    for place in places:
        root = complex(1.0, place * step)
        log_s = math.log(mu) + 2.0 * cmath.log(root)
        # The lower half of the parabola is the mirror image: twice the real part, but once at the tip.
        scale = (2.0 if place else 1.0) * step / math.pi * mu * root
        powers.append(_expm1(a * log_s))
        near.append(scale * cmath.exp(mu * root * root + (a - b) * log_s))
        far.append(scale * cmath.exp(mu * root * root + (3.0 * a - b) * log_s))
    return _Nodes(tuple(powers), tuple(near), tuple(far))


def _expm1(x: complex) -> complex:
    real = math.expm1(x.real) * math.cos(x.imag) - 2.0 * math.sin(0.5 * x.imag) ** 2
    return complex(real, math.exp(x.real) * math.sin(x.imag))


def _reciprocal_gamma(x: float) -> float:
    """``1 / Gamma(x)`` for any real x: an entire function, zero where Gamma has its poles."""
    if x <= 0.0 and x == math.floor(x):
        return 0.0
    if x > 170.0:
        return math.exp(-math.lgamma(min(x, _BETA_MAX)))
    try:
        return 1.0 / math.gamma(x)
    except OverflowError:  # |x| below the smallest normal number, where Gamma(x) is 1/x
        return x


def _evaluate(z: Tensor, a: float, b: float) -> Tensor:
    """E_{a,b} of a float64 tensor of shape [N], for any real b."""
    if a == 1.0 and b <= 1.0 and b == math.floor(b):
        # No power of 1/z is left beside the exponential, which then counts to its last digit.
        value = z ** (1.0 - b) * torch.exp(z)
    else:
        value = _along_the_parabola(z, a, b)
    value = torch.where(z == 0.0, _reciprocal_gamma(b), value)
    value = torch.where(z == math.inf, math.inf, value)
    # E_{2,b} swings with amplitude |z|^((1-b)/2); everything else dies out.
    return torch.where(z == -math.inf, 0.0 if a < 2.0 or b > 1.0 else math.nan, value)


def _along_the_parabola(z: Tensor, a: float, b: float) -> Tensor:
    """The trapezoidal sum and what the poles take from it."""
    contour = _contour(a, b)
    scaled = (torch.pow(z.abs(), 1.0 / a).clamp(max=_HUGE) / contour.mu).sqrt()
    positive, negative = z > 0.0, z < 0.0
    # The pole at s* > 0 crosses the parabola at w = 0, midway between two shifted nodes.
    straight = positive & (1.0 - scaled < contour.strip)
    # Two poles at the angles +-pi/a; for a <= 1 they are behind the cut.
    angle = 0.5 * math.pi / max(a, 1.0)
    across, along = scaled * math.cos(angle), scaled * math.sin(angle)
    turned = negative & (1.0 - across < contour.strip) & (a > 1.0)
    on_shifted_node = turned & (torch.remainder(along / contour.step - 0.25, 1.0) < 0.5)

    value = torch.empty_like(z)
    far = z.abs() > contour.radius
    for nodes, chosen in ((contour.shifted, ~on_shifted_node), (contour.centred, on_shifted_node)):
        value[chosen & ~far] = _sum(z[chosen & ~far], nodes.powers, nodes.near)
        value[chosen & far] = _far_sum(z[chosen & far], nodes, a, b)
    value[straight] += _straight_pole(scaled[straight], a, b, contour)
    if a > 1.0:
        value[turned] += _turned_poles(
            scaled[turned], torch.complex(along, 1.0 - across)[turned], on_shifted_node[turned], a, b, contour
        )
    return value


def _sum(z: Tensor, powers: tuple[complex, ...], weights: tuple[complex, ...]) -> Tensor:
    """``sum_j Re(weight_j / (s_j^a - z))`` for z of shape [N]."""
    power = torch.tensor(powers, dtype=torch.complex128, device=z.device)
    weight = torch.tensor(weights, dtype=torch.complex128, device=z.device)
    product, square = weight.imag * power.imag, power.imag**2
    sums = []
    # Further out than the square root of the range, the sum no longer counts beside the terms in 1/z.
    for part in (z - 1.0).clamp(-_FAR_OUT, _FAR_OUT).split(_CHUNK):
        real = power.real - part.unsqueeze(-1)
        sums.append((torch.addcmul(product, weight.real, real) / torch.addcmul(square, real, real)).sum(-1))
    return torch.cat(sums)


def _far_sum(z: Tensor, nodes: _Nodes, a: float, b: float) -> Tensor:
    """``E_{a,b}(z) = -1/(Gamma(b-a) z) - 1/(Gamma(b-2a) z^2) + E_{a,b-2a}(z) / z^2``, its poles left out.

    The leading terms may vanish (b = a) or nearly so: as sums over nodes they would cancel to noise.
    """
    inverse = 1.0 / z
    rest = _sum(z, nodes.powers, nodes.far) - _reciprocal_gamma(b - 2.0 * a)
    return inverse * (inverse * rest - _reciprocal_gamma(b - a))


def _straight_pole(scaled: Tensor, a: float, b: float, contour: _Contour) -> Tensor:
    """``s*^(1-b) e^(s*) / a / (1 + e^(2 pi Im w* / h))`` at ``s* = mu scaled^2``, ``w* = i (1 - scaled)``."""
    pole = contour.mu * scaled * scaled
    share = torch.nn.functional.logsigmoid(2.0 * math.pi / contour.step * (scaled - 1.0))
    return torch.exp(pole + (1.0 - b) * torch.log(pole) + share) / a


def _turned_poles(
    scaled: Tensor, w: Tensor, centred: Tensor, a: float, b: float, contour: _Contour
) -> Tensor:
    """``2 Re(s*^(1-b) e^(s*) / a / (1 - e^(-2 pi i (w* - w_0) / h)))`` at ``s* = mu scaled^2 e^(i pi/a)``."""
    modulus = contour.mu * scaled * scaled
    # cos(pi/a) = -sin(pi/a - pi/2): exactly 0 at a = 2, and no digits lost near it.
    decay = modulus * -math.sin(math.pi * (2.0 - a) / (2.0 * a)) + (1.0 - b) * torch.log(modulus)
    phase = modulus * math.sin(math.pi / a) + (1.0 - b) * math.pi / a
    first_node = torch.where(centred, 0.0, 0.5)
    rate = 2.0 * math.pi / contour.step
    passed = torch.exp(torch.complex(rate * w.imag, 2.0 * math.pi * (first_node - w.real / contour.step)))
    return 2.0 / a * (torch.polar(torch.exp(decay), phase) / (1.0 - passed)).real
