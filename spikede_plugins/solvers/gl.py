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
        return torch.cumprod(1.0 - (1.0 + alpha) / m, dim=0)
