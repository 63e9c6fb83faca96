"""One interval of event-driven neurons: every spike in it, and the state it ends in.

Each neuron goes on its own clock from spike to spike. After a spike it is held at v_reset for the refractory
period, then starts anew. Under a constant current all spikes after the first are alike,

    t_k = t_1 + (k - 1) T,      T = refractory + crossing(v_reset),

under a ramp they are found in turn. An interval holds the spikes in (0, D]: one at its very end belongs to
it.

**Gradients of times**, by the implicit function theorem: v(t*) = v_threshold gives

    dt* = -(dv(t*) - dv_threshold) / rate,      rate = max(dv/dt at t*, floor)

where dv(t*) is the change of the free potential at a fixed time. The floor bounds what a potential that only
grazes its threshold (rate -> 0) would send back: no gradient is more than 1/floor of that of the potential.

**Gradients of counts**, by a surrogate sigma': a spike counts as the step of the overshoot
z_k = rate (D - t_k) that the potential would have at the end of the interval had the spike not reset it, and
a neuron that is free at the end as one more step, of v - v_threshold, which it has not taken:

    dcount = sum_k sigma'(z_k) dv(t_k) + sigma'(v_end - v_threshold) dv_end

This divides by nothing, and where an interval holds one spike at most it is the surrogate gradient of
clock-driven networks, with the potential's change at the spike itself instead of at the end of the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spikede_plugins.errors import StateError
from spikede_plugins.event_search import Search
from spikede_plugins.surrogate import Surrogate

if TYPE_CHECKING:
    from spikede_plugins.spiking_dynamics import SpikingDynamics

#: A neuron that fires more often than this in one interval is refused, unless ``max_spikes`` says otherwise.
RUNAWAY = 1_000_000


class NeuronState(NamedTuple):
    """What a layer of neurons carries from one interval to the next.

    Attributes:
        v: potentials ``[*shape]``.
        held: how long each neuron is still held at v_reset ``[*shape]``.
        current: the newest input current ``[*shape]``, where a ramp leads from it to the next; or None.
        memory: what the dynamics themselves remember (fractional ones their history); or None.
    """

    v: Tensor
    held: Tensor
    current: Tensor | None = None
    memory: Any = None


class Events(NamedTuple):
    """The spikes of one interval.

    Attributes:
        counts: how many each neuron fired, ``[*shape]``, with the surrogate gradient.
        times: when, from the start of the interval, ``[K, *shape]`` in ascending order; inf where there are
            no more.
    """

    counts: Tensor
    times: Tensor


class Rules(NamedTuple):
    """What holds for every interval.

    Attributes:
        refractory: how long a neuron is held after a spike; inf: it fires once.
        slope_floor: the least dv/dt at threshold that gradients of times divide by.
        surrogate: of the counts.
        search: how custom dynamics are integrated.
        max_spikes: the most spikes of a neuron in an interval; given, the number of rows of ``times``.
    """

    refractory: float = 0.0
    slope_floor: float = 1e-3
    surrogate: Surrogate = Surrogate("atan")
    search: Search = Search()
    max_spikes: int | None = None

    @property
    def limit(self) -> int:
        """The most spikes of a neuron in an interval."""
        return RUNAWAY if self.max_spikes is None else self.max_spikes


def run_interval(
    dynamics: SpikingDynamics, state: NeuronState, current: Tensor, duration: float, rules: Rules, ramp: bool
) -> tuple[NeuronState, Events]:
    """The state after ``duration`` under ``current`` ``[*shape]``, and the spikes on the way.

    Args:
        ramp: the current goes linearly from the state's to this one, which it reaches at the end.

    Raises:
        StateError: for more spikes than ``max_spikes``, and as the search raises.
    """
    slope, begin = None, current
    if ramp and state.current is not None:
        begin, slope = state.current, (current - state.current) / duration
    if slope is None:
        v, held, counts, times = _all_alike(dynamics, state, begin, duration, rules)
    else:
        v, held, counts, times = _in_turn(dynamics, state, begin, slope, duration, rules)
    return NeuronState(v, held, current if ramp else None), Events(counts, times)


Walked = tuple[Tensor, Tensor, Tensor, Tensor]


def _all_alike(
    dynamics: SpikingDynamics, state: NeuronState, current: Tensor, duration: float, rules: Rules
) -> Walked:
    """A constant current: the first spike, and then one every period."""
    v, search = state.v, rules.search
    # One that is held beyond the interval (for ever, say) starts nothing in it.
    waits = state.held > duration
    held = torch.where(waits, 0.0, state.held)
    threshold, reset = (_like(value, v) for value in (dynamics.v_threshold, dynamics.v_reset))
    zero = torch.zeros_like(v)
    with torch.no_grad():
        room = (duration - held).clamp_min(0.0)
        first = torch.where(waits, math.inf, dynamics.crossing(v, current, None, room, search))
        fires = held + first <= duration
        # Held to its very end: it starts in the next interval.
        left = torch.where(fires, (duration - held - first - rules.refractory).clamp_min(0.0), 0.0)
        again = dynamics.crossing(reset, current, None, left, search)
        further = torch.where(fires & torch.isfinite(again), left / (again + rules.refractory), 0.0)
        number = torch.where(fires, 1.0, 0.0).to(v.dtype)
        number = number + _whole(further, held + first, again + rules.refractory, duration, rules)
        rows = _rows(number, rules)
        first, again = (torch.where(torch.isfinite(t), t, 0.0) for t in (first, again))
        rate = dynamics.rate(threshold, current)
    # What each crossing is off by, which is nothing, with its gradient; the spike's own time is fixed.
    miss_first = dynamics.flow(v, current, None, (held + first).detach() - held, search) - threshold
    miss_again = dynamics.flow(reset, current, None, again, search) - threshold
    floor = rate.clamp_min(rules.slope_floor)
    t_first = implicit_time(held.detach() + first, torch.where(fires, miss_first, zero), floor)
    period = implicit_time(again, torch.where(number > 1, miss_again, zero), floor)
    if math.isfinite(rules.refractory):
        period = period + rules.refractory
    index = torch.arange(rows, dtype=v.dtype, device=v.device).reshape(-1, *[1] * v.dim())
    fired = index < number
    times = torch.where(fired, t_first + index * period, math.inf)
    # The last spike, and the rest of the interval from there.
    begun = torch.where(waits, state.held, held)
    last = torch.where(fires, t_first + (number - 1.0).clamp_min(0.0) * period + rules.refractory, begun)
    origin = torch.where(fires, reset, v)
    rest = (duration - last).clamp_min(0.0)
    end = dynamics.flow(origin, current, None, rest, search)
    v_end = torch.where(rest > 0, end, origin)
    held_end = (last - duration).clamp_min(0.0)
    counts = number
    if _wanted(v_end, times, miss_first):
        over = rate.clamp_min(0.0) * (duration - torch.where(fired, times.detach(), duration))
        change = torch.where(fired, miss_first + index * miss_again, 0.0)
        counts = _counts(number, over, change, fired, v_end - threshold, rest > 0, rules)
    return v_end, held_end, counts, times


def _whole(further: Tensor, first: Tensor, period: Tensor, duration: float, rules: Rules) -> Tensor:
    """How many whole periods lie between the first spike and the end, as the times themselves say it."""
    count = torch.floor(further)
    if not math.isfinite(rules.refractory):
        return count
    period = torch.where(torch.isfinite(period), period, math.inf)
    count = torch.where(first + count * period > duration, count - 1.0, count)
    one_more = first + (count + 1.0) * period <= duration
    return torch.where(torch.isfinite(period), torch.where(one_more, count + 1.0, count), 0.0).clamp_min(0.0)


def _rows(number: Tensor, rules: Rules) -> int:
    """Rows that the times of an interval have."""
    if rules.max_spikes is not None and torch.compiler.is_compiling():
        torch._assert_async((number <= rules.max_spikes).all(), "more spikes in an interval than max_spikes")
        return rules.max_spikes
    largest = float(number.max()) if number.numel() else 0.0
    if not math.isfinite(largest):
        raise StateError(
            "a neuron fires more often in one interval than can be counted: move its threshold away from its "
            "reset, or weaken the input."
        )
    most = int(largest)
    check_spikes(most, rules)
    return most if rules.max_spikes is None else rules.max_spikes


def check_spikes(most: int, rules: Rules) -> None:
    """Whether so many spikes of a neuron in an interval are allowed.

    Raises:
        StateError: if they are not.
    """
    if most > rules.limit:
        raise StateError(
            f"a neuron fires more than {rules.limit} times in one interval: weaken the input, shorten the "
            "interval, give the layer a refractory period, or a higher max_spikes."
        )


def _in_turn(
    dynamics: SpikingDynamics, state: NeuronState, current: Tensor, slope: Tensor, duration: float,
    rules: Rules,
) -> Walked:  # fmt: skip
    """A ramp: one spike of every neuron after the other."""
    v, clock, search = state.v, state.held, rules.search
    threshold, reset = (_like(value, v) for value in (dynamics.v_threshold, dynamics.v_reset))
    times: list[Tensor] = []
    misses: list[Tensor] = []
    rates: list[Tensor] = []
    active = torch.ones_like(v, dtype=torch.bool)
    while True:
        active = active & (clock <= duration)
        at = current + slope * torch.where(active, clock, 0.0)
        with torch.no_grad():
            room = torch.where(active, duration - clock, 0.0)
            wait = dynamics.crossing(v, at, slope, room, search)
            hits = active & (clock + wait <= duration)
            if not bool(hits.any()):
                break
            check_spikes(len(times) + 1, rules)
            wait = torch.where(hits, wait, 0.0)
            rate = dynamics.rate(threshold, at + slope * wait)
        span = torch.where(hits, (clock + wait).detach() - clock, 0.0)
        miss = torch.where(hits, dynamics.flow(v, at, slope, span, search) - threshold, 0.0)
        t = implicit_time(clock.detach() + wait, miss, rate.clamp_min(rules.slope_floor))
        times.append(torch.where(hits, t, math.inf))
        misses.append(miss)
        rates.append(rate)
        clock = torch.where(hits, t + rules.refractory, clock)
        v = torch.where(hits, reset, v)
        active = hits
    rest = (duration - clock).clamp_min(0.0)
    at = current + slope * torch.minimum(clock, torch.full_like(clock, duration))
    v_end = torch.where(rest > 0, dynamics.flow(v, at, slope, rest, search), v)
    held_end = (clock - duration).clamp_min(0.0)
    counts, rows = counted(times, misses, rates, v_end - threshold, rest > 0, duration, rules)
    return v_end, held_end, counts, rows


def counted(
    times: Sequence[Tensor], misses: Sequence[Tensor], rates: Sequence[Tensor], below: Tensor, free: Tensor,
    duration: float, rules: Rules,
) -> Events:  # fmt: skip
    """The spikes of an interval whose times were found row by row.

    Args:
        times: of each row, ``[*shape]``; inf where a neuron has none.
        misses, rates: what the potential misses of the threshold there, which is nothing but has a gradient,
            and how fast it rises.
        below: v - v_threshold at the end; ``free`` tells where that counts.
    """
    rows = torch.stack(tuple(times)) if times else below.detach().new_empty((0, *below.shape))
    fired = torch.isfinite(rows)
    number = fired.sum(0).to(below.dtype)
    if not _wanted(below, rows, *misses):
        return Events(number, rows)
    rate, change = (torch.stack(tuple(each)) if each else rows for each in (rates, misses))
    over = rate.clamp_min(0.0) * (duration - torch.where(fired, rows.detach(), duration))
    return Events(_counts(number, over, change, fired, below, free, rules), rows)


def _counts(
    number: Tensor, over: Tensor, change: Tensor, fired: Tensor, below: Tensor, free: Tensor, rules: Rules
) -> Tensor:
    """The number of spikes, with the gradient at the head of this file."""
    spikes = torch.where(fired, rules.surrogate(over + (change - change.detach())), 0.0).sum(0)
    soft = spikes + torch.where(free, rules.surrogate(below), 0.0)
    return number + (soft - soft.detach())


def _wanted(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _like(value: float | Tensor, v: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(v.dtype).expand(v.shape)
    return v.new_full((), value).expand(v.shape)


def implicit_time(time: Tensor, miss: Tensor, rate: Tensor) -> Tensor:
    """``time``, at which ``miss`` (the free potential less the threshold) is 0, with dt = -dmiss / rate."""
    if torch.compiler.is_compiling():
        return time - (miss - miss.detach()) / rate
    return _ImplicitTime.apply(time, miss, rate)  # type: ignore[no-any-return]


class _ImplicitTime(torch.autograd.Function):
    """Second derivatives would need those of the rate: they are refused, not guessed."""

    @staticmethod
    def forward(ctx: Any, time: Tensor, miss: Tensor, rate: Tensor) -> Tensor:
        ctx.save_for_backward(rate)
        return time.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (rate,) = ctx.saved_tensors
        return None, -grad / rate, None
