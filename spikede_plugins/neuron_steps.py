"""One call of a neuron in a model that a wrapper runs: its potential and its past.

A neuron that a model calls twice in a step is two populations; each has a :class:`NeuronCall` of its own.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from spikede_plugins.adapter import Adapter
from spikede_plugins.engine import (
    FRESH,
    FractionalOperator,
    HistoryLog,
    can_scan,
    charge_step,
    scan,
    state_dtype,
)
from spikede_plugins.errors import OptionError
from spikede_plugins.neurons import BaseNeuron
from spikede_plugins.solvers.base import CorrectorSolver


class NeuronCall(Protocol):
    """What a run asks of one call of a neuron.

    Attributes:
        potentials: the potentials of the steps so far, if they are recorded: each ``[B, ...]``, or, of
            :meth:`sequence`, ``[T, B, ...]``.
    """

    potentials: list[Tensor]

    def step(self, x: Tensor) -> Tensor:
        """The spikes of the next step, ``[B, ...]``."""
        ...

    def sequence(self, x_seq: Tensor) -> Tensor:
        """The spikes of all steps, ``[T, B, ...]``."""
        ...


class OwnNeuronCall:
    """A derivative-style neuron, from the potential 0 on.

    Args:
        neuron: the neuron.
        operator: its order, solver, memory and step.
        like: input ``[B, ...]`` of a step, for shape, dtype and device.
        record: keep the potential at every step, before the step is made.

    Raises:
        OptionError: for an implicit solver and a neuron that has not said that it is elementwise.
    """

    def __init__(
        self, neuron: BaseNeuron, operator: FractionalOperator, like: Tensor, record: bool = False
    ) -> None:
        self.neuron, self.operator, self.record = neuron, operator, record
        self.potentials: list[Tensor] = []
        self.v = torch.zeros(like.shape, dtype=state_dtype(like), device=like.device)
        self.history, self.log = FRESH, HistoryLog()
        self.elementwise = neuron.as_elementwise()
        solver = operator.solver
        if self.elementwise is None and isinstance(solver, CorrectorSolver) and solver.predictor is None:
            raise OptionError(
                f"method={solver.name!r} solves for each element alone, and {type(neuron).__name__} has not "
                'said that this is right: set elementwise = True in its class if so, or use method="abm".'
            )

    def step(self, x: Tensor) -> Tensor:
        if self.elementwise is not None and can_scan(self.operator):
            return self._scan(x.unsqueeze(0))[0]
        if self.record:
            self.potentials.append(self.v)
        fired: list[Tensor] = []
        x = x.to(self.v.dtype)

        def charge(v: Tensor) -> Tensor:
            rate, spike = self.neuron.dynamics(v, x)
            fired.append(spike)
            return v + rate

        self.v, self.history = charge_step(self.operator, charge, self.v, self.history, self.log)
        return fired[0]  # that at the potential before the step; solvers may ask for more

    def sequence(self, x_seq: Tensor) -> Tensor:
        if self.elementwise is not None and can_scan(self.operator):
            return self._scan(x_seq)
        spikes = torch.stack([self.step(x) for x in x_seq])
        self.potentials = [torch.stack(self.potentials)] if self.record else []
        return spikes

    def _scan(self, x_seq: Tensor) -> Tensor:
        assert self.elementwise is not None
        before = self.v
        spikes, self.v, self.history, reached = scan(
            self.operator, self.elementwise, x_seq, before, self.history, self.log, keep_v=self.record
        )
        if reached is not None:
            rows = torch.cat([before.unsqueeze(0), reached[:-1]])
            self.potentials.append(rows if len(x_seq) > 1 else rows[0])
        return spikes


class FrameworkNeuronCall:
    """A framework's neuron, made fractional, from its own start on.

    Args:
        neuron: the fractional neuron; it is not changed.
        adapter: its framework's.
        operator: its order, solver, memory and step.
        record: keep the potential after every step, as the framework's own recordings have it.
    """

    def __init__(
        self, neuron: nn.Module, adapter: Adapter, operator: FractionalOperator, record: bool = False
    ) -> None:
        self.neuron, self.adapter, self.operator, self.record = neuron, adapter, operator, record
        self.potentials: list[Tensor] = []
        self.alone: nn.Module | None = None

    def step(self, x: Tensor) -> Tensor:
        if self.alone is None:
            self.alone = self.adapter.stepping(self.neuron, self.operator)
        spikes: Tensor = self.alone(x)
        if self.record:
            self.potentials.append(self.adapter.potential(self.alone))
        return spikes

    def sequence(self, x_seq: Tensor) -> Tensor:
        if not self.record:
            return self.adapter.run_sequence(self.neuron, self.operator, x_seq)
        spikes = torch.stack([self.step(x) for x in x_seq])
        self.potentials = [torch.stack(self.potentials)]
        return spikes
