"""Input given as samples, as a function of time: linear, nearest, cubic and Akima interpolation.

Samples x_i are taken at times t_0 < ... < t_{T-1}. With h_i = t_{i+1} - t_i, the slopes of the chords
m_i = (x_{i+1} - x_i) / h_i and the place w = (t - t_i) / h_i of t in its interval [t_i, t_{i+1}):

    linear    x(t) = (1 - w) x_i + w x_{i+1}
    nearest   x(t) = x_i where t <= (t_i + t_{i+1}) / 2, else x_{i+1}
    cubic     the line, and the cubic bump that gives the curve the slopes d_i, d_{i+1} at the two ends:
    akima     x(t) = (1 - w) x_i + w x_{i+1}
                     + h_i w (1 - w) [(1 - w) (d_i - m_i) + w (m_i - d_{i+1})]

The last two differ in their slopes d. The cubic spline has a continuous second derivative ("not-a-knot":
at t_1 and t_{T-2} also a continuous third), with l_i = h_i / (h_{i-1} + h_i) and u_i = 1 - l_i

    l_i d_{i-1} + 2 d_i + u_i d_{i+1} = 3 (l_i m_{i-1} + u_i m_i)

for all 0 < i < T-1, which is linear in x. Akima weighs the chords on both sides by how little they turn:

    d_i = (f' m_{i-1} + f m_i) / (f + f'),   f = |m_{i-1} - m_{i-2}|,   f' = |m_{i+1} - m_i|

Outside [t_0, t_{T-1}] the first and the last sample are held.

Sources: de Boor, *A Practical Guide to Splines* (1978), chapter IV; Akima, J. ACM 17 (1970), 589-602. The
values are those of ``numpy.interp`` and, in ``scipy.interpolate``, of ``interp1d(kind="nearest")``,
``CubicSpline`` and ``Akima1DInterpolator``.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spikede_plugins.errors import OptionError, OptionTypeError, UnknownNameError, nearest

#: The methods, and how many samples each needs.
_FEWEST = {"linear": 1, "nearest": 1, "cubic": 4, "akima": 5}
#: Akima: a turn that is smaller than this part of the largest one is rounding, and both chords count alike.
_NO_TURN = 1e-9
#: Slopes are worked out in float64 for so many values of x at a time, whatever the size of x.
_BLOCK = 2**20


def available_interpolations() -> list[str]:
    """The methods that :func:`interpolate` and :class:`Interpolant` know."""
    return sorted(_FEWEST)


def interpolate(x: Tensor, x_time: Any, t: Any, method: str = "linear") -> Tensor:
    """The samples ``x`` at the time(s) ``t``: ``Interpolant(x, x_time, method)(t)``.

    For many times, one after the other, make the :class:`Interpolant` once and call it.

    Args:
        x: samples, ``[T, ...]``.
        x_time: their times, ``[T]``, strictly increasing.
        t: where to evaluate, a number or ``[Q]``.
        method: "linear", "nearest", "cubic" or "akima".

    Returns:
        ``[...]`` for one time, ``[Q, ...]`` for several, in the dtype and on the device of ``x``.

    Raises:
        OptionError, OptionTypeError, UnknownNameError: as :class:`Interpolant` does.
    """
    return Interpolant(x, x_time, method)(t)


class Interpolant:
    """A function of time through samples; the equations are at the top of this module.

    >>> current = Interpolant(torch.tensor([[0.0], [4.0]]), [0.0, 1.0])
    >>> current(0.25)
    tensor([1.])
    >>> current([0.5, 7.0])
    tensor([[2.],
            [4.]])

    At a sample's own time the sample is returned, whatever its neighbours are. NaN and infinity in ``x`` are
    data: they show wherever the method uses them ("cubic" uses all samples of a channel for each value).
    Gradients reach ``x``, never a time.

    ``x`` is kept and not copied: do not write into it afterwards. "cubic" and "akima" also hold one slope a
    sample, so make a new interpolant after ``x`` changed, or for another backward pass.

    Args:
        x: samples, ``[T, ...]``, floating point ("nearest" takes any dtype).
        x_time: their times, ``[T]``, strictly increasing: a tensor, an array or a list. Handled in float64.
        method: "linear", "nearest", "cubic" (at least 4 samples) or "akima" (at least 5).

    Raises:
        UnknownNameError: for an unknown method; the nearest name is offered.
        OptionTypeError: if ``x`` is no tensor or of a dtype that cannot be interpolated, ``x_time`` holds no
            real numbers, or ``method`` is no string.
        OptionError: for too few samples, or times that are not ``[T]``, not finite or not increasing.
    """

    def __init__(self, x: Tensor, x_time: Any, method: str = "linear") -> None:
        _check_method(method)
        _check_samples(x, method)
        self.method = method
        # A copy: T numbers, which must not change when the caller's do.
        self._times = _real_numbers(x_time, "x_time").clone()
        _check_times(self._times, len(x))
        self._knots: list[float] = self._times.tolist()
        # Made without gradients, it has none: neither for one time nor for several.
        self._x = x if torch.is_grad_enabled() else x.detach()
        self._rows = _rows(self._x)
        slopes = _SLOPES.get(method)
        self._slopes = None if slopes is None else _in_blocks(slopes, self._x, self._times)
        self._slope_rows = None if self._slopes is None else _rows(self._slopes)

    def __call__(self, t: Any) -> Tensor:
        """The value at the time(s) ``t``: a number or 0-dim -> ``[...]``, ``[Q]`` -> ``[Q, ...]``.

        Raises:
            OptionTypeError: if ``t`` holds no real numbers.
            OptionError: if ``t`` has more than one dimension, or holds NaN.
        """
        if isinstance(t, (int, float)) and not isinstance(t, bool):
            return self._at_one(float(t))
        times = _real_numbers(t, "t")
        if times.dim() > 1:
            raise OptionError(
                f"t must be a number or of shape [Q], got {list(times.shape)}; pass t.reshape(-1)."
            )
        return self._at_one(times.item()) if times.dim() == 0 else self._at_many(times)

    def _at_one(self, t: float) -> Tensor:
        if math.isnan(t):
            raise OptionError("t is NaN; pass a time, e.g. t=0.5 (before and after the samples is allowed).")
        t = min(max(t, self._knots[0]), self._knots[-1])
        i = bisect_right(self._knots, t) - 1
        start = self._knots[i]
        if t == start:  # always so at the last sample: what follows has an interval
            return self._rows[i].clone()
        end = self._knots[i + 1]
        if self.method == "nearest":
            return self._rows[i + int(t > _middle(start, end))].clone()
        h, ends = end - start, (self._rows[i], self._rows[i + 1])
        slopes = None if self._slope_rows is None else (self._slope_rows[i], self._slope_rows[i + 1])
        return _between(ends, slopes, h, (t - start) / h)

    def _at_many(self, t: Tensor) -> Tensor:
        """As :meth:`_at_one` for ``t`` [Q], all at once."""
        if bool(t.isnan().any()):
            raise OptionError(f"t[{_first(t.isnan())}] is NaN; pass times, e.g. t=t[~t.isnan()].")
        t = t.clamp(self._knots[0], self._knots[-1])
        i = torch.searchsorted(self._times, t, right=True) - 1
        j = (i + 1).clamp(max=len(self._knots) - 1)
        start, end = self._times[i], self._times[j]

        def rows(of: Tensor, index: Tensor) -> Tensor:
            return of.index_select(0, index.to(of.device))

        if self.method == "nearest":
            return rows(self._x, torch.where(t > _middle(start, end), j, i))
        at_sample = t == start
        h = torch.where(at_sample, 1.0, end - start)  # there is no interval after the last sample

        def as_factor(values: Tensor, dtype: torch.dtype) -> Tensor:
            return values.to(self._x.device, dtype).reshape(-1, *[1] * (self._x.dim() - 1))

        left, right = rows(self._x, i), rows(self._x, j)
        slopes = None if self._slopes is None else (rows(self._slopes, i), rows(self._slopes, j))
        dtype = _working_dtype(self._x)
        value = _between((left, right), slopes, as_factor(h, dtype), as_factor((t - start) / h, dtype))
        # The place alone would do, if 0 times a neighbour that is not finite were 0.
        return torch.where(as_factor(at_sample, torch.bool), left, value)


def _between(ends: tuple[Tensor, Tensor], slopes: tuple[Tensor, Tensor] | None, h: Any, w: Any) -> Tensor:
    """The value at the place ``w`` of intervals of length ``h``: on the line or, given slopes, on the cubic.

    ``h`` and ``w`` are numbers, or tensors that broadcast. Half precision is worked out in float32.
    """
    dtype = _working_dtype(ends[0])
    left, right = ends[0].to(dtype), ends[1].to(dtype)
    # lerp counts from the nearer end: it stays between the two, and on them where they are equal.
    value = torch.lerp(left, right, w)
    if slopes is not None:
        rise = right - left
        value = value + w * (1.0 - w) * torch.lerp(h * slopes[0] - rise, rise - h * slopes[1], w)
    return value.to(ends[0].dtype)


def _middle(start: Any, end: Any) -> Any:
    """Halved before they are added, as SciPy does, so that ties fall alike to the last bit."""
    return start / 2.0 + end / 2.0


def _working_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _rows(x: Tensor) -> Any:
    """What is indexed by one number to get a row of ``x`` without a copy.

    The gradient of ``x[i]`` is as large as ``x``, for each single time. Rows that are taken apart once are
    put together once, however many of them were used.
    """
    return x.unbind(0) if x.requires_grad else x


# --- slopes: of x [T, N] in float64, at the times [T] (float64, on the CPU) -------------------------------


def _in_blocks(slopes: Callable[[Tensor, Tensor], Tensor], x: Tensor, times: Tensor) -> Tensor:
    """The slopes of ``x`` [T, ...], some channels at a time: float64 is not needed for all at once."""
    channels = x.reshape(len(x), math.prod(x.shape[1:]))
    blocks = channels.split(max(1, _BLOCK // len(x)), dim=1)
    done = [slopes(block.double(), times).to(_working_dtype(x)) for block in blocks]
    return torch.cat(done, dim=1).reshape(x.shape)


def _chords(x: Tensor, times: Tensor) -> Tensor:
    """m_i = (x_{i+1} - x_i) / h_i, shape [T-1, N]."""
    return x.diff(dim=0) / times.diff().to(x.device)[:, None]


def _cubic_slopes(x: Tensor, times: Tensor) -> Tensor:
    """The slopes of the not-a-knot cubic spline: a tridiagonal system for d_1 ... d_{T-2}, then the two ends.

    Not-a-knot at t_1 reads l d_0 + d_1 = l (2 + u) m_0 + u^2 m_1, and its mirror image at t_{T-2}. Subtracted
    from the spline's equation there, it removes d_0; what is left is strictly diagonally dominant, so that
    elimination needs no pivoting.
    """
    h = times.diff()
    lower = h[1:] / (h[:-1] + h[1:])
    upper = h[:-1] / (h[:-1] + h[1:])
    diagonal = torch.full_like(lower, 2.0)
    before, after = 3.0 * lower, 3.0 * upper  # factors of m_{i-1} and m_i on the right-hand side
    first, last = (lower[0], upper[0]), (lower[-1], upper[-1])
    diagonal[0] = diagonal[-1] = 1.0
    before[0], after[0] = first[0].square(), first[1] * (2.0 + first[0])
    before[-1], after[-1] = last[0] * (2.0 + last[1]), last[1].square()

    m = _chords(x, times)
    right = before.to(x.device)[:, None] * m[:-1] + after.to(x.device)[:, None] * m[1:]
    inner = _solve_tridiagonal(lower.tolist(), diagonal.tolist(), upper.tolist(), right)
    (l0, u0), (l1, u1) = (tuple(float(v) for v in pair) for pair in (first, last))
    start = (2.0 + u0) * m[0] + (u0 * u0 * m[1] - inner[0]) / l0
    end = (2.0 + l1) * m[-1] + (l1 * l1 * m[-2] - inner[-1]) / u1
    return torch.stack([start, *inner, end])


def _solve_tridiagonal(
    lower: list[float], diagonal: list[float], upper: list[float], right: Tensor
) -> list[Tensor]:
    """Rows y with ``lower_i y_{i-1} + diagonal_i y_i + upper_i y_{i+1} = right_i``, by elimination.

    The factors are plain numbers, so that autograd keeps no intermediate row.
    """
    rows, pivots = list(right.unbind(0)), list(diagonal)
    for i in range(1, len(rows)):
        factor = lower[i] / pivots[i - 1]
        pivots[i] -= factor * upper[i - 1]
        rows[i] = torch.sub(rows[i], rows[i - 1], alpha=factor)
    rows[-1] = rows[-1] / pivots[-1]
    for i in reversed(range(len(rows) - 1)):
        rows[i] = torch.sub(rows[i], rows[i + 1], alpha=upper[i]) / pivots[i]
    return rows


def _akima_slopes(x: Tensor, times: Tensor) -> Tensor:
    """d_i = m_{i-1} + (m_i - m_{i-1}) f / (f + f'), each channel for itself; straight where nothing turns.

    SciPy compares with the largest turn of *all* channels; here no channel depends on the scale of another.
    """
    m = _chords(x, times)
    # Two more chords at each end, continuing the last ones along a line (of parabolas through the samples).
    a1 = 2.0 * m[0] - m[1]
    z1 = 2.0 * m[-1] - m[-2]
    m = torch.cat([(2.0 * a1 - m[0])[None], a1[None], m, z1[None], (2.0 * z1 - m[-1])[None]])
    turn = m.diff(dim=0).abs()
    f, total = turn[:-2], turn[:-2] + turn[2:]
    smallest = (_NO_TURN * total.detach().amax(dim=0)).clamp_min(torch.finfo(total.dtype).tiny)
    turns = total > smallest
    # Where nothing turns the quotient is 0 / 0: divide by 1 there, lest its gradient be NaN.
    share = torch.where(turns, f / torch.where(turns, total, 1.0), 0.5)
    return m[1:-2] + share * (m[2:-1] - m[1:-2])


_SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cubic": _cubic_slopes, "akima": _akima_slopes}


# --- checks -----------------------------------------------------------------------------------------------


def _check_method(method: Any) -> None:
    if not isinstance(method, str):
        raise OptionTypeError(
            f"method must be a string, got {method!r} ({type(method).__name__}); pass e.g. method='linear'."
        )
    if method not in _FEWEST:
        raise UnknownNameError(f"unknown interpolation method {method!r}; {nearest(method, _FEWEST)}")


def _check_samples(x: Any, method: str) -> None:
    if not isinstance(x, Tensor):
        raise OptionTypeError(
            f"x must be a tensor of samples [T, ...], got {type(x).__name__}; pass torch.as_tensor(x)."
        )
    if method != "nearest" and not x.is_floating_point():
        raise OptionTypeError(
            f"x is of dtype {x.dtype}, which has no values between the samples that method={method!r} could "
            "return; pass x.float(), or method='nearest'."
        )
    if x.dim() == 0:
        raise OptionError("x has no time dimension, it is a single number; pass samples of shape [T, ...].")
    count = len(x)
    if count == 0:
        raise OptionError(f"x has no samples, its shape is {list(x.shape)}; give at least one, [T, ...].")
    if count < _FEWEST[method]:
        fitting = " or ".join(f"method={name!r}" for name, fewest in _FEWEST.items() if fewest <= count)
        raise OptionError(
            f"method={method!r} needs at least {_FEWEST[method]} samples, x has {count}; "
            f"for {count} use {fitting}."
        )


def _real_numbers(values: Any, what: str) -> Tensor:
    """``values`` as a float64 tensor on the CPU, without gradient."""
    kind = str(getattr(values, "dtype", type(values).__name__))
    try:
        if "complex" not in kind and "bool" not in kind:
            if isinstance(values, Tensor):
                return values.detach().to("cpu", torch.float64)
            return torch.tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        pass
    example = "a number or a tensor [Q], e.g. t=0.5" if what == "t" else "a tensor [T], e.g. torch.arange(T)"
    raise OptionTypeError(f"{what} must hold real numbers, got {kind}; pass {example}.")


def _first(mask: Tensor) -> int:
    """The index of the first True of ``mask`` [N]."""
    return int(mask.nonzero()[0])


def _check_times(times: Tensor, count: int) -> None:
    if times.dim() != 1:
        raise OptionError(
            f"x_time must be of shape [T], got {list(times.shape)}; all channels share the same times: "
            "pass one time a sample."
        )
    if len(times) != count:
        raise OptionError(
            f"x has {count} samples but x_time has {len(times)} times; give one time for each x[i] "
            "(the first dimension of x is time)."
        )
    wrong = ~times.isfinite()
    if bool(wrong.any()):
        i = _first(wrong)
        raise OptionError(f"x_time[{i}] is {times[i].item()}; all times must be finite numbers.")
    wrong = times.diff() <= 0
    if bool(wrong.any()):
        i = _first(wrong)
        raise OptionError(
            f"x_time must be strictly increasing, but x_time[{i}] = {times[i].item()} is followed by "
            f"x_time[{i + 1}] = {times[i + 1].item()}; sort the samples "
            "(x_time, order = x_time.sort(); x = x[order]) and keep one of each time."
        )
