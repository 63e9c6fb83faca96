"""One solver a file; each is found by name through the registry."""

from spikede_plugins.solvers.base import CorrectorSolver, ExplicitSolver, Solver

__all__ = ["CorrectorSolver", "ExplicitSolver", "Solver"]
