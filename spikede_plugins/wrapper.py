"""A model with derivative-style neurons as one continuous-time (fractional) system.

    D^{a_l} v_l = f_l(v_l, I_l(t)),   spikes s_l(v_l, I_l(t))      for every neuron layer l of the model

On a grid the network is run layer by layer: time is folded into the batch, ``base`` is called once with
``[T * B, ...]``, and only its neurons unfold it and go step by step, over their own history. What step k of
the whole network would give is the same numbers, because no layer looks at a later layer's past. The input
is held during a step, and the output at ``t_k`` is that of the potentials reached at ``t_k``.

That is so where ``base`` treats each sample of its batch alone. A model that mixes them (message passing
between nodes, attention or means over the batch) or keeps a state of its own (a recurrent cell) is called
once a step instead, as a loop over time would. ``time="auto"`` finds out which it is (``time_check``).

An adaptive solver of integer order evaluates the whole network at times of its own, on interpolated input;
the output is then read at the times asked for. ``base`` is called as it is in all ways.

Since time lies in the batch, batch normalisation in training mode takes its statistics over ``T * B``, as
multi-step frameworks do. Where the network is evaluated at single times (torchdiffeq's methods, and
``fdeint_adjoint``, in backward once more) it takes them over ``B`` there, each time, and its output is read
in the same way; running statistics are updated at each evaluation. Control flow in ``base`` that looks at
values sees single times, unless ``time="fold"`` says otherwise.
"""

from __future__ import annotations

import inspect
import logging
import types
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spikede_plugins.call_order import CallOrder, traced_calls, use_name
from spikede_plugins.checks import flag, is_finite
from spikede_plugins.engine import FractionalOperator
from spikede_plugins.errors import (
    ConversionError,
    MissingExtraError,
    OptionError,
    OptionTypeError,
    OrderError,
    SpikedeWarning,
    StateError,
    UnknownNameError,
    UnsupportedNeuronError,
    nearest,
)
from spikede_plugins.fdeint import fdeint_adjoint
from spikede_plugins.from_spikede import (
    absent_attribute,
    means_all_times,
    orders_as_there,
    own_method,
    own_options,
    refuse_integrator,
)
from spikede_plugins.interpolation import Interpolant, available_interpolations
from spikede_plugins.layer_orders import entries_by_layer, layer_orders
from spikede_plugins.layer_runs import (
    FrameworkNeuron,
    GridRun,
    Layer,
    Masks,
    Operators,
    StateRun,
    VectorField,
    call_base,
    each,
)
from spikede_plugins.loading import watch_loading
from spikede_plugins.memory import Memory, as_memory
from spikede_plugins.model_state import as_is, put_back
from spikede_plugins.neurons import BaseNeuron
from spikede_plugins.orders import FractionalOrder
from spikede_plugins.readings import Reading, refuse_times
from spikede_plugins.registry import adapters_in_use, available_solvers, get_solver
from spikede_plugins.run_states import RunStates
from spikede_plugins.sample_times import blur_of, rows_of, sample_times, time_points, uniform_step
from spikede_plugins.solvers.base import CorrectorSolver, Solver
from spikede_plugins.step_runs import StepRun, integrate_steps, run_steps
from spikede_plugins.time_check import Finding, find_out
from spikede_plugins.tree import copy_model, find_neurons, replace_modules
from spikede_plugins.uncompiled import uncompiled, uncompiled_alone

