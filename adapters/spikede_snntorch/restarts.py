"""Samples of a batch whose whole state was put back to its start begin a new history."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spikede_plugins.engine import FractionalOperator, History
from spikede_plugins.engine.rows import edited_alike, every, restart_rows

from .matching import readable


def restarted(
    operator: FractionalOperator, entry: Any, history: History, state: tuple[Tensor, ...]
) -> History | None:
    """The history that the next step from ``state`` continues; None if every sample begins a new one.

    Args:
        operator: order, solver, memory, step size.
        entry: the membrane that was returned, with the state as it was then.
        history: its history, with or without a graph.
        state: the state as it was handed back, the membrane first.
    """
    mem = state[0]
    if not readable(mem) or not mem.numel():
        return history
    with torch.no_grad():
        rows = _put_back(entry, history, tuple(t.detach() for t in state))
    if not bool(rows.any()):
        return _begun(operator, history, mem)
    if bool(rows.all()):
        return None
    return _begun(operator, restart_rows(operator, history, mem, rows), mem)


def _begun(operator: FractionalOperator, history: History, mem: Tensor) -> History:
    """The history, in which neurons that have just forgotten theirs start from the edited membrane."""
    start = history.start
    if operator.memory_reset != "spike" or start is None or start.dim() == mem.dim():
        return history
    first = torch.where(start[-1] < 0, mem.to(start), start[0])
    return history._replace(start=torch.cat([first.unsqueeze(0), start[1:]]))


def _put_back(entry: Any, history: History, state: tuple[Tensor, ...]) -> Tensor:
    """Which samples ``[B]`` were put back to zero or to the value that their sequence started from."""
    mem, start = state[0], history.start
    at_zero = every([t == 0 for t in state])
    rows = _changed(entry, state, at_zero, torch.zeros_like(mem))
    if start is None:
        return rows
    start = (start if start.dim() == mem.dim() else start[0]).detach().to(mem)
    firsts = (*entry.stream.firsts, *([None] * len(state)))
    starts = [start, *(0 if first is None else first.to(mem) for first in firsts[: len(state) - 1])]
    at_start = every([t == s for t, s in zip(state, starts, strict=True)]) & ~at_zero
    return rows | _changed(entry, state, at_start, start)


def _changed(entry: Any, state: Sequence[Tensor], back: Tensor, start: Tensor) -> Tensor:
    """Those of the samples ``back [B]``, whose state is at ``start``, that somebody put there."""
    if entry.values is None or not bool(back.any()):
        return back
    before = [value.to(t) for value, t in zip(entry.values, state, strict=False)]
    back = back & ~every([t == value for t, value in zip(state, before, strict=False)])
    if not bool(back.any()):
        return back
    alike, entry.stream.clamps = edited_alike(before[0], state[0], start, entry.stream.clamps)
    return back & ~alike
