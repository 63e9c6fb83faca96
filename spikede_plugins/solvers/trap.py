"""Implicit product trapezoidal rule."""

from __future__ import annotations

from spikede_plugins.solvers.trapezoid import ProductTrapezoid


class Trapezoidal(ProductTrapezoid):
    """The product trapezoidal rule with the rate at ``v_k`` itself.

        u_k = c (rate(v_k) + s_k rate_0) - sum_{m>=1} w_m u_{k-m},      v_k = v_0 + u_k

    with the numbers at the head of ``solvers.trapezoid``. Accuracy 2 on smooth solutions, ``1 + a`` on those
    that begin like ``t^a``. A neuron for which this equation has no solution (its potential leaves through
    infinity within the step, or its rate jumps) takes ``rate(v_{k-1})`` in that step, and a warning says so.
    Source: Diethelm, Ford & Freed, Nonlinear Dynamics 29 (2002).
    """

    name = "trap"
    summary = "product trapezoidal, implicit"
    predictor = None

    def accuracy(self, alpha: float) -> float:
        return 2.0

    def accuracy_rough(self, alpha: float) -> float:
        return 1.0 + alpha
