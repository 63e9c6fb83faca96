"""The fractional operator of one neuron layer: order, solver, memory and step size bound together."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spikede_plugins.errors import OptionError, OptionTypeError
from spikede_plugins.memory import FullMemory, Memory
from spikede_plugins.orders import FractionalOrder
from spikede_plugins.solvers.base import CorrectorSolver, ExplicitSolver, Solver
from spikede_plugins.solvers.glmulti import MultiTermGrunwaldLetnikov

MEMORY_RESETS = ("never", "spike")
_CPU = torch.device("cpu")


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


class _Kept(NamedTuple):
    values: tuple[float, ...]
    kernel: Kernel
    tangents: list[list[Kernel]] | None


def _jvp(function: Callable[..., Kernel], at: list[Tensor], index: int, direction: Tensor) -> Kernel:
    """The derivative of a kernel in one direction of one of its numbers, by two reverse passes.

    The first is linear in its cotangent u; differentiating that in u gives the forward derivative.
    """
    with torch.enable_grad():
        inputs = [t.detach().clone().requires_grad_(i == index) for i, t in enumerate(at)]
        fields = []
        for out in function(*inputs):
            if out is None or not out.requires_grad:
                fields.append(None if out is None else torch.zeros_like(out))
                continue
            u = torch.zeros_like(out, requires_grad=True)
            (back,) = torch.autograd.grad(out, inputs[index], u, create_graph=True)
            fields.append(torch.autograd.grad(back, u, direction)[0])
    return Kernel(*fields)  # type: ignore[arg-type]


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
        self._cache: dict[Any, _Kept] = {}

    @property
    def is_native(self) -> bool:
        """Whether this is the integer neuron itself: fixed alpha = 1 at the native step."""
        return self.order.is_one and self.step_size == 1.0

    def kernel(self, past: int, like: Tensor) -> Kernel:
        """Gain and weights for steps that look back at most ``past`` states, as ``like`` needs them.

        Numbers are computed once for the orders as they are (float64, on the CPU), kept, and grown by
        doubling; with learnable orders so are their derivatives, so that a step costs no more than a sum.
        """
        needed = max(1, self.memory.lags(past))
        if isinstance(self.solver, CorrectorSolver):
            needed = past + 1  # the starting weight of the step itself
        with_graph = torch.is_grad_enabled() and not self.order.fixed
        key = (like.dtype, like.device)
        kept = self._cache.get(key)
        if torch.compiler.is_compiling():
            # A compiled graph may reuse its memory (what it computes is not for keeping) and learns alpha
            # through the formulas themselves.
            usable = kept is not None and self.order.fixed and kept.kernel.weights.shape[0] >= needed
            return kept.kernel if usable and kept is not None else self._compute(needed, like)
        self.order.keep_inside()
        values = self._values()
        if (
            kept is None
            or kept.values != values
            or kept.kernel.weights.shape[0] < needed
            or (with_graph and kept.tangents is None)
        ):
            length = 64
            while length < needed:
                length *= 2
            # Numbers made in inference mode could not be trained with later.
            with torch.inference_mode(False), torch.no_grad():
                kernel = self._compute(length, like)
            kept = _Kept(values, kernel, self._tangents(length, like) if with_graph else None)
            self._cache[key] = kept
        if not with_graph or kept.tangents is None:
            return kept.kernel
        return self._with_graph(kept.kernel, kept.tangents)

    def _values(self) -> tuple[float, ...]:
        """The numbers the kernel depends on, as they are now."""
        if self.order.fixed:
            return ()
        with torch.no_grad():
            return tuple(x for t in self._learnable() for x in t.reshape(-1).tolist())

    def _learnable(self) -> list[Tensor]:
        """Orders and coefficients as the solver sees them, float64, with their graph."""
        coefficients = self.order.term_coefficients(_CPU)
        return [self.order.alphas(_CPU), *([] if coefficients is None else [coefficients])]

    def _tangents(self, n: int, like: Tensor) -> list[list[Kernel]]:
        """The derivative of the kernel to each number it depends on: by parameter, then by number.

        One order a channel is one derivative, as every column of the weights has its own order.
        """
        numbers = [t.detach() for t in self._learnable()]
        tangents = []
        for i, number in enumerate(numbers):
            directions = (
                list(torch.eye(number.numel(), dtype=number.dtype))
                if self.order.multi_term
                else [torch.ones_like(number)]
            )
            tangents.append(
                [
                    _jvp(lambda *given: self._compute(n, like, list(given)), numbers, i, direction)
                    for direction in directions
                ]
            )
        return tangents

    def _with_graph(self, kernel: Kernel, tangents: list[list[Kernel]]) -> Kernel:
        """The kernel as a function of the parameters: its value, and to first order its change."""
        fields: list[Tensor | None] = list(kernel)
        for number, derivatives in zip(self._learnable(), tangents, strict=True):
            change = number - number.detach()  # zero, and the way back to the parameter
            parts = change.reshape(-1).unbind() if self.order.multi_term else [change.reshape(-1)]
            for part, derivative in zip(parts, derivatives, strict=True):
                for i, (field, slope) in enumerate(zip(fields, derivative, strict=True)):
                    if field is not None and slope is not None:
                        fields[i] = field + slope * part.to(device=field.device, dtype=field.dtype)
        return Kernel(*fields)  # type: ignore[arg-type]

    def _compute(self, n: int, like: Tensor, given: list[Tensor] | None = None) -> Kernel:
        numbers = self._learnable() if given is None else given
        alphas = numbers[0]

        def cast(t: Tensor) -> Tensor:
            return t.to(device=like.device, dtype=like.dtype)

        def flat(t: Tensor) -> Tensor:  # one order: give it the trailing dimension of the many
            return t if alphas.dim() and not self.order.multi_term else t.unsqueeze(-1)

        first = torch.zeros(n, 1, dtype=torch.float64)
        first[0] = 1.0
        solver = self.solver
        if len(numbers) > 1:
            multi = solver if isinstance(solver, MultiTermGrunwaldLetnikov) else MultiTermGrunwaldLetnikov()
            gain, weights = multi.terms(alphas, numbers[1], self.step_size, n)
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
