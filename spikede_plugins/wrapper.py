"""A model with derivative-style neurons as one continuous-time (fractional) system.

    D^{a_l} v_l = f_l(v_l, I_l(t)),   spikes s_l(v_l, I_l(t))      for every neuron layer l of the model

On a grid the network is run layer by layer: time is folded into the batch, ``base`` is called once with
``[T * B, ...]``, and only its neurons unfold it and go step by step, over their own history. What step k of
the whole network would give is the same numbers, because no layer looks at a later layer's past. The input
is held during a step, and the output at ``t_k`` is that of the potentials reached at ``t_k``.

An adaptive solver of integer order evaluates the whole network at times of its own, on interpolated input;
the output is then read at the times asked for. ``base`` is called as it is in both ways: nothing is traced.

Since time lies in the batch, batch normalisation in training mode takes its statistics over ``T * B``, as
multi-step frameworks do; an adaptive solver calls it at every evaluation.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
from spikede_plugins.errors import (
    ConversionError,
    MissingExtraError,
    OptionError,
    OptionTypeError,
    SpikedeWarning,
    StateError,
    UnknownNameError,
    UnsupportedNeuronError,
    nearest,
)
from spikede_plugins.interpolation import Interpolant, available_interpolations
from spikede_plugins.layer_orders import layer_orders
from spikede_plugins.memory import Memory, as_memory
from spikede_plugins.neurons import BaseNeuron, current_driver, driven_by
from spikede_plugins.orders import FractionalOrder
from spikede_plugins.registry import adapters_in_use, available_solvers, get_solver
from spikede_plugins.solvers.base import CorrectorSolver, Solver
from spikede_plugins.tree import copy_model, find_neurons, replace_modules

INTEGRATORS = ("odeint", "odeint_adjoint", "fdeint", "fdeint_adjoint")
DROPOUTS = ("step", "sequence")
_GRID_OPTIONS = ("memory", "step_size")
#: How many steps ``fdeint_adjoint`` reads out at a time.
_CHUNK = 16
_DROPOUT_LAYERS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class _FrameworkNeuron(nn.Module):
    """A framework's neuron, made fractional, as a layer of a model that a wrapper runs."""

    def __init__(self, neuron: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.neuron = neuron
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        driver = current_driver()
        if driver is None:
            raise StateError(
                f"{type(self.neuron).__name__} belongs to an SNNWrapper; call the model through that."
            )
        return driver(self, x)  # type: ignore[arg-type]


Layer = BaseNeuron | _FrameworkNeuron


# -- what neurons do while base is called ---------------------------------------------------------


class _Run:
    """A call of ``base`` with ``steps`` steps folded into the batch."""

    def __init__(self, steps: int, batch: int) -> None:
        self.steps, self.batch, self.time_is_gone = steps, batch, False

    def unfold_time(self, x: Tensor, last: bool = False) -> Tensor:
        """``[T * B, ...] -> [T, B, ...]``; with ``last``, the model's output has no time any more."""
        if x.dim() == 0 or x.shape[0] != self.steps * self.batch:
            raise OptionError(
                f"a layer of the model gave shape {tuple(x.shape)}, whose first dimension is not the batch "
                f"of {self.steps * self.batch} it was called with; keep the batch in dimension 0 (time is "
                "folded into it)."
            )
        self.time_is_gone |= last
        return x.unflatten(0, (self.steps, self.batch))

    def output(self, out: Any) -> Any:
        """The output of ``base`` with time unfolded, in whatever it is nested."""
        return out if self.time_is_gone else _each(out, lambda t: self.unfold_time(t) if t.dim() else t)


class _GridRun(_Run):
    """Each neuron runs all T steps from 0, with its own operator."""

    def __init__(self, steps: int, batch: int, operators: dict[int, FractionalOperator]) -> None:
        super().__init__(steps, batch)
        self.operators = operators

    def __call__(self, layer: Layer, current: Tensor) -> Tensor:
        x_seq = self.unfold_time(current)
        operator = self.operators.get(id(layer))
        if operator is None:
            raise StateError(
                f"a {type(layer).__name__} is called that was not in the model when it was wrapped; "
                "wrap the model anew."
            )
        if isinstance(layer, _FrameworkNeuron):
            spikes = layer.adapter.run_sequence(layer.neuron, operator, x_seq)
        else:
            spikes = _neuron_sequence(layer, operator, x_seq)
        return spikes.flatten(0, 1).to(current.dtype)


def _neuron_sequence(neuron: BaseNeuron, operator: FractionalOperator, x_seq: Tensor) -> Tensor:
    """The spikes ``[T, B, ...]`` of a neuron that starts from 0."""
    v = torch.zeros(x_seq.shape[1:], dtype=state_dtype(x_seq), device=x_seq.device)
    elementwise = neuron.as_elementwise()
    if elementwise is not None and can_scan(operator):
        return scan(operator, elementwise, x_seq, v, FRESH, HistoryLog())[0]
    history, log, spikes = FRESH, HistoryLog(), []
    for x in x_seq.to(v.dtype):
        fired: list[Tensor] = []

        def charge(v: Tensor, x: Tensor = x, fired: list[Tensor] = fired) -> Tensor:
            rate, spike = _dynamics(neuron, v, x)
            fired.append(spike)
            return v + rate

        v, history = charge_step(operator, charge, v, history, log)
        spikes.append(fired[0])  # that at the potential before the step; solvers may ask for more
    return torch.stack(spikes)


def _dynamics(neuron: BaseNeuron, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """``(dv_dt, spike)`` of a neuron, checked.

    Raises:
        OptionError: if that is not what it returned.
    """
    out = neuron.forward(v, x)
    shapes = [tuple(t.shape) for t in out if isinstance(t, Tensor)] if isinstance(out, tuple) else []
    if shapes != [tuple(v.shape)] * 2:
        raise OptionError(
            f"{type(neuron).__name__}.forward must return (dv_dt, spike), two tensors shaped like v_mem, "
            f"{tuple(v.shape)}; got {type(out).__name__} of {shapes}."
        )
    rate, spike = out
    return rate, spike


class _StateRun(_Run):
    """Each neuron is evaluated at a potential that is given; their derivatives are recorded.

    A module that is called several times in ``base`` has a potential for each call.
    """

    def __init__(self, steps: int, batch: int, states: Sequence[Tensor] | None) -> None:
        super().__init__(steps, batch)
        self.states = states
        self.rates: list[Tensor] = []
        self.called: list[Layer] = []

    def __call__(self, layer: Layer, current: Tensor) -> Tensor:
        if isinstance(layer, _FrameworkNeuron):
            raise OptionError(
                f"{type(layer.neuron).__name__} is reset by a jump, which an adaptive solver cannot follow; "
                'use a method on a grid, e.g. method="euler" or integrator="fdeint".'
            )
        self.called.append(layer)
        if self.states is None:  # which potentials are there?
            self.rates.append(torch.zeros(current.shape, dtype=state_dtype(current), device=current.device))
            return torch.zeros_like(current)
        if len(self.rates) == len(self.states):
            raise StateError("the model called more neurons than before: which are called must not change.")
        v = self.states[len(self.rates)]
        rate, spike = _dynamics(layer, v, current.to(v.dtype))
        self.rates.append(rate)
        return spike.to(current.dtype)


class _VectorField(nn.Module):
    """``(t, potentials) -> their derivatives``: the whole network once."""

    def __init__(self, base: nn.Module, signal: Callable[[Tensor], Tensor], batch: int) -> None:
        super().__init__()
        self.base, self.signal, self.batch = base, signal, batch

    def forward(self, t: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        run = _StateRun(1, self.batch, states)
        with driven_by(run):
            self.base(self.signal(t))
        return tuple(run.rates)


@contextlib.contextmanager
def _one_mask(base: nn.Module, batch: int) -> Iterator[None]:
    """Inside, each dropout layer drops the same at every step."""
    masks: dict[int, Tensor] = {}

    def hook(layer: nn.Module, given: tuple[Any, ...], out: Tensor) -> Tensor:
        x = given[0]
        if not layer.training or x.shape[0] % batch:
            return out
        steps = x.unflatten(0, (-1, batch))
        if id(layer) not in masks:
            masks[id(layer)] = layer.forward(torch.ones_like(steps[0]))
        return (steps * masks[id(layer)]).flatten(0, 1)

    layers = [m for m in base.modules() if isinstance(m, _DROPOUT_LAYERS)]
    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# -- what was asked for ---------------------------------------------------------------------------


class _Way(NamedTuple):
    """How a run is to be integrated.

    Attributes:
        solver: the fractional solver; None for torchdiffeq's ``method``.
        method: the method by name.
        integer: whether every order is 1 (``euler`` on a grid).
        adjoint: whether the network's activations are not to be kept.
        memory: how the past is kept.
        options: what else was given.
    """

    solver: Solver | None
    method: str
    integer: bool
    adjoint: bool
    memory: Memory
    options: dict[str, Any]


def _ode_methods() -> tuple[str, ...]:
    """torchdiffeq's methods; empty if it is not installed."""
    try:
        from torchdiffeq._impl.odeint import SOLVERS
    except ImportError:
        return ()
    return tuple(SOLVERS)


def _torchdiffeq() -> Any:
    try:
        import torchdiffeq
    except ImportError as error:
        raise MissingExtraError(
            "this method is torchdiffeq's, which is not installed: "
            'pip install "spikede-plugins[ode]"; or use method="euler" on a uniform grid.'
        ) from error
    return torchdiffeq


def _way(integrator: str, method: Any, options: dict[str, Any]) -> _Way:
    """What an integrator, a method and options mean together.

    Raises:
        UnknownNameError, OptionError, OptionTypeError: for what does not exist or does not go together.
    """
    adjoint = integrator.endswith("_adjoint")
    fractional = integrator.startswith("fdeint")
    options = dict(options)
    memory = options.pop("memory", "auto")
    kept = as_memory("full" if memory is None or memory == -1 else memory)
    if method is None:
        method = "gl" if fractional else "euler"
    if isinstance(method, Solver):
        return _Way(method, method.name, False, adjoint, kept, _grid_options(options))
    if not isinstance(method, str):
        raise OptionTypeError(f'method must be a name, e.g. "gl", or a Solver, got {type(method).__name__}.')
    if method in available_solvers():  # says itself that the run is fractional
        return _Way(get_solver(method), method, False, adjoint, kept, _grid_options(options))
    known = {"euler", *_ode_methods()}
    if method not in known:
        solvers = sorted(available_solvers())
        raise UnknownNameError(
            f"unknown method {method!r}; {nearest(method, [*solvers, *known])} (fractional: "
            f"{', '.join(solvers)}; of order one: euler and torchdiffeq's)"
        )
    if fractional:
        raise OptionError(
            f'method={method!r} integrates order one; use it with integrator="odeint", or one of '
            f"{', '.join(sorted(available_solvers()))} with integrator={integrator!r}."
        )
    return _Way(None, method, True, adjoint, kept, options)


def _grid_options(options: dict[str, Any]) -> dict[str, Any]:
    for name in options:
        if name not in _GRID_OPTIONS:
            raise UnknownNameError(f"unknown option {name!r}; {nearest(str(name), _GRID_OPTIONS)}")
    return options


def _times(x: Any, x_time: Any) -> Tensor:
    """The times of the samples, float64 on the CPU, ``[T]`` or, with the end of the last step, ``[T + 1]``.

    Raises:
        OptionTypeError, OptionError: for an input or times that cannot be used.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise OptionTypeError(f"x must be a tensor of floating point numbers, got {kind}.")
    if x.dim() < 2 or x.shape[0] == 0:
        raise OptionError(f"x must be [T, B, ...] with at least one time point, got shape {tuple(x.shape)}.")
    if not torch.compiler.is_compiling() and bool(x.detach().sum().isnan()):
        raise OptionError("x has NaN in it (or infinities of both signs); mask or drop those samples.")
    times = _time_points(x_time, "x_time")
    if len(times) not in (x.shape[0], x.shape[0] + 1):
        raise OptionError(
            f"x has {x.shape[0]} time points, but x_time has {len(times)}; give {x.shape[0]}, or one more "
            "for the end of the last step."
        )
    return times


def _time_points(given: Any, what: str) -> Tensor:
    times = torch.as_tensor(given, dtype=torch.float64, device="cpu").detach()
    if times.dim() != 1 or not len(times):
        raise OptionError(f"{what} must be one-dimensional, [T], got shape {tuple(times.shape)}.")
    if not bool(times.isfinite().all()):
        raise OptionError(f"{what} has NaN or infinity in it.")
    back = (times.diff() <= 0).nonzero()
    if len(back):
        i = int(back[0])
        raise OptionError(
            f"{what} must increase, but {what}[{i}] = {times[i]:g} is followed by {times[i + 1]:g}."
        )
    return times


def _uniform_step(times: Tensor, default: Any) -> float | None:
    """The step of a uniform grid, None for another; ``default`` for a single point."""
    if len(times) == 1:
        step = 1.0 if default is None else default
        if isinstance(step, bool) or not isinstance(step, (int, float)) or not step > 0:
            raise OptionError(f"step_size must be a positive number, got {step!r}.")
        return float(step)
    step = float(times[-1] - times[0]) / (len(times) - 1)
    # Times may come in float32.
    slack = 1e-4 * step + 4 * torch.finfo(torch.float32).eps * float(times.abs().max())
    return step if bool(((times.diff() - step).abs() <= slack).all()) else None


def _rows(wanted: Tensor, grid: Tensor) -> Tensor | None:
    """Which points of the grid are wanted; None for all.

    Raises:
        OptionError: for a time that is not on the grid.
    """
    if len(wanted) == len(grid) and torch.equal(wanted, grid):
        return None
    slack = 1e-4 * float(grid.diff().min()) if len(grid) > 1 else 0.0
    slack += 4 * torch.finfo(torch.float32).eps * float(grid.abs().max())
    nearest_row = (wanted.unsqueeze(1) - grid).abs().min(1)
    if bool((nearest_row.values > slack).any()):
        i = int((nearest_row.values > slack).nonzero()[0])
        raise OptionError(
            f"output_time[{i}] = {float(wanted[i]):g} is none of the times of x_time; on a grid the output "
            "is at those. A method of torchdiffeq takes any time."
        )
    return nearest_row.indices


def _each(out: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``out`` with every tensor in it changed, in whatever it is nested."""
    if isinstance(out, Tensor):
        return change(out)
    if isinstance(out, dict):
        return type(out)((key, _each(value, change)) for key, value in out.items())
    if isinstance(out, tuple) and hasattr(out, "_fields"):
        return type(out)(*(_each(value, change) for value in out))
    if isinstance(out, (list, tuple)):
        return type(out)(_each(value, change) for value in out)
    return out


def _joined(parts: list[Any]) -> Any:
    """Outputs over consecutive times as one."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts) if first.dim() else first
    if isinstance(first, dict):
        return type(first)((key, _joined([part[key] for part in parts])) for key in first)
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*map(_joined, map(list, zip(*parts, strict=True))))
    if isinstance(first, (list, tuple)):
        return type(first)(map(_joined, map(list, zip(*parts, strict=True))))
    return first


def _fixed_grid() -> tuple[str, ...]:
    """torchdiffeq's methods with steps of a fixed size."""
    from torchdiffeq._impl.odeint import SOLVERS
    from torchdiffeq._impl.solvers import FixedGridODESolver

    return tuple(name for name, solver in SOLVERS.items() if issubclass(solver, FixedGridODESolver))


def _with_framework_neurons(base: nn.Module) -> nn.Module:
    """``base`` itself, or, if it has neurons of a framework, a copy in which they are layers of ours.

    Raises:
        UnsupportedNeuronError: for neurons that have no fractional form or cannot be run here, all of them.
        ConversionError: for neurons that are fractional already.
    """
    found = find_neurons(base, adapters_in_use())
    if not found:
        return base
    if any(neuron.fractional for neuron in found):
        raise ConversionError(
            "the model has neurons that were made fractional already; give SNNWrapper the model before "
            "convert_to_fractional (restore_native gives it back)."
        )
    obstacles = []
    for neuron in found:
        support = neuron.adapter.support(neuron.module)
        reason = neuron.adapter.sequence_obstacle(neuron.module) if support.supported else support.reason
        if reason:
            obstacles.append(f"  {neuron.paths[0] or '(the model)'} ({support.kind}): {reason}")
    if obstacles:
        raise UnsupportedNeuronError("SNNWrapper cannot run these neurons:\n" + "\n".join(obstacles))
    model = copy_model(base)
    pairs = []
    for neuron in find_neurons(model, adapters_in_use()):
        fractional = neuron.adapter.to_fractional(neuron.module, _unset())
        pairs.append((neuron.module, _FrameworkNeuron(fractional, neuron.adapter)))
    if pairs[0][0] is model:
        return pairs[0][1]
    replace_modules(model, pairs)
    return model


def _unset() -> FractionalOperator:
    """The operator of a neuron that gets its own when it runs."""
    return FractionalOperator(FractionalOrder(0.5), get_solver("gl"))


# -- the wrapper ----------------------------------------------------------------------------------


class SNNWrapper(nn.Module):
    """A model as a continuous-time system, fractional or of order one.

    Args:
        base: a model whose neurons are :class:`BaseNeuron` modules, called with their input alone. Neurons
            of SpikingJelly and snnTorch (``init_hidden=True``) are accepted as well; such a model is copied.
        integrator: ``"odeint"`` (order one) or ``"fdeint"`` (fractional); with ``_adjoint`` the network's
            activations are not kept for backward but computed once more.
        interpolation_method: ``"linear"``, ``"nearest"``, ``"cubic"`` or ``"akima"``: the input between its
            samples, which solvers that are not on the grid of ``x_time`` ask for.
        alpha, multi_coefficient, learn_alpha, learn_coefficient, alpha_mode: the orders of the neuron layers,
            see :func:`spikede_plugins.layer_orders.layer_orders`. They count for fractional methods.
        method: ``"euler"`` or a method of torchdiffeq (order one); ``"gl"``, ``"l1"``, ``"pred"``, ``"abm"``,
            ``"trap"``, ``"glmulti"``, or a registered or given :class:`Solver` (fractional, whatever the
            integrator is called). None: ``"euler"`` or ``"gl"``.
        options: ``{"memory": "auto" | "full" | -1 | n | "soe" | Memory, "step_size": h}``; the step size
            counts where there is a single time point, else ``x_time`` has it. For torchdiffeq's methods
            ``rtol``, ``atol`` and their own options.
        dropout: ``"step"`` for masks drawn at every step, ``"sequence"`` for one a sequence.

    ``method`` and ``options`` are defaults that ``forward`` may override.

    Raises:
        OptionTypeError, OptionError, OrderError, UnknownNameError: for arguments that cannot be used.
        ConversionError, UnsupportedNeuronError: for a model without neurons, or with some that cannot be run.
    """

    def __init__(
        self,
        base: nn.Module,
        integrator: str = "odeint",
        interpolation_method: str = "linear",
        alpha: Any = 0.5,
        multi_coefficient: Any = None,
        learn_alpha: bool | Sequence[bool] = False,
        learn_coefficient: bool | Sequence[bool] = False,
        alpha_mode: str = "auto",
        method: str | Solver | None = None,
        options: dict[str, Any] | None = None,
        *,
        memory: Any = None,
        dropout: str = "step",
    ) -> None:
        super().__init__()
        if not isinstance(base, nn.Module):
            raise OptionTypeError(f"base must be a torch.nn.Module, got {type(base).__name__}.")
        for value, known, what in (
            (integrator, INTEGRATORS, "integrator"),
            (interpolation_method, available_interpolations(), "interpolation_method"),
            (dropout, DROPOUTS, "dropout"),
        ):
            if value not in known:
                raise UnknownNameError(f"unknown {what} {value!r}; {nearest(str(value), known)}")
        self.integrator, self.interpolation_method, self.dropout = integrator, interpolation_method, dropout
        self.method = method
        self.options = {**(options or {}), **({} if memory is None else {"memory": memory})}
        _way(integrator, method, self.options)
        self.base = _with_framework_neurons(base)
        layers = self._layers()
        if not layers:
            raise ConversionError(
                f"{type(base).__name__} has no neuron: give it BaseNeuron modules (LIFNeuron, IFNeuron, ...) "
                "or neurons of SpikingJelly or snnTorch."
            )
        self.neuron_names = [name or "base" for name, _ in layers]
        self.orders = nn.ModuleList(
            layer_orders(
                alpha, self.neuron_names, multi_coefficient, learn_alpha, learn_coefficient, alpha_mode
            )
        )
        self._integer = [FractionalOrder(1.0) for _ in layers]
        self._operators: dict[Any, dict[int, FractionalOperator]] = {}

    def _layers(self) -> list[tuple[str, Layer]]:
        return [
            (name, module)
            for name, module in self.base.named_modules()
            if isinstance(module, (BaseNeuron, _FrameworkNeuron))
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_operators": {}}

    def forward(
        self,
        x: Tensor,
        x_time: Any,
        output_time: Any = None,
        method: str | Solver | None = None,
        options: dict[str, Any] | None = None,
    ) -> Any:
        """The model's output over time, from resting neurons.

        Args:
            x: input samples ``[T, B, ...]``.
            x_time: their times ``[T]``, increasing; one more may follow, the end of the last step.
            output_time: the times of the output; None for those of the samples. On a grid they must be
                among those.
            method, options: in place of the defaults given to the constructor (options key by key).

        Returns:
            What ``base`` returns, with its first dimension unfolded: ``[T, B, ...]``.

        Raises:
            OptionError, OptionTypeError, UnknownNameError: for arguments that cannot be used.
            MissingExtraError: for a method of torchdiffeq without torchdiffeq.
        """
        way = _way(
            self.integrator, self.method if method is None else method, {**self.options, **(options or {})}
        )
        times = _times(x, x_time)
        steps, batch = x.shape[:2]
        fewest = {"cubic": 4, "akima": 5}.get(self.interpolation_method, 1)
        if steps < fewest:
            raise OptionError(
                f"interpolation_method={self.interpolation_method!r} needs {fewest} time points, x has "
                f'{steps}; "linear" and "nearest" need one.'
            )
        wanted = times[:steps] if output_time is None else _time_points(output_time, "output_time")
        step = _uniform_step(times, way.options.get("step_size"))
        one_mask = _one_mask(self.base, batch) if self.dropout == "sequence" else contextlib.nullcontext()
        with one_mask:
            if way.solver is not None and step is None:
                raise OptionError(
                    f"method={way.method!r} needs a uniform grid, but the steps of x_time differ; use "
                    'method="euler" or one of torchdiffeq\'s, which take any, or resample the input.'
                )
            if way.solver is None and (way.method != "euler" or step is None or way.adjoint):
                return self._by_torchdiffeq(x, times, wanted, way)
            rows = _rows(wanted, times[:steps])
            operators = self._operators_for(way, 1.0 if step is None else step)
            if way.adjoint:
                return self._by_adjoint(x, times, rows, way, operators)
            run = _GridRun(steps, batch, operators)
            with driven_by(run):
                out = run.output(self.base(x.flatten(0, 1)))
        return out if rows is None or run.time_is_gone else _each(out, lambda t: t[rows])

    def _operators_for(self, way: _Way, step: float) -> dict[int, FractionalOperator]:
        """For each neuron its order bound to the solver, the memory and the step."""
        key = (way.solver if way.solver is not None else "euler", way.memory, step)
        found = self._operators.get(key)
        if found is None:
            orders = self._integer if way.integer else self._fractional_orders()
            solver = get_solver("gl") if way.solver is None else way.solver
            terms = [order.multi_term for order in orders]
            if any(terms) and solver.name not in ("gl", "glmulti"):
                warnings.warn(
                    f"method={solver.name!r} takes one order; the layers with several are integrated by "
                    "'glmulti'.",
                    SpikedeWarning,
                    stacklevel=3,
                )
            found = {
                id(layer): FractionalOperator(
                    order, get_solver("glmulti") if several else solver, way.memory, step
                )
                for (_, layer), order, several in zip(self._layers(), orders, terms, strict=True)
            }
            while len(self._operators) >= 8:  # grids that change from call to call
                self._operators.pop(next(iter(self._operators)))
            self._operators[key] = found
        return found

    # -- the whole network at a time of its own ---------------------------------------------------

    def _resting(self, x: Tensor) -> tuple[tuple[Tensor, ...], list[Layer]]:
        """Resting potentials for one time point ``x [B, ...]``, one for each neuron that is called."""
        run, training = _StateRun(1, len(x), None), [m for m in self.base.modules() if m.training]
        for module in training:
            module.training = False  # not .eval(), which a model may have made its own
        try:
            with torch.no_grad(), driven_by(run):
                self.base(x)
        finally:
            for module in training:
                module.training = True
        return tuple(run.rates), run.called

    def _by_torchdiffeq(self, x: Tensor, times: Tensor, wanted: Tensor, way: _Way) -> Any:
        solvers = _torchdiffeq()
        signal = Interpolant(x, times[: len(x)], self.interpolation_method)
        field = _VectorField(self.base, signal, x.shape[1])
        start, _ = self._resting(x[0])
        grid = torch.cat([times[:1], times[: len(x)], wanted]).unique()
        if float(wanted[0]) < float(times[0]):
            raise OptionError(
                f"output_time begins at {float(wanted[0]):g}, before x_time, {float(times[0]):g}."
            )
        grid = grid[grid <= wanted[-1]]
        settings = {**way.options}
        tolerances = {name: settings.pop(name) for name in ("rtol", "atol") if name in settings}
        states = tuple(v.unsqueeze(0) for v in start)
        if len(grid) > 1:
            if way.method == "euler" or way.method not in _fixed_grid():
                settings.pop("step_size", None)
            solve: Any = solvers.odeint
            more: dict[str, Any] = {}
            if way.adjoint:
                inputs = [x] if x.requires_grad else []
                given = [p for p in self.base.parameters() if p.requires_grad]
                solve, more = solvers.odeint_adjoint, {"adjoint_params": (*given, *inputs)}
            states = solve(
                field, start, grid.to(start[0]), method=way.method, options=settings or None, **tolerances,
                **more,
            )  # fmt: skip
        rows = torch.searchsorted(grid, wanted)
        return self._read(signal(wanted), tuple(v[rows] for v in states))

    def _read(self, x: Tensor, states: Sequence[Tensor]) -> Any:
        """The output for input ``[K, B, ...]`` and potentials ``[K, B, ...]``."""
        run = _StateRun(x.shape[0], x.shape[1], [v.flatten(0, 1) for v in states])
        with driven_by(run):
            return run.output(self.base(x.flatten(0, 1)))

    def _by_adjoint(
        self, x: Tensor, times: Tensor, rows: Tensor | None, way: _Way,
        operators: dict[int, FractionalOperator],
    ) -> Any:  # fmt: skip
        """Step by step, the network's activations computed once more in backward."""
        if isinstance(way.solver, CorrectorSolver):
            raise OptionError(
                f"method={way.method!r} asks for rates twice a step, which fdeint_adjoint does not do here; "
                'use integrator="fdeint", or gl, l1 or pred.'
            )
        from spikede_plugins.fdeint import fdeint_adjoint

        steps = len(x)
        signal = Interpolant(x, times[:steps], "nearest")
        field = _VectorField(self.base, signal, x.shape[1])
        start, called = self._resting(x[0])
        orders = [operators[id(layer)].order for layer in called]
        states: tuple[Tensor, ...] = tuple(v.unsqueeze(0) for v in start)
        if steps > 1:
            states = fdeint_adjoint(
                field, start, times[:steps].to(x.device), alpha=orders,
                method=way.solver or "gl", memory=way.memory,
            )  # fmt: skip
        kept = torch.arange(steps) if rows is None else rows
        parts = [
            checkpoint(self._read, x[part], tuple(v[part] for v in states), use_reentrant=False)
            for part in kept.split(_CHUNK)
        ]
        return _joined(parts)

    # -- what users of the original call ----------------------------------------------------------

    def _set_neuron_shapes(self, input_shape: Sequence[int] | None = None) -> None:
        """Nothing: shapes are found when the model runs. Here for programs that call it."""

    def get_per_layer_alpha(self) -> list[Tensor]:
        """For each neuron layer its orders ``[K]``, with their graph, in the order of ``neuron_names``."""
        return [order.alphas().reshape(-1) for order in self._fractional_orders()]

    def get_per_layer_coefficient(self) -> list[Tensor]:
        """For each neuron layer the coefficients ``[K]`` of its terms; ones where there is a single term."""
        found = []
        for order in self._fractional_orders():
            factors = order.term_coefficients()
            found.append(torch.ones_like(order.alphas()).reshape(-1) if factors is None else factors)
        return found

    def _fractional_orders(self) -> list[FractionalOrder]:
        return [order for order in self.orders if isinstance(order, FractionalOrder)]

    def print_alpha_info(self) -> None:
        """Print the order of every neuron layer, and what is learned."""
        width = max(map(len, self.neuron_names))
        for name, order in zip(self.neuron_names, self._fractional_orders(), strict=True):
            print(f"{name:<{width}}  D^alpha, alpha = {order.describe()}")

    def extra_repr(self) -> str:
        return (
            f"integrator={self.integrator!r}, method={self.method!r}, options={self.options}, "
            f"interpolation_method={self.interpolation_method!r}"
        )
