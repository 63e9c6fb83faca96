"""Surrogate gradients: a step forward, the slope of a smooth function backward.

    s = [z >= 0] (or [z > 0]),      ds/dz := slope(z; a)

| name | slope |
|---|---|
| sigmoid | a sigma(az) (1 - sigma(az)) |
| atan | (a/2) / (1 + (pi a z / 2)^2) |
| piecewise_quadratic | max(a - a^2 abs(z), 0) |
| piecewise_exp | (a/2) exp(-a abs(z)) |
| soft_sign | 1 / (2 a (1/a + abs(z))^2) |
| super_spike | a / (1 + abs(z))^2 |
| erf | (a / sqrt(pi)) exp(-(az)^2) |
| fast_sigmoid | 1 / (1 + a abs(z))^2 |
| triangular | a where z < 0, -a elsewhere |
| straight_through | 1 |
| piecewise_linear | 1 / (2a) where abs(z) <= a |
| gaussian | exp(-z^2 / (2 a^2)) / (a sqrt(2 pi)) |

``arctan`` is another name of ``atan`` and ``linear`` of ``piecewise_linear``; any name may end in
``_surrogate``.

Source: Neftci, Mostafa & Zenke, IEEE Signal Processing Magazine 36 (2019); the scales are those the
frameworks use, so that a surrogate means the same before and after conversion.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spikede_plugins.checks import is_finite
from spikede_plugins.errors import OptionError, OptionTypeError, UnknownNameError, nearest


def _sigmoid(z: Tensor, a: float) -> Tensor:
    s = torch.sigmoid(a * z)
    return a * s * (1.0 - s)


def _soft_sign(z: Tensor, a: float) -> Tensor:
    distance = 1.0 / a + z.abs()
    return 0.5 / (a * distance * distance)


_SLOPES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "sigmoid": _sigmoid,
    "atan": lambda z, a: (0.5 * a) / (1.0 + (0.5 * math.pi * a * z).square()),
    "piecewise_quadratic": lambda z, a: (a - a * a * z.abs()).clamp_min(0.0),
    "piecewise_exp": lambda z, a: (0.5 * a) * torch.exp(-a * z.abs()),
    "soft_sign": _soft_sign,
    "super_spike": lambda z, a: a / (1.0 + z.abs()).square(),
    "erf": lambda z, a: (a / math.sqrt(math.pi)) * torch.exp(-(a * z).square()),
    "fast_sigmoid": lambda z, a: 1.0 / (1.0 + a * z.abs()).square(),
    "triangular": lambda z, a: a * torch.where(z < 0, 1.0, -1.0).to(z.dtype),
    "straight_through": lambda z, a: torch.ones_like(z),
    "piecewise_linear": lambda z, a: (z.abs() <= a).to(z.dtype) / (2.0 * a),
    "gaussian": lambda z, a: torch.exp(-0.5 * (z / a).square()) / (a * math.sqrt(2.0 * math.pi)),
}
_ALIASES = {"arctan": "atan", "linear": "piecewise_linear"}
#: Scales outside these make a formula divide by zero or overflow in float32.
SCALES = (1e-30, 1e30)


def usable_scale(alpha: float) -> bool:
    """Whether kernels may compute with this scale."""
    return SCALES[0] <= alpha <= SCALES[1]


def available_surrogates() -> list[str]:
    """The names :func:`spike` and :func:`slope` know."""
    return sorted(_SLOPES)


def surrogate_name(name: str, *others: str) -> str:
    """The name in the table of what may be written in another way (``"arctan_surrogate"`` is ``"atan"``).

    Args:
        name: the name.
        others: what else the caller knows, to be offered as well.

    Raises:
        UnknownNameError: for a name that is not in the table; the nearest one is offered.
        OptionTypeError: for anything but a name.
    """
    if not isinstance(name, str):
        raise OptionTypeError(f'the name of a surrogate is wanted, e.g. "atan", got {name!r}.')
    short = name.removesuffix("_surrogate")
    short = _ALIASES.get(short, short)
    if short not in _SLOPES:
        raise UnknownNameError(f"unknown surrogate {name!r}; {nearest(name, [*_SLOPES, *_ALIASES, *others])}")
    return short


def slope(z: Tensor, name: str, alpha: float) -> Tensor:
    """The slope the surrogate ``name`` has at ``z`` (any shape).

    Raises:
        UnknownNameError: for a name that is not in the table; the nearest one is offered.
    """
    if name not in _SLOPES:
        raise UnknownNameError(f"unknown surrogate {name!r}; {nearest(name, _SLOPES)}")
    return _SLOPES[name](z, alpha)


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, name: str, alpha: float, strict: bool) -> Tensor:
        ctx.save_for_backward(z)
        ctx.name, ctx.alpha = name, alpha
        return (z > 0 if strict else z >= 0).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (z,) = ctx.saved_tensors
        return grad * slope(z, ctx.name, ctx.alpha), None, None, None


def spike(z: Tensor, name: str = "atan", alpha: float = 2.0, strict: bool = False) -> Tensor:
    """1 where ``z >= 0`` (``strict``: ``z > 0``), else 0, in the dtype of ``z``; its gradient is the slope.

    Raises:
        UnknownNameError: for an unknown surrogate.
    """
    if name not in _SLOPES:
        raise UnknownNameError(f"unknown surrogate {name!r}; {nearest(name, _SLOPES)}")
    return _Spike.apply(z, name, alpha, strict)


class Surrogate(nn.Module):
    """A surrogate of the table as a module, which SpikingJelly and snnTorch take for one of theirs.

    Args:
        name: a name of the table.
        alpha: its scale ``a``, > 0; None for 2, or 1 where the scale is a width.
        strict: fire above 0 only (snnTorch), not at it (SpikingJelly).

    Raises:
        UnknownNameError: for an unknown name.
        OptionError, OptionTypeError: for a scale that cannot be used.
    """

    spiking = True  # what SpikingJelly asks of a surrogate

    def __init__(self, name: str, alpha: float | None = None, strict: bool = False) -> None:
        super().__init__()
        self.name, self.strict = surrogate_name(name), strict
        if alpha is None:
            alpha = 1.0 if self.name in ("piecewise_linear", "gaussian") else 2.0
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
            raise OptionTypeError(f"the scale of a surrogate must be a number, got {alpha!r}.")
        if not is_finite(alpha) or not usable_scale(alpha):
            raise OptionError(
                f"the scale of a surrogate must be finite and positive, from {SCALES[0]:g} to {SCALES[1]:g}, "
                f"got {str(alpha)[:20]}."
            )
        self.alpha = float(alpha)

    def forward(self, z: Tensor) -> Tensor:
        return spike(z, self.name, self.alpha, self.strict)

    def extra_repr(self) -> str:
        return f"{self.name!r}, alpha={self.alpha:g}" + ", strict=True" * self.strict


def is_step(function: Any) -> bool:
    """Whether a framework's surrogate is a step: 0 below 0 and 1 above, whatever its slope."""
    z = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    with torch.no_grad():
        return bool(torch.equal(torch.as_tensor(function(z)).to(z), (z > 0).to(z)))
