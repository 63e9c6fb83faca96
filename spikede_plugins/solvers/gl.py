"""Grünwald-Letnikov: ``h^-a sum_m w_m u_{k-m} = rate`` with the binomial weights of ``(1 - z)^a``."""

from __future__ import annotations

import torch
from torch import Tensor

from spikede_plugins.solvers.base import ExplicitSolver


class GrunwaldLetnikov(ExplicitSolver):
    """``w_0 = 1, w_m = (1 - (1 + a) / m) w_{m-1}``, gain ``h^a``; accuracy 1.

    Source: Podlubny, *Fractional Differential Equations* (1999), section 7.4. The weights sum up u, the
    deviation from the start, so the scheme is that of the Caputo derivative.
    """

    name = "gl"
    summary = "Grünwald-Letnikov"

    def accuracy(self, alpha: float) -> float:
        return 1.0

    def gain(self, alpha: Tensor, step_size: float) -> Tensor:
        return torch.pow(torch.as_tensor(step_size, dtype=alpha.dtype, device=alpha.device), alpha)

    def weights(self, alpha: Tensor, n: int) -> Tensor:
        m = torch.arange(1, n + 1, dtype=alpha.dtype, device=alpha.device)
        m = m.reshape(-1, *([1] * alpha.dim()))
        factors = 1.0 - (1.0 + alpha) / m
        weights = torch.cumprod(factors, dim=0)
        if not alpha.requires_grad or n < 3:
            return weights
        # The second factor vanishes at alpha = 1, and through a zero torch differentiates a cumulative
        # product in n^2 steps. The same product with that factor outside carries the gradient.
        far = factors[0] * factors[1] * torch.cumprod(factors[2:], dim=0)
        same = torch.cat([factors[:1], factors[:1] * factors[1:2], far])
        return weights.detach() + (same - same.detach())
