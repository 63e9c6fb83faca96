"""The fractional Adams-Bashforth predictor (rectangle rule), written on the history of states."""

from __future__ import annotations

import torch
from torch import Tensor

from spikede_plugins.solvers.base import ExplicitSolver
from spikede_plugins.solvers.series import power_difference, reciprocal


class Predictor(ExplicitSolver):
    """Gain ``h^a / Gamma(1+a)``; the weights are the reciprocal series of ``q_m = (m+1)^a - m^a``.

    On rates the rule reads ``u_k = gain * sum_j q_{k-1-j} rate_j``; dividing by the series q turns it
    into a sum over past states. The accuracy is 1.
    Source: Diethelm, Ford & Freed, Nonlinear Dynamics 29 (2002), equation 1.13.
    """

    name = "pred"
    summary = "Adams-Bashforth predictor"

    def accuracy(self, alpha: float) -> float:
        return 1.0

    def gain(self, alpha: Tensor, step_size: float) -> Tensor:
        h = torch.as_tensor(step_size, dtype=alpha.dtype, device=alpha.device)
        return torch.pow(h, alpha) * torch.exp(-torch.lgamma(1.0 + alpha))  # at alpha = 1 exactly h

    def weights(self, alpha: Tensor, n: int) -> Tensor:
        # (1 - z) q has the negative second differences of m^a behind its leading 1: its reciprocal is
        # a sum of positive terms, so no digits cancel before the last difference.
        steps = torch.cat([torch.ones_like(alpha).unsqueeze(0), power_difference(alpha, n, 2)])
        return torch.diff(reciprocal(steps), dim=0)
