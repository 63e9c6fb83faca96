"""Potentials of any ``dvdt`` and their first crossing of the threshold, by torchdiffeq.

Every neuron has its own clock: with t = span s, all neurons run over the same s in [0, 1],

    dv/ds = span dvdt(v, I + slope span s)

A crossing is looked for cell by cell of ``dt_init``: the cell at whose end the potential is not below the
threshold holds it. Inside, Newton's method with bisection as its safeguard solves v(t) = v_threshold, each
v(t) integrated anew from the start of the cell. The search ends at ``span``, so what never fires returns.

Two bounds keep the search finite where a potential would leave to infinity behind its threshold (quadratic,
exponential neurons): a little above the threshold ``dvdt`` is taken where it was, and torchdiffeq may take
``max_steps`` steps.

Source: Chen, Amos & Nickel, *Learning Neural Event Functions for Ordinary Differential Equations*, ICLR 2021.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from spikede_plugins.errors import MissingExtraError, StateError

if TYPE_CHECKING:
    from spikede_plugins.spiking_dynamics import SpikingDynamics

#: How far above the threshold dvdt is still asked, as a part of v_threshold - v_reset.
_MARGIN = 1e-3
#: Cells that are integrated at a time.
_PIECE = 64
#: A crossing is found after this many halvings or sooner.
_ROUNDS = 80


class Search(NamedTuple):
    """How potentials are integrated and crossings are searched.

    Attributes:
        dt_init: the cell of the search: a potential is compared with its threshold so often at least.
        dt_min: how exact a crossing must be; the search goes on to rounding where it can.
        solver: a method of torchdiffeq.
        rtol, atol: its tolerances, on the neuron that is off most; None: 1e-10, float32 1e-6.
        max_steps: the most steps of one cell.
        adjoint: gradients by the adjoint equation instead of through the steps.
    """

    dt_init: float = 0.1
    dt_min: float = 0.001
    solver: str = "dopri5"
    rtol: float | None = None
    atol: float | None = None
    max_steps: int = 10_000
    adjoint: bool = False


def solve_flow(
    dynamics: SpikingDynamics, v: Tensor, current: Tensor, slope: Tensor | None, span: Tensor, search: Search
) -> Tensor:
    """The potential after ``span``, ``[*shape]``; differentiable in all that it depends on."""

    if search.adjoint and torch.is_grad_enabled():
        return _solve_adjoint(dynamics, v, current, slope, span, search)

    def rate(s: Tensor, v: Tensor) -> Tensor:
        at = current if slope is None else current + slope * (span * s.to(v.dtype))
        return span * _bounded_rate(dynamics, v, at)

    return _solve(rate, v, 1, search)[-1]


def _solve_adjoint(
    dynamics: SpikingDynamics, v: Tensor, current: Tensor, slope: Tensor | None, span: Tensor, search: Search
) -> Tensor:
    """:func:`solve_flow` by the adjoint equation.

    Current and span are states that stay as they are: their graphs may lead back to the parameters, which the
    adjoint of this solve must not follow.
    """
    slope = torch.zeros_like(v) if slope is None else slope

    def rate(s: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        v, current, slope, span = state
        at = current + slope * (span * s.to(v.dtype))
        still = torch.zeros_like(v)
        return span * _bounded_rate(dynamics, v, at), still, still, still

    state = tuple(t.expand(v.shape) for t in (v, current, slope, span))
    trained = tuple(p for p in dynamics.parameters() if p.requires_grad)
    return _solve(rate, state, 1, search, trained)[0][-1]


def search_crossing(
    dynamics: SpikingDynamics, v: Tensor, current: Tensor, slope: Tensor | None, span: Tensor, search: Search
) -> Tensor:
    """When the potential first reaches its threshold, ``[*shape]``; inf where not within ``span``.

    Raises:
        StateError: if dvdt is not finite, or if the solver needs more than ``max_steps`` steps.
    """
    with torch.no_grad():
        shape = v.shape
        threshold = torch.as_tensor(dynamics.v_threshold, dtype=v.dtype, device=v.device).expand(shape)
        slopes = torch.zeros_like(v) if slope is None else slope.expand(shape)
        columns = [t.expand(shape).clone() for t in (v, current, slopes, span)]
        found = torch.where(v >= threshold, 0.0, math.inf).to(v.dtype)
        begun = torch.zeros_like(v)
        cells = math.ceil(float(span.max()) / search.dt_init - 1e-9) if v.numel() else 0
        cell = torch.full_like(v, search.dt_init)
        for first in range(0, cells, _PIECE):
            seeking = torch.isinf(found) & (begun < columns[3])
            if not bool(seeking.any()):
                break
            # Neurons that need no search any longer stand still: their clock has no span.
            count = min(_PIECE, cells - first)
            length = torch.where(seeking, torch.minimum(cell * count, columns[3] - begun), 0.0)
            at = _trace(dynamics, columns[0], columns[1], columns[2], begun, length, count, search)
            over = (at[1:] >= threshold) & seeking
            which = over.to(torch.int8).argmax(0)
            hit = over.any(0)
            low = begun + which * (length / count)
            start = at.gather(0, which.unsqueeze(0))[0]
            if bool(hit.any()):
                inside = _inside(dynamics, start, columns, low, length / count, threshold, hit, search)
                found = torch.where(hit, low + inside, found)
            columns[0], begun = at[-1], begun + length
        return torch.where(found <= span, found, math.inf)


def _trace(
    dynamics: SpikingDynamics, v: Tensor, current: Tensor, slope: Tensor, begun: Tensor, length: Tensor,
    cells: int, search: Search,
) -> Tensor:  # fmt: skip
    """The potentials at the ends of ``cells`` cells that make up ``length``, ``[cells + 1, *shape]``."""

    def rate(s: Tensor, v: Tensor) -> Tensor:
        at = current + slope * (begun + length * s.to(v.dtype))
        return length * _bounded_rate(dynamics, v, at)

    return _solve(rate, v, cells, search)


def _inside(
    dynamics: SpikingDynamics, v: Tensor, columns: list[Tensor], low: Tensor, width: Tensor,
    threshold: Tensor, hit: Tensor, search: Search,
) -> Tensor:  # fmt: skip
    """Where in its cell, which begins at ``low`` with ``v``, a neuron that has ``hit`` reaches threshold."""
    v, low, right, threshold = v[hit], low[hit], width[hit], threshold[hit]
    current, slope = columns[1][hit] + columns[2][hit] * low, columns[2][hit]
    part = _Part(dynamics, hit)
    left, nothing = torch.zeros_like(v), torch.zeros_like(v)
    rate = part.rate(v, current)
    at, value = left, v
    eps = torch.finfo(v.dtype).eps
    for _ in range(_ROUNDS):
        newton = at + (threshold - value) / torch.where(rate > 0, rate, math.inf)
        middle = 0.5 * (left + right)
        moved = torch.where((newton > left) & (newton < right) & (rate > 0), newton, middle)
        done = ((moved - at).abs() <= 4.0 * eps * (low + right)) | (right - left <= 4.0 * eps * (low + right))
        at = moved
        if bool(done.all()):
            break
        value = _trace_part(part, v, current, slope, nothing, at, search)
        rate = part.rate(value, current + slope * at)
        left, right = torch.where(value < threshold, at, left), torch.where(value < threshold, right, at)
    if not bool((done | (right - left <= search.dt_min)).all()):
        raise StateError(
            f"the crossings of {type(dynamics).__name__} could not be found to dt_min = {search.dt_min:g}; "
            "a smoother dvdt, a smaller dt_init or tighter rtol and atol may help."
        )
    result = torch.zeros_like(width)
    result[hit] = at
    return result


class _Part:
    """Some neurons of a layer, one behind the other: the dynamics are still asked for all of them."""

    def __init__(self, dynamics: SpikingDynamics, which: Tensor) -> None:
        self.dynamics, self.which = dynamics, which

    def spread(self, values: Tensor, fill: Tensor | float) -> Tensor:
        whole = values.new_zeros(self.which.shape) + fill
        whole[self.which] = values
        return whole

    def rate(self, v: Tensor, current: Tensor) -> Tensor:
        reset = torch.as_tensor(self.dynamics.v_reset, dtype=v.dtype, device=v.device)
        found = _bounded_rate(self.dynamics, self.spread(v, reset), self.spread(current, 0.0))
        return found[self.which]


def _trace_part(
    part: _Part, v: Tensor, current: Tensor, slope: Tensor, begun: Tensor, length: Tensor, search: Search
) -> Tensor:
    def rate(s: Tensor, v: Tensor) -> Tensor:
        return length * part.rate(v, current + slope * (begun + length * s.to(v.dtype)))

    return _solve(rate, v, 1, search)[-1]


def _bounded_rate(dynamics: SpikingDynamics, v: Tensor, current: Tensor) -> Tensor:
    """dvdt, taken where it was a little above the threshold."""
    limit = dynamics.v_threshold + _MARGIN * (dynamics.v_threshold - dynamics.v_reset)
    limit = limit.detach().to(v) if isinstance(limit, Tensor) else v.new_full((), limit)
    rate = dynamics.rate(torch.minimum(v, limit), current.expand_as(v))
    if not bool(torch.isfinite(rate).all()):
        bad = v[~torch.isfinite(rate)].flatten()[0]
        raise StateError(
            f"{type(dynamics).__name__}.dvdt is not finite at v = {float(bad):g}: check it for divisions by "
            "zero and overflow, and the input for its size."
        )
    return rate


def _solve(
    rate: Any, start: Any, cells: int, search: Search, trained: tuple[Tensor, ...] | None = None
) -> Any:
    """torchdiffeq from s = 0 to 1, ``[cells + 1, *shape]``; its steps end at the ends of the cells.

    ``start`` is the potentials, or a tuple that begins with them. With ``trained`` by the adjoint equation.
    """
    v: Tensor = start[0] if isinstance(start, tuple) else start
    try:
        from torchdiffeq import odeint, odeint_adjoint
    except ImportError as error:
        raise MissingExtraError(
            "dynamics of your own are integrated by torchdiffeq, which is not installed: "
            'pip install "spikede-plugins[ode]". (ODELIFDynamics and ODEIFDynamics need nothing.)'
        ) from error
    if not v.numel():
        empty = v.expand(cells + 1, *v.shape)
        return (empty,) if isinstance(start, tuple) else empty
    # The solver's clock is of float64 whatever the dtype of the potential is.
    s = torch.linspace(0.0, 1.0, cells + 1, dtype=torch.float64, device=v.device)
    tolerance = 1e-10 if v.dtype == torch.float64 else 1e-6
    options = {"norm": _largest, "step_t": s[1:], "max_num_steps": search.max_steps}
    given: dict[str, Any] = {
        "method": search.solver, "options": options,
        "rtol": tolerance if search.rtol is None else search.rtol,
        "atol": tolerance if search.atol is None else search.atol,
    }  # fmt: skip
    try:
        if trained is not None:
            back = {"norm": "seminorm", "max_num_steps": search.max_steps}
            return odeint_adjoint(rate, start, s, adjoint_params=trained, adjoint_options=back, **given)
        return odeint(rate, start, s, **given)
    except AssertionError as error:  # what torchdiffeq says of steps that are too many or too small
        raise StateError(
            f"torchdiffeq's {search.solver} gave up: {error}. The potential is too stiff or leaves to "
            "infinity: shorten the interval, raise max_steps, or loosen rtol and atol."
        ) from error


def _largest(error: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The norm of the step control: no neuron is off by more than the tolerance, however many there are."""
    return (error[0] if isinstance(error, tuple) else error).abs().max()
