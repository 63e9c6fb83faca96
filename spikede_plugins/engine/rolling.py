"""A step as a pure function of tensors of fixed size, for programs that are captured once and run for ever.

    S_k = sum_{m=1..L} W_m u_{k-m}  +  sum_p C_p z_p,        z_p <- x_p z_p + u_{k-L-1}

The newest L deviations roll through a buffer that begins with zeros; of a compressed memory, the one that
leaves it goes into the traces at every step, where the engine's own steps fold a block at a time. The
weights of lags up to L + BLOCK are then those of the traces, right to the memory's tolerance like all others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from spikede_plugins.engine.history import combine, per_neuron
from spikede_plugins.engine.operator import FractionalOperator
from spikede_plugins.engine.step import History, check_channels
from spikede_plugins.errors import ExportError
from spikede_plugins.exponentials import EXACT
from spikede_plugins.solvers.base import ExplicitSolver


class Numbers(NamedTuple):
    """What a step needs: gain ``[S]``, weights of the newest lags oldest first ``[L, S]``; of a compressed
    memory also what a step takes of the traces ``[P, S]`` and what they keep over a step ``[P]``."""

    gain: Tensor
    weights: Tensor
    readout: Tensor | None
    decay: Tensor | None


class RollingOperator(FractionalOperator):
    """A snapshot of an operator, with the orders as they are, whose steps are pure functions.

    Raises:
        ExportError: if what it remembers has no fixed size, or its solver or reset no such form.
    """

    captures = "step"

    def __init__(self, operator: FractionalOperator) -> None:
        if not isinstance(operator.solver, ExplicitSolver):
            raise ExportError(
                f'the solver {operator.solver.name!r} has no step of fixed size; convert with method="gl".'
            )
        if operator.memory_reset != "never":
            raise ExportError(
                f"memory_reset={operator.memory_reset!r} has no step of fixed size; "
                'convert with memory_reset="never".'
            )
        if not (operator.memory.limit or operator.folds or operator.is_native):
            raise ExportError(
                f"memory={operator.memory.describe()!r} grows with every step, so one step has no inputs of "
                'fixed size; convert with memory="soe", or with an int for a window.'
            )
        super().__init__(
            operator.order, operator.solver, operator.memory, operator.step_size, operator.memory_reset
        )
        self._numbers: dict[tuple[torch.dtype, torch.device], Numbers] = {}

    @property
    def length(self) -> int:
        """How many deviations are kept as they are."""
        return 1 if self.is_native else self.memory.limit or EXACT

    def numbers(self, like: Tensor) -> Numbers:
        """The numbers of a step in the dtype and on the device of the state."""
        key = (like.dtype, like.device)
        if key not in self._numbers:
            with torch.no_grad():
                kernel = self.kernel(self.length, like, self.folds)
            readout = decay = None
            if kernel.readout is not None and kernel.inject is not None and self.folds:
                readout, decay = kernel.readout[0], kernel.inject[:, -2]  # of one step
            weights = kernel.weights[: self.length].flip(0)
            self._numbers[key] = Numbers(kernel.gain, weights, readout, decay)
        return self._numbers[key]

    @property
    def steps_in_blocks(self) -> bool:
        return False


class RollingStep:
    """What :class:`spikede_plugins.engine.step.Step` is to other operators."""

    fires = False

    def __init__(self, operator: RollingOperator, v: Tensor, history: History) -> None:
        self.v = v
        self.channel_dim = check_channels(operator, v.shape)
        numbers = operator.numbers(v)
        rows, start, traces = history
        self.start = v.detach().clone() if start is None else start
        if rows is None:
            rows = v.new_zeros((operator.length, *v.shape))
        self.traces = None
        if numbers.decay is not None and numbers.readout is not None:
            if traces is None:
                traces = v.new_zeros((numbers.decay.shape[0], *v.shape))
            decay = numbers.decay.reshape(-1, *([1] * v.dim()))
            self.traces = decay * traces + rows[0]
        self.rows = torch.cat([rows[1:], (v - self.start).unsqueeze(0)])
        self.sum = combine(numbers.weights.unsqueeze(0), self.rows, self.channel_dim)[0]
        if self.traces is not None and numbers.readout is not None:
            self.sum = self.sum + combine(numbers.readout.unsqueeze(0), self.traces, self.channel_dim)[0]
        self.gain = per_neuron(numbers.gain, v.shape, self.channel_dim)

    def charge(
        self, charge: Callable[[Tensor], Tensor], base: Tensor | None = None, *, affine: bool = False
    ) -> tuple[Tensor, History]:
        """As ``Step.charge``."""
        v = self.v if base is None else base
        charged = charge(v)
        charged = charged + (self.gain - 1.0) * (charged - v) - self.sum
        return charged, History(self.rows, self.start, self.traces)
