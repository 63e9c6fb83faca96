"""The times of samples: read, checked, and whether they are a uniform grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikede_plugins.checks import is_finite, is_readable
from spikede_plugins.errors import OptionError, OptionTypeError


def sample_times(x: Any, x_time: Any) -> Tensor:
    """The times of the samples, float64 on the CPU, ``[T]`` or, with the end of the last step, ``[T + 1]``.

    Raises:
        OptionTypeError, OptionError: for an input or times that cannot be used.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise OptionTypeError(f"x must be a tensor of floating point numbers, got {kind}.")
    if x.dim() < 2 or x.shape[0] == 0:
        raise OptionError(f"x must be [T, B, ...] with at least one time point, got shape {tuple(x.shape)}.")
    if not bool(x.detach().sum().isfinite()) and not bool(x.isfinite().all()):  # a sum may overflow
        raise OptionError("x has NaN or infinite numbers in it; mask or drop those samples.")
    times = time_points(x_time, "x_time")
    if len(times) not in (x.shape[0], x.shape[0] + 1):
        raise OptionError(
            f"x has {x.shape[0]} time points, but x_time has {len(times)}; give {x.shape[0]}, or one more "
            "for the end of the last step."
        )
    return times


def blur_of(given: Any, times: Tensor) -> float:
    """What the precision that times were given in cannot tell apart."""
    single = isinstance(given, Tensor) and given.dtype in (torch.float32, torch.float16, torch.bfloat16)
    eps = torch.finfo(given.dtype if single else torch.float64).eps
    return 4.0 * eps * float(times.abs().max())


def time_points(given: Any, what: str) -> Tensor:
    try:
        times = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionTypeError(f"{what} must be a sequence of numbers, got {type(given).__name__}.") from error
    if not is_readable(times):
        raise OptionTypeError(f"{what} must hold numbers, got a tensor without any (meta or sparse).")
    if times.is_complex():
        raise OptionTypeError(f"{what} must be real numbers, got complex ones.")
    times = times.to(dtype=torch.float64, device="cpu").detach()
    if times.dim() != 1 or not len(times):
        raise OptionError(f"{what} must be one-dimensional, [T], got shape {tuple(times.shape)}.")
    if not bool(times.isfinite().all()):
        raise OptionError(f"{what} has NaN or infinity in it.")
    back = (times.diff() <= 0).nonzero()
    if len(back):
        i = int(back[0])
        raise OptionError(
            f"{what} must increase, but {what}[{i}] = {times[i]:g} is followed by {times[i + 1]:g}."
        )
    return times


def uniform_step(times: Tensor, blur: float, default: Any) -> float | None:
    """The step of a uniform grid, None for another; ``default`` for a single point.

    Raises:
        OptionError: for times of a precision that cannot tell their steps apart, or a step size that is none.
    """
    given = 1.0 if default is None else default
    number = isinstance(given, (int, float)) and not isinstance(given, bool)
    if not number or not is_finite(given) or not given > 0:
        raise OptionError(f"step_size must be a positive number, got {given!r}.")
    if len(times) == 1:
        return float(given)
    step = float(times[-1] - times[0]) / (len(times) - 1)
    if blur > 0.1 * step:
        raise OptionError(
            f"x_time is too coarse in its precision to tell steps of {step:g} apart at {float(times[-1]):g}; "
            "give it in float64, or count from 0."
        )
    if not bool(((times.diff() - step).abs() <= 1e-4 * step + blur).all()):
        return None
    # Windows of one recording have the same step, whatever rounding says.
    return float(f"{step:.6g}") if blur > 1e-9 * step else step


def rows_of(wanted: Tensor, grid: Tensor, blur: float) -> Tensor | None:
    """Which points of the grid are wanted; None for all.

    Raises:
        OptionError: for a time that is not on the grid.
    """
    if len(wanted) == len(grid) and torch.equal(wanted, grid):
        return None
    slack = blur + (1e-4 * float(grid.diff().min()) if len(grid) > 1 else 0.0)
    above = torch.searchsorted(grid, wanted).clamp(max=len(grid) - 1)
    below = (above - 1).clamp(min=0)
    rows = torch.where((wanted - grid[below]).abs() < (wanted - grid[above]).abs(), below, above)
    off = (wanted - grid[rows]).abs() > slack
    if bool(off.any()):
        i = int(off.nonzero()[0])
        raise OptionError(
            f"output_time[{i}] = {float(wanted[i]):g} is none of the times of x_time; on a grid the output "
            "is at those. A method of torchdiffeq takes any time."
        )
    return rows
