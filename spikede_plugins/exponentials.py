"""Memory weights as a sum of exponentials, and how wrong that is.

    W_m  ~  sum_p C_p x_p^(m - L - 1),      m = L+1 ... horizon,      x_p = exp(-s_p)

The weights of gl, l1 and pred are mixtures of decaying exponentials, so a few nodes with geometric rates s_p
carry them over many decades. The first L lags stay as they are. For given nodes the coefficients are the
least squares of the *relative* error, a linear map of the weights, so gradients to alpha go through it.

Source: the idea of Jiang, Zhang, Zhang & Zhang, Communications in Computational Physics 21 (2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from spikede_plugins.errors import OptionError

#: Steps a block: traces are read and updated once for so many.
BLOCK = 16
#: Lags before a block that are summed as they are, behind which the exponentials begin.
EXACT = 16
#: More traces than these are no longer cheaper than what they replace.
MAX_TRACES = 64

_SAMPLES = 200
#: Singular values below this share only blow up the coefficients: sums of large numbers of both signs.
_CUT = 1e-9
_SLOWEST, _FASTEST = (0.3, 1.0), (0.1, 0.2, 0.4, 0.8)


class Nodes(NamedTuple):
    """The rates chosen for some weights.

    Attributes:
        rates: ``s_p > 0``, ``[P]``, float64; ``exp(-BLOCK s_p)`` is a float32 number, so that it decays
            without rounding however often it is applied.
        horizon: up to which lag they were fitted.
        error: the largest relative error of the weights they were chosen for, over all lags.
    """

    rates: Tensor
    horizon: int
    error: float


def fit_horizon(horizon: int) -> int:
    """The lag a fit goes to: far enough to have something to fit."""
    return max(horizon, 4 * (EXACT + BLOCK))


def sampled_lags(horizon: int) -> Tensor:
    """The lags that a fit looks at, denser the nearer."""
    spread = torch.logspace(math.log10(EXACT + 1), math.log10(horizon), _SAMPLES, dtype=torch.float64)
    return torch.unique(spread.round().long().clamp(EXACT + 1, horizon))


def _rates(slowest: float, fastest: float, count: int, horizon: int) -> Tensor:
    ends = math.log10(slowest / horizon), math.log10(fastest)
    raw = torch.logspace(*ends, count, dtype=torch.float64)
    return -torch.exp(-BLOCK * raw).float().double().log() / BLOCK


def _powers(rates: Tensor, lags: Tensor) -> Tensor:
    """``x_p^(m - L - 1)`` at each lag, ``[lags, P]``."""
    return torch.exp(-rates * (lags - EXACT - 1).double().unsqueeze(1))


def coefficients(
    weights: Tensor, shape: Tensor, rates: Tensor, horizon: int, lags: Tensor | None = None
) -> Tensor:
    """``C [P, S]`` for weights ``[>= horizon, S]``: linear in the weights, so differentiable in them.

    Args:
        weights: what to fit.
        shape: numbers of the size of the weights, none of them 0 (the weights themselves, where they vanish
            those of a near order): errors are counted relative to these; no gradient goes through them.
        rates: the nodes ``[P]``.
        horizon: the last lag.
        lags: ``sampled_lags(horizon)``, for graphs that cannot hold how many these are.
    """
    if lags is None:
        lags = sampled_lags(horizon)
    scale = shape.detach()[lags - 1].T.unsqueeze(-1)  # [S, M, 1]
    matrix = _powers(rates, lags) / scale
    size = matrix.norm(dim=1, keepdim=True)  # slow and fast exponentials differ by many orders in these units
    u, singular, vh = torch.linalg.svd(matrix / size, full_matrices=False)
    # In factors, not as one matrix: applied one after the other they lose no digits.
    inverse = torch.where(singular > _CUT * singular[:, :1], 1.0 / singular, 0.0)
    target = weights[lags - 1].T.unsqueeze(-1) / scale
    found = vh.transpose(1, 2) @ (inverse.unsqueeze(-1) * (u.transpose(1, 2) @ target))
    return found[..., 0].T / size.squeeze(1).T


def weights_of(rates: Tensor, coefficient: Tensor, first: int, last: int) -> Tensor:
    """The weights that the exponentials stand for, lags ``first ... last``, ``[last - first + 1, S]``."""
    return _powers(rates, torch.arange(first, last + 1)) @ coefficient


def relative_error(weights: Tensor, shape: Tensor, rates: Tensor, coefficient: Tensor, horizon: int) -> float:
    """The largest ``|fitted - weight| / |shape|`` over *all* lags up to the horizon."""
    worst = 0.0
    for first in range(EXACT + 1, horizon + 1, 8192):
        last = min(first + 8191, horizon)
        off = weights_of(rates, coefficient, first, last) - weights[first - 1 : last]
        worst = max(worst, float((off / shape[first - 1 : last]).abs().max()))
    return worst


def choose_nodes(weights: Tensor, tolerance: float, horizon: int, what: str) -> Nodes:
    """The fewest nodes, in steps of 4, that carry all columns of ``weights [horizon, S]`` to ``tolerance``.

    Raises:
        OptionError: if 64 nodes do not; it tells the best that was reached.
    """
    fitted = fit_horizon(horizon)
    found = _choose(_Weights(weights[:fitted]), tolerance, fitted)
    if not math.isfinite(found.error):
        raise OptionError(
            f"{what}: the weights up to lag {horizon} vanish in float64, so exponentials cannot carry them; "
            'pass memory="full", or a larger order.'
        )
    if found.error > tolerance:
        raise OptionError(
            f"{what}: no sum of up to {MAX_TRACES} exponentials reaches tolerance {tolerance:g} up to lag "
            f"{horizon}; the best has a relative error of {found.error:.1e}. Ask for that "
            f"(SumOfExponentials(tolerance={_rounded_up(found.error):.1e}, horizon={horizon})), for a "
            'shorter horizon, or for memory="full".'
        )
    return found


def _rounded_up(error: float) -> float:
    digit = 10.0 ** (math.floor(math.log10(error)) - 1)
    return math.ceil(error / digit) * digit


class _Weights:
    """Weights as the key of a cache: equal numbers, equal keys."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._bytes = values.contiguous().numpy().tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Weights) and self._bytes == other._bytes

    def __hash__(self) -> int:
        return hash(self._bytes)