INTEGRATORS = ("odeint", "odeint_adjoint", "fdeint", "fdeint_adjoint")
DROPOUTS = ("step", "sequence")
TIMES = ("auto", "fold", "step")
#: How often a check that could not tell is made again before the model is stepped for good.
_TRIES = 3
#: Attributes of a module of these types switch what it does; a check holds for what they were.
_SWITCHES = (bool, str, types.FunctionType, types.MethodType)
_log = logging.getLogger("spikede_plugins")
_GRID_OPTIONS = ("memory", "step_size")
#: Adaptive solvers: firing makes rates jump, which no tolerance resolves for nothing.
_TOLERANCES = {"rtol": 1e-3, "atol": 1e-4}
_MOST_STEPS = 10_000
#: Options of torchdiffeq's methods that are a positive number.
_NUMBERS = (
    "rtol", "atol", "max_num_steps", "first_step", "safety", "ifactor", "dfactor", "max_iters", "max_order",
)  # fmt: skip
#: How torchdiffeq's fixed-step methods go from grid to output.
_BETWEEN = ("linear", "cubic")


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
    options = own_options(options)
    method = own_method(method, integrator)
    memory = options.pop("memory", "auto")
    everything = memory is None or (isinstance(memory, int) and memory == -1)
    kept = as_memory("full" if everything else memory)
    if method is None:
        method = "gl" if fractional else "euler"
    if isinstance(method, Solver):
        return _Way(method, method.name, False, adjoint, kept, _grid_options(options))
    if not isinstance(method, str):
        raise OptionTypeError(f'method must be a name, e.g. "gl", or a Solver, got {type(method).__name__}.')
    if method in available_solvers():  # says itself that the run is fractional
        return _Way(get_solver(method), method, False, adjoint, kept, _grid_options(options))
    theirs = _ode_methods()
    known = {"euler", *theirs}
    if method not in known:
        solvers = sorted(available_solvers())
        absent = "" if theirs else ', which is not installed: pip install "spikede-plugins[ode]"'
        raise UnknownNameError(
            f"unknown method {method!r}; {nearest(method, [*solvers, *known])} (fractional: "
            f"{', '.join(solvers)}; of order one: euler, and those of torchdiffeq{absent})"
        )
    if fractional:
        raise OptionError(
            f'method={method!r} integrates order one; use it with integrator="odeint", or one of '
            f"{', '.join(sorted(available_solvers()))} with integrator={integrator!r}."
        )
    if method == "euler":
        for name in options:
            if name not in (*_GRID_OPTIONS, "rtol", "atol", "perturb"):
                raise UnknownNameError(f"unknown option {name!r}; {nearest(str(name), _GRID_OPTIONS)}")
    else:
        _check_theirs(method, options)
    for name in _NUMBERS:
        value = options.get(name, 1.0)
        if value is None and name == "first_step":  # its default: found by the method
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
            raise OptionTypeError(f"the option {name!r} must be a number, got {value!r}.")
        if not isinstance(value, Tensor) and not (is_finite(value) and value > 0):
            raise OptionError(f"the option {name!r} must be finite and positive, got {value}.")
    return _Way(None, method, True, adjoint, kept, options)


def _check_theirs(method: str, options: dict[str, Any]) -> None:
    """Options of a method of torchdiffeq, which itself only warns of those that it does not know.

    Raises:
        UnknownNameError: for an option that the method does not have.
    """
    from torchdiffeq._impl.odeint import SOLVERS

    arguments = [
        argument
        for kind in SOLVERS[method].__mro__
        if kind is not object
        for argument in inspect.signature(kind.__init__).parameters.values()
    ]
    named = {one.name for one in arguments if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)}
    known = {*(named - {"self", "func", "y0"}), *_GRID_OPTIONS, *_TOLERANCES, "norm"}
    for name in options:
        if name not in known:
            raise UnknownNameError(
                f"unknown option {name!r} for torchdiffeq's {method!r}; {nearest(str(name), known)}"
            )
    between = options.get("interp", _BETWEEN[0])
    if not isinstance(between, str) or between not in _BETWEEN:
        raise UnknownNameError(f"unknown interp {between!r}; {nearest(str(between), _BETWEEN)}")


def _as_options(options: Any) -> dict[str, Any]:
    if options is not None and not isinstance(options, dict):
        raise OptionTypeError(f'options must be a dict, e.g. {{"memory": 50}}, got {type(options).__name__}.')
    return dict(options or {})


def _refuse_state(states: RunStates | None, way: _Way) -> None:
    """Only on a grid is there a state that a run goes on with."""
    if states is None or (states.before is None and not states.keep):
        return
    what = "initial_state" if states.before is not None else "return_state=True"
    mend = (
        'use integrator="fdeint", which gives the same values' if way.solver is not None
        else 'use method="euler" with integrator="odeint" on a uniform grid'
    )  # fmt: skip
    kind = 'integrator="fdeint_adjoint"' if way.solver is not None else f"torchdiffeq's {way.method!r}"
    raise OptionError(f"{what}: {kind} carries no state from run to run; {mend}, or v0= alone.")


