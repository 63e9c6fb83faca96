"""Fractional neurons with spike times inside the steps: Caputo's derivative, memory kept across spikes.

    C D^a v = -C (v - v_rest) / tau + I

A power-law memory has no closed form from spike to spike, so the potential goes in even steps h = dt_init by
a history-aware solver, and a spike lies where the curve through the newest potentials meets the threshold (a
parabola, after a spike or a jump of the input a line). With t* the spike, r the refractory period:

* At the first step after t* the history holds v_peak (if there is one, else v_reset), then v_reset up to
  t* + r: the plateau is what such a neuron remembers of its spike, and makes it adapt.
* The step in which the plateau ends counts for its share behind t* + r, which is also how later spikes
  depend on earlier ones.

The plateau is part of the fractional equation itself. A reset without one (r = 0, a < 1) is not: it is an
impulse one step wide, and what the memory keeps of it vanishes with h.

Spike times are as exact as the solver: their error falls with the order of its accuracy, up to the second.
The solvers with a corrector (abm, trap) read the rates of their past out of the potentials, which a reset
breaks: they serve neurons that fire once (``refractory=math.inf``).

Source: Teka, Marinov & Santamaria, PLoS Computational Biology 10(3): e1003526 (2014).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikede_plugins.checks import items_of
from spikede_plugins.engine import FRESH, FractionalOperator, History, HistoryLog, charge_step
from spikede_plugins.errors import OptionError
from spikede_plugins.event_intervals import Events, NeuronState, Rules, check_spikes, counted, implicit_time
from spikede_plugins.memory import Memory, as_memory
from spikede_plugins.neurons import number
from spikede_plugins.orders import FractionalOrder, PerChannel
from spikede_plugins.registry import get_solver
from spikede_plugins.solvers.base import CorrectorSolver, Solver
from spikede_plugins.spiking_dynamics import SpikingDynamics, Value

#: An interval may be off from a whole number of steps by this share of one.
_UNEVEN = 1e-6


class _Past(NamedTuple):
    """What fractional neurons remember.

    Attributes:
        history: of the solver.
        before: the potential one step ago ``[*shape]``.
        straight: whether it and the one now lie on one free stretch under one current ``[*shape]``.
    """

    history: History
    before: Tensor
    straight: Tensor


class FractionalLIFDynamics(SpikingDynamics):
    """Fractional leaky integrate-and-fire: ``C D^alpha v = -C (v - v_rest) / tau + I``.

        # Teka's neuron: R I in mV for a current of 1 (C = tau / R)
        FractionalLIFDynamics(0.4, tau_mem=20.0, v_rest=-70.0, v_threshold=-50.0, v_reset=-70.0, v_peak=30.0)

    Args:
        alpha: the order in (0, 1], or ``PerChannel([...], dim=-1)`` with one for each neuron.
        tau_mem, v_rest, v_threshold, v_reset, C_mem: as of ``ODELIFDynamics``; tau_mem is a time^alpha.
        v_peak: what the history holds at a spike, at least v_threshold; None for v_reset.
        method: a solver (``available_solvers()``) of the layer's steps ``dt_init``.
        memory: how the history is kept: ``"full"``, an int, ``"soe"``, a :class:`Memory`.
        learn: parameters to train: True for all, or their names, ``"alpha"`` among them.

    Raises:
        OptionError, OptionTypeError, OrderError, UnknownNameError: for what cannot be used.
    """

    values = ("tau_mem", "v_rest", "v_threshold", "v_reset", "C_mem")
    positive = ("tau_mem", "C_mem")
    tau_mem: Value
    C_mem: Value

    def __init__(
        self, alpha: float | PerChannel = 0.7, tau_mem: Value = 20.0, v_rest: Value = 0.0,
        v_threshold: Value = 1.0, v_reset: Value = 0.0, C_mem: Value = 1.0, *, v_peak: float | None = None,
        method: str | Solver = "l1", memory: str | int | Memory = "full", learn: bool | Iterable[str] = False,
    ) -> None:  # fmt: skip
        # Anything but names is left to the parent to refuse.
        names = items_of(learn) or learn if not isinstance(learn, (bool, str)) else learn
        orders = names is True or names == "alpha" or (isinstance(names, list) and "alpha" in names)
        if isinstance(names, list):
            names = [name for name in names if name != "alpha"]
        super().__init__(v_threshold, v_reset, v_rest, learn=False if names == "alpha" else names)
        self.keep("tau_mem", tau_mem)
        self.keep("C_mem", C_mem)
        self.order = FractionalOrder(alpha, learn_alpha=orders)
        self.solver = method if isinstance(method, Solver) else get_solver(method)
        self.memory = as_memory(memory)
        self.v_peak = v_peak
        highest = torch.as_tensor(self.v_threshold).detach().max()
        if v_peak is not None and not number(v_peak, "v_peak", positive=False) >= highest:
            raise OptionError(f"v_peak must be at least v_threshold, got {v_peak!r}; None leaves it out.")
        self._operators: dict[float, FractionalOperator] = {}
        self._log = HistoryLog()

    def __getstate__(self) -> dict[str, Any]:
        # The operator and the log are caches, and the log may hold a graph.
        return {**self.__dict__, "_operators": {}, "_log": HistoryLog()}

    def check_rules(self, rules: Rules) -> None:
        if isinstance(self.solver, CorrectorSolver) and math.isfinite(rules.refractory):
            raise OptionError(
                f"method {self.solver.name!r} reads the rates of its past out of the potentials, which a "
                'reset breaks; use "l1", "gl" or "pred", or refractory=math.inf for neurons that fire once.'
            )
        if self.v_peak is not None and rules.refractory < rules.search.dt_init:
            raise OptionError(
                f"v_peak needs a refractory period of at least a step, dt_init = {rules.search.dt_init:g}, "
                f"in which the potential comes back to v_reset; got {rules.refractory:g}."
            )

    def check_now(self) -> None:
        super().check_now()
        self.order.keep_inside()

    def dvdt(self, v: Tensor, current: Tensor) -> Tensor:
        """The right-hand side: the fractional rate of the potential."""
        return (self.v_rest - v) / self.tau_mem + current / self.C_mem

    def _operator(self, step: float) -> FractionalOperator:
        if step not in self._operators:
            self._operators = {step: FractionalOperator(self.order, self.solver, self.memory, step_size=step)}
        return self._operators[step]

    def each(self, state: NeuronState, change: Callable[[Tensor], Tensor]) -> NeuronState:
        moved = super().each(state, change)
        if state.memory is None:
            return moved
        history, before, straight = state.memory
        # Whether is neither a number that changes its dtype nor one with a graph.
        straight = straight.to(moved.v.device)
        return moved._replace(memory=_Past(history.each(change), change(before), straight))

    def advance(
        self, state: NeuronState, current: Tensor, duration: float, rules: Rules, ramp: bool
    ) -> tuple[NeuronState, Events]:
        step = rules.search.dt_init
        count = round(duration / step)
        if count < 1 or abs(duration / step - count) > _UNEVEN:
            raise OptionError(
                f"an interval of {duration:g} is no whole number of steps dt_init = {step:g}, which the "
                f"memory of fractional dynamics needs; e.g. dt_init={duration / max(count, 1):g}."
            )
        v, held, latest, past = state
        if past is None:
            past = _Past(FRESH, v, torch.zeros_like(v, dtype=torch.bool))
        same = latest is not None and (ramp or latest == current)
        past = past._replace(straight=past.straight & same)
        begin = latest if ramp and latest is not None else current
        stretch = _Stretch(self, step, duration, rules)
        for k in range(1, count + 1):
            at = begin + (current - begin) * (k / count) if ramp else current
            v, held, past = stretch.take(v, held, past, at, k)
        return NeuronState(v, held, current, past), stretch.events(v, held)


class _Stretch:
    """The steps of one interval."""

    def __init__(self, dynamics: FractionalLIFDynamics, step: float, duration: float, rules: Rules) -> None:
        self.dynamics, self.step, self.duration, self.rules = dynamics, step, duration, rules
        self.operator = dynamics._operator(step)
        self.affine = type(dynamics).dvdt is FractionalLIFDynamics.dvdt
        self.times: list[Tensor] = []
        self.misses: list[Tensor] = []
        self.rates: list[Tensor] = []

    def take(
        self, v: Tensor, held: Tensor, past: _Past, current: Tensor, k: int
    ) -> tuple[Tensor, Tensor, _Past]:
        """Step k: the new potential, how long the neuron is still held, and its past."""
        dynamics, h = self.dynamics, self.step
        charged, history = charge_step(
            self.operator, lambda u: u + dynamics.rate(u, current), v, past.history, dynamics._log,
            affine=self.affine,
        )  # fmt: skip
        waits = held >= h * (1.0 - 1e-9)
        # The share of the step behind the end of the plateau; more than 1 where it ended before the step.
        share = 1.0 - torch.where(waits, 0.0, held) / h
        whole = held == 0
        reset, threshold = (
            torch.as_tensor(value).to(v) for value in (dynamics.v_reset, dynamics.v_threshold)
        )
        new = torch.where(whole, charged, v + share * (charged - v))
        new = torch.where(waits, reset, new)
        fires = ~waits & (new >= threshold)
        held = torch.where(waits, held - h, 0.0)
        straight = whole & past.straight
        if bool(fires.any()):
            t = self._spike(v, new, past.before, straight, fires, share, threshold, k)
            held = torch.where(fires, t + (self.rules.refractory - k * h), held)
            new = torch.where(fires, reset if dynamics.v_peak is None else dynamics.v_peak, new)
        return new, held, _Past(history, v, whole & ~fires)

    def _spike(
        self, v: Tensor, new: Tensor, before: Tensor, straight: Tensor, fires: Tensor, share: Tensor,
        threshold: Tensor, k: int,
    ) -> Tensor:  # fmt: skip
        """When in step k the neurons that fire reach the threshold: ``v + b s + a s^2``, s in [0, 1]."""
        h = self.step
        a = torch.where(straight, 0.5 * (new - 2.0 * v + before), 0.0)
        b = new - v - a
        with torch.no_grad():
            missing = (threshold - v).clamp_min(0.0)
            root = (b.square() + 4.0 * a * missing).clamp_min(0.0).sqrt()
            s = torch.where(missing > 0, 2.0 * missing / (b + root), 0.0).clamp(0.0, 1.0)
            rate = (b + 2.0 * a * s) / (share * h)
        miss = torch.where(fires, v + b * s + a * s.square() - threshold, 0.0)
        found = k * h - share * h * (1.0 - s)
        # The value is found; its gradient is that of the step's own beginning and of the crossing in it.
        floor = rate.clamp_min(self.rules.slope_floor)
        t = found + (implicit_time(found.detach(), miss, floor) - found.detach())
        check_spikes(len(self.times) + 1, self.rules)
        self.times.append(torch.where(fires, t, math.inf))
        self.misses.append(miss)
        self.rates.append(rate)
        return torch.where(fires, t, 0.0)

    def events(self, v: Tensor, held: Tensor) -> Events:
        """The spikes of the steps taken; ``v`` and ``held`` are those at the end."""
        below = v - torch.as_tensor(self.dynamics.v_threshold).to(v)
        return counted(self.times, self.misses, self.rates, below, held <= 0, self.duration, self.rules)
