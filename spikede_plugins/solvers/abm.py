"""Adams-Bashforth-Moulton: predict, evaluate, correct, evaluate (PECE)."""

from __future__ import annotations

from spikede_plugins.solvers.pred import Predictor
from spikede_plugins.solvers.trapezoid import ProductTrapezoid


class AdamsBashforthMoulton(ProductTrapezoid):
    """The trapezoidal rule with the rate at a predicted potential; accuracy ``min(2, 1 + a)``.

    Predictor and corrector both sum over the same history of corrected states.
    Source: Diethelm, Ford & Freed, Nonlinear Dynamics 29 (2002).
    """

    name = "abm"
    summary = "Adams-Bashforth-Moulton predictor-corrector"
    predictor = Predictor()

    def accuracy(self, alpha: float) -> float:
        return min(2.0, 1.0 + alpha)
