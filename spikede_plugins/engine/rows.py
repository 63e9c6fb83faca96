"""Rows of a batch that begin a new history, and histories as plain tensors.

A batch holds independent samples along its first dimension, a row each. A row that begins a new history has
no past: its deviations and its traces are zero, so the history sum over them is zero, and its start is the
potential that the row has now. The other rows keep what they have. Solvers with a corrector count the steps
since the start of each neuron, as with ``memory_reset="spike"``: the rate at the start belongs to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikede_plugins.engine.history import HistoryLog
from spikede_plugins.engine.operator import FractionalOperator
from spikede_plugins.engine.step import History
from spikede_plugins.errors import OptionError, OptionTypeError
from spikede_plugins.solvers.base import CorrectorSolver

#: A past as plain tensors: what ``pack`` gives and ``unpack`` takes.
Packed = dict[str, Any]
_KEYS = ("rows", "start", "traces")


def over_rows(rows: Tensor, shape: torch.Size) -> Tensor:
    """The mask ``rows [B]``, shaped to broadcast against a time step ``[B, ...]``."""
    return rows.reshape(-1, *([1] * (len(shape) - 1)))


#: So many elements do not all lie below the start by chance.
_MANY = 4


def restarted_rows(
    now: Sequence[Tensor], before: Sequence[Tensor], starts: Sequence[Tensor | float]
) -> Tensor | None:
    """The rows of an edited state that were put back to their start.

    Such a row differs from what it was and equals the start in every variable. An edit of all elements alike
    that takes a whole row to the start (:func:`edited_alike`) is no such row, unless all rows are there.

    Args:
        now: the variables of the neuron as they are handed back, the membrane potential first, ``[B, ...]``.
        before: the same as the neuron left them.
        starts: what each begins with after a reset, a number or a tensor that broadcasts against it.

    Returns:
        A mask ``[B]``, True where a row begins anew; None if no row does.
    """
    if not now or not now[0].dim():
        return None
    with torch.no_grad():
        same = every([a == b for a, b in zip(now, before, strict=True)])
        back = every([a == start for a, start in zip(now, starts, strict=True)])
        rows = back & ~same
        if bool(rows.any()) and not bool(back.all()):
            rows = rows & ~edited_alike(before[0], now[0], starts[0])[0]
        return rows if bool(rows.any()) else None


def edited_alike(
    before: Tensor, now: Tensor, start: Tensor | float, clamps: bool = False
) -> tuple[Tensor, bool]:  # fmt: skip
    """Which rows ``[B]`` an edit of all elements alike (a clamp, a rounding) would take to the start.

    Such an edit takes to the start what lies below it, or in an interval around it. A row that was put back
    had elements in a range in which others were left where they were.

    Args:
        before, now: the membrane potential before and after the edit ``[B, ...]``.
        start: what it begins with after a reset.
        clamps: whether this membrane is known to be clamped to its start.

    Returns:
        The rows, and whether the membrane is clamped to its start.
    """
    moved = before - start
    kept = now != start
    flat = moved.reshape(moved.shape[0] if moved.dim() else 1, -1)
    clamped = torch.zeros_like(flat[:, 0], dtype=torch.bool)
    if not bool((now < start).any()):
        # Nothing is below the start any more: a clamp, unless it is a matter of one row of few neurons.
        clamps = clamps or int((moved < 0).sum()) >= _MANY
        if clamps:
            clamped = (flat <= 0).all(1)
    if not bool((now != before)[kept].any()):  # all else was left as it was
        return clamped, clamps
    others = moved[kept].sort().values
    left = torch.searchsorted(others, flat.amax(1), right=True) > torch.searchsorted(others, flat.amin(1))
    return clamped | ~left, clamps


def every(parts: Sequence[Tensor]) -> Tensor:
    """The rows ``[B]`` in which all elements of all parts are true."""
    return torch.stack([part.reshape(part.shape[0] if part.dim() else 1, -1).all(1) for part in parts]).all(0)


def restart_rows(operator: FractionalOperator, history: History, v: Tensor, rows: Tensor) -> History:
    """The history in which some rows of the batch begin anew at the potential that they have now.

    Args:
        operator: order, solver, memory, step size.
        history: what came before. It is not changed.
        v: the membrane potential that the next step starts from ``[B, ...]``.
        rows: a mask ``[B]``, True for the rows that begin anew.

    Returns:
        The history for the next step. No gradient goes back beyond the start of a row.
    """
    past, start, traces = history
    if past is None or start is None:
        return history
    rows = over_rows(rows.to(v.device), v.shape)
    kept = past.masked_fill(rows, 0.0)
    traces = None if traces is None else traces.masked_fill(rows, 0.0)
    corrector = isinstance(operator.solver, CorrectorSolver)
    if start.dim() < past.dim():  # a start of explicit solvers: one potential a neuron
        if corrector:
            raise OptionError(f"a history of solver {operator.solver.name!r} holds the rate at its start.")
        same = bool(torch.where(rows, v.detach() == start.detach(), True).all())
        return History(kept, start if same else torch.where(rows, v, start), traces)
    counted = start.shape[0] == 2 + corrector
    steps = start[-1:] if counted else torch.full_like(start[:1], float(past.shape[0]))
    others = start[1:-1] if counted else start[1:]
    first = torch.where(rows, v, start[0]).unsqueeze(0)
    # The next step of such a row is the first one from its start: it finds its own rate.
    return History(
        kept,
        torch.cat([first, others.masked_fill(rows, 0.0), steps.masked_fill(rows, -1.0)]),
        traces,
    )


def select_history(history: History, index: Tensor) -> History:
    """The history of the rows ``index`` of the batch, in that order."""
    past, start, traces = history
    if past is None or start is None:
        return history
    index = index.to(past.device)
    stacked = int(start.dim() == past.dim())
    if start.dim() == 0 or not any(start.stride()):  # one number for all neurons, which takes no memory
        chosen = start.flatten()[0] if start.dim() else start
        start = chosen.expand(*start.shape[:stacked], len(index), *past.shape[2:])
    else:
        start = start.index_select(stacked, index)
    return History(
        past.index_select(1, index), start, None if traces is None else traces.index_select(1, index)
    )


class Carried(NamedTuple):
    """One past that a neuron goes on from: its history and the log behind it.

    Attributes:
        history: what came before the newest potential.
        log: the buffer of the history and its count of steps.
        membrane: the newest potential ``[B, ...]`` where the caller carries it; None where the neuron does.
    """

    history: History
    log: HistoryLog
    membrane: Tensor | None = None


class Snapshot(NamedTuple):
    """What a layer carries from one call to the next; tensors as they are, with their graph.

    Attributes:
        variables: state variables by the framework's names: tensors ``[B, ...]``, or what a reset leaves.
        pasts: the pasts of its membrane. An integer neuron and one that has taken no step have none.
    """

    variables: dict[str, Any]
    pasts: tuple[Carried, ...] = ()


def pack(past: Carried) -> Packed:
    """The past as a plain dict of tensors of their own, without a graph."""
    named = {**dict(zip(_KEYS, past.history, strict=True)), "membrane": past.membrane}
    values = {name: None if value is None else value.detach().clone() for name, value in named.items()}
    return {**values, "steps": past.log.steps}


def unpack(packed: Packed) -> Carried:
    """The past that :func:`pack` was given, with tensors of its own.

    Raises:
        OptionTypeError: if ``packed`` is not what ``pack`` gives.
        OptionError: if its shapes do not belong together.
    """
    if not isinstance(packed, dict) or set(packed) != {*_KEYS, "membrane", "steps"}:
        raise OptionTypeError(f"a history holds {', '.join(_KEYS)}, membrane and steps, got {packed!r:.80}.")
    rows, start, traces, membrane = (packed[name] for name in (*_KEYS, "membrane"))
    if not isinstance(rows, Tensor) or not isinstance(start, Tensor) or not rows.dim():
        raise OptionTypeError("rows and start of a history must be tensors.")
    shape = rows.shape[1:]
    fits = start.shape in (shape, torch.Size()) or (start.dim() == rows.dim() and start.shape[1:] == shape)
    fits = fits and all(t is None or t.shape[-len(shape) :] == shape for t in (traces, membrane) if shape)
    if not fits:
        raise OptionError(
            f"the parts of a history do not belong together: rows {tuple(rows.shape)}, start "
            f"{tuple(start.shape)}; take the state from get_state(model)."
        )
    if start.shape == shape and not start.any():  # zeros, the usual start: one number, which engines skip
        start = start.new_zeros(()).expand(shape)
    elif start.dim():
        start = start.clone()
    history = History(rows.clone(), start, None if traces is None else traces.clone())
    log = HistoryLog.counting(int(packed["steps"]))
    return Carried(history, log, None if membrane is None else membrane.clone())


def row_mask(rows: Any, batch: int) -> Tensor:
    """``rows`` (a mask, indices, a slice or one index) as a mask ``[batch]`` on the CPU.

    Raises:
        OptionTypeError: if it is none of these.
        OptionError: if it names a row that the batch does not have, or is a mask of another length.
    """
    mask = torch.zeros(batch, dtype=torch.bool)
    mask[row_index(rows, batch)] = True
    return mask


def row_index(rows: Any, batch: int) -> Tensor:
    """``rows`` (a mask, indices, a slice or one index) as indices on the CPU; errors as of ``row_mask``."""
    if isinstance(rows, slice):
        return torch.arange(batch)[rows]
    try:
        index = torch.as_tensor(rows).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionTypeError(
            f"rows must be indices, a mask or a slice, got {type(rows).__name__}."
        ) from error
    if index.dtype == torch.bool:
        if index.shape != (batch,):
            raise OptionError(f"a mask of shape {tuple(index.shape)} does not fit a batch of {batch}.")
        return index.nonzero().flatten()
    if index.numel() == 0:
        return torch.zeros(0, dtype=torch.long)
    if index.is_floating_point() or index.is_complex() or index.dim() > 1:
        raise OptionTypeError(f"rows must be whole numbers in one dimension, got {rows!r:.80}.")
    index = index.reshape(-1).long()
    if bool((index < -batch).any() or (index >= batch).any()):
        raise OptionError(f"rows {index.tolist()} reach beyond a batch of {batch}.")
    return index % batch
