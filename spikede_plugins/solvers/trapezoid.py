"""The product trapezoidal rule, shared by the implicit solver and the Adams-Moulton corrector.

On rates: ``u_k = c (f_k + sum_{j=1..k-1} A_{k-j} f_j + a_k f_0)``, ``c = h^a / Gamma(2+a)``,
``A_m = (m+1)^(1+a) - 2 m^(1+a) + (m-1)^(1+a)``, ``a_k = (k-1)^(1+a) - (k-1-a) k^a``.
Dividing by the series ``A = 1 + A_1 z + ...`` turns it into a sum over past states,

    u_k = c (f_k + s_k f_0) - sum_m w_m u_{k-m},      1 + w_1 z + ... = 1 / A,     s = a / A.

Source: Diethelm, Ford & Freed, Nonlinear Dynamics 29 (2002), equations 1.10-1.12.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spikede_plugins.solvers.base import CorrectorSolver
from spikede_plugins.solvers.series import multiply, power_difference, reciprocal


class ProductTrapezoid(CorrectorSolver):
    """Gain, weights and starting weights of the rule at the head of this file."""

    def gain(self, alpha: Tensor, step_size: float) -> Tensor:
        return torch.exp(alpha * math.log(step_size) - torch.lgamma(2.0 + alpha))

    def _inverse(self, alpha: Tensor, n: int) -> Tensor:
        return reciprocal(
            torch.cat([torch.ones_like(alpha).unsqueeze(0), power_difference(1.0 + alpha, n, 2)])
        )

    def weights(self, alpha: Tensor, n: int) -> Tensor:
        return self._inverse(alpha, n)[1:]

    def start_weights(self, alpha: Tensor, n: int) -> Tensor:
        k = torch.arange(1, n + 1, dtype=alpha.dtype, device=alpha.device)
        k = k.reshape(-1, *([1] * alpha.dim()))
        # (k-1)^(1+a) - (k-1-a) k^a = k^a ((k-1)(((k-1)/k)^a - 1) + a), free of cancellation in expm1
        shrink = torch.cat(
            [torch.full_like(k[:1] + alpha, -1.0), torch.expm1(alpha * torch.log1p(-1.0 / k[1:]))]
        )
        on_rates = torch.pow(k, alpha) * ((k - 1.0) * shrink + alpha)
        series = torch.cat([torch.zeros_like(alpha).unsqueeze(0), on_rates])
        return multiply(self._inverse(alpha, n), series, n + 1)[1:]
