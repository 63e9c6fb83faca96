"""What a potential does between spikes: the dynamics that :class:`~spikede_plugins.SpikingODELayer` runs.

    dv/dt = dvdt(v, I),      a spike where v reaches v_threshold, then v = v_reset

Between two spikes an input I(t) = I + slope t is constant (slope None) or a ramp. For the two dynamics of
this file everything is known in closed form. Leaky, C dv/dt = -C (v - v_rest) / tau + I:

    v(t) = v_oo + b (t - tau d) + (v_0 - v_oo) (1 - d),     d = 1 - exp(-t / tau)
    v_oo = v_rest + tau I / C,    b = tau slope / C
    constant I:  t* = tau log((v_oo - v_0) / (v_oo - v_threshold))

and integrate-and-fire, C dv/dt = I:  v(t) = v_0 + (I t + slope t^2 / 2) / C.

Under a ramp the leaky potential less the threshold is c + b t + e exp(-t / tau), which is convex or concave
throughout: Newton's method from the side where the curve lies beyond its tangent goes to the first crossing
without ever passing it.

Sources: Gerstner, Kistler, Naud & Paninski, *Neuronal Dynamics* (2014), chapter 1; Brette, Neural Computation
18 (2006), for the exact simulation of spike times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from spikede_plugins.checks import check_held, is_finite, is_readable, items_of
from spikede_plugins.errors import OptionError, OptionTypeError, StateError, nearest
from spikede_plugins.event_intervals import Events, NeuronState, Rules, run_interval
from spikede_plugins.event_search import Search, search_crossing, solve_flow

#: What a parameter may be given as: a number, or a tensor with one or with one a neuron.
Value = float | Tensor
#: Newton steps to a crossing under a ramp; where the curve only grazes the threshold each halves the error.
_NEWTON_STEPS = 100


class SpikingDynamics(nn.Module):
    """A potential between spikes; subclasses define ``dvdt(v, current)``.

        class Quadratic(SpikingDynamics):
            def dvdt(self, v, current):
                return v**2 + current

    Such a potential is integrated, and its crossings are searched, by torchdiffeq
    (``spikede_plugins.event_search``). ``dvdt`` acts on each neuron alone, is differentiable, and depends on
    nothing but its arguments and the parameters of the module. What of it is trained must be parameters.

    Args:
        v_threshold: where the neuron fires.
        v_reset: where the potential is after a spike, below ``v_threshold``.
        v_rest: where the potential starts.
        learn: parameters to train: True for all, or their names.

    Each may be a number, or a tensor with one entry or one for each neuron; an ``nn.Parameter`` is trained.
    Numbers that are not trained stay numbers: they are exact in every dtype.

    Raises:
        OptionError: for numbers that are not finite, or if v_reset is not below v_threshold.
        OptionTypeError: for what is not a number.
    """

    #: Whether flow and crossing are closed forms.
    closed: bool = False
    #: Names of all parameters, and of those that must be positive.
    values: tuple[str, ...] = ("v_threshold", "v_reset", "v_rest")
    positive: tuple[str, ...] = ()

    def __init__(
        self, v_threshold: Value = 1.0, v_reset: Value = 0.0, v_rest: Value = 0.0, *,
        learn: bool | Iterable[str] = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self._learned = self._names(learn)
        self.keep("v_threshold", v_threshold)
        self.keep("v_reset", v_reset)
        self.keep("v_rest", v_rest)
        if not _holds(self.v_reset, self.v_threshold):
            raise OptionError(
                f"v_reset must be below v_threshold, got v_reset={_text(self.v_reset)} and "
                f"v_threshold={_text(self.v_threshold)}: a neuron reset to its threshold would fire without "
                "end; lower v_reset."
            )

    v_threshold: Value
    v_reset: Value
    v_rest: Value

    def _names(self, learn: bool | Iterable[str]) -> frozenset[str]:
        if isinstance(learn, bool):
            return frozenset(self.values if learn else ())
        names = [learn] if isinstance(learn, str) else items_of(learn)
        if names is None:
            raise OptionTypeError(
                f"learn must be True, False, or the names of parameters, got {learn!r}; e.g. "
                f"learn=[{self.values[0]!r}]."
            )
        for name in names:
            if not isinstance(name, str) or name not in self.values:
                raise OptionError(
                    f"learn names an unknown parameter {name!r}; {nearest(str(name), self.values)}"
                )
        return frozenset(names)

    def keep(self, name: str, value: Any) -> None:
        """Keep a parameter: a number as it is, a tensor as a buffer, what is trained as a parameter.

        Raises:
            OptionError, OptionTypeError: see the class.
        """
        if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
            raise OptionTypeError(f"{name} must be a number or a tensor, got {type(value).__name__}.")
        if isinstance(value, Tensor) and is_lazy(value):
            raise OptionTypeError(f"{name} must hold numbers, got a parameter that is not initialised.")
        shaped = not isinstance(value, Tensor) or (value.dim() <= 1 and value.numel() > 0)
        if isinstance(value, Tensor) and not (shaped and value.is_floating_point()):
            raise OptionError(
                f"{name} must be floating point with one entry, or [n_neurons] with one for each; got "
                f"{value.dtype} of shape {tuple(value.shape)}."
            )
        if not is_readable(value):
            raise OptionTypeError(f"{name} must hold numbers, got a tensor without any (meta or sparse).")
        fine = bool(torch.isfinite(value).all()) if isinstance(value, Tensor) else is_finite(value)
        if not fine:
            raise OptionError(f"{name} must be finite, got {_text(value)}.")
        if name in self.positive and not _holds(0.0, value):
            raise OptionError(f"{name} must be positive, got {_text(value)}; e.g. {name}=1.0.")
        if isinstance(value, nn.Parameter):
            self.register_parameter(name, value)
        elif name in self._learned:
            given = value.detach().clone() if isinstance(value, Tensor) else torch.tensor(float(value))
            self.register_parameter(name, nn.Parameter(given))
        elif isinstance(value, Tensor):
            self.register_buffer(name, value)
        else:
            setattr(self, name, float(value))

    def check_now(self) -> None:
        """Whether parameters that are trained are still what they must be.

        Raises:
            StateError: if they are not.
        """
        for name in self.positive:
            value = getattr(self, name)
            if isinstance(value, nn.Parameter) and not _holds(0.0, value):
                raise StateError(
                    f"{name} was trained to {_text(value)}, but must be positive: lower the learning rate, "
                    f"or after each step dynamics.{name}.data.clamp_(min=1e-3)."
                )
        trained = isinstance(self.v_reset, nn.Parameter) or isinstance(self.v_threshold, nn.Parameter)
        if trained and not _holds(self.v_reset, self.v_threshold):
            raise StateError(
                f"v_reset = {_text(self.v_reset)} was trained to v_threshold = {_text(self.v_threshold)} or "
                "above, so a neuron would fire without end; lower the learning rate or clamp one of them."
            )

    def check_width(self, neurons: int) -> None:
        """Whether tensors with an entry a neuron fit a layer of so many.

        Raises:
            OptionError: if they do not.
        """
        for name in self.values:
            value = getattr(self, name)
            if isinstance(value, Tensor) and value.numel() not in (1, neurons):
                raise OptionError(
                    f"{name} has {value.numel()} entries, but the layer has {neurons} neurons; give one for "
                    "each, or a number."
                )

    def check_range(self, dtype: torch.dtype) -> None:
        """Whether the layer's dtype can hold the numbers.

        Raises:
            OptionError: if it cannot.
        """
        for name in self.values:
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                check_held(value, name, dtype)

    def check_rules(self, rules: Rules) -> None:
        """Whether the dynamics can be run by these rules of a layer.

        Raises:
            OptionError: if they cannot.
        """

    # -- what a subclass defines -------------------------------------------------------------------

    def dvdt(self, v: Tensor, current: Tensor) -> Tensor:
        """The rate of the potential, ``[*shape]`` like ``v`` and ``current``."""
        raise NotImplementedError(f"{type(self).__name__} defines no dvdt(v, current).")

    # -- what the layer asks ----------------------------------------------------------------------

    def rate(self, v: Tensor, current: Tensor) -> Tensor:
        """:meth:`dvdt`, checked.

        Raises:
            OptionError: if it is not a tensor like v.
        """
        found = self.dvdt(v, current)
        if not isinstance(found, Tensor) or found.shape != v.shape or found.dtype != v.dtype:
            got = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise OptionError(
                f"{type(self).__name__}.dvdt(v, current) must return a tensor like v, {v.dtype} "
                f"{tuple(v.shape)}: one rate for each neuron; got {got}."
            )
        return found

    def flow(self, v: Tensor, current: Tensor, slope: Tensor | None, span: Tensor, search: Search) -> Tensor:
        """The potential after ``span`` without a spike; differentiable. All are ``[*shape]``."""
        return solve_flow(self, v, current, slope, span, search)

    def crossing(
        self, v: Tensor, current: Tensor, slope: Tensor | None, span: Tensor, search: Search
    ) -> Tensor:
        """How long it takes to the first spike, ``[*shape]``, without gradient.

        0 at or above the threshold, inf where it is not within ``span``.
        """
        return search_crossing(self, v, current, slope, span, search)

    def advance(
        self, state: NeuronState, current: Tensor, duration: float, rules: Rules, ramp: bool
    ) -> tuple[NeuronState, Events]:
        """The state after ``duration`` and the spikes on the way; see ``event_intervals.run_interval``."""
        return run_interval(self, state, current, duration, rules, ramp)

    def each(self, state: NeuronState, change: Callable[[Tensor], Tensor]) -> NeuronState:
        """The state with every tensor in it changed (moved, detached, ...)."""
        v, held, current, _ = state
        return NeuronState(change(v), change(held), None if current is None else change(current))

    def extra_repr(self) -> str:
        def shown(name: str) -> str:
            return _text(getattr(self, name)) + " (learned)" * isinstance(getattr(self, name), nn.Parameter)

        return ", ".join(f"{name}={shown(name)}" for name in self.values)


def _holds(low: Value, high: Value) -> bool:
    """``low < high``, everywhere; not where one is not a number."""
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        with torch.no_grad():
            return bool((torch.as_tensor(high) - torch.as_tensor(low) > 0).all())
    return low < high


def _text(value: Value) -> str:
    if not isinstance(value, Tensor):
        return f"{value:g}" if is_finite(value) else str(value)[:20]
    return f"{value.item():g}" if value.numel() == 1 else f"{value.min():g} ... {value.max():g}"


class ODELIFDynamics(SpikingDynamics):
    """Leaky integrate-and-fire: ``C dv/dt = -C (v - v_rest) / tau + I``, in closed form.

    Under a constant I above rheobase the neuron fires every ``tau log((v_oo - v_reset) / (v_oo -
    v_threshold))``, with ``v_oo = v_rest + tau I / C``.

    Args:
        tau_mem: time constant, > 0, in the unit of the layer's intervals (ms, say).
        v_rest, v_threshold, v_reset: as of :class:`SpikingDynamics`.
        C_mem: capacitance, > 0.
        learn: parameters to train: True for all, or their names.

    Raises:
        OptionError, OptionTypeError: see :class:`SpikingDynamics`.
    """

    values = ("tau_mem", "v_rest", "v_threshold", "v_reset", "C_mem")
    positive = ("tau_mem", "C_mem")
    tau_mem: Value
    C_mem: Value

    def __init__(
        self, tau_mem: Value = 20.0, v_rest: Value = 0.0, v_threshold: Value = 1.0, v_reset: Value = 0.0,
        C_mem: Value = 1.0, *, learn: bool | Iterable[str] = False,
    ) -> None:  # fmt: skip
        super().__init__(v_threshold, v_reset, v_rest, learn=learn)
        self.keep("tau_mem", tau_mem)
        self.keep("C_mem", C_mem)

    def dvdt(self, v: Tensor, current: Tensor) -> Tensor:
        return (self.v_rest - v) / self.tau_mem + current / self.C_mem

    @property
    def closed(self) -> bool:  # type: ignore[override]
        """Whether these are the dynamics that the closed forms belong to: a subclass may have others."""
        return type(self).dvdt is ODELIFDynamics.dvdt

    def flow(self, v: Tensor, current: Tensor, slope: Tensor | None, span: Tensor, search: Search) -> Tensor:
        if not self.closed:
            return super().flow(v, current, slope, span, search)
        gone = -torch.expm1(-span / self.tau_mem)
        change = (self.v_rest + current * (self.tau_mem / self.C_mem) - v) * gone
        if slope is not None:
            change = change + slope * (self.tau_mem / self.C_mem) * (span - self.tau_mem * gone)
        return v + change

    def crossing(
        self, v: Tensor, current: Tensor, slope: Tensor | None, span: Tensor, search: Search
    ) -> Tensor:
        if not self.closed:
            return super().crossing(v, current, slope, span, search)
        factor = self.tau_mem / self.C_mem
        above = self.v_rest + current * factor - self.v_threshold  # of v_oo
        missing = self.v_threshold - v
        if slope is None:
            found = self.tau_mem * torch.log1p(missing / above)
            found = torch.where((above > 0) & (found <= span), found, math.inf)
        else:
            tilt = slope * factor
            found = self._under_ramp(above - tilt * self.tau_mem, tilt, span, missing)
        return torch.where(missing <= 0, 0.0, found)

    def _under_ramp(self, c: Tensor, b: Tensor, span: Tensor, missing: Tensor) -> Tensor:
        """The first root of ``g(t) = c + b t + e exp(-t / tau)``, ``g(0) = -missing < 0``, up to ``span``."""
        tau = self.tau_mem
        e = -missing - c

        def g(t: Tensor) -> Tensor:
            # Not c + b t + e exp(-t / tau), whose terms may be far larger than what they leave.
            return b * t + e * torch.expm1(-t / tau) - missing

        convex = e > 0
        # A concave g has its top where b = (e / tau) exp(-t / tau), if it falls at all.
        falls = ~convex & (b < 0) & (tau * b > e)
        top = torch.where(falls, -tau * torch.log(torch.where(falls, tau * b / e, 1.0)), span)
        last = torch.minimum(top, span)
        crosses = g(last) >= 0
        t = torch.where(convex, last, torch.zeros_like(last))
        for _ in range(_NEWTON_STEPS):
            rate = b - (e / tau) * torch.exp(-t / tau)
            step = g(t) / torch.where(rate > 0, rate, math.inf)
            moved = torch.minimum((t - step).clamp_min(0.0), last)
            # From its side it moves one way; a step the other way, or none, is rounding.
            moved = torch.where(convex, torch.minimum(moved, t), torch.maximum(moved, t))
            done = torch.where(crosses, moved == t, True)
            t = moved
            if bool(done.all()):
                break
        return torch.where(crosses, t, math.inf)


class ODEIFDynamics(SpikingDynamics):
    """Integrate-and-fire: ``C dv/dt = I``, in closed form.

    Args:
        v_rest: where the potential starts.
        v_threshold, v_reset, C_mem, learn: as of :class:`ODELIFDynamics`.

    Raises:
        OptionError, OptionTypeError: see :class:`SpikingDynamics`.
    """

    values = ("v_rest", "v_threshold", "v_reset", "C_mem")
    positive = ("C_mem",)
    C_mem: Value

    def __init__(
        self, v_rest: Value = 0.0, v_threshold: Value = 1.0, v_reset: Value = 0.0, C_mem: Value = 1.0, *,
        learn: bool | Iterable[str] = False,
    ) -> None:  # fmt: skip
        super().__init__(v_threshold, v_reset, v_rest, learn=learn)
        self.keep("C_mem", C_mem)

    def dvdt(self, v: Tensor, current: Tensor) -> Tensor:
        return (current / self.C_mem).expand_as(v)

    @property
    def closed(self) -> bool:  # type: ignore[override]
        """Whether these are the dynamics that the closed forms belong to: a subclass may have others."""
        return type(self).dvdt is ODEIFDynamics.dvdt

    def flow(self, v: Tensor, current: Tensor, slope: Tensor | None, span: Tensor, search: Search) -> Tensor:
        if not self.closed:
            return super().flow(v, current, slope, span, search)
        mean = current if slope is None else current + 0.5 * slope * span
        return v + mean * span / self.C_mem

    def crossing(
        self, v: Tensor, current: Tensor, slope: Tensor | None, span: Tensor, search: Search
    ) -> Tensor:
        if not self.closed:
            return super().crossing(v, current, slope, span, search)
        missing = self.v_threshold - v
        charge = missing * self.C_mem
        if slope is None:
            found = torch.where(current > 0, charge / current, math.inf)
        else:
            # The smaller positive root of slope / 2 t^2 + current t = charge; neither form cancels.
            square = current.square() + 2.0 * slope * charge
            root = square.clamp_min(0.0).sqrt()
            late = torch.where(slope > 0, (root - current) / slope, math.inf)
            found = torch.where(current + root > 0, 2.0 * charge / (current + root), math.inf)
            found = torch.where(square < 0, math.inf, torch.where(current < 0, late, found))
        return torch.where(missing <= 0, 0.0, torch.where(found <= span, found, math.inf))
