"""Which of SpikingJelly's surrogate functions the scan engine may run over all time steps at once.

A scan evaluates the surrogate on ``[T, *shape]`` and differentiates it element by element, so the function
must be elementwise, deterministic and free of parameters of its own. That is known of the framework's own
classes; any other surrogate is called step by step, exactly as the framework would.
"""

from __future__ import annotations

import inspect

from spikingjelly.activation_based import surrogate
from torch import Tensor, nn

from spikede_plugins.checks import is_finite
from spikede_plugins.surrogate import Surrogate, usable_scale

#: Framework class -> the same function in :mod:`spikede_plugins.surrogate`.
NAMED = {
    "Sigmoid": "sigmoid",
    "ATan": "atan",
    "PiecewiseQuadratic": "piecewise_quadratic",
    "PiecewiseExp": "piecewise_exp",
    "SoftSign": "soft_sign",
    "SuperSpike": "super_spike",
    "Erf": "erf",
}

#: Further elementwise, deterministic classes (PoissonPass draws random numbers and is not among them).
_ELEMENTWISE = {
    *NAMED,
    "NonzeroSignLogAbs",
    "PiecewiseLeakyReLU",
    "SquarewaveFourierSeries",
    "S2NN",
    "QPseudoSpike",
    "LeakyKReLU",
    "FakeNumericalGradient",
    "LogTailedReLU",
    "DeterministicPass",
    "MultiLevelSpikeCount",
    "Rect",
}


#: What each of them is made with. torch.compile reads a dictionary, but not the attributes of a module.
_SETTINGS = {
    kind.__name__: tuple(inspect.signature(kind.__init__).parameters)[1:]
    for kind in (Surrogate, *(getattr(surrogate, name, None) for name in sorted(_ELEMENTWISE)))
    if kind is not None
}


def _own_class(function: object) -> str:
    """The class name if ``function`` is exactly one of the framework's classes, else an empty string."""
    kind = type(function)
    return kind.__name__ if getattr(surrogate, kind.__name__, None) is kind else ""


def scannable(function: object) -> bool:
    """Whether the surrogate may be evaluated for all time steps at once."""
    return (
        isinstance(function, nn.Module)
        and (_own_class(function) in _ELEMENTWISE or type(function) is Surrogate)
        and not any(
            isinstance(getattr(function, setting, None), Tensor)
            for setting in _SETTINGS[type(function).__name__]
        )
        and not any(True for _ in function.parameters())
        and not (function._forward_hooks or function._forward_pre_hooks)
        and not (function._backward_hooks or function._backward_pre_hooks)
    )


def named(function: object) -> tuple[str, float] | None:
    """Name and scale of the same surrogate in :mod:`spikede_plugins.surrogate`, or None."""
    if type(function) is Surrogate and not function.strict:
        return function.name, function.alpha
    name = NAMED.get(_own_class(function))
    alpha = getattr(function, "alpha", None)
    if name is None or not isinstance(alpha, (int, float)) or not getattr(function, "spiking", False):
        return None
    return (name, float(alpha)) if is_finite(alpha) and usable_scale(alpha) else None
