"""The fractional operator of one neuron layer: order, solver, memory and step size bound together."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spikede_plugins.errors import OptionError, OptionTypeError
from spikede_plugins.memory import FullMemory, Memory
from spikede_plugins.orders import FractionalOrder
from spikede_plugins.solvers.base import CorrectorSolver, ExplicitSolver, Solver
from spikede_plugins.solvers.glmulti import MultiTermGrunwaldLetnikov

MEMORY_RESETS = ("never", "spike")


class Kernel(NamedTuple):
    """The numbers a run of n steps needs, in the dtype and on the device of the state.

    Each is shaped to broadcast against a single time step ``[B, C, ...]``: ``S = 1`` for one order,
    ``S = C`` for an order per channel.

    Attributes:
        gain: ``[S]``, the factor of the newest rate.
        weights: ``[n, S]``, ``w_m + [m = 1]`` for m = 1 ... n: the bracket that vanishes at alpha = 1.
        corrector_gain, corrector_weights, start_weights: ``[S]``, ``[n, S]``, ``[n, S]``, the same
            of a solver with a corrector (its weights are the plain ``w_m``); else None.
    """

    gain: Tensor
    weights: Tensor
    corrector_gain: Tensor | None = None
    corrector_weights: Tensor | None = None
    start_weights: Tensor | None = None


class FractionalOperator(nn.Module):
    """``D^alpha``, as one layer of neurons uses it.

    Args:
        order: the order(s).
        solver: gives gain and weights.
        memory: how many past states are summed.
        step_size: h in native steps (1 = the framework's own step).
        memory_reset: ``"never"``, or ``"spike"`` to forget a neuron's history when it fires.

    Raises:
        OptionError: for a step size that is not finite and positive, an unknown ``memory_reset``, or
            a solver that cannot integrate several terms.
    """

    def __init__(
        self,
        order: FractionalOrder,
        solver: Solver,
        memory: Memory | None = None,
        step_size: float = 1.0,
        memory_reset: str = "never",
    ) -> None:
        super().__init__()
        if isinstance(step_size, bool) or not isinstance(step_size, (int, float)):
            raise OptionTypeError(f"step_size must be a number, got {type(step_size).__name__}.")
        if not math.isfinite(step_size) or step_size <= 0:
            raise OptionError(
                f"step_size must be finite and positive, got {step_size}; 1.0 is the native step."
            )
        if memory_reset not in MEMORY_RESETS:
            raise OptionError(f"memory_reset must be one of {MEMORY_RESETS}, got {memory_reset!r}.")
        if order.multi_term and not isinstance(solver, MultiTermGrunwaldLetnikov):
            raise OptionError(
                f"a MultiTerm order needs the solver 'glmulti', got {solver.name!r}; "
                'pass method="gl" or method="glmulti".'
            )
        if not isinstance(solver, (ExplicitSolver, CorrectorSolver)):
            raise OptionTypeError(
                f"solver {getattr(solver, 'name', solver)!r} must derive from ExplicitSolver or "
                "CorrectorSolver (spikede_plugins.solvers)."
            )
        self.order = order
        self.solver = solver
        self.memory = memory if memory is not None else FullMemory()
        self.step_size = float(step_size)
        self.memory_reset = memory_reset
        self._cache: dict[Any, Kernel] = {}

    @property
    def is_native(self) -> bool:
        """Whether this is the integer neuron itself: fixed alpha = 1 at the native step."""
        return self.order.is_one and self.step_size == 1.0

    def kernel(self, past: int, like: Tensor) -> Kernel:
        """Gain and weights for steps that look back at most ``past`` states, as ``like`` needs them.

        Fixed orders are computed once (float64, on the CPU), kept, and grown by doubling; learnable
        ones are computed anew, with a graph to alpha and the coefficients.
        """
        needed = max(1, self.memory.lags(past))
        if isinstance(self.solver, CorrectorSolver):
            needed = past + 1  # the starting weight of the step itself
        if not self.order.fixed:
            return self._compute(needed, like)
        key = (like.dtype, like.device)
        kept = self._cache.get(key)
        if kept is None or kept.weights.shape[0] < needed:
            if torch.compiler.is_compiling():
                # A compiled graph may reuse its memory; what it computes is not for keeping.
                return self._compute(needed, like)
            length = 64
            while length < needed:
                length *= 2
            with torch.no_grad():
                kept = self._compute(length, like)
            self._cache[key] = kept
        return kept

    def _compute(self, n: int, like: Tensor) -> Kernel:
        alphas = self.order.alphas(torch.device("cpu"))

        def cast(t: Tensor) -> Tensor:
            return t.to(device=like.device, dtype=like.dtype)

        def flat(t: Tensor) -> Tensor:  # one order: give it the trailing dimension of the many
            return t if alphas.dim() and not self.order.multi_term else t.unsqueeze(-1)

        first = torch.zeros(n, 1, dtype=torch.float64)
        first[0] = 1.0
        solver = self.solver
        coefficients = self.order.term_coefficients(torch.device("cpu"))
        if coefficients is not None:
            multi = solver if isinstance(solver, MultiTermGrunwaldLetnikov) else MultiTermGrunwaldLetnikov()
            gain, weights = multi.terms(alphas, coefficients, self.step_size, n)
            return Kernel(cast(flat(gain)), cast(flat(weights) + first))
        if isinstance(solver, CorrectorSolver):
            corrector = (
                cast(flat(solver.gain(alphas, self.step_size))),
                cast(flat(solver.weights(alphas, n))),
                cast(flat(solver.start_weights(alphas, n))),
            )
            explicit = solver.predictor
            if explicit is None:
                zero = torch.zeros_like(corrector[0])
                return Kernel(zero, torch.zeros_like(corrector[1]), *corrector)
            gain, weights = explicit.gain(alphas, self.step_size), explicit.weights(alphas, n)
            return Kernel(cast(flat(gain)), cast(flat(weights) + first), *corrector)
        gain, weights = solver.gain(alphas, self.step_size), solver.weights(alphas, n)
        return Kernel(cast(flat(gain)), cast(flat(weights) + first))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}}

    def extra_repr(self) -> str:
        text = f"method={self.solver.name!r}, memory={self.memory.describe()}"
        if self.step_size != 1.0:
            text += f", step_size={self.step_size}"
        return text + (", memory_reset='spike'" if self.memory_reset == "spike" else "")
