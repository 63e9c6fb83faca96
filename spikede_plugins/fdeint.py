"""Any Caputo equation ``D^a y = f(t, y)``, ``y(t_0) = y_0``, called like torchdiffeq's ``odeint``.

With ``u_k = y_k - y_0`` and the bracket weights ``W_m = w_m + [m = 1]`` of a solver, an explicit step is

    y_k = y_{k-1} + g f(t_{k-1}, y_{k-1}) - sum_{m=1..k-1} W_m u_{k-m}.

At a = 1 the sum vanishes and g is the step: Euler's step, to the last bit. A solver with a corrector
predicts p_k in this way, or seeks p_k = y_k, and then takes

    y_k = y_0 + c (f(t_k, p_k) + s_k f(t_0, y_0)) - sum_{m=1..k-1} w_m u_{k-m}.

The sums are formed by blocks of steps (``engine.blocks``). As long as nothing needs a gradient this is a thin
loop over one buffer; from the first state on that needs one, the differentiable steps of
``engine.block_steps`` go on with what the buffer holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.parameter import is_lazy
from torch.utils.checkpoint import checkpoint

from spikede_plugins.checks import counted, is_finite, is_readable
from spikede_plugins.engine.history import per_neuron
from spikede_plugins.engine.operator import FractionalOperator, Kernel, Source
from spikede_plugins.engine.recall import Recalled, recall_by_blocks, recall_nothing, recall_window
from spikede_plugins.engine.step import check_channels
from spikede_plugins.errors import OptionError, OptionTypeError, OrderError, StateError, nearest
from spikede_plugins.memory import (
    AutoMemory,
    FullMemory,
    Memory,
    SumOfExponentials,
    WindowMemory,
    as_memory,
)
from spikede_plugins.orders import FractionalOrder, MultiTerm, PerChannel, check_alpha
from spikede_plugins.registry import get_solver
from spikede_plugins.solvers.base import CorrectorSolver, ExplicitSolver, Solver

State = Tensor | tuple[Tensor, ...]
#: ``(t, y) -> dy``: t a 0-dim tensor, y and the result like ``y0``.
Func = Callable[[Tensor, Any], Any]
Alpha = float | Tensor | PerChannel | MultiTerm | FractionalOrder | Sequence[Any]


def fdeint(
    func: Func, y0: State, t: Tensor, *, alpha: Alpha, method: str | Solver = "gl",
    memory: str | int | Memory | None = "full", options: dict[str, Any] | None = None,
) -> Any:  # fmt: skip
    """Integrate ``D^alpha y = func(t, y)``, ``y(t[0]) = y0``, Caputo's derivative of order alpha in (0, 1].

        t = torch.linspace(0.0, 4.0, 401)
        y = fdeint(lambda t, y: -y, torch.ones(3), t, alpha=0.7)     # [401, 3], E_0.7(-t^0.7)

    The result is differentiable in ``y0``, in ``alpha`` and in whatever ``func`` depends on, to rounding.

    Args:
        func: the right-hand side; called with a 0-dim tensor t and y, returns a tensor (or tuple) like y.
        y0: the start, a tensor ``[*shape]`` or a tuple of tensors, float32 or float64.
        t: the times ``[T]`` at which the solution is wanted, strictly increasing; evenly spaced, unless
            ``options`` has a ``step_size``.
        alpha: the order: a number, or a tensor with one (whose gradient is exact);
            for a tensor y0 also ``PerChannel([...], dim=...)`` or a tensor ``[n]`` with one order for each
            entry of the last dimension; for a tuple y0 also a sequence with the order of each member;
            ``MultiTerm([...], [...])`` for ``sum_i c_i D^{a_i} y = func(t, y)`` (method gl);
            a :class:`FractionalOrder`, whose parameters are then learned.
        method: the name of a solver (``available_solvers()``) or a solver: gl, l1, pred, glmulti explicit,
            abm predictor and corrector, trap implicit. ``Solver.accuracy`` tells the order of each.
        memory: ``"full"`` (also None or -1), an int for the newest so many steps, ``"soe"`` for a sum of
            exponentials, whose cost does not grow with T, ``"auto"`` (full for 128 steps, then soe), or
            a :class:`Memory`. The horizon of the two words is at least the length of the run.
        options: ``step_size``: go from t[0] on in steps of this size and interpolate linearly at ``t`` (the
            last step may end behind ``t[-1]``); for the implicit method ``max_iterations`` (200) and
            ``tolerance`` (64 roundings of the dtype).

    Returns:
        The solution at the times t, ``[T, *shape]``, its first row ``y0``; a tuple of such for a tuple.

    Raises:
        OptionError: for times, starts, options or a right-hand side whose values or shapes cannot be used.
        OptionTypeError: for arguments of the wrong type.
        OrderError: for an order outside (0, 1], or the wrong number of orders.
        UnknownNameError: for an unknown method; the nearest known one is offered.
        StateError: if the implicit method finds no solution of a step, or for second derivatives where the
            order is learned.

    Source: K. Diethelm, *The Analysis of Fractional Differential Equations* (2010), for the problem; the file
    of each solver for its scheme.
    """
    return _integrate(func, y0, t, alpha, method, memory, options, recompute=False)


def fdeint_adjoint(
    func: Func, y0: State, t: Tensor, *, alpha: Alpha, method: str | Solver = "gl",
    memory: str | int | Memory | None = "full", options: dict[str, Any] | None = None,
) -> Any:  # fmt: skip
    """:func:`fdeint` that keeps the states only, not what ``func`` computed on its way.

    Backward calls ``func`` once more at every state, so a wide network as right-hand side takes no more
    memory than a narrow one, for the time of one more forward pass. Solution and gradients are those of
    :func:`fdeint`; no adjoint equation is solved, and ``func`` need not be a module. (What ``func`` draws at
    random is drawn again the same, for which 5 kB a step are kept.)

    Args, returns and errors as of :func:`fdeint`.
    """
    return _integrate(func, y0, t, alpha, method, memory, options, recompute=True)


def _integrate(
    func: Func, y0: State, t: Tensor, alpha: Alpha, method: str | Solver, memory: str | int | Memory | None,
    options: dict[str, Any] | None, recompute: bool,
) -> Any:  # fmt: skip
    if not callable(func):
        raise OptionTypeError(f"func must be callable as func(t, y), got {type(func).__name__}.")
    starts = _read_starts(y0)
    solver = _read_solver(method)
    settings = _Settings.read(options, solver)
    grid = _Grid.read(t, settings.step_size, starts[0].device)
    orders = _read_orders(alpha, starts, single=isinstance(y0, Tensor))
    steps = len(grid.times) - 1
    # Solvers, memories and orders that are the caller's own objects may be others in the next call.
    named = isinstance(method, str) and not isinstance(memory, Memory)
    operators = [
        (_kept_operator if named and not isinstance(order, FractionalOrder) else _new_operator)(
            order, solver, _memory(memory, steps), grid.step
        )
        for order in orders
    ]
    parts = [_Part(operator, start, steps) for operator, start in zip(operators, starts, strict=True)]
    evaluate = _right_hand_side(func, isinstance(y0, Tensor), recompute)
    times = grid.times.unbind()
    if not isinstance(solver, CorrectorSolver):
        states = _explicit(evaluate, times, parts)
    elif solver.predictor is not None:
        states = _predicted_and_corrected(evaluate, times, parts)
    else:
        again = _right_hand_side(func, isinstance(y0, Tensor), recompute=False)
        states = _implicit(evaluate, times, parts, _FixedPoint(solver.name, again, settings, grid.step))
    found = grid.select(starts, states)
    return found[0] if isinstance(y0, Tensor) else tuple(found)


# -- the schemes ----------------------------------------------------------------------------------

Evaluate = Callable[[Tensor, Sequence[Tensor]], list[Tensor]]


def _explicit(evaluate: Evaluate, times: Sequence[Tensor], parts: Sequence[_Part]) -> Iterator[list[Tensor]]:
    """``y_k = y_{k-1} + g f(t_{k-1}, y_{k-1}) - sum W_m u_{k-m}``, k = 1, 2, ..."""
    ys, recalled = _beginning(parts)
    for k in range(1, len(times)):
        ys = _explicit_step(parts, ys, evaluate(times[k - 1], ys), recalled)
        yield ys
        recalled = _recalled(parts, ys, k + 1 < len(times))


def _predicted_and_corrected(
    evaluate: Evaluate, times: Sequence[Tensor], parts: Sequence[_Part]
) -> Iterator[list[Tensor]]:
    """``y_k = y_0 + c (f(t_k, p_k) + s_k f_0) - sum w_m u_{k-m}`` with p_k the explicit step."""
    ys, recalled = _beginning(parts)
    rates = start_rates = evaluate(times[0], ys)
    for k in range(1, len(times)):
        predicted = _explicit_step(parts, ys, rates, recalled)
        ys = _corrected(parts, _known(parts, k, start_rates, recalled), evaluate(times[k], predicted))
        yield ys
        if k + 1 < len(times):
            rates = evaluate(times[k], ys)
        recalled = _recalled(parts, ys, k + 1 < len(times))


def _implicit(
    evaluate: Evaluate, times: Sequence[Tensor], parts: Sequence[_Part], solve: _FixedPoint
) -> Iterator[list[Tensor]]:
    """The same with p_k = y_k."""
    ys, recalled = _beginning(parts)
    start_rates = evaluate(times[0], ys)
    for k in range(1, len(times)):
        ys = solve(evaluate, k, times[k], _known(parts, k, start_rates, recalled), parts, ys)
        yield ys
        recalled = _recalled(parts, ys, k + 1 < len(times))


def _explicit_step(
    parts: Sequence[_Part], ys: Sequence[Tensor], rates: Sequence[Tensor], recalled: Sequence[Recalled]
) -> list[Tensor]:
    """``y_{k-1} + g f_{k-1} - sum W_m u_{k-m}``"""
    return [
        y + part.gain * rate + memory[0]
        for part, y, rate, memory in zip(parts, ys, rates, recalled, strict=True)
    ]


def _known(
    parts: Sequence[_Part], k: int, start_rates: Sequence[Tensor], recalled: Sequence[Recalled]
) -> list[Tensor]:
    """``y_0 + c s_k f_0 - sum w_m u_{k-m}``: of step k of a corrector all but the newest rate."""
    known = []
    for part, rate, memory in zip(parts, start_rates, recalled, strict=True):
        so_far = part.start + memory[-1]
        known.append(so_far + part.start_factors[k - 1] * rate if k <= len(part.start_factors) else so_far)
    return known


def _corrected(parts: Sequence[_Part], known: Sequence[Tensor], rates: Sequence[Tensor]) -> list[Tensor]:
    """``known + c f_k``"""
    return [rest + part.corrector_gain * rate for part, rest, rate in zip(parts, known, rates, strict=True)]


def _beginning(parts: Sequence[_Part]) -> tuple[list[Tensor], list[Recalled]]:
    return [part.start for part in parts], [next(part.recall) for part in parts]


def _recalled(parts: Sequence[_Part], ys: Sequence[Tensor], more: bool) -> list[Recalled]:
    """What the next step recalls, if there is one."""
    return [part.recall.send(y) for part, y in zip(parts, ys, strict=True)] if more else []


class _Part:
    """One tensor of the state: its order's numbers and its memory.

    Args:
        operator: order, solver, memory, step size.
        start: ``y_0 [*shape]``.
        steps: of the whole run.
    """

    def __init__(self, operator: FractionalOperator, start: Tensor, steps: int) -> None:
        self.start = start
        self.channel_dim = check_channels(operator, start.shape)
        kernel = operator.kernel(max(steps - 1, 0), start)
        operator.warn_beyond_horizon(steps)
        self.gain = self.corrector_gain = self._spread(kernel.gain)
        self.start_factors: tuple[Tensor, ...] = ()
        kernels = [kernel]
        solver, limit = operator.solver, operator.memory.limit
        if isinstance(solver, CorrectorSolver):
            if kernel.corrector_gain is None or kernel.corrector_weights is None:
                raise OptionError(f"solver {solver.name!r} gave no corrector weights.")
            self.corrector_gain = self._spread(kernel.corrector_gain)
            # A window that has slid past the start has forgotten its rate as well.
            counts = min(steps, limit + 1) if limit else steps
            self.start_factors = self._start_factors(kernel.corrector_gain, kernel.start_weights, counts)
            corrector = Kernel(kernel.corrector_gain, kernel.corrector_weights, source=Source())
            kernels = [corrector] if solver.predictor is None else [kernel, corrector]
        if operator.order.is_one and isinstance(solver, ExplicitSolver):
            self.recall = recall_nothing(start)
        elif limit:
            self.recall = recall_window(kernels, limit, start, self.channel_dim)
        else:
            self.recall = recall_by_blocks(kernels, operator.reach(), start, steps, self.channel_dim)

    def _spread(self, numbers: Tensor) -> Tensor:
        return per_neuron(numbers, self.start.shape, self.channel_dim)

    def _start_factors(self, gain: Tensor, weights: Tensor | None, steps: int) -> tuple[Tensor, ...]:
        """``c s_k`` of the first steps."""
        factors = () if weights is None else (gain * weights[:steps]).unbind()
        return tuple(self._spread(each) for each in factors)


# -- the implicit step ----------------------------------------------------------------------------

Iteration = Callable[[Sequence[Tensor]], list[Tensor]]


class _FixedPoint:
    """Solves ``y = known + c f(t, y)`` for a coupled f, and its adjoint ``w = grad + c (df/dy)^T w``.

    Args:
        name: of the solver, for messages.
        again: the right-hand side as backward evaluates it.
        settings: how long to iterate, and to what.
        step_size: for messages.
    """

    def __init__(self, name: str, again: Evaluate, settings: _Settings, step_size: float) -> None:
        self.name, self.again, self.step_size = name, again, step_size
        self.max_iterations, self.tolerance = settings.max_iterations, settings.tolerance

    def __call__(
        self, evaluate: Evaluate, k: int, t: Tensor, known: Sequence[Tensor], parts: Sequence[_Part],
        guess: Sequence[Tensor],
    ) -> list[Tensor]:  # fmt: skip
        def step(ys: Sequence[Tensor]) -> list[Tensor]:
            return _corrected(parts, known, evaluate(t, ys))

        with torch.no_grad():
            found = self._iterate(step, [y.detach() for y in guess], "step", k, t, 1.0)
        if not torch.is_grad_enabled():
            return found
        solved = step(found)
        if not any(y.requires_grad for y in solved):
            return solved
        # One more iteration changes nothing, and carries the gradient of all but y itself.
        gains = [part.corrector_gain.detach() for part in parts]
        return list(_Settled.apply(partial(self._adjoint, k, t, found, gains), *solved))

    def _adjoint(
        self, k: int, t: Tensor, ys: Sequence[Tensor], gains: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> list[Tensor]:
        """What the solution's gradients become behind the implicit function theorem."""
        with torch.enable_grad():
            at = [y.detach().requires_grad_() for y in ys]
            pulled = [gain * rate for gain, rate in zip(gains, self.again(t, at), strict=True)]

        def step(ws: Sequence[Tensor]) -> list[Tensor]:
            pairs = [(p, w) for p, w in zip(pulled, ws, strict=True) if p.requires_grad]
            if not pairs:
                return list(grads)
            outputs, cotangents = zip(*pairs, strict=True)
            back = torch.autograd.grad(outputs, at, cotangents, retain_graph=True, allow_unused=True)
            return [g if b is None else g + b for g, b in zip(grads, back, strict=True)]

        return self._iterate(step, list(grads), "the adjoint of step", k, t, 0.0)

    def _iterate(
        self, step: Iteration, at: list[Tensor], what: str, k: int, t: Tensor, unit: float
    ) -> list[Tensor]:
        """Until no number changes by more than the tolerance, relative to ``unit`` and the largest one."""
        tolerance = self.tolerance or 64.0 * max(torch.finfo(each.dtype).eps for each in at)
        change, count = math.inf, 0
        while count < self.max_iterations and not math.isnan(change):
            moved = step(at)
            change = _largest(new - old for new, old in zip(moved, at, strict=True))
            at, count = moved, count + 1
            if change <= tolerance * (unit + _largest(at)):
                return at
        raise StateError(
            f"method {self.name!r}: {what} {k} (t = {float(t):g}, step size {self.step_size:g}) is unsolved "
            f"after {count} fixed-point iterations, of which the last changed a number by {change:.1e}. They "
            'converge for small steps: pass a smaller options={"step_size": ...}, more "max_iterations", a '
            'larger "tolerance", or method="abm", which solves nothing.'
        )


