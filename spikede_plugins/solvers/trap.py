"""Implicit product trapezoidal rule."""

from __future__ import annotations

from spikede_plugins.solvers.trapezoid import ProductTrapezoid


class Trapezoidal(ProductTrapezoid):
    """The product trapezoidal rule with the rate at ``v_k`` itself; accuracy 2 on smooth solutions."""

    name = "trap"
    summary = "product trapezoidal, implicit"
    predictor = None

    def accuracy(self, alpha: float) -> float:
        return 2.0
