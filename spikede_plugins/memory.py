"""How much of the past a neuron keeps: all of it, a window, or a sum of exponentials.

A memory tells how many lags of the history sum a step may use, and from where on old states are folded
into traces; the engines ask nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from spikede_plugins.errors import OptionError, OptionTypeError, nearest
from spikede_plugins.exponentials import BLOCK, EXACT

#: Steps that ``memory="auto"`` keeps in full before it begins to fold.
AUTO_STEPS = 128
#: The longest window.
MAX_WINDOW = 2**31 - 1
#: The longest horizon of a sum of exponentials; the fit looks at every weight up to it.
MAX_HORIZON = 10_000_000


class Memory(ABC):
    """What is remembered of the states ``u_1 ... u_{k-1}`` when step k is taken.

    Attributes:
        limit: the largest lag that enters the sum; 0 for all.
        fold_at: with how many states old ones begin to be folded into traces; 0 for never.
    """

    limit: int = 0
    fold_at: int = 0

    @abstractmethod
    def describe(self) -> str:
        """A short text for reports."""


@dataclass(frozen=True)
class FullMemory(Memory):
    """Every state since the last reset."""

    def describe(self) -> str:
        return "full"


@dataclass(frozen=True)
class WindowMemory(Memory):
    """The newest ``length`` states (short-memory principle, Podlubny 1999, section 7.3).

    Raises:
        OptionTypeError: if ``length`` is no int.
        OptionError: if ``length`` < 1.
    """

    length: int

    def __post_init__(self) -> None:
        if isinstance(self.length, bool) or not isinstance(self.length, int):
            raise OptionTypeError(f"a window's length must be an int, got {type(self.length).__name__}.")
        if self.length < 1:
            raise OptionError(
                f"memory must keep at least 1 step, got {self.length}; "
                'pass memory="full" to keep every step or an int >= 1 for a window.'
            )
        if self.length > MAX_WINDOW:
            raise OptionError(
                f'memory must be at most {MAX_WINDOW} steps; pass memory="full" to keep every step.'
            )

    @property
    def limit(self) -> int:  # type: ignore[override]
        return self.length

    def describe(self) -> str:
        return f"window {self.length}"


@dataclass(frozen=True)
class SumOfExponentials(Memory):
    """Power-law memory of constant size: the newest states as they are, all older ones in P leaky traces.

        sum_m W_m u_{k-m}  ~  sum_{m <= L} W_m u_{k-m}  +  sum_p C_p z_p,      z_p <- x_p z_p + u

    P is the smallest number (64 at most) for which every weight up to ``horizon`` is right to ``tolerance``;
    that is checked against all of them when the memory is bound to a solver and its orders. For solvers that
    are a gain and weights (gl, l1, pred, glmulti, and others' explicit solvers).

    Args:
        tolerance: the largest relative error of a weight, in (0, 1).
        horizon: up to which lag, in steps. A longer run goes on, with a warning of how wrong it may be.

    Raises:
        OptionError, OptionTypeError: for values out of range or of the wrong type.

    Source: Jiang, Zhang, Zhang & Zhang, Communications in Computational Physics 21 (2017), for the idea.
    """

    tolerance: float = 1e-6
    horizon: int = 10_000

    fold_at = EXACT + BLOCK

    def __post_init__(self) -> None:
        if isinstance(self.tolerance, bool) or not isinstance(self.tolerance, (int, float)):
            raise OptionTypeError(f"tolerance must be a number, got {type(self.tolerance).__name__}.")
        if isinstance(self.horizon, bool) or not isinstance(self.horizon, int):
            raise OptionTypeError(f"horizon must be an int, got {type(self.horizon).__name__}.")
        if not 0.0 < self.tolerance < 1.0:
            raise OptionError(f"tolerance must lie in (0, 1), got {self.tolerance}; 1e-6 suits float32.")
        if not 1 <= self.horizon <= MAX_HORIZON:
            raise OptionError(
                f"horizon must lie between 1 and {MAX_HORIZON} steps, all of whose weights are checked, got "
                f"{self.horizon}; a longer run goes on beyond it, with a warning of how wrong it may be."
            )

    def describe(self) -> str:
        return f"soe to {self.horizon} steps"


@dataclass(frozen=True)
class AutoMemory(SumOfExponentials):
    """Full memory for 128 steps, a sum of exponentials in longer runs.

    Solvers without the form that this needs keep every step.
    """

    fold_at = AUTO_STEPS

    def describe(self) -> str:
        return "auto"


_WORDS = {"full": FullMemory, "soe": SumOfExponentials, "auto": AutoMemory}


def as_memory(spec: Any) -> Memory:
    """``"full"``, ``"soe"``, ``"auto"``, an int window or a :class:`Memory` as a :class:`Memory`.

    Raises:
        OptionError: for a window below 1 or an unknown word.
        OptionTypeError: for anything else.
    """
    if isinstance(spec, Memory):
        return spec
    if isinstance(spec, bool) or not isinstance(spec, (str, int)):
        raise OptionTypeError(
            f'memory must be "full", "soe", "auto", an int window or a Memory, got {type(spec).__name__}.'
        )
    if isinstance(spec, int):
        return WindowMemory(spec)
    if spec not in _WORDS:
        raise OptionError(
            f'memory must be "full", "soe", "auto" or an int window, got {spec!r}; {nearest(spec, _WORDS)}'
        )
    return _WORDS[spec]()
