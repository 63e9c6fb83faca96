"""The fractional operator of one neuron layer: order, solver, memory and step size bound together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikede_plugins.checks import is_finite
from spikede_plugins.engine.blocks import Reach
from spikede_plugins.engine.observed import unrecorded
from spikede_plugins.errors import OptionError, OptionTypeError, OrderError, SpikedeWarning, StateError
from spikede_plugins.exponentials import (
    BLOCK,
    EXACT,
    Nodes,
    choose_nodes,
    coefficients,
    error_beyond,
    fit_horizon,
    relative_error,
    sampled_lags,
)
from spikede_plugins.memory import AutoMemory, FullMemory, Memory, SumOfExponentials, WindowMemory
from spikede_plugins.orders import FractionalOrder
from spikede_plugins.settings import SettingsTravel
from spikede_plugins.solvers.answers import ask
from spikede_plugins.solvers.base import CorrectorSolver, ExplicitSolver, Solver
from spikede_plugins.solvers.glmulti import MultiTermGrunwaldLetnikov

MEMORY_RESETS = ("never", "spike")
_CPU = torch.device("cpu")

_NAN = (
    "the learned order has become nan: a loss or a gradient was not finite, and the optimiser wrote "
    "nan into the parameter. Load the last good checkpoint, and look at the gradients before each step with "
    "torch.nn.utils.clip_grad_norm_(..., error_if_nonfinite=True)."
)

#: Orders that the nodes for a learnable order must serve, besides the one it starts from.
_LEARNED_RANGE = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
#: Above this order the weights vanish; errors are then counted relative to those of this one.
_NEARLY_ONE = 0.999


class Source:
    """What tells the numbers of one kernel from those of another; engines keep their form of them here."""

    def __init__(self) -> None:
        self.arrays: dict[Any, Any] = {}


class Kernel(NamedTuple):
    """The numbers a run of n steps needs, in the dtype and on the device of the state.

    Each is shaped to broadcast against a single time step ``[B, C, ...]``: ``S = 1`` for one order,
    ``S = C`` for an order per channel.

    Attributes:
        gain: ``[S]``, the factor of the newest rate.
        weights: ``[n, S]``, ``w_m + [m = 1]`` for m = 1 ... n: the bracket that vanishes at alpha = 1.
        corrector_gain, corrector_weights, start_weights: ``[S]``, ``[n, S]``, ``[n, S]``, the same
            of a solver with a corrector (its weights are the plain ``w_m``); else None.
        readout: ``[BLOCK, P, S]``, what each step of a block takes of the traces of a compressed memory.
        decay: ``[P]``, what a trace keeps over a block.
        inject: ``[P, BLOCK]``, what the rows of a block that is folded add to a trace, oldest first.
        source: the same object for the same numbers, by which sums formed with them are found again.
    """

    gain: Tensor
    weights: Tensor
    corrector_gain: Tensor | None = None
    corrector_weights: Tensor | None = None
    start_weights: Tensor | None = None
    readout: Tensor | None = None
    decay: Tensor | None = None
    inject: Tensor | None = None
    source: Source | None = None


def _as_option(memory: Memory) -> str | int:
    """A memory as one would write it in an option, for checkpoints."""
    if isinstance(memory, WindowMemory):
        return memory.length
    if memory in (AutoMemory(), FullMemory()) or not is_dataclass(memory):
        return memory.describe()
    return repr(memory)


class _Kept(NamedTuple):
    values: tuple[float, ...]
    kernel: Kernel
    tangents: list[list[Kernel]] | None


def _jvp(function: Callable[..., Kernel], at: list[Tensor], index: int, direction: Tensor) -> Kernel:
    """The derivative of a kernel in one direction of one of its numbers, by two reverse passes.

    The first is linear in its cotangent u; differentiating that in u gives the forward derivative.
    """
    with torch.enable_grad():
        inputs = [t.detach().clone().requires_grad_(i == index) for i, t in enumerate(at)]
        fields: list[Tensor | None] = []
        for out in function(*inputs):
            if not isinstance(out, Tensor) or not out.requires_grad:
                fields.append(None)
                continue
            u = torch.zeros_like(out, requires_grad=True)
            (back,) = torch.autograd.grad(out, inputs[index], u, create_graph=True)
            fields.append(torch.autograd.grad(back, u, direction)[0])
    return Kernel(*fields)  # type: ignore[arg-type]


def _block_end(past: int) -> int:
    """One more than the states behind the last step of the block of a step with ``past`` behind it."""
    return past - past % BLOCK + BLOCK


def _bracket(weights: Tensor) -> Tensor:
    """``w_m + [m = 1]``"""
    first = torch.zeros(weights.shape[0], 1, dtype=weights.dtype)
    first[0] = 1.0
    return weights + first


class FractionalOperator(SettingsTravel):
    """``D^alpha``, as one layer of neurons uses it.

    Args:
        order: the order(s).
        solver: gives gain and weights.
        memory: how many past states are summed.
        step_size: h in native steps (1 = the framework's own step).
        memory_reset: ``"never"``, or ``"spike"`` to forget a neuron's history when it fires.
        checkpoint: a scan keeps its state every so many steps and recomputes the others in backward; None to
            keep what backward needs of every step.

    Raises:
        OptionError: for a step size that is not finite and positive, an unknown ``memory_reset``, or
            a solver that cannot integrate several terms; a sum of exponentials for a solver that has no
            such form, or to a tolerance that cannot be reached.
    """

    def __init__(
        self,
        order: FractionalOrder,
        solver: Solver,
        memory: Memory | None = None,
        step_size: float = 1.0,
        memory_reset: str = "never",
        checkpoint: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(step_size, bool) or not isinstance(step_size, (int, float)):
            raise OptionTypeError(f"step_size must be a number, got {type(step_size).__name__}.")
        if not is_finite(step_size) or step_size <= 0:
            raise OptionError(
                f"step_size must be finite and positive, got {step_size}; 1.0 is the native step."
            )
        if not isinstance(memory_reset, str) or memory_reset not in MEMORY_RESETS:
            raise OptionError(f"memory_reset must be one of {MEMORY_RESETS}, got {memory_reset!r}.")
        if order.multi_term and not isinstance(solver, MultiTermGrunwaldLetnikov):
            raise OptionError(
                f"a MultiTerm order needs the solver 'glmulti', got {solver.name!r}; "
                'pass method="gl" or method="glmulti".'
            )
        if not isinstance(solver, (ExplicitSolver, CorrectorSolver)):
            raise OptionTypeError(
                f"solver {getattr(solver, 'name', solver)!r} must derive from ExplicitSolver or "
                "CorrectorSolver (spikede_plugins.solvers)."
            )
        if checkpoint is not None and (isinstance(checkpoint, bool) or not isinstance(checkpoint, int)):
            raise OptionTypeError(f"checkpoint must be a number of steps or None, got {checkpoint!r}.")
        if checkpoint is not None and checkpoint < 1:
            raise OptionError(f"checkpoint must be at least 1 step, got {checkpoint}; None keeps every step.")
        self.order = order
        self.solver = solver
        self.checkpoint = checkpoint
        self.memory = memory if memory is not None else FullMemory()
        self.step_size = float(step_size)
        self.memory_reset = memory_reset
        self._cache: dict[Any, _Kept] = {}
        self._warned = False
        self._nodes = self._choose_nodes()
        self._lags = None if self._nodes is None else sampled_lags(self._nodes.horizon)

    #: The dotted path of the layer in the model that was converted, for messages.
    path: str = ""
    #: What a captured program may take of its neuron: ``"step"`` (the state is an input and an output),
    #: ``"sequence"`` (it begins and ends within the call); empty: a captured state would be a constant.
    captures: str = ""
    #: What a compressed memory is fitted at, as numbers that a captured graph can hold.
    _lags: Tensor | None = None

    def settings(self) -> dict[str, Any]:
        """What a checkpoint tells of this layer beside its numbers, see :class:`SettingsTravel`."""
        return {
            **self.order.settings(),
            "method": self.solver.name,
            "memory": _as_option(self.memory),
            "step_size": self.step_size,
            "memory_reset": self.memory_reset,
        }

    def learned_now(self) -> dict[str, Any]:
        """The orders that are learned, as they are now."""
        return self.order.learned_now()

    def at(self, text: str) -> str:
        """A message with the path of the layer before it, where the layer has one."""
        return f"{self.path}: {text}" if self.path else text

    @property
    def is_native(self) -> bool:
        """Whether this is the integer neuron itself: fixed alpha = 1 at the native step."""
        return self.order.is_one and self.step_size == 1.0

    def kernel(self, past: int, like: Tensor, folded: bool = False, rows: int = 0) -> Kernel:
        """Gain and weights for steps that look back at most ``past`` states, as ``like`` needs them.

        ``rows`` states are at hand when the run begins. With ``folded`` (old states were folded into traces
        before), or where ``past`` is so long that they will be, also the numbers of the traces.

        Numbers are computed once for the orders as they are (float64, on the CPU) and kept, for each power of
        two of steps; with learnable orders so are their derivatives, so that a step costs no more than a sum.
        The same call gives numbers of the same shape, whatever other runs needed in the meantime: a
        checkpoint's repetition must save what its first run saved.
        """
        traced = False
        # To the end of the block that the newest step is in: its sums are formed when it begins.
        needed = max(1, min(past, self.memory.limit)) if self.memory.limit else _block_end(past)
        if isinstance(self.solver, CorrectorSolver):
            needed = past + 1  # the starting weight of the step itself
        elif self._nodes is not None:
            traced = folded or past >= self.memory.fold_at
            # A state made with another memory may hold more rows than this one leaves unfolded.
            needed = min(needed, max(self.memory.fold_at, EXACT + BLOCK, _block_end(rows)) + BLOCK)
        with_graph = torch.is_grad_enabled() and not self.order.fixed
        length = 64
        while length < needed:
            length *= 2
        key = (like.dtype, like.device, self.order.count, length, traced)
        kept = self._cache.get(key)
        if torch.compiler.is_compiling():
            # A compiled graph may reuse its memory (what it computes is not for keeping) and learns alpha
            # through the formulas themselves.
            given = self.order.fixed or bool(self.captures)
            if kept is not None and given:
                return kept.kernel
            return self._compute(needed, like, traced)
        numbers = self._learnable() if not self.order.fixed else []
        if any(t.is_meta for t in numbers):
            return self._shapes_only(needed, like, traced, numbers)
        with torch.no_grad():  # the numbers the kernel depends on, as they are now
            values = tuple(x for t in numbers for x in t.reshape(-1).tolist())
        if kept is None or kept.values != values or (with_graph and kept.tangents is None):
            if any(map(math.isnan, values)):
                raise OrderError(self.at(_NAN))
            # Numbers made in inference mode could not be trained with later.
            with torch.inference_mode(False), torch.no_grad():
                kernel = self._compute(length, like, traced, numbers or None)._replace(source=Source())
            with unrecorded():
                slopes = self._tangents(length, like, traced, numbers) if with_graph else None
            kept = _Kept(values, kernel, slopes)
            if any(other.values != values for other in list(self._cache.values())):
                self._cache = {}  # of orders that are no more
            self._cache[key] = kept
        if not with_graph or kept.tangents is None:
            return kept.kernel
        return self._with_graph(kept.kernel, kept.tangents, numbers)

    def _shapes_only(self, needed: int, like: Tensor, traced: bool, numbers: list[Tensor]) -> Kernel:
        """A kernel for a learned order on the meta device, from a stand-in for the numbers it has not."""
        if not like.is_meta:
            raise StateError(
                self.at(
                    "its learned order is on the meta device, which has no numbers, and its input is on "
                    f"{like.device}; give it numbers with model.to_empty(device=...) and load_state_dict."
                )
            )
        double = torch.float64
        stand_in = [torch.linspace(0.5, 0.9, t.numel(), dtype=double).reshape(t.shape) for t in numbers]
        with torch.no_grad():
            kernel = self._compute(needed, like, traced, stand_in)
        tie = sum(t.sum() for t in numbers).to(like.dtype) * 0.0  # type: ignore[union-attr]
        fields = [field + tie if isinstance(field, Tensor) else field for field in kernel]
        return Kernel(*fields)._replace(source=Source())  # type: ignore[arg-type]

    def _learnable(self) -> list[Tensor]:
        """Orders and coefficients as the solver sees them, float64, with their graph.

        By a call of the order, as a module that is sharded on its own wants it.
        """
        return self.order(_CPU)  # type: ignore[no-any-return]

    def _tangents(self, n: int, like: Tensor, traced: bool, numbers: list[Tensor]) -> list[list[Kernel]]:
        """The derivative of the kernel to each number it depends on: by parameter, then by number.

        One order a channel is one derivative, as every column of the weights has its own order.
        """
        numbers = [t.detach() for t in numbers]
        tangents = []
        for i, number in enumerate(numbers):
            directions = (
                list(torch.eye(number.numel(), dtype=number.dtype))
                if self.order.multi_term
                else [torch.ones_like(number)]
            )
            tangents.append(
                [
                    _jvp(lambda *given: self._compute(n, like, traced, list(given)), numbers, i, direction)
                    for direction in directions
                ]
            )
        return tangents

    def _with_graph(self, kernel: Kernel, tangents: list[list[Kernel]], numbers: list[Tensor]) -> Kernel:
        """The kernel as a function of the parameters: its value, and to first order its change."""
        fields: list[Any] = list(kernel)
        for number, derivatives in zip(numbers, tangents, strict=True):
            change = number - number.detach()  # zero, and the way back to the parameter
            parts = change.reshape(-1).unbind() if self.order.multi_term else [change.reshape(-1)]
            for part, derivative in zip(parts, derivatives, strict=True):
                for i, (field, slope) in enumerate(zip(fields, derivative, strict=True)):
                    if field is not None and isinstance(slope, Tensor):
                        fields[i] = field + slope * part.to(device=field.device, dtype=field.dtype)
        return Kernel(*fields)

    def _compute(self, n: int, like: Tensor, traced: bool, given: list[Tensor] | None = None) -> Kernel:
        numbers = self._learnable() if given is None else given
        alphas = numbers[0]

        def cast(t: Tensor) -> Tensor:
            return t.to(device=like.device, dtype=like.dtype)

        def flat(t: Tensor) -> Tensor:  # one order: give it the trailing dimension of the many
            return t if alphas.dim() and not self.order.multi_term else t.unsqueeze(-1)

        solver = self.solver
        if isinstance(solver, CorrectorSolver):
            corrector = (
                cast(flat(ask(solver, "gain", alphas, self.step_size))),
                cast(flat(ask(solver, "weights", alphas, n))),
                cast(flat(ask(solver, "start_weights", alphas, n))),
            )
            explicit = solver.predictor
            if explicit is None:
                zero = torch.zeros_like(corrector[0])
                return Kernel(zero, torch.zeros_like(corrector[1]), *corrector)
            gain, weights = ask(explicit, "gain", alphas, self.step_size), ask(explicit, "weights", alphas, n)
            return Kernel(cast(flat(gain)), cast(_bracket(flat(weights))), *corrector)
        length = max(n, self._nodes.horizon) if traced and self._nodes is not None else n
        gain, weights = self._gain_and_weights(numbers, length)
        kernel = Kernel(cast(gain), cast(weights[:n]))
        if not traced or self._nodes is None:
            return kernel
        rates = self._nodes.rates
        shape = self._fit_shape(numbers, length)
        fitted = coefficients(weights, shape, rates, self._nodes.horizon, self._lags)
        place = torch.arange(BLOCK, dtype=torch.float64)
        steps = torch.exp(-rates * place.unsqueeze(1))  # [BLOCK, P]: over so many steps
        return kernel._replace(
            readout=cast(steps.unsqueeze(-1) * fitted),
            decay=cast(torch.exp(-rates * BLOCK)),
            inject=cast(steps.flip(0).T),
        )

    def _gain_and_weights(self, numbers: list[Tensor], n: int) -> tuple[Tensor, Tensor]:
        """Gain ``[S]`` and bracket weights ``[n, S]`` of an explicit solver, float64."""
        alphas, solver = numbers[0], self.solver
        if len(numbers) > 1:
            multi = solver if isinstance(solver, MultiTermGrunwaldLetnikov) else MultiTermGrunwaldLetnikov()
            gain, weights = multi.terms(alphas, numbers[1], self.step_size, n)
            return gain.unsqueeze(-1), _bracket(weights.unsqueeze(-1))
        gain, weights = ask(solver, "gain", alphas, self.step_size), ask(solver, "weights", alphas, n)
        if not alphas.dim():
            gain, weights = gain.unsqueeze(-1), weights.unsqueeze(-1)
        return gain, _bracket(weights)

    def check_solver(self) -> None:
        """Ask the solver once for what a short run needs, so that a broken one is known before any run.

        Raises:
            PluginError: if its numbers cannot be used.
        """
        if not self.is_native:
            with torch.enable_grad():
                self._compute(128, torch.empty(0, dtype=torch.float64), False)

    @property
    def steps_in_blocks(self) -> bool:
        """Whether single steps may sum what is older than their block once a block."""
        corrects = isinstance(self.solver, CorrectorSolver)
        return not corrects and self.memory_reset == "never" and not self.memory.limit

    # -- compressed memory ------------------------------------------------------------------------

    @property
    def folds(self) -> bool:
        """Whether old states are folded into traces once there are enough of them."""
        return self._nodes is not None

    @property
    def traces(self) -> int:
        """How many traces a compressed memory has; 0 for none."""
        return 0 if self._nodes is None else len(self._nodes.rates)

    def reach(self) -> Reach:
        """How far back a run looks, as the engines take it."""
        return Reach(self.memory.limit, self.memory.fold_at if self.folds else 0)

    def _fit_shape(self, numbers: list[Tensor], n: int) -> Tensor:
        """Weights of a size like those of the orders, none of them 0, for errors to be relative to."""
        capped = [numbers[0].detach().clamp_max(_NEARLY_ONE), *(t.detach() for t in numbers[1:])]
        return self._gain_and_weights(capped, n)[1]

    def _choose_nodes(self) -> Nodes | None:
        """The nodes of a sum of exponentials, fit for every order this operator may get to.

        Raises:
            OptionError: if the solver has no such form or the tolerance is out of reach.
        """
        memory, solver = self.memory, self.solver
        if not isinstance(memory, SumOfExponentials):
            return None
        if not isinstance(solver, ExplicitSolver):
            if not isinstance(memory, AutoMemory):
                raise OptionError(
                    f"memory={memory.describe()!r} needs a solver that is a gain and weights, which "
                    f"{solver.name!r} is not; gl, l1, pred and glmulti are, and plugins that derive from "
                    'ExplicitSolver. Pass one of them as method=, or memory="full".'
                )
            self.memory = FullMemory()
            return None
        if self.is_native:
            return None
        horizon = fit_horizon(memory.horizon)
        numbers = [t.detach() for t in self._learnable()]
        if self.order.channel_dim is not None:  # nodes that serve some of many orders serve those between
            ordered = numbers[0].unique()
            numbers[0] = ordered[torch.linspace(0, len(ordered) - 1, min(len(ordered), 16)).round().long()]
        shapes = [self._fit_shape(numbers, horizon)]
        if not self.order.fixed:
            many = torch.tensor(_LEARNED_RANGE, dtype=torch.float64)
            shapes.append(_bracket(ask(solver, "weights", many, horizon)))
        what = f"solver {solver.name!r}, alpha {self.order.describe()}"
        try:
            return choose_nodes(torch.cat(shapes, 1), memory.tolerance, memory.horizon, what)
        except OptionError:
            if not isinstance(memory, AutoMemory):
                raise
            self.memory = FullMemory()
            return None

    def memory_error(self) -> float:
        """The largest relative error of a memory weight up to the horizon, for the orders as they are now.

        0 where every weight is used as it is.
        """
        if self._nodes is None:
            return 0.0
        with torch.no_grad():
            numbers, horizon = self._learnable(), self._nodes.horizon
            weights, shape = self._gain_and_weights(numbers, horizon)[1], self._fit_shape(numbers, horizon)
            fitted = coefficients(weights, shape, self._nodes.rates, horizon)
            return relative_error(weights, shape, self._nodes.rates, fitted, horizon)

    def warn_beyond_horizon(self, steps: int) -> None:
        """Say once that a run has become longer than the memory was fitted for, and how wrong it may be."""
        if self._nodes is None or self._warned or steps <= self._nodes.horizon:
            return
        self._warned = True
        with torch.no_grad():
            numbers, (rates, horizon, _) = self._learnable(), self._nodes

            def weights(n: int) -> Tensor:
                return self._gain_and_weights(numbers, n)[1]

            fitted = coefficients(weights(horizon), self._fit_shape(numbers, horizon), rates, horizon)
            near, far = error_beyond(weights, rates, fitted, horizon)
        warnings.warn(
            f"a run has become longer than the horizon of its compressed memory, {horizon} steps: from here "
            f"on a step's memory sum may be off by {near:.1e} of the largest deviation (up to {8 * horizon} "
            f"steps; {far:.1e} however long). SumOfExponentials(horizon=...) as memory looks further back.",
            SpikedeWarning,
            stacklevel=2,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}}

    def memory_text(self) -> str:
        """The memory for reports, with the number of traces and the error that was reached."""
        if self._nodes is None:
            return self.memory.describe()
        return f"{self.memory.describe()} ({self.traces} traces, error {self._nodes.error:.0e})"

    def extra_repr(self) -> str:
        text = f"method={self.solver.name!r}, memory={self.memory_text()}"
        if self.step_size != 1.0:
            text += f", step_size={self.step_size}"
        if self.checkpoint is not None:
            text += f", checkpoint={self.checkpoint}"
        return text + (", memory_reset='spike'" if self.memory_reset == "spike" else "")
