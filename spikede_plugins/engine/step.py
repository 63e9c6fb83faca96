"""One time step of any neuron with any solver: the definition that the scan engine must reproduce.

    v_k = charge(v) + (gain - 1) (charge(v) - v) - sum_{m>=1} (w_m + [m=1]) u_{k-m},    v = v_{k-1}

At alpha = 1 gain is 1 and every weight in the sum vanishes: the native value, to the last bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from spikede_plugins.checks import counted
from spikede_plugins.engine import cpu
from spikede_plugins.engine.block_steps import Taken, begin_block, known_in_block, take_step
from spikede_plugins.engine.blocks import Block, blocks, fold
from spikede_plugins.engine.fire_steps import DelayedReset, Fired, fire_step
from spikede_plugins.engine.history import (
    HistoryLog,
    OpenBlock,
    append,
    combine,
    joined,
    per_neuron,
    remember,
    remembered,
)
from spikede_plugins.engine.operator import FractionalOperator, Kernel
from spikede_plugins.errors import ExportError, OptionError, SpikedeWarning
from spikede_plugins.exponentials import BLOCK
from spikede_plugins.exporting import is_exporting
from spikede_plugins.memory import WindowMemory
from spikede_plugins.solvers.base import CorrectorSolver

if TYPE_CHECKING:
    from spikede_plugins.engine.rolling import RollingOperator, RollingStep

_NEWTON_STEPS = 30
_UNSOLVED = (
    "an implicit step has no solution for some neurons: their potential leaves through infinity within it "
    "(QIF, EIF, Izhikevich), or their rate jumps where they fire (SNNWrapper's neurons). They take the rate "
    "at the potential before. A smaller step_size makes that rarer; method='abm' or 'pred' needs none."
)


class History(NamedTuple):
    """The past of a neuron layer; all None before the first step after a reset.

    Attributes:
        rows: deviations ``u = v - start`` of the steps before the newest one, ``[r, *shape]``. The newest
            deviation is not among them: it is ``v - start`` of the potential the framework carries, so a
            potential changed from outside (a reset, a user's hand) is remembered as it is.
        start: the potential the run started from, ``[*shape]``. Solvers with a corrector keep the rate at the
            start behind it, and ``memory_reset="spike"`` the number of steps since each neuron's own start
            (-1 right after its spike), stacked as ``[2 or 3, *shape]``.
        traces: what a compressed memory has folded of the rows before, ``[P, *shape]``; None until it does.
    """

    rows: Tensor | None = None
    start: Tensor | None = None
    traces: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> History:
        """The history with every tensor in it changed (moved, detached, ...)."""
        return History(*(None if t is None else change(t) for t in self))


FRESH = History()


def state_dtype(x: Tensor) -> torch.dtype:
    """The dtype potentials and histories are kept in: float32 at least, also under autocast."""
    return torch.promote_types(x.dtype, torch.float32)


def _start(v: Tensor) -> Tensor:
    """The potential a run starts from; zeros, the usual case, as one number that takes no memory to read."""
    if v.device.type != "cpu" or v.dim() == 0 or v.requires_grad or torch.compiler.is_compiling():
        return v
    return v if v.any() else v.new_zeros(()).expand(v.shape)


def check_channels(operator: FractionalOperator, shape: torch.Size) -> int | None:
    """The channel dimension of a time step ``shape``, or None for one order.

    Raises:
        OptionError: if the dimension does not exist or its size is not the number of orders.
    """
    dim = operator.order.channel_dim
    if dim is None:
        return None
    if -len(shape) <= dim < len(shape) and not operator.order.sized:
        operator.order.size(shape[dim])
    count = operator.order.count
    if not -len(shape) <= dim < len(shape) or shape[dim] != count:
        raise OptionError(
            operator.at(
                f"PerChannel has {counted(count, 'order')} for dimension {dim}, but one time step has shape "
                f"{tuple(shape)}; give one order for each channel, or another dim=."
            )
        )
    return dim % len(shape)


class Step:
    """One time step whose history sum is formed and whose charge is still to come.

    Most neurons take :func:`charge_step`. This is for those whose framework evaluates its charge more than
    once a step, or starts it from a potential that it has changed itself: the sum is formed only once.

    Args:
        operator: order, solver, memory, step size.
        v: the membrane potential ``[*shape]`` that the framework carries into the step.
        history: what came before; ``FRESH`` makes ``v`` the start.
        log: the buffer that history rows live in.
        several: whether :meth:`charge` may be called more than once.

    Raises:
        OptionError: if per-channel orders do not fit the shape.
    """

    def __init__(
        self, operator: FractionalOperator, v: Tensor, history: History, log: HistoryLog, *,
        several: bool = False,
    ) -> None:  # fmt: skip
        self.operator, self.v, self.several = operator, v, several
        self.block: OpenBlock | None = None
        self.channel_dim = check_channels(operator, v.shape)
        self.corrector = isinstance(operator.solver, CorrectorSolver)
        rows, self.start, self.traces = history
        # Neurons with a start of their own: rows that began anew (engine.rows) are stacked behind the rate.
        stacked = self.start is not None and self.start.dim() > v.dim()
        counted = self.start is not None and stacked and self.start.shape[0] == 2 + self.corrector
        self.forgets = operator.memory_reset == "spike" or counted
        self.past = 0 if rows is None else rows.shape[0] + 1
        self.kernel = operator.kernel(self.past, v, self.traces is not None, self.past)
        self.sums: tuple[Tensor, ...] | None = None
        if not torch.compiler.is_compiling():
            operator.warn_beyond_horizon(log.advance(rows, 1, self.traces is not None))
        if rows is None or self.start is None:
            self.start = None
            self.rows = v.detach().new_empty((0, *v.shape))
            return
        block = next(blocks(self.past, 1, operator.reach(), self.traces is not None))
        if operator.steps_in_blocks and not torch.compiler.is_compiling():
            self.block = self._open_block(rows, block, log)
            return
        self._whole_sum(rows, v - (self.start if self.start.dim() == v.dim() else self.start[0]), block, log)
        if not torch.compiler.is_compiling():
            log.hand_on(self.rows)

    def _whole_sum(self, rows: Tensor, u: Tensor, block: Block, log: HistoryLog) -> None:
        """The sum over all rows at every step: windows, correctors, forgetful neurons, captured graphs."""
        kernel = self.kernel
        weights = kernel.weights.unsqueeze(0)
        if kernel.corrector_weights is not None:
            weights = torch.stack([kernel.weights, kernel.corrector_weights])
        age = None
        if self.forgets and self.start is not None:
            age = self.start[-1].detach() + 1.0
            self.start = torch.cat([self.start[:-1], age.unsqueeze(0)])
        lags = self.operator.memory.limit or self.past
        self.rows, sums = remember(rows, u, weights, lags, self.channel_dim, log, age)
        if block.folds:
            traces = None if self.traces is None else self._known(self.traces, age, self.past)
            self.traces = fold(kernel, remembered(self.rows, age)[: block.low], traces, block.folds)
            self.rows = self.rows[block.low :]
            direct = weights[:, : block.before].flip(1)
            sums = combine(direct, remembered(self.rows, age), self.channel_dim)
        if self.traces is not None and kernel.readout is not None:
            read = combine(kernel.readout[block.place : block.place + 1], self.traces, self.channel_dim)
            sums = sums + self._known(read, age, self.rows.shape[0])
        self.sums = tuple(sums.unbind(0))

    @staticmethod
    def _known(values: Tensor, age: Tensor | None, rows: int) -> Tensor:
        """What traces give, blanked where a neuron's own start lies among the rows behind them."""
        return values if age is None else values * (age > rows)

    def _open_block(self, rows: Tensor, block: Block, log: HistoryLog) -> OpenBlock:
        """The block that this step is in, with its sums over what is older, which are formed once a block."""
        kernel, reach = self.kernel, self.operator.reach()
        self.log, self.place, self.rows = log, block.place, rows
        if block.place == 0:
            u = self.v if self.start is None else self.v - self.start
            whole = joined(append(rows, u, log), rows, u.unsqueeze(0))
            begun = begin_block(kernel, whole, self.traces, block, reach, self.channel_dim)
            self.rows, self.traces = begun.rows, begun.traces
            inside = begun.rows.detach().new_empty((0, *u.shape))
            return OpenBlock(begun.rows, inside, begun.minus, kernel.source)
        found = log.opened(rows, kernel.source, kernel.weights.requires_grad)
        if found is None:  # a state that comes from elsewhere: form the sums of its block anew
            split = block.before
            begun = begin_block(kernel, rows[:split], self.traces, block, reach, self.channel_dim)
            inside = rows[split:]
            minus = known_in_block(kernel, begun.minus, inside, self.channel_dim)
            found = OpenBlock(rows[:split], inside, minus, kernel.source, block.place)
        return found

    def _take(self, charged: Tensor, origin: Tensor | None, start: Tensor, block: OpenBlock) -> Tensor:
        """The charged potential of a step in an open block, which then ends with this step."""
        taken = take_step(
            self.kernel, self.place, self.place == block.first, charged, self.v, origin, start, self.rows,
            block.before, block.inside, block.minus, self.log, self.channel_dim, keep_sum=self.several,
        )  # fmt: skip
        self._close(block, taken)
        if taken.sum is not None:
            self.sums = (-taken.sum,)
        return taken.charged

    def _close(self, block: OpenBlock, taken: Taken | Fired) -> None:
        self.rows = taken.rows
        self.log.keep_open(self.rows, block._replace(inside=taken.inside, minus=taken.minus))
        self.log.hand_on(self.rows)
        self.block = None

    @property
    def fires(self) -> bool:
        """Whether :meth:`fire` can take this step."""
        v, start = self.v, self.v if self.start is None else self.start
        return (
            self.operator.steps_in_blocks
            and not (start.requires_grad and torch.is_grad_enabled())
            and cpu.serves_steps(v.shape, v, self.kernel, self.channel_dim)
        )

    def fire(self, code: DelayedReset, x: Tensor, leak: Tensor) -> tuple[Tensor, Tensor, History]:
        """The whole step of a leaky neuron with a delayed reset, charge and firing: one fused kernel.

        Args:
            code: the neuron (``engine.fire_steps``).
            x: input ``[*shape]``.
            leak: what of the potential is left after a step, one number.

        Returns:
            Spikes, the potential carried on, and the history for the next step.
        """
        block, start = self.block, self.start
        if block is None or start is None:  # the first step of a run
            start = _start(self.v)
            minus = self.v.new_zeros(()).expand(BLOCK, *self.v.shape)
            fired = fire_step(
                self.kernel, code, 0, True, x, self.v, start, self.rows, self.rows, self.rows, minus, leak,
                HistoryLog(), self.channel_dim,
            )  # fmt: skip
        else:
            fired = fire_step(
                self.kernel, code, self.place, self.place == block.first, x, self.v, start, self.rows,
                block.before, block.inside, block.minus, leak, self.log, self.channel_dim,
            )  # fmt: skip
            self._close(block, fired)
        return fired.spikes, fired.v, History(self.rows, start, self.traces)

    def charge(
        self, charge: Callable[[Tensor], Tensor], base: Tensor | None = None, *, affine: bool = False
    ) -> tuple[Tensor, History]:
        """The charged potential ``[*shape]`` and the history for the next step.

        Args:
            charge: the native charge ``v -> v'`` of this step, its input already bound.
            base: the potential that the charge starts from, where it is not ``v`` itself; what lies between
                them is an impulse at this step.
            affine: whether ``charge`` is affine in v (implicit solvers then need no iteration).
        """
        operator, kernel = self.operator, self.kernel
        v = self.v if base is None else base
        charged = charge(v)
        start = self.start
        if start is None:
            extra = [charged - v] * self.corrector + [torch.zeros_like(v)] * self.forgets
            start = torch.stack([self.v, *extra]) if extra else _start(self.v)
        elif self.corrector and self.forgets:  # the rate at the start of neurons that have just begun anew
            rate = torch.where(start[2] == 0, charged - v, start[1])
            start = torch.stack([start[0], rate, start[2]])
        if self.block is not None:
            explicit = self._take(charged, base, start, self.block)
            return explicit, History(self.rows, start, self.traces)
        history = History(self.rows, start, self.traces)
        explicit = charged + (self._spread(kernel.gain) - 1.0) * (charged - v)
        if self.sums is not None:
            explicit = explicit - self.sums[0]
        if not self.corrector:
            return explicit, history
        known = start[0] if base is None else start[0] + (base - self.v)
        sought = _correct(
            operator, kernel, charge, v, explicit, known, self._start_weight(start) * start[1], self.sums,
            self._spread, affine,
        )  # fmt: skip
        return sought, history

    def _start_weight(self, start: Tensor) -> Tensor | float:
        """What a corrector with gain 1 gives to the rate at the start ``start[1]``."""
        series, memory = self.kernel.start_weights, self.operator.memory
        if series is None:
            raise OptionError(f"solver {self.operator.solver.name!r} gave no start weights.")
        window = memory.length if isinstance(memory, WindowMemory) else self.past
        if self.forgets:  # every neuron counts from a start of its own
            steps = start[2].detach()
            known = steps.long().clamp(max=len(series) - 1)  # beyond a window there are no weights
            count = series.shape[-1]
            channel = self._spread(torch.arange(count, device=series.device))
            return series.reshape(-1)[known * count + channel] * (steps <= window)
        # A window that has slid past the start has forgotten its rate as well.
        return self._spread(series[self.past]) if self.past <= window else 0.0

    def _spread(self, values: Tensor) -> Tensor:
        return per_neuron(values, self.v.shape, self.channel_dim)


def begin_step(
    operator: FractionalOperator, v: Tensor, history: History, log: HistoryLog, *, several: bool = False
) -> Step | RollingStep:
    """The step of this operator, its history sum formed; arguments as of :class:`Step`."""
    if operator.captures == "step":
        from spikede_plugins.engine import rolling

        return rolling.RollingStep(cast("RollingOperator", operator), v, history)
    return Step(operator, v, history, log, several=several)


def charge_step(
    operator: FractionalOperator,
    charge: Callable[[Tensor], Tensor],
    v: Tensor,
    history: History,
    log: HistoryLog,
    *,
    affine: bool = False,
) -> tuple[Tensor, History]:
    """The fractional charge of one step, before firing.

    Args:
        operator: order, solver, memory, step size.
        charge: the native charge ``v -> v'`` of this step, its input already bound.
        v: the membrane potential ``[*shape]`` that the framework carries into the step.
        history: what came before; ``FRESH`` makes ``v`` the start.
        log: the buffer that history rows live in.
        affine: whether ``charge`` is affine in v (implicit solvers then need no iteration).

    Returns:
        The charged potential ``[*shape]`` and the history for the next step.

    Raises:
        OptionError: if per-channel orders do not fit the shape.
    """
    return begin_step(operator, v, history, log).charge(charge, affine=affine)


def _correct(
    operator: FractionalOperator, kernel: Kernel, charge: Callable[[Tensor], Tensor], v: Tensor,
    predicted: Tensor, known: Tensor, start_part: Tensor, sums: tuple[Tensor, ...] | None,
    spread: Callable[[Tensor], Tensor], affine: bool,
) -> Tensor:
    if kernel.corrector_gain is None:
        raise OptionError(f"solver {operator.solver.name!r} gave no corrector weights.")
    gain = spread(kernel.corrector_gain)
    known = known + gain * start_part
    if sums is not None:
        known = known - sums[1]
    solver = operator.solver
    if isinstance(solver, CorrectorSolver) and solver.predictor is not None:
        return known + gain * (charge(predicted) - predicted)
    return _implicit(charge, known, gain, v, affine)


def _implicit(
    charge: Callable[[Tensor], Tensor], known: Tensor, gain: Tensor, before: Tensor, affine: bool
) -> Tensor:
    """Solve ``v = known + gain (charge(v) - v)``, neuron by neuron.

    Newton's method: one step solves an affine charge, any other takes a bounded number. A last step from the
    solution changes nothing and carries the gradient (implicit function theorem). Where the potential
    leaves through infinity within the step, or the charge jumps over the solution, there is none: those
    neurons take the rate at the potential before, ``v = known + gain (charge(before) - before)``, which is a
    step with slope 1.
    """

    def newton(v: Tensor, solved: Tensor | None = None) -> Tensor:
        with torch.enable_grad():
            at = v.detach().requires_grad_()
            total = charge(at).sum()  # needs no gradient where the charge does not read v
            slope = torch.autograd.grad(total, at, allow_unused=True)[0] if total.requires_grad else None
        slope = torch.zeros_like(v) if slope is None else slope
        slope = slope if solved is None else torch.where(solved, slope, 1.0)
        return v + (known + gain * (charge(v) - v) - v) / (1.0 + gain * (1.0 - slope))

    v = before.detach()
    with torch.no_grad():
        v, solved = (newton(v), None) if affine else _search(newton, v)
    if solved is None:
        return newton(v)
    found = newton(torch.where(solved, v, before), solved)
    if bool((~solved & found.isfinite()).any()):  # neither inf nor nan by its input
        warnings.warn(_UNSOLVED, SpikedeWarning, stacklevel=2)
    return found


def _search(newton: Callable[[Tensor], Tensor], v: Tensor) -> tuple[Tensor, Tensor | None]:
    """Newton's method from ``v``, and where it came to a solution; None if everywhere.

    Raises:
        ExportError: in a captured program, which cannot iterate until its numbers tell it to stop.
    """
    if is_exporting():
        raise ExportError(
            "an implicit solver iterates for neurons that are not affine (QIF, EIF, Izhikevich), which no "
            'captured program can hold; convert with method="gl" or "abm".'
        )
    eps = torch.finfo(v.dtype).eps
    moved = torch.zeros_like(v)
    for _ in range(_NEWTON_STEPS):
        last, v = v, newton(v)
        moved = (v - last).abs() / (1.0 + v.abs())
        if bool((moved <= 4.0 * eps).all()):
            return v, None
    return v, moved <= eps**0.5  # not so where it wanders about, or has met inf or nan


def forget_fired(history: History, v: Tensor, spike: Tensor) -> History:
    """The history after a step in which neurons fired, for ``memory_reset="spike"``.

    Neurons that fired start anew from their reset potential; the others keep their past. The rows stay where
    they are (they may be needed for backward, and copying them at every step would cost T^2 memory): a neuron
    that forgets no longer counts those before its new start.

    Args:
        history: as a step with ``memory_reset="spike"`` returned it.
        v: the potential after reset ``[*shape]``.
        spike: non-zero where a neuron fired.
    """
    rows, start, traces = history
    if rows is None or start is None or start.dim() == v.dim():
        return history
    fired = (spike.detach() != 0).reshape(v.shape)
    first = torch.where(fired, v, start[0]).unsqueeze(0)
    # The next step is the first one from the new start: it has no state behind it and finds its own rate.
    steps = start[-1:].masked_fill(fired, -1.0)
    return History(rows, torch.cat([first, start[1:-1].masked_fill(fired, 0.0), steps]), traces)
