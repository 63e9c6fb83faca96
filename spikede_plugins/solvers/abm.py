"""Adams-Bashforth-Moulton: predict, evaluate, correct, evaluate (PECE)."""

from __future__ import annotations

from spikede_plugins.solvers.pred import Predictor
from spikede_plugins.solvers.trapezoid import ProductTrapezoid


class AdamsBashforthMoulton(ProductTrapezoid):
    """The trapezoidal rule with the rate at a predicted potential; accuracy ``min(2, 1 + a)``.

    Predictor and corrector both sum over the same history of corrected states. Of earlier steps the corrector
    so has the rates that it was given, at predicted potentials, where the classic scheme evaluates them once
    more: the order is the same, numbers differ from the second step on.
    Source: Diethelm, Ford & Freed, Nonlinear Dynamics 29 (2002), for the classic scheme.
    """

    name = "abm"
    summary = "Adams-Bashforth-Moulton predictor-corrector"
    predictor = Predictor()

    def accuracy(self, alpha: float) -> float:
        return min(2.0, 1.0 + alpha)
