"""What the tests of ``fdeint`` share: all solvers, and short words for times and numbers in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from spikede_plugins import ExplicitSolver, available_solvers, get_solver

SOLVERS = sorted(available_solvers())
EXPLICIT = [name for name in SOLVERS if isinstance(get_solver(name), ExplicitSolver)]
ALPHAS = (0.3, 0.5, 0.7, 0.9)


def times(end: float, steps: int) -> Tensor:
    return torch.linspace(0.0, end, steps + 1, dtype=torch.float64)


def numbers(*values: float, learn: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=learn)


def number(value: float, learn: bool = False) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=learn)


def off(a: Tensor, b: Tensor) -> float:
    """The largest difference."""
    assert a.shape == b.shape
    return float((a - b).detach().abs().max())