def _largest(tensors: Iterable[Tensor]) -> float:
    """The largest absolute value; nan if there is one."""
    values = [float(each.detach().abs().max()) for each in tensors]
    return math.nan if any(map(math.isnan, values)) else max(values)


class _Settled(torch.autograd.Function):
    """The identity; backward applies the adjoint of the implicit step."""

    @staticmethod
    def forward(ctx: Any, adjoint: Iteration, *solved: Tensor) -> Any:
        ctx.adjoint = adjoint
        return tuple(y.detach() for y in solved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, *ctx.adjoint(grads)


# -- the right-hand side --------------------------------------------------------------------------


def _right_hand_side(func: Func, single: bool, recompute: bool) -> Evaluate:
    """``func`` of t and the tensors of a state, checked; with ``recompute`` its activations are not kept."""

    def call(t: Tensor, y: Any) -> Any:
        if recompute and torch.is_grad_enabled():
            return checkpoint(func, t, y, use_reentrant=False)
        return func(t, y)

    def of_tensor(t: Tensor, ys: Sequence[Tensor]) -> list[Tensor]:
        return [_fitting(call(t, ys[0]), ys[0])]

    def of_tuple(t: Tensor, ys: Sequence[Tensor]) -> list[Tensor]:
        rates = call(t, tuple(ys))
        if not isinstance(rates, (list, tuple)) or len(rates) != len(ys):
            raise OptionTypeError(
                f"func must return a tuple of {len(ys)} tensors, like y0, got {_kind(rates)}; return one "
                "rate for each member of y."
            )
        return [_fitting(rate, like) for rate, like in zip(rates, ys, strict=True)]

    return of_tensor if single else of_tuple


def _fitting(rate: Any, like: Tensor) -> Tensor:
    """The rate, which must fit the state; in its dtype, if autocast made it another."""
    if isinstance(rate, Tensor) and rate.shape == like.shape and rate.dtype == like.dtype:
        return rate
    if not isinstance(rate, Tensor):
        raise OptionTypeError(f"func must return a tensor for each tensor of y, got {_kind(rate)}.")
    if rate.shape != like.shape:
        raise OptionError(
            f"func returned shape {tuple(rate.shape)} for a y of shape {tuple(like.shape)}; the rate of "
            "each entry of y is wanted, in its place: reshape or expand the result."
        )
    if torch.is_autocast_enabled(like.device.type) and rate.is_floating_point():
        return rate.to(like.dtype)
    raise OptionError(
        f"func returned {rate.dtype} for a y of {like.dtype}; give func's constants and parameters the dtype "
        "of y0, or return rate.to(y.dtype)."
    )


def _kind(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return "a tensor" if isinstance(value, Tensor) else type(value).__name__


# -- what is asked for ----------------------------------------------------------------------------

_OPTIONS = ("max_iterations", "step_size", "tolerance")


class _Settings(NamedTuple):
    """``options``, checked."""

    step_size: float | None = None
    max_iterations: int = 200
    tolerance: float | None = None

    @classmethod
    def read(cls, options: dict[str, Any] | None, solver: Solver) -> _Settings:
        if options is None:
            return cls()
        if not isinstance(options, dict):
            raise OptionTypeError(f'options must be a dict, e.g. {{"step_size": 0.1}}, got {_kind(options)}.')
        iterates = isinstance(solver, CorrectorSolver) and solver.predictor is None
        for key, value in options.items():
            if key not in _OPTIONS:
                raise OptionError(f"unknown option {key!r}; {nearest(str(key), _OPTIONS)}")
            number = isinstance(value, int) or (isinstance(value, float) and key != "max_iterations")
            if not number or isinstance(value, bool):
                kind = "an int" if key == "max_iterations" else "a number"
                raise OptionTypeError(f"the option {key!r} must be {kind}, got {value!r}.")
            if not is_finite(value) or value <= 0:
                raise OptionError(f"the option {key!r} must be finite and positive, got {value}.")
            if key != "step_size" and not iterates:
                raise OptionError(
                    f"the option {key!r} is for implicit methods (trap); {solver.name!r} iterates nothing: "
                    "leave it out."
                )
        return cls(**options)


def _read_starts(y0: Any) -> tuple[Tensor, ...]:
    """The tensors of the start."""
    if not isinstance(y0, (Tensor, tuple)):
        raise OptionTypeError(
            f"y0 must be a tensor or a tuple of tensors, got {_kind(y0)}; pass e.g. torch.tensor([1.0])."
        )
    starts = (y0,) if isinstance(y0, Tensor) else y0
    if not starts:
        raise OptionError("y0 is an empty tuple; give at least one tensor.")
    for n, start in enumerate(starts):
        what = "y0" if isinstance(y0, Tensor) else f"y0[{n}]"
        if not isinstance(start, Tensor):
            raise OptionTypeError(f"{what} must be a tensor, got {type(start).__name__}.")
        if start.dtype not in (torch.float32, torch.float64):
            raise OptionTypeError(
                f"{what} must be float32 or float64, got {start.dtype}; pass {what}.to(torch.float32)."
            )
        if not is_readable(start):
            raise OptionTypeError(f"{what} must hold numbers, got a {_unreadable(start)} tensor.")
        if not start.numel():
            raise OptionError(f"{what} has no entries (shape {tuple(start.shape)}); give at least one.")
        if not bool(torch.isfinite(start).all()):
            raise OptionError(f"{what} must be finite, but holds inf or nan.")
    return tuple(starts)


def _unreadable(t: Tensor) -> str:
    return "meta" if t.is_meta else "sparse"


def _read_solver(method: Any) -> Solver:
    if isinstance(method, Solver):
        return method
    if not isinstance(method, str):
        raise OptionTypeError(
            f'method must be the name of a solver, e.g. "gl", or a Solver, got {_kind(method)}.'
        )
    return get_solver(method)


def _memory(spec: str | int | Memory | None, steps: int) -> Memory:
    """The memory for a run whose length is known."""
    if spec is None or (isinstance(spec, int) and spec == -1):
        return FullMemory()
    memory = as_memory(spec)
    if isinstance(memory, WindowMemory) and memory.length >= steps:
        return FullMemory()
    if isinstance(spec, str) and isinstance(memory, SumOfExponentials):
        kind = AutoMemory if isinstance(memory, AutoMemory) else SumOfExponentials
        return kind(horizon=max(memory.horizon, steps))
    return memory


class _TensorOrder(FractionalOrder):
    """Learned order(s) in a tensor of the user's: its graph leads on to wherever they come from."""

    def __init__(self, alpha: Tensor) -> None:
        values = alpha.detach()
        super().__init__(PerChannel(values, dim=-1) if alpha.dim() else float(values))
        self._given = alpha

    @property
    def fixed(self) -> bool:
        return False

    @property
    def is_one(self) -> bool:
        return False

    def alphas(self, device: torch.device | None = None) -> Tensor:
        return self._given.to(device=device, dtype=torch.float64)


#: The order of one tensor: numbers that stay, or a module that holds what is learned.
Order = float | PerChannel | MultiTerm | FractionalOrder


def _new_operator(order: Order, solver: Solver, memory: Memory, step: float) -> FractionalOperator:
    order = order if isinstance(order, FractionalOrder) else FractionalOrder(order)
    # Several terms are the gl scheme summed up: "gl" means the solver that does that.
    several = order.multi_term and solver.name == "gl"
    return FractionalOperator(order, get_solver("glmulti") if several else solver, memory, step)


#: The operators of fixed orders, whose weights the next solve finds again.
_kept_operator = lru_cache(maxsize=16)(_new_operator)


def _read_orders(alpha: Any, starts: Sequence[Tensor], single: bool) -> list[Order]:
    """The order of each tensor of the start."""
    if is_lazy(alpha):
        raise OptionTypeError("alpha is a parameter that is not initialised; give it numbers first.")
    several = isinstance(alpha, (list, tuple)) or (isinstance(alpha, Tensor) and alpha.dim() == 1)
    if not several or (single and isinstance(alpha, Tensor) and alpha.numel() == 1):
        return [_read_order(alpha, "alpha")] * len(starts)
    if not single:
        if len(alpha) != len(starts):
            raise OrderError(
                f"alpha has {counted(len(alpha), 'order')}, y0 has {counted(len(starts), 'tensor')}; give "
                "one order for each, or one number for all."
            )
        return [_read_order(each, f"alpha[{n}]") for n, each in enumerate(alpha)]
    if not isinstance(alpha, Tensor):
        raise OptionTypeError(
            f"alpha is {_kind(alpha)}, but y0 is one tensor; for one order for each entry of its last "
            "dimension pass torch.tensor([...]), for another dimension PerChannel([...], dim=...), for "
            "several terms MultiTerm([...], [...])."
        )
    last = starts[0].shape[-1] if starts[0].dim() else None
    if last != len(alpha):
        raise OrderError(
            f"alpha has {counted(len(alpha), 'order')}, but y0 has shape {tuple(starts[0].shape)}; give one "
            "for each entry of its last dimension, or PerChannel([...], dim=...) for another one."
        )
    return [_TensorOrder(alpha) if alpha.requires_grad else PerChannel(alpha, dim=-1)]


def _read_order(alpha: Any, what: str) -> Order:
    if isinstance(alpha, MultiTerm) and alpha.learn_coefficients:
        raise OptionError(
            f"{what}: the coefficients to be learned would be out of reach; make the order once, "
            "order = FractionalOrder(MultiTerm(..., learn_coefficients=True)), pass it as alpha, and give "
            "order.parameters() to the optimiser."
        )
    if isinstance(alpha, (PerChannel, MultiTerm)) and (alpha.parameter is not None or not alpha.sized):
        return FractionalOrder(alpha)  # holds what is learned, or is sized by this very run
    if isinstance(alpha, (FractionalOrder, PerChannel, MultiTerm)):
        return alpha
    value = check_alpha(alpha, what)
    return _TensorOrder(alpha.reshape(())) if isinstance(alpha, Tensor) and alpha.requires_grad else value


#: Times may lie off an even grid by this share of a step,
_UNEVEN = 1e-6
#: and by this share of the largest one, a few roundings of float32, in which they may once have been.
_BLUR = 1e-6


class _Grid(NamedTuple):
    """The steps of a run, and where among them the times lie that are asked for.

    Attributes:
        times: the grid ``[steps + 1]``, in the dtype of t.
        step: its step size.
        at: for each time that is asked for, the number of the grid point before it and how far it lies
            towards the next one, in [0, 1).
    """

    times: Tensor
    step: float
    at: list[tuple[int, float]]

    @classmethod
    def read(cls, t: Any, step_size: float | None, device: torch.device) -> _Grid:
        """The grid for the times t.

        Raises:
            OptionError, OptionTypeError: see :func:`fdeint`.
        """
        points = _read_times(t)
        if len(points) == 1:
            return cls(t.to(device), step_size or 1.0, [(0, 0.0)])
        gaps = points.diff()
        if not bool((gaps > 0).all()):
            n = int((gaps <= 0).nonzero()[0])
            raise OptionError(
                f"t must increase strictly, but t[{n}] = {points[n]:g} is followed by t[{n + 1}] = "
                f"{points[n + 1]:g}; a fractional derivative remembers in one direction only: sort t."
            )
        even = float((points[-1] - points[0]) / (len(points) - 1))
        step = even if step_size is None else float(step_size)
        largest = float(points.abs().max())
        if 8.0 * torch.finfo(t.dtype).eps * largest > 0.1 * step:
            raise OptionError(
                f"t is of {t.dtype}, which cannot tell steps of {step:g} apart at t = {points[-1]:g}; "
                "pass t.double(), or count t from 0."
            )
        slack = _UNEVEN * step + min(_BLUR * largest, 0.1 * step)
        if step_size is None:
            if float((gaps - even).abs().max()) > slack:
                raise OptionError(
                    f"t is not evenly spaced: its steps lie between {gaps.min():g} and {gaps.max():g}, but "
                    f'the memory needs equal ones; pass e.g. options={{"step_size": {gaps.min():.3g}}} to go '
                    "in such steps and interpolate at t."
                )
            return cls(t.detach().to(device), even, [(k, 0.0) for k in range(len(points))])
        return cls(*_walk(points, step, slack / step, t.to(device)), _positions(points, step, slack / step))

    def select(self, starts: Sequence[Tensor], states: Iterator[list[Tensor]]) -> list[Tensor]:
        """The solution at the times asked for, by linear interpolation; ``[T, *shape]`` of each tensor."""
        wanted = {k for k, _ in self.at} | {k + 1 for k, share in self.at if share}
        kept: dict[int, Sequence[Tensor]] = {0: starts}
        for k, ys in enumerate(states if len(self.times) > 1 else (), 1):
            if k in wanted:
                kept[k] = ys
        return [
            torch.stack(
                [
                    kept[k][n] + share * (kept[k + 1][n] - kept[k][n]) if share else kept[k][n]
                    for k, share in self.at
                ]
            )
            for n in range(len(starts))
        ]


def _read_times(t: Any) -> Tensor:
    """The times in float64, to reckon with."""
    if not isinstance(t, Tensor) or not t.is_floating_point():
        got = str(t.dtype) if isinstance(t, Tensor) else type(t).__name__
        raise OptionTypeError(
            f"t must be a tensor of floating-point times, got {got}; pass e.g. torch.linspace(0.0, 1.0, 101)."
        )
    if not is_readable(t):
        raise OptionTypeError(f"t must hold numbers, got a {_unreadable(t)} tensor.")
    if t.dim() != 1 or not len(t):
        raise OptionError(f"t must be one-dimensional with at least one time, got shape {tuple(t.shape)}.")
    if t.requires_grad:
        raise OptionError("t requires a gradient, which is not supported; pass t.detach().")
    if not bool(torch.isfinite(t).all()):
        raise OptionError("t must be finite, but holds inf or nan.")
    return t.detach().to(device="cpu", dtype=torch.float64)


def _positions(points: Tensor, step: float, slack: float) -> list[tuple[int, float]]:
    """Where the times lie, in steps; those within ``slack`` of a grid point lie on it."""
    at = (points - points[0]) / step
    at = torch.where((at - at.round()).abs() <= slack, at.round(), at)
    return [(int(low), float(share)) for low, share in zip(at.floor(), at - at.floor(), strict=True)]


def _walk(points: Tensor, step: float, slack: float, like: Tensor) -> tuple[Tensor, float]:
    """The grid from the first time on, until it reaches the last one."""
    steps = math.ceil(float((points[-1] - points[0]) / step) - slack)
    grid = points[0] + step * torch.arange(max(steps, 1) + 1, dtype=torch.float64)
    return grid.to(like), step
