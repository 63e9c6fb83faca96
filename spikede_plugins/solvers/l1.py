"""L1: the Caputo derivative of the piecewise linear interpolant of u."""

from __future__ import annotations

import torch
from torch import Tensor

from spikede_plugins.solvers.base import ExplicitSolver
from spikede_plugins.solvers.series import power_difference


class L1(ExplicitSolver):
    """``w_m = b_m - b_{m-1}``, ``b_m = (m+1)^(1-a) - m^(1-a)``, gain ``h^a Gamma(2-a)``; accuracy 1 here.

    The L1 formula itself is of order 2-a; with the rate taken at the previous potential the scheme is of
    order 1. Source: Oldham & Spanier, *The Fractional Calculus* (1974), section 8.2.
    """

    name = "l1"
    summary = "L1 (piecewise linear history)"

    def accuracy(self, alpha: float) -> float:
        return 1.0

    def gain(self, alpha: Tensor, step_size: float) -> Tensor:
        h = torch.as_tensor(step_size, dtype=alpha.dtype, device=alpha.device)
        return torch.pow(h, alpha) * torch.exp(torch.lgamma(2.0 - alpha))  # at alpha = 1 exactly h

    def weights(self, alpha: Tensor, n: int) -> Tensor:
        return power_difference(1.0 - alpha, n, 2)
