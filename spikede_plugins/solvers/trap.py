"""Implicit product trapezoidal rule."""

from __future__ import annotations

from spikede_plugins.solvers.trapezoid import ProductTrapezoid


class Trapezoidal(ProductTrapezoid):
    """The product trapezoidal rule with the rate at ``v_k`` itself.

    Accuracy 2 on smooth solutions, ``1 + a`` on those that begin like ``t^a``.
    """

    name = "trap"
    summary = "product trapezoidal, implicit"
    predictor = None

    def accuracy(self, alpha: float) -> float:
        return 2.0

    def accuracy_rough(self, alpha: float) -> float:
        return 1.0 + alpha