@lru_cache(maxsize=64)
def _choose(key: _Weights, tolerance: float, horizon: int) -> Nodes:
    weights = key.values
    lags = sampled_lags(horizon)
    best: Nodes | None = None
    usable = bool((weights[lags - 1] != 0).all()) and bool(torch.isfinite(weights).all())
    for count in range(4, MAX_TRACES + 1, 4) if usable else ():
        for slowest in _SLOWEST:
            for fastest in _FASTEST:
                rates = _rates(slowest, fastest, count, horizon)
                coefficient = coefficients(weights, weights, rates, horizon)
                sampled = _powers(rates, lags) @ coefficient / weights[lags - 1] - 1.0
                error = float(sampled.abs().max())
                if best is not None and error > max(best.error, tolerance):
                    continue
                error = relative_error(weights, weights, rates, coefficient, horizon)
                if best is None or error < best.error:
                    best = Nodes(rates, horizon, error)
        if best is not None and best.error <= tolerance:
            break
    return best if best is not None else Nodes(torch.zeros(0), horizon, math.inf)


def error_beyond(
    weights: Callable[[int], Tensor], rates: Tensor, coefficient: Tensor, horizon: int
) -> tuple[float, float]:
    """How far a sum over a bounded history can be off once it is longer than the horizon.

    The exponentials die out there, the weights do not. With ``sum_m W_m = 0``, which holds for every solver
    that takes a constant for a constant, what lies behind a lag is minus what lies before it.

    Args:
        weights: gives the first n bracket weights ``[n, S]``.
        rates, coefficient, horizon: the fit.

    Returns:
        The largest ``sum |W_m - fitted|`` over the lags from the horizon to 8 horizons, and a bound for runs
        of any length: each times the largest deviation in the history.
    """
    end = 8 * horizon
    given = weights(end)
    measured = torch.zeros(given.shape[1], dtype=torch.float64)
    for first in range(horizon + 1, end + 1, 8192):
        last = min(first + 8191, end)
        fitted = weights_of(rates, coefficient, first, last)
        measured += (given[first - 1 : last] - fitted).abs().sum(0)
    beyond = given.sum(0).abs()
    left = torch.exp(-rates * (end - EXACT)) / -torch.expm1(-rates)
    beyond += (left.unsqueeze(1) * coefficient.abs()).sum(0)
    return float(measured.max()), float((measured + beyond).max())