def _grid_options(options: dict[str, Any]) -> dict[str, Any]:
    for name in options:
        if name not in _GRID_OPTIONS:
            raise UnknownNameError(f"unknown option {name!r}; {nearest(str(name), _GRID_OPTIONS)}")
    return options


def _fixed_grid() -> tuple[str, ...]:
    """torchdiffeq's methods with steps of a fixed size."""
    from torchdiffeq._impl.odeint import SOLVERS
    from torchdiffeq._impl.solvers import FixedGridODESolver

    return tuple(name for name, solver in SOLVERS.items() if issubclass(solver, FixedGridODESolver))


def _adaptive() -> tuple[str, ...]:
    """torchdiffeq's Runge-Kutta methods with steps of their own choice."""
    from torchdiffeq._impl.odeint import SOLVERS
    from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver

    return tuple(name for name, solver in SOLVERS.items() if issubclass(solver, RKAdaptiveStepsizeODESolver))


def _with_framework_neurons(base: nn.Module) -> nn.Module:
    """``base`` itself, or, if it has neurons of a framework, a copy in which they are layers of ours.

    Raises:
        UnsupportedNeuronError: for neurons that have no fractional form or cannot be run here, all of them.
        ConversionError: for neurons that are fractional already.
    """
    found = find_neurons(base, adapters_in_use())
    stateful = [text for adapter in adapters_in_use() for text in adapter.stateful_layers(base)]
    if stateful:
        raise UnsupportedNeuronError(
            "SNNWrapper folds time into the batch, where these layers would mix up steps:\n  "
            + "\n  ".join(stateful)
        )
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
    for adapter in {id(neuron.adapter): neuron.adapter for neuron in found}.values():
        adapter.fold_time(model)
    pairs = []
    for neuron in find_neurons(model, adapters_in_use()):
        fractional = neuron.adapter.to_fractional(neuron.module, _unset())
        pairs.append((neuron.module, FrameworkNeuron(fractional, neuron.adapter)))
    if pairs[0][0] is model:
        return pairs[0][1]
    replace_modules(model, pairs)
    return model


def _unset() -> FractionalOperator:
    """The operator of a neuron that gets its own when it runs."""
    return FractionalOperator(FractionalOrder(0.5), get_solver("gl"))


class _Ode(NamedTuple):
    """What torchdiffeq is asked for.

    Attributes:
        times, wanted: the times of the samples and of the output; ``blur`` what counts as the same time.
        way: the method and its options.
        chosen: whether the output's times were asked for.
        record: whether potentials are.
        folds: whether times may be folded into the batch.
        states: where the potentials begin, if not at 0.
    """

    times: Tensor
    wanted: Tensor
    blur: float
    way: _Way
    chosen: bool
    record: bool
    folds: bool
    states: RunStates | None


