"""``SpikingODELayer``: event-driven neurons in continuous time, every spike at its own time.

    I(t) = W x(t),      dv/dt = dvdt(v, I),      v = v_threshold: a spike, v = v_reset

Nothing is stepped through: each neuron goes from its spike to its next one, so a spike time is as exact as
the dynamics are known (to rounding for leaky and plain integrate-and-fire), an interval may hold any number
of spikes, and no neuron's spikes depend on another's. One interval of 1 000 equals 1 000 of 1.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from spikede_plugins.checks import check_held, flag
from spikede_plugins.engine import events as fused
from spikede_plugins.errors import OptionError, OptionTypeError, UnknownNameError, nearest
from spikede_plugins.event_intervals import Events, NeuronState, Rules, check_spikes
from spikede_plugins.event_search import Search
from spikede_plugins.loading import watch_loading
from spikede_plugins.neurons import number
from spikede_plugins.spiking_dynamics import ODEIFDynamics, ODELIFDynamics, SpikingDynamics
from spikede_plugins.surrogate import Surrogate

#: How the input goes on between its samples.
_INTERPOLATIONS = ("hold", "linear")


class SpikeTimes(NamedTuple):
    """The spikes of a call.

    Attributes:
        times: ``[(B,) n_neurons, K]``, counted from the latest reset, ascending; inf behind a neuron's last.
            K is at least 1: where nothing fired, a column of inf.
        counts: how many there are, ``[(B,) n_neurons]``, integers.
    """

    times: Tensor
    counts: Tensor


class SpikingODELayer(nn.Module):
    """Neurons that are driven by ``W x`` and fire at exact times.

        layer = SpikingODELayer(10, 3)                      # leaky integrate-and-fire
        counts = layer(torch.rand(100, 8, 10), interval=1.0)    # [100, 8, 3]
        layer.spike_times.times                             # [8, 3, K], inf behind the last
        layer.first_spike                                   # [8, 3], inf where silent
        layer.voltage                                       # [8, 3]

    The potentials are kept from call to call until :meth:`reset`, so a sequence may come in pieces, or sample
    by sample through :meth:`step`. Input of another batch shape starts a new sequence. :meth:`detach` cuts
    the graph between two pieces.

    Spike times and potentials have the gradients of the implicit function theorem, counts those of a
    surrogate (``spikede_plugins.event_intervals``); both reach input, weight and trained parameters of the
    dynamics.

    Args:
        n_inputs, n_neurons: features of the input and neurons.
        dynamics: what the potentials do between spikes; None for ``ODELIFDynamics()``.
        dt_init: for dynamics of your own the cell of the search for crossings; for fractional ones the step.
        dt_min: how exact a crossing of your own dynamics is at least (usually it is to the tolerances).
        refractory: how long a neuron is held at v_reset after a spike; ``math.inf``: each fires once.
        interpolation: ``"hold"``: a sample holds for its interval. ``"linear"``: the input goes from the
            sample before to this one, which it reaches at the end of its interval; the first one holds.
        bias: train a constant current for each neuron as well.
        surrogate: of the counts: a name of ``spikede_plugins.surrogate``, or a :class:`Surrogate`.
        slope_floor: the least dv/dt at threshold that gradients of times divide by.
        solver, rtol, atol, max_steps: of torchdiffeq, for dynamics of your own.
        adjoint: gradients of your own dynamics by the adjoint equation (memory that does not grow with the
            steps of the solver) instead of through the steps.
        max_spikes: the most spikes a neuron may fire in an interval (None: a million). ``torch.compile`` with
            ``fullgraph=True`` needs it: the shapes then do not depend on data.
        device, dtype: of the weight.

    Raises:
        OptionError, OptionTypeError: for arguments that cannot be used.
        UnknownNameError: for an unknown interpolation or surrogate.
    """

    fractional_by_itself = (
        "has fractional neurons where its dynamics are: SpikingODELayer(n_inputs, n_neurons, "
        "FractionalLIFDynamics(alpha))"
    )

    def __init__(
        self, n_inputs: int, n_neurons: int, dynamics: SpikingDynamics | None = None, dt_init: float = 0.1,
        dt_min: float = 0.001, *, refractory: float = 0.0, interpolation: str = "hold", bias: bool = False,
        surrogate: str | Surrogate = "atan", slope_floor: float = 1e-3, solver: str = "dopri5",
        rtol: float | None = None, atol: float | None = None, max_steps: int = 10_000, adjoint: bool = False,
        max_spikes: int | None = None, device: Any = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.n_inputs, self.n_neurons = _count(n_inputs, "n_inputs"), _count(n_neurons, "n_neurons")
        dynamics = ODELIFDynamics() if dynamics is None else dynamics
        if not isinstance(dynamics, SpikingDynamics):
            raise OptionTypeError(
                f"dynamics must be a SpikingDynamics, e.g. ODELIFDynamics(tau_mem=20.0), got "
                f"{type(dynamics).__name__}; derive your class from SpikingDynamics."
            )
        dynamics.check_width(n_neurons)
        self.dynamics = dynamics
        if not isinstance(interpolation, str) or interpolation not in _INTERPOLATIONS:
            raise UnknownNameError(
                f"unknown interpolation {interpolation!r}; {nearest(str(interpolation), _INTERPOLATIONS)}"
            )
        self.interpolation = interpolation
        self.surrogate = surrogate if isinstance(surrogate, Surrogate) else Surrogate(surrogate)
        self.refractory = _refractory(refractory)
        self.search = Search(
            number(dt_init, "dt_init"), number(dt_min, "dt_min"), _solver(solver),
            rtol if rtol is None else number(rtol, "rtol"), atol if atol is None else number(atol, "atol"),
            _count(max_steps, "max_steps"), flag(adjoint, "adjoint"),
        )  # fmt: skip
        self.slope_floor = number(slope_floor, "slope_floor")
        self.max_spikes = max_spikes if max_spikes is None else _count(max_spikes, "max_spikes")
        dynamics.check_rules(self.rules)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise OptionTypeError(f"dtype must be a floating-point dtype of torch, got {dtype!r}.")
        self.weight = nn.Parameter(torch.empty(n_neurons, n_inputs, device=device, dtype=dtype))
        zeros = torch.zeros(n_neurons, device=device, dtype=dtype)
        self.bias = nn.Parameter(zeros) if flag(bias, "bias") else None
        bound = 1.0 / math.sqrt(n_inputs)
        nn.init.uniform_(self.weight, -bound, bound)
        dynamics.check_range(self.weight.dtype)
        check_held(self.slope_floor, "slope_floor", self.weight.dtype)
        dynamics.to(device=self.weight.device, dtype=self.weight.dtype)
        watch_loading(self)
        self.reset()

    @property
    def rules(self) -> Rules:
        """What holds for every interval."""
        return Rules(self.refractory, self.slope_floor, self.surrogate, self.search, self.max_spikes)

    # -- state -----------------------------------------------------------------------------------

    def reset(self, v: Tensor | None = None) -> None:
        """Forget everything: time is 0, and potentials are v_rest, or ``v`` ``[(B,) n_neurons]``."""
        self.state: NeuronState | None = None
        self._given = v
        self._elapsed = torch.zeros((), dtype=torch.float64)
        # The spikes of the latest call: interval by interval, or as the kernels found them.
        self._events: list[tuple[Tensor, Events]] = []
        self._found: SpikeTimes | None = None

    def detach(self) -> None:
        """Cut the graph: gradients of what follows do not reach back beyond this point."""
        self._each(Tensor.detach)

    @property
    def elapsed(self) -> float:
        """The time since the latest reset."""
        return float(self._elapsed)

    @property
    def voltage(self) -> Tensor:
        """The potentials as they are now, ``[(B,) n_neurons]``."""
        return self._begun(()).v if self.state is None else self.state.v

    @property
    def spike_times(self) -> SpikeTimes:
        """The spikes of the latest call of the layer or of :meth:`step`, timed from the latest reset."""
        if self._found is not None:
            return self._found
        if not self._events:
            v = self.voltage
            return SpikeTimes(v.new_full((*v.shape, 1), math.inf), torch.zeros_like(v, dtype=torch.int64))
        # In float64 until they are summed up: late times of short intervals would round away.
        rows = torch.cat([(start + events.times).to(events.times.dtype) for start, events in self._events])
        fired = torch.isfinite(rows)
        counts = fired.sum(0)
        most = int(counts.max()) if counts.numel() else 0
        if most == 0:  # a row of inf, in the graph of the times that are not there
            rows = torch.cat([rows[:0], rows.new_full((1, *rows.shape[1:]), math.inf)])
            return SpikeTimes(rows.movedim(0, -1), counts)
        # Each interval's rows are in order, with gaps of inf between them that move to the end.
        order = (~fired).to(torch.int8).argsort(dim=0, stable=True)[:most]
        return SpikeTimes(rows.gather(0, order).movedim(0, -1), counts)

    @property
    def first_spike(self) -> Tensor:
        """When each neuron fired first in the latest call, ``[(B,) n_neurons]``; inf where it was silent.

        Timed as :attr:`spike_times` is, and with its gradient; that of a silent neuron is 0.

            layer(torch.rand(100, 8, 10), interval=1.0)
            fired = layer.first_spike.isfinite()
        """
        return self.spike_times.times[..., 0]

    def _begun(self, batch: tuple[int, ...]) -> NeuronState:
        """The state of a new sequence."""
        shape = (*batch, self.n_neurons)
        given = self.dynamics.v_rest if self._given is None else self._given
        v = torch.as_tensor(given, dtype=self.weight.dtype, device=self.weight.device)
        if v.dim() > len(shape) and not batch:
            shape = (*v.shape[:-1], self.n_neurons)
        try:
            v = v.expand(shape).clone(memory_format=torch.contiguous_format)
        except RuntimeError as error:
            raise OptionError(
                f"reset() was given potentials of shape {tuple(v.shape)} for neurons of shape {shape}; give "
                "one for each neuron, [n_neurons], or [B, n_neurons]."
            ) from error
        return NeuronState(v, torch.zeros_like(v))

    def _each(self, change: Any) -> None:
        """Every tensor of the state changed (moved, detached)."""
        if self.state is not None:
            self.state = self.dynamics.each(self.state, change)
        if isinstance(self._given, Tensor):
            self._given = change(self._given)
        self._events = [(start, Events(*map(change, events))) for start, events in self._events]
        if self._found is not None:
            times, counts = self._found
            times = change(times)
            self._found = SpikeTimes(times, counts.to(times.device))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._each(fn)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles hold the values without the graph, which neither could take along.
        kept = self.__dict__.copy()
        copy = self.__new__(type(self))
        copy.__dict__.update(kept)
        copy.detach()
        return copy.__dict__

    # -- running ---------------------------------------------------------------------------------

    def forward(self, inputs: Any, interval: float = 1.0) -> Any:
        """The number of spikes in each of T intervals, ``[T, (B,) n_neurons]``.

        Args:
            inputs: ``[T, n_inputs]`` or ``[T, B, n_inputs]``: a tensor, or a NumPy array (then so is the
                result, without gradients).
            interval: how long each of them lasts, > 0, in the unit of the time constants.

        Raises:
            OptionError: for shapes, values or intervals that cannot be used.
            OptionTypeError: for inputs of another type.
            StateError: for more spikes than ``max_spikes``, or dynamics that cannot be integrated.
        """
        x, numpy = self._read(inputs, 2, "[T, n_inputs] or [T, B, n_inputs]")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not numpy):
            counts = self._run(x, _interval(interval))
        return counts.cpu().numpy() if numpy else counts

    def step(self, x: Any, interval: float = 1.0) -> Any:
        """The number of spikes in one interval, ``[(B,) n_neurons]``, for ``x`` ``[(B,) n_inputs]``.

        Raises:
            As :meth:`forward` does.
        """
        x, numpy = self._read(x, 1, "[n_inputs] or [B, n_inputs]")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not numpy):
            counts = self._run(x.unsqueeze(0), _interval(interval))[0]
        return counts.cpu().numpy() if numpy else counts

    def _read(self, inputs: Any, least: int, shapes: str) -> tuple[Tensor, bool]:
        numpy = isinstance(inputs, np.ndarray)
        x = torch.from_numpy(inputs) if numpy else inputs
        if not isinstance(x, Tensor):
            raise OptionTypeError(f"inputs must be a tensor or a NumPy array, got {type(inputs).__name__}.")
        if x.is_complex():
            raise OptionTypeError(f"inputs must be real, got {x.dtype}.")
        if x.dim() < least or x.shape[-1] != self.n_inputs:
            raise OptionError(
                f"inputs must be {shapes} with n_inputs={self.n_inputs}, got shape {tuple(x.shape)}; "
                f"the last dimension holds the features{', step(x) takes a single sample' * (least > 1)}."
            )
        dtype = self.weight.dtype
        free = numpy or not x.is_floating_point() or torch.is_autocast_enabled(x.device.type)
        if x.dtype != dtype and not free:
            raise OptionTypeError(
                f"inputs are {x.dtype}, the layer is {dtype}; call layer.to({x.dtype}) or inputs.to({dtype})."
            )
        x = x.to(device=self.weight.device if numpy else x.device, dtype=dtype)
        if not torch.compiler.is_compiling() and not bool(torch.isfinite(x).all()):
            raise OptionError("inputs must be finite, but hold inf or nan; see torch.nan_to_num(inputs).")
        return x, numpy

    def _run(self, x: Tensor, interval: float) -> Tensor:
        if not torch.compiler.is_compiling():
            self.dynamics.check_now()
        with torch.autocast(x.device.type, enabled=False):
            currents = nn.functional.linear(x, self.weight, self.bias)
            state = self.state
            if state is None or state.v.shape != currents.shape[1:]:
                if state is not None:
                    self._elapsed = torch.zeros((), dtype=torch.float64)
                state = self._begun(tuple(currents.shape[1:-1]))
            ramp = self.interpolation == "linear"
            if self._serves(state, currents):
                return self._run_fused(state, currents, interval, ramp)
            counts, self._events, self._found = [], [], None
            rules = self.rules
            for k in range(len(currents)):
                state, events = self.dynamics.advance(state, currents[k], interval, rules, ramp)
                counts.append(events.counts)
                self._events.append((self._elapsed + k * interval, events))
        self.state, self._elapsed = state, self._elapsed + len(currents) * interval
        return torch.stack(counts) if counts else currents

    def _serves(self, state: NeuronState, currents: Tensor) -> bool:
        """Whether the fused kernels may run this: closed forms on the CPU, no gradient asked for."""
        dynamics = self.dynamics
        if type(dynamics) not in (ODELIFDynamics, ODEIFDynamics) or not fused.serves(currents):
            return False
        tensors = (currents, *dynamics.parameters(), *dynamics.buffers(), state.v, state.held)
        return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))

    def _run_fused(self, state: NeuronState, currents: Tensor, interval: float, ramp: bool) -> Tensor:
        steps, shape = len(currents), currents.shape[1:]
        leaky = isinstance(self.dynamics, ODELIFDynamics)
        names = ("v_rest", "v_threshold", "v_reset", "tau_mem" if leaky else "C_mem", "C_mem")
        values = [torch.as_tensor(getattr(self.dynamics, name), dtype=torch.float64) for name in names]
        values = [value.detach().reshape(-1) for value in values]
        ran = fused.run(
            leaky, currents.reshape(steps, -1), None if state.current is None else state.current.reshape(-1),
            ramp, state.v.reshape(-1), state.held.reshape(-1), self.elapsed, interval, self.refractory,
            torch.stack(torch.broadcast_tensors(*values)), self.rules.limit,
        )  # fmt: skip
        if bool((ran.number < 0).any()):
            check_spikes(self.rules.limit + 1, self.rules)
        self._events, self._found = [], SpikeTimes(ran.times.reshape(*shape, -1), ran.number.reshape(shape))
        self.state = NeuronState(
            ran.v.reshape(shape), ran.held.reshape(shape), currents[-1] if ramp and steps else state.current
        )
        self._elapsed = self._elapsed + steps * interval
        return ran.counts.reshape(currents.shape)

    def extra_repr(self) -> str:
        held = f", refractory={self.refractory:g}" * (self.refractory > 0)
        return f"{self.n_inputs}, {self.n_neurons}{held}, interpolation={self.interpolation!r}"


def _count(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise OptionTypeError(f"{what} must be an int, got {value!r} ({type(value).__name__}).")
    if value < 1:
        raise OptionError(f"{what} must be at least 1, got {value}.")
    if value > 2**31 - 1:
        raise OptionError(f"{what} must be at most {2**31 - 1}.")
    return value


def _refractory(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise OptionTypeError(f"refractory must be a number, got {value!r} ({type(value).__name__}).")
    if not value >= 0:
        raise OptionError(f"refractory must be 0 or more, got {value}; e.g. refractory=2.0.")
    return float(value)


def _interval(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise OptionTypeError(f"interval must be a number, got {value!r} ({type(value).__name__}).")
    if not 0 < value < math.inf:
        raise OptionError(f"interval must be finite and positive, got {value}; e.g. interval=1.0.")
    return float(value)


#: Methods of torchdiffeq that control their error.
_ADAPTIVE = ("adaptive_heun", "bosh3", "dopri5", "dopri8", "fehlberg2", "tsit5")


def _solver(name: Any) -> str:
    if not isinstance(name, str) or name not in _ADAPTIVE:
        raise UnknownNameError(
            f"unknown solver {name!r}; it must be an adaptive one of torchdiffeq: "
            f"{nearest(str(name), _ADAPTIVE)}"
        )
    return str(name)
