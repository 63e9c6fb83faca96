"""What a solver is: a gain and memory weights, both functions of the order alone.

With ``u_k = v_k - v_start`` (the deviation from the potential the neuron started from)

    u_k = gain(alpha, h) * rate(v_{k-1}, x_k) - sum_{m=1..k-1} w_m(alpha) * u_{k-m},

so a solver need not know what it integrates, and whatever runs one solver runs them all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor


class Solver(ABC):
    """A method for ``D^alpha v = rate``, known by a name.

    Attributes:
        name: the name it is registered under.
        summary: one line for listings.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""

    @abstractmethod
    def accuracy(self, alpha: float) -> float:
        """The order p of the global error O(h^p) at a fixed time, as measured on smooth solutions."""

    def accuracy_rough(self, alpha: float) -> float:
        """The same on solutions that begin like ``t^alpha``, as most do; by default ``accuracy``."""
        return self.accuracy(alpha)

    @abstractmethod
    def gain(self, alpha: Tensor, step_size: float) -> Tensor:
        """The factor of the newest rate, shape of ``alpha``; differentiable in ``alpha``."""

    @abstractmethod
    def weights(self, alpha: Tensor, n: int) -> Tensor:
        """The memory weights ``w_1 ... w_n``, shape ``[n, *alpha.shape]``; differentiable in ``alpha``."""


class ExplicitSolver(Solver):
    """A solver that needs the rate at the previous potential only (the form at the head of this file).

    This is what a third-party solver derives from: ``name``, ``accuracy``, ``gain`` and ``weights``
    in plain torch (float64 in, float64 out) are all it has to give; step and scan engines, history
    forms and gradients to alpha follow from them. At ``alpha = 1`` the gain must be ``step_size`` and
    the weights ``-1, 0, 0, ...`` exactly: the integer neuron is the limit of every fractional one.
    """


class CorrectorSolver(Solver):
    """A solver that also weighs the rate at the new potential.

        u_k = gain * (rate(v*, x_k) + s_k * rate_0) - sum_{m=1..k-1} w_m u_{k-m}

    where ``rate_0`` is the rate at the start, ``s_k`` its starting weight, and ``v*`` either a
    prediction (``predictor`` gives it, from the same history) or ``v_k`` itself (``predictor`` is None:
    implicit, solved in closed form for affine neurons and by iteration otherwise).
    """

    predictor: ExplicitSolver | None = None

    @abstractmethod
    def start_weights(self, alpha: Tensor, n: int) -> Tensor:
        """The starting weights ``s_1 ... s_n``, shape ``[n, *alpha.shape]``; differentiable."""