class _Grid(NamedTuple):
    """What ``fdeint_adjoint`` is asked for; ``rows`` of the grid are the output's, or all."""

    times: Tensor
    rows: Tensor | None
    way: _Way
    record: bool
    folds: bool
    states: RunStates | None


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
            ``rtol`` (1e-3), ``atol`` (1e-4), ``max_num_steps`` (10 000, adaptive ones) and their own options.
        dropout: ``"step"`` for masks drawn at every step, ``"sequence"`` for one a sequence.
        time: ``"fold"`` to call ``base`` once with all times folded into its batch, for models that treat
            each sample alone; ``"step"`` to call it once a step. ``"auto"`` folds only a model that is known
            to treat samples alone, or that gave the same both ways on the first times of the first call (and
            of the first one in another mode); else it steps, and a line of the logger ``spikede_plugins``
            says once which layer is the reason.

    An argument with one entry a neuron (``alpha``, ``multi_coefficient``, ``learn_alpha``,
    ``learn_coefficient``) goes by the order in which the neurons are called. A neuron that is called several
    times takes one entry for all its calls, or, if there are as many entries as calls, one for each.

    ``method`` and ``options`` are defaults that ``forward`` may override.

    Raises:
        OptionTypeError, OptionError, OrderError, UnknownNameError: for arguments that cannot be used.
        ConversionError, UnsupportedNeuronError: for a model without neurons, or with some that cannot be run.
    """

    fractional_by_itself = (
        "is fractional by itself: pass alpha=, method= and memory= to SNNWrapper(model, ...), and read its "
        "orders with spikede_plugins.alphas(wrapper) or wrapper.print_alpha_info()"
    )
    #: What functions on the state of a model say of this one.
    keeps_no_state = (
        "SNNWrapper keeps no state between two calls: net(x, x_time, return_state=True) returns it, "
        "net(x, x_time, initial_state=state) goes on from it, and reset_rows(state, rows) and "
        "select_rows(state, index) change it."
    )

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
        time: str = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(base, nn.Module):
            raise OptionTypeError(f"base must be a torch.nn.Module, got {type(base).__name__}.")
        if any(isinstance(module, SNNWrapper) for module in base.modules()):
            raise ConversionError(
                f"{type(base).__name__} is or holds an SNNWrapper, which runs its neurons over a time of its "
                "own; wrap the model that is in it (wrapper.base) once."
            )
        refuse_integrator(integrator)
        for value, known, what in (
            (integrator, INTEGRATORS, "integrator"),
            (interpolation_method, available_interpolations(), "interpolation_method"),
            (dropout, DROPOUTS, "dropout"),
            (time, TIMES, "time"),
        ):
            if not isinstance(value, str) or value not in known:
                raise UnknownNameError(f"unknown {what} {value!r}; {nearest(str(value), known)}")
        self.integrator, self.interpolation_method, self.dropout = integrator, interpolation_method, dropout
        self.method, self.time = method, time
        self.options = {**_as_options(options), **({} if memory is None else {"memory": memory})}
        self._operators: dict[Any, list[FractionalOperator]] = {}
        self._findings: dict[Any, Finding] = {}
        self._mode: Any = None
        self._tries, self._said = 0, False
        _way(integrator, method, self.options)
        self.base = _with_framework_neurons(base)
        layers = self._layers()
        if not layers:
            raise ConversionError(
                f"{type(base).__name__} has no neuron: give it BaseNeuron modules (LIFNeuron, IFNeuron, ...) "
                "or neurons of SpikingJelly or snnTorch."
            )
        self.neuron_names = [name or "base" for name, _ in layers]
        by_layer = entries_by_layer(
            alpha, len(layers), multi_coefficient, (learn_alpha, learn_coefficient), alpha_mode
        )
        self._places = self._call_order(by_layer)
        self.orders = nn.ModuleList(
            layer_orders(
                alpha, self._places.labels, multi_coefficient, learn_alpha, learn_coefficient, alpha_mode
            )
        )
        watch_loading(self)
        self._integer = [FractionalOrder(1.0) for _ in self.orders]
        undone = [m for m in self.base.modules() if isinstance(m, (nn.AlphaDropout, nn.FeatureAlphaDropout))]
        if dropout == "sequence" and undone:
            raise OptionError(
                f'dropout="sequence" is for layers that multiply by a mask, which {type(undone[0]).__name__} '
                'does not; use nn.Dropout, or dropout="step".'
            )

    def _layers(self) -> list[tuple[str, Layer]]:
        return [
            (name, module)
            for name, module in self.base.named_modules()
            if isinstance(module, (BaseNeuron, FrameworkNeuron))
        ]

    def _call_order(self, entries: int | None) -> CallOrder:
        """The places of the neurons in a list of so many orders; None for a single order for all."""
        names = self.neuron_names
        several = entries is not None and (entries > 1 or len(names) > 1)
        calls = traced_calls(self.base, (BaseNeuron, FrameworkNeuron)) if several else None
        try:
            return CallOrder(names, calls, entries)
        except OrderError:  # said in full where the orders are read
            return CallOrder(names, None, None)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            absent = absent_attribute(name)
            found = orders_as_there(self, name)
            if absent is None and found is None:
                raise
        if absent is not None:
            raise absent
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_operators": {}, "_findings": {}, "_tries": 0}

    def _replicate_for_data_parallel(self) -> Any:
        replica: Any = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica._operators = {}  # found by the neurons' identity
        replica._mode = self._mode or self._mode_now()  # findings are shared, modules are new in every call
        return replica

    @uncompiled_alone
    def forward(
        self,
        x: Tensor,
        x_time: Any,
        output_time: Any = None,
        method: str | Solver | None = None,
        options: dict[str, Any] | None = None,
        *,
        return_potentials: bool = False,
        v0: Any = None,
        initial_state: Any = None,
        return_state: bool = False,
    ) -> Any:
        """The model's output over time, from resting neurons or where they are told to begin.

        Args:
            x: input samples ``[T, B, ...]``.
            x_time: their times ``[T]``, increasing; one more may follow, the end of the last step.
            output_time: the times of the output; None for those of the samples. On a grid they must be
                among those. All times of ``x_time`` are the same as None, also with the end of the last step.
            method, options: in place of the defaults given to the constructor (options key by key).
            return_potentials: return the neurons' potentials as well.
            v0: the potentials that the run begins with: a number, a tensor that broadcasts against them,
                ``[B, ...]``, or a dict of these by the neuron's path (the others begin at 0).
            initial_state: the state that another run ended with; this one goes on with it.
            return_state: return the state at the end of the last step as well, behind all else. On a grid.

        Returns:
            What ``base`` returns, with its first dimension unfolded: ``[T, B, ...]``. Called once a step,
            what it returns at each step, stacked; a number becomes ``[T]``. With ``return_potentials`` a pair
            of that and a dict of the potentials ``[T, B, ...]`` by the path of the neuron (from the second
            call of a neuron on ``"path (call 2)"``), at the times of the output: those that its spikes come
            from, 0 at the first one; of SpikingJelly's and snnTorch's neurons those after the step, as
            these record them. With ``return_state`` a plain nested dict of tensors follows
            (``spikede_plugins.run_states``): ``x`` in chunks, each one from the state of the one before,
            gives what ``x`` in one run gives.

        Raises:
            OptionError, OptionTypeError, UnknownNameError: for arguments that cannot be used.
            StateError: for an ``initial_state`` or a ``v0`` that does not belong to this model and input.
            MissingExtraError: for a method of torchdiffeq without torchdiffeq.
        """
        flag(return_potentials, "return_potentials")
        states = self._states(v0, initial_state, return_state)
        run, masks = self._begin(x, x_time, output_time, method, options, return_potentials, states)
        if isinstance(run, GridRun):
            return self._end(run, call_base(self.base, run, x.flatten(0, 1), masks))
        if isinstance(run, StepRun):
            return self._end(run, run_steps(self.base, run, x, masks))
        return run()

    @uncompiled
    def _states(self, v0: Any, initial_state: Any, keep: bool) -> RunStates | None:
        """Where neurons begin, and whether it is asked where they end; None for from rest, and no."""
        if flag(keep, "return_state") or v0 is not None or initial_state is not None:
            names = {id(layer): name or "base" for name, layer in self._layers()}
            return RunStates(names, v0, initial_state, keep)
        return None

    @uncompiled
    def _begin(
        self, x: Tensor, x_time: Any, output_time: Any, method: str | Solver | None,
        options: dict[str, Any] | None, record: bool, states: RunStates | None,
    ) -> tuple[GridRun | StepRun | Callable[[], Any], Masks | None]:  # fmt: skip
        """The run of the layers on a grid, or what runs the network otherwise; and the masks of dropout."""
        way = _way(
            self.integrator, self.method if method is None else method,
            {**self.options, **_as_options(options)},
        )  # fmt: skip
        times = sample_times(x, x_time)
        steps, batch = x.shape[:2]
        fewest = {"cubic": 4, "akima": 5}.get(self.interpolation_method, 1)
        if steps < fewest:
            raise OptionError(
                f"interpolation_method={self.interpolation_method!r} needs {fewest} time points, x has "
                f'{steps}; "linear" and "nearest" need one.'
            )
        blur = blur_of(x_time, times)
        wanted = times[:steps]
        if output_time is not None:
            wanted = time_points(output_time, "output_time")
            blur = max(blur, blur_of(output_time, wanted))
            if means_all_times(wanted, times, steps, blur):
                output_time, wanted = None, times[:steps]
        step = uniform_step(times, blur_of(x_time, times), way.options.get("step_size"))
        masks = Masks(self.base, batch) if self.dropout == "sequence" else None
        if way.solver is not None and step is None:
            raise OptionError(
                f"method={way.method!r} needs a uniform grid, but the steps of x_time differ; use "
                'method="euler" or one of torchdiffeq\'s, which take any, or resample the input.'
            )
        self._check_names()
        on_grid = way.solver is not None or (way.method == "euler" and step is not None)
        folds = self._folds(x)
        if not on_grid or (way.adjoint and way.solver is None and folds):
            chosen = output_time is not None
            keeps = self._keeps_a_state(x)
            if keeps:
                raise OptionError(
                    f"method={way.method!r} evaluates the model at times of its own, in any order, but "
                    f"{keeps}; "
                    'use method="euler" or a fractional method on a uniform grid, which call it once a step.'
                )
            _refuse_state(states, way)
            ode = _Ode(times, wanted, blur, way, chosen, record, folds, states)
            return partial(self._by_torchdiffeq, x, ode, masks), None
        rows = rows_of(wanted, times[:steps], blur)
        operators = self._operators_for(way, 1.0 if step is None else step)
        if way.adjoint:
            _refuse_state(states, way)
            grid = _Grid(times, rows, way, record, folds, states)
            return partial(self._by_adjoint, x, grid, operators, masks), None
        run = (GridRun if folds else StepRun)(steps, batch, operators, rows, record)
        run.beginnings = states
        return run, masks

    @uncompiled
    def _end(self, run: GridRun | StepRun, out: Any) -> Any:
        """The output at the times wanted, with time unfolded."""
        self._places.check(len(run.called))
        if isinstance(run, GridRun):
            out = run.output(out)
        if run.rows is not None:
            refuse_times(run)
            out = each(out, lambda t: t[run.rows] if t.dim() else t)
        found = self._with_potentials(out, run.called, run.potentials, run.rows) if run.record else (out,)
        if run.beginnings is not None:
            run.beginnings.all_used()
            found = (*found, run.beginnings.end()) if run.beginnings.keep else found
        return found if len(found) > 1 else out

    def _with_potentials(
        self, out: Any, called: list[Layer], potentials: Sequence[Tensor], rows: Tensor | None
    ) -> tuple[Any, dict[str, Tensor]]:
        """The output, and the potentials by the name of the neuron."""
        names = {id(layer): name or "base" for name, layer in self._layers()}
        paths = [names[id(layer)] for layer in called]
        chosen = [v if rows is None else v[rows.to(v.device)] for v in potentials]
        return out, {use_name(paths, i): v for i, v in enumerate(chosen)}

    # -- folded or stepped ------------------------------------------------------------------------

    def _folds(self, x: Tensor) -> bool:
        """Whether times are folded into the batch of ``base``."""
        if self.time != "auto":
            return self.time == "fold"
        if not x.numel():
            return True  # there is nothing to mix
        finding = self._finding(x)
        if not finding.folds and finding.settled and not self._said:
            self._said = True
            _log.warning(
                "SNNWrapper calls %s once for each time step, since %s. "
                '(time="step" says that this is meant; time="fold" calls it once, all times in its batch.)',
                type(self.base).__name__, finding.reason,
            )  # fmt: skip
        return finding.folds

    def _keeps_a_state(self, x: Tensor) -> str:
        """What ``base`` keeps from call to call and reads again, as a clause; empty for nothing."""
        return self._finding(x).state if self.time != "fold" and x.numel() else ""

    def _finding(self, x: Tensor) -> Finding:
        """What was found out about the model as it is built and in the mode it is in, for such an input."""
        key = self._mode or self._mode_now(), x.dim()
        known = self._findings.get(key)
        if known is None:
            known = find_out(self.base, x)
            if not known.settled and x.shape[0] > 1:
                self._tries += 1
                known = known._replace(settled=self._tries >= _TRIES)
            if known.settled:
                while len(self._findings) >= 8:
                    self._findings.pop(next(iter(self._findings)))
                self._findings[key] = known
        return known

    def _mode_now(self) -> Any:
        """The modules, with their switches: what is true or false (training is), names, functions."""
        return tuple(
            (id(module), type(module), *(v for v in vars(module).values() if type(v) in _SWITCHES))
            for module in self.base.modules()
        )

    # -- orders -----------------------------------------------------------------------------------

    def _check_names(self) -> None:
        names = [name or "base" for name, _ in self._layers()]
        if names != self.neuron_names:
            raise StateError(
                f"the model's neuron layers are {', '.join(names) or 'gone'} now, and "
                f"were {', '.join(self.neuron_names)} when it was wrapped; wrap it anew."
            )

    def _operators_for(self, way: _Way, step: float) -> Operators:
        """For each neuron call its order bound to the solver, the memory and the step."""
        layers = self._layers()
        # A neuron put in the place of another one takes its order.
        names = {id(layer): name or "base" for name, layer in layers}
        key = (way.solver or "euler", way.memory, step, tuple(names))
        found = self._operators.get(key)
        if found is None:
            orders = self._integer if way.integer else self._fractional_orders()
            solver = get_solver("gl") if way.solver is None else way.solver
            terms = [order.multi_term for order in orders]
            if any(terms) and solver.name not in ("gl", "glmulti"):
                warnings.warn(
                    f"method={solver.name!r} takes one order; the layers with several, or with a "
                    "coefficient, are integrated by 'glmulti'.",
                    SpikedeWarning,
                    stacklevel=3,
                )
            found = [
                FractionalOperator(order, get_solver("glmulti") if several else solver, way.memory, step)
                for order, several in zip(orders, terms, strict=True)
            ]
            while len(self._operators) >= 8:  # grids that change from call to call
                self._operators.pop(next(iter(self._operators)))
            self._operators[key] = found
        bound, places = found, self._places

        def operator(layer: Layer, call: int) -> FractionalOperator:
            name = names.get(id(layer))
            if name is None:
                raise StateError(
                    f"a {type(layer).__name__} is called that was not in the model when it was wrapped; "
                    "wrap the model anew."
                )
            return bound[places.place(name, call)]

        return operator

    # -- the whole network at a time of its own ---------------------------------------------------

    def _resting(self, x: Tensor, states: RunStates | None = None) -> tuple[tuple[Tensor, ...], list[Layer]]:
        """The first potentials for one time point ``x [B, ...]``, one for each neuron that is called."""
        run = StateRun(1, len(x), None)
        buffers = [(b, b.clone()) for b in self.base.buffers()]  # a call that only looks must change nothing
        kept = as_is(self.base)
        devices = [x.device] if x.is_cuda else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            call_base(self.base, run, x, None)
            put_back(kept)
            for buffer, value in buffers:
                buffer.copy_(value)
        self._places.check(len(run.called))
        if states is None:
            return tuple(run.rates), run.called
        begun = [states.first(layer, v) for layer, v in zip(run.called, run.rates, strict=True)]
        states.all_used()
        return tuple(begun), run.called

    @uncompiled
    def _by_torchdiffeq(self, x: Tensor, ode: _Ode, masks: Masks | None) -> Any:
        solvers = _torchdiffeq()
        times, wanted, blur = ode.times, ode.wanted, ode.blur
        signal = Interpolant(x, times[: len(x)], self.interpolation_method)
        field = VectorField(self.base, signal, x.shape[1], masks)
        start, called = self._resting(x[0], ode.states)
        if float(wanted[0]) < float(times[0]) - blur:
            raise OptionError(
                f"output_time begins at {float(wanted[0]):g}, before x_time, {float(times[0]):g}."
            )
        if float(wanted[-1]) > float(times[-1]) + blur:
            raise OptionError(
                f"output_time ends at {float(wanted[-1]):g}, behind x_time, {float(times[-1]):g}, where "
                "there is no input; give samples up to there, or end it sooner."
            )
        grid = times[: len(x)]
        after = torch.searchsorted(grid, wanted).clamp(max=len(grid) - 1)
        for near in (after, (after - 1).clamp(min=0)):  # what rounding put beside a time of the grid
            wanted = torch.where((wanted - grid[near]).abs() <= blur, grid[near], wanted)
        points = torch.cat([grid, wanted]).unique()
        points = points[points <= wanted[-1]]
        states = tuple(v.expand(len(points), *v.shape) for v in start)  # of an empty batch, all there is
        if len(points) > 1 and x.shape[1]:
            states = self._solve(solvers, field, start, points.to(x.device), ode.way, x)
        rows = torch.searchsorted(points, wanted)
        x, states = signal(wanted), tuple(v[rows] for v in states)
        out = Reading(self.base, x, states, masks, ode.chosen).all_times(ode.folds)
        return self._with_potentials(out, called, states, None) if ode.record else out

    def _solve(
        self, solvers: Any, field: VectorField, start: tuple[Tensor, ...], points: Tensor, way: _Way,
        x: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """The potentials at all points, by torchdiffeq."""
        fixed = way.method in _fixed_grid()
        settings = {**way.options}
        tolerances = {name: settings.pop(name, default) for name, default in _TOLERANCES.items()}
        if way.method == "euler" or not fixed:
            settings.pop("step_size", None)
        if way.method in _adaptive():
            settings.setdefault("max_num_steps", _MOST_STEPS)
        solve: Any = solvers.odeint
        more: dict[str, Any] = {}
        if way.adjoint:
            given = [p for p in self.base.parameters() if p.requires_grad]
            solve = solvers.odeint_adjoint
            more = {"adjoint_params": (*given, *([x] if x.requires_grad else []))}
        try:
            found: tuple[Tensor, ...] = solve(
                field, start, points, method=way.method, options=settings or None, **tolerances, **more
            )
        except AssertionError as error:
            raise StateError(
                f"torchdiffeq's {way.method!r} gave up: {error}. Where neurons fire their rates jump, and an "
                "adaptive solver's steps shrink; use larger rtol and atol (options), a larger max_num_steps, "
                'or a method with fixed steps ("euler", "rk4").'
            ) from error
        return found

    @uncompiled
    def _by_adjoint(self, x: Tensor, grid: _Grid, operators: Operators, masks: Masks | None) -> Any:
        """Step by step, the network's activations computed once more in backward."""
        way, rows = grid.way, grid.rows
        if isinstance(way.solver, CorrectorSolver):
            raise OptionError(
                f"method={way.method!r} asks for rates twice a step, which fdeint_adjoint does not do here; "
                'use integrator="fdeint", or gl, l1 or pred.'
            )
        if not grid.folds:
            start = None if grid.states is None else self._resting(x[0], grid.states)[0]
            out, run, states = integrate_steps(self.base, x, operators, masks, start)
            self._places.check(len(run.called))
            if rows is not None:
                refuse_times(run)
                out = each(out, lambda t: t[rows] if t.dim() else t)
            return self._with_potentials(out, run.called, states, rows) if grid.record else out
        steps = len(x)
        signal = Interpolant(x, grid.times[:steps], "nearest")
        field = VectorField(self.base, signal, x.shape[1], masks)
        start, called = self._resting(x[0], grid.states)
        orders = [operators(layer, call).order for call, layer in enumerate(called)]
        reached: tuple[Tensor, ...] = tuple(v.expand(steps, *v.shape) for v in start)
        if steps > 1 and x.shape[1]:  # an empty batch has nothing to integrate
            reached = fdeint_adjoint(
                field, start, grid.times[:steps].to(x.device), alpha=orders,
                method=way.solver or "gl", memory=way.memory,
            )  # fmt: skip
        if rows is not None:
            x, reached = x[rows], tuple(v[rows] for v in reached)
        reading = Reading(self.base, x, reached, masks, rows is not None, again=True)
        out = reading.all_times(True)
        return self._with_potentials(out, called, reached, None) if grid.record else out

    # -- what users of the original call ----------------------------------------------------------

    def _set_neuron_shapes(self, input_shape: Sequence[int] | None = None) -> None:
        """Nothing: shapes are found when the model runs. Here for programs that call it."""

    def get_per_layer_alpha(self) -> list[Tensor]:
        """For each neuron layer its orders ``[K]``, with their graph.

        In the order of ``neuron_names``, or, where ``alpha`` or another argument has one entry a layer, in
        that of the calls.
        """
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
        names = self._places.labels
        width = max(map(len, names))
        for name, order in zip(names, self._fractional_orders(), strict=True):
            print(f"{name:<{width}}  D^alpha, alpha = {order.describe()}")

    def extra_repr(self) -> str:
        return (
            f"integrator={self.integrator!r}, method={self.method!r}, options={self.options}, "
            f"interpolation_method={self.interpolation_method!r}"
        )
