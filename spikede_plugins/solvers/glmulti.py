"""Grünwald-Letnikov for several orders at once: ``sum_i c_i D^{a_i} v = rate``."""

from __future__ import annotations

from torch import Tensor

from spikede_plugins.solvers.base import ExplicitSolver
from spikede_plugins.solvers.gl import GrunwaldLetnikov


class MultiTermGrunwaldLetnikov(ExplicitSolver):
    """``W_m = sum_i c_i h^{-a_i} w_m(a_i)``, gain ``1 / W_0``, weights ``W_m / W_0``; accuracy 1.

    ``terms`` does the work for orders ``[K]`` with coefficients ``[K]``; ``gain`` and ``weights`` are
    the single-term case, where the scheme is that of :class:`GrunwaldLetnikov`.
    """

    name = "glmulti"
    summary = "Grünwald-Letnikov, several orders"
    single = GrunwaldLetnikov()

    def accuracy(self, alpha: float) -> float:
        return 1.0

    def gain(self, alpha: Tensor, step_size: float) -> Tensor:
        return self.single.gain(alpha, step_size)

    def weights(self, alpha: Tensor, n: int) -> Tensor:
        return self.single.weights(alpha, n)

    def terms(
        self, alphas: Tensor, coefficients: Tensor, step_size: float, n: int
    ) -> tuple[Tensor, Tensor]:
        """Gain (shape []) and weights (shape [n]) of the sum of terms; differentiable in both."""
        scaled = coefficients / self.single.gain(alphas, step_size)
        leading = scaled.sum()
        return 1.0 / leading, (scaled * self.single.weights(alphas, n)).sum(1) / leading


