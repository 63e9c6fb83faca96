"""A model called once a step, for models that mix the samples of a batch or carry a state of their own.

Every neuron call keeps its potential and its past from one call of the model to the next. What the model
itself keeps (the hidden state of a cell, a buffer) goes on as it would in a loop over time. No dimension of
what the model computes need be the batch: nodes may be pooled, rows added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spikede_plugins.engine import FRESH, HistoryLog, charge_step, state_dtype
from spikede_plugins.errors import StateError
from spikede_plugins.layer_runs import (
    CHANGED,
    FractionalRun,
    Layer,
    Masks,
    Operators,
    Run,
    StateRun,
    call_base,
    each,
    joined,
    neuron_call,
)
from spikede_plugins.model_state import Captured, Captures, as_is, put_back
from spikede_plugins.neuron_steps import NeuronCall
from spikede_plugins.uncompiled import uncompiled, uncompiled_alone


class HeadInputs:
    """What heads that average over time were given: all of it is there at the last step."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.given: dict[int, dict[int, Tensor]] = {}

    def over_time(self, head: int, step: int, x: Tensor) -> Tensor:
        """The input ``[T, B, ...]`` of the ``head``-th head of a step; before the last step, of this one."""
        given = self.given.setdefault(head, {})
        given.setdefault(step, x)
        return torch.stack([given[k] for k in sorted(given)]) if step == self.steps - 1 else x.unsqueeze(0)


class StepRun(FractionalRun):
    """T calls of ``base`` with one step each."""

    def __init__(
        self, steps: int, batch: int, operators: Operators, rows: Tensor | None, record: bool = False
    ) -> None:
        super().__init__(steps, batch, operators, rows, record)
        self.heads = HeadInputs(steps)
        self.calls: list[NeuronCall] = []
        self.now = self._next = self._next_head = 0

    def begin(self, step: int) -> None:
        """The next call of ``base`` is this step."""
        if step and self._next != len(self.calls):
            raise StateError(CHANGED)
        self.now, self._next, self._next_head = step, 0, 0

    def __call__(self, layer: Layer, current: Tensor) -> Tensor:
        n = self._next
        if self.now == 0:
            call = neuron_call(layer, self.operators(layer, n), current, self.record)
            self.calls.append(self.begin_call(call, layer))
            self.called.append(layer)
        elif n >= len(self.calls) or self.called[n] is not layer:
            raise StateError(CHANGED)
        self._next += 1
        return self.calls[n].step(current).to(current.dtype)

    def unfold_time(self, x: Tensor, last: bool = False) -> Tensor:
        self.time_is_gone |= last
        self._next_head += 1
        return self.heads.over_time(self._next_head - 1, self.now, x)

    @property
    def potentials(self) -> list[Tensor]:
        """Of each call of a neuron, ``[T, B, ...]``."""
        return [torch.stack(call.potentials) for call in self.calls]


@uncompiled_alone
def run_steps(base: nn.Module, run: StepRun, x: Tensor, masks: Masks | None) -> Any:
    """The output of ``base`` over time, ``[T, ...]``; that of a head alone if it has averaged over time."""
    parts = []
    for step in range(run.steps):
        run.begin(step)
        parts.append(call_base(base, run, x[step], masks))
    return gathered(run, parts)


def gathered(run: Run, parts: Sequence[Any]) -> Any:
    """The outputs of all steps as one."""
    if run.time_is_gone:
        return run.output(parts[-1])
    return joined([each(part, lambda t: t.unsqueeze(0)) for part in parts])


class At(StateRun):
    """One evaluation of the network at one time, whose heads see the other times as well.

    Args:
        batch: of the input.
        states: the potentials, one for each call of a neuron.
        grows: add a potential 0 for a call that has none yet.
        heads, step: what heads are given, and which time this is.
    """

    def __init__(
        self, batch: int, states: list[Tensor], grows: bool, heads: HeadInputs, step: int
    ) -> None:
        super().__init__(1, batch, states)
        self.own, self.grows, self.heads, self.step, self._head = states, grows, heads, step, 0

    def __call__(self, layer: Layer, current: Tensor) -> Tensor:
        if self.grows and len(self.rates) == len(self.own):
            dtype = state_dtype(current)
            self.own.append(torch.zeros(current.shape, dtype=dtype, device=current.device))
        return super().__call__(layer, current)

    def unfold_time(self, x: Tensor, last: bool = False) -> Tensor:
        self.time_is_gone |= last
        self._head += 1
        return self.heads.over_time(self._head - 1, self.step, x)


class _Evaluation:
    """One evaluation, made once more in backward with what the model kept before it."""

    def __init__(self, base: nn.Module, masks: Masks | None, captures: Captures) -> None:
        self.base, self.masks, self.captures = base, masks, captures
        self.before: Captured | None = None

    def __call__(self, run: Callable[[], At], x: Tensor, *states: Tensor) -> tuple[Any, At]:
        if self.before is None:
            self.before = self.captures.take()
            return self._call(run(), x)
        now = as_is(self.base)
        put_back(self.before)
        try:
            return self._call(run(), x)
        finally:
            put_back(now)

    def _call(self, run: At, x: Tensor) -> tuple[Any, At]:
        out = call_base(self.base, run, x, self.masks)
        return out, run


@uncompiled
def integrate_steps(
    base: nn.Module, x: Tensor, operators: Operators, masks: Masks | None,
    start: Sequence[Tensor] | None = None,
) -> tuple[Any, StateRun, list[Tensor]]:  # fmt: skip
    """The network integrated step by step; its activations are not kept but computed once more in backward.

    The neuron calls begin at ``start``, or at 0.

    Returns:
        The output over time, the evaluation at the last time, and the potentials of the neuron calls.
    """
    steps, batch = x.shape[:2]
    states: list[Tensor] = list(start or [])
    heads, captures = HeadInputs(steps), Captures(base)
    parts, reached, pasts = [], [], []
    logs: list[HistoryLog] = []
    for k in range(steps):
        held = list(states)

        def run(k: int = k, held: list[Tensor] = held) -> At:
            return At(batch, held, k == 0 and start is None, heads, k)

        out, done = checkpoint(_Evaluation(base, masks, captures), run, x[k], *held, use_reentrant=False)
        parts.append(out)
        states = held
        if k == 0:
            pasts, logs = [FRESH] * len(states), [HistoryLog() for _ in states]
        reached.append(states)
        rates = done.all_rates()
        if k + 1 == steps:
            break
        states = []
        for n, (v, rate) in enumerate(zip(held, rates, strict=True)):
            operator = operators(done.called[n], n)
            v, pasts[n] = charge_step(operator, partial(torch.add, rate), v, pasts[n], logs[n])
            states.append(v)
    potentials = [torch.stack(each_call) for each_call in zip(*reached, strict=True)]
    return gathered(done, parts), done, potentials
