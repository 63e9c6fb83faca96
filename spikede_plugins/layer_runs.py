"""What neurons do while a model is called: run all steps, or be evaluated at potentials that are given.

A model is called with time folded into its batch, ``[T * B, ...]``. Its neurons ask the run they are in
(``neurons.driven_by``), which unfolds time for them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spikede_plugins.adapter import Adapter
from spikede_plugins.engine import FractionalOperator, state_dtype
from spikede_plugins.errors import OptionError, StateError
from spikede_plugins.neuron_steps import FrameworkNeuronCall, NeuronCall, OwnNeuronCall
from spikede_plugins.neurons import BaseNeuron, current_driver, driven_by
from spikede_plugins.run_states import RunStates
from spikede_plugins.uncompiled import uncompiled, uncompiled_alone

CHANGED = "the model called other neurons than before; which it calls must not depend on values."
DROPOUT_LAYERS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class FrameworkNeuron(nn.Module):
    """A framework's neuron, made fractional, as a layer of a model that a wrapper runs."""

    def __init__(self, neuron: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.neuron = neuron
        self.adapter = adapter

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # what a model looks up of its neuron
            return getattr(super().__getattr__("neuron"), name)

    @uncompiled
    def forward(self, x: Tensor) -> Tensor:
        driver = current_driver()
        if driver is None:
            raise StateError(
                f"{type(self.neuron).__name__} belongs to an SNNWrapper; call the model through that."
            )
        return driver(self, x)  # type: ignore[arg-type]


Layer = BaseNeuron | FrameworkNeuron


class Run:
    """A call of ``base`` with ``steps`` steps folded into the batch."""

    #: Where its neurons begin and end, if that is asked for.
    beginnings: RunStates | None = None

    def __init__(self, steps: int, batch: int) -> None:
        self.steps, self.batch, self.time_is_gone = steps, batch, False

    def begin_call(self, call: NeuronCall, layer: Layer) -> NeuronCall:
        """A call of a neuron, put where it begins."""
        return call if self.beginnings is None else self.beginnings.begin(call, layer)

    def __call__(self, layer: Layer, current: Tensor) -> Tensor:
        raise NotImplementedError

    def unfold_time(self, x: Tensor, last: bool = False) -> Tensor:
        """``[T * B, ...] -> [T, B, ...]``; with ``last``, the model's output has no time any more."""
        whole = self.steps * self.batch  # or a multiple: what a model folds into its batch comes behind
        if x.dim() == 0 or (x.shape[0] % whole if whole else x.shape[0]):
            raise OptionError(
                f"a layer of the model gave shape {tuple(x.shape)}, whose first dimension is not the batch "
                f"of {whole} it was called with; keep the batch in dimension 0 (time is folded into it)."
            )
        self.time_is_gone |= last
        return x.unflatten(0, (self.steps, x.shape[0] // self.steps))

    def output(self, out: Any) -> Any:
        """The output of ``base`` with time unfolded, in whatever it is nested.

        Raises:
            OptionError: if a head averaged over time and something else is returned beside it.
        """
        if not self.time_is_gone:
            return each(out, lambda t: self.unfold_time(t) if t.dim() else t)
        if sum(t.dim() > 0 for t in tensors_of(out)) > 1:
            raise OptionError(
                "the model returns several tensors, and a ClassificationHead has averaged over time in it: "
                "which of them still have time in their batch cannot be told; return the head's alone."
            )
        return out


#: For the n-th call of a neuron in a call of the model: its order, bound to solver, memory and step.
Operators = Callable[[Layer, int], FractionalOperator]


def neuron_call(layer: Layer, operator: FractionalOperator, like: Tensor, record: bool) -> NeuronCall:
    """A neuron from its start on, for input like ``like [B, ...]``."""
    if isinstance(layer, FrameworkNeuron):
        return FrameworkNeuronCall(layer.neuron, layer.adapter, operator, record)
    return OwnNeuronCall(layer, operator, like, record)


class FractionalRun(Run):
    """A run of neurons by operators of their own; ``rows`` of the output are wanted, or all.

    With ``record``, ``potentials`` has for each call of a neuron its potentials ``[T, B, ...]``.
    """

    def __init__(
        self, steps: int, batch: int, operators: Operators, rows: Tensor | None, record: bool = False
    ) -> None:
        super().__init__(steps, batch)
        self.operators, self.rows, self.record = operators, rows, record
        self.called: list[Layer] = []


class GridRun(FractionalRun):
    """Each neuron runs all T steps from 0, one layer after the other."""

    def __init__(
        self, steps: int, batch: int, operators: Operators, rows: Tensor | None, record: bool = False
    ) -> None:
        super().__init__(steps, batch, operators, rows, record)
        self.potentials: list[Tensor] = []

    def __call__(self, layer: Layer, current: Tensor) -> Tensor:
        x_seq = self.unfold_time(current)
        operator = self.operators(layer, len(self.called))
        self.called.append(layer)
        call = self.begin_call(neuron_call(layer, operator, x_seq[0], self.record), layer)
        spikes = call.sequence(x_seq)
        self.potentials += call.potentials
        return spikes.flatten(0, 1).to(current.dtype)


class StateRun(Run):
    """Each neuron is evaluated at a potential that is given; their derivatives are recorded.

    A module that is called several times in ``base`` has a potential for each call.
    """

    def __init__(self, steps: int, batch: int, states: Sequence[Tensor] | None) -> None:
        super().__init__(steps, batch)
        self.states = states
        self.rates: list[Tensor] = []
        self.called: list[Layer] = []

    def __call__(self, layer: Layer, current: Tensor) -> Tensor:
        if isinstance(layer, FrameworkNeuron):
            kind = getattr(layer.neuron, "native_class", type(layer.neuron)).__name__
            raise OptionError(
                f"{kind} is reset by a jump and runs layer by layer on a grid only; "
                'use method="euler" with integrator="odeint", or integrator="fdeint".'
            )
        self.called.append(layer)
        if self.states is None:  # which potentials are there?
            resting = torch.zeros(current.shape, dtype=state_dtype(current), device=current.device)
            self.rates.append(resting)
            return torch.zeros_like(current)
        if len(self.rates) == len(self.states):
            raise StateError(CHANGED)
        v = self.states[len(self.rates)]
        rate, spike = layer.dynamics(v, current.to(v.dtype))
        self.rates.append(rate)
        return spike.to(current.dtype)

    def all_rates(self) -> tuple[Tensor, ...]:
        if self.states is not None and len(self.rates) != len(self.states):
            raise StateError(CHANGED)
        return tuple(self.rates)


class VectorField(nn.Module):
    """``(t, potentials) -> their derivatives``: the whole network once."""

    def __init__(
        self, base: nn.Module, signal: Callable[[Tensor], Tensor], batch: int, masks: Masks | None
    ) -> None:
        super().__init__()
        self.base, self.signal, self.batch, self.masks = base, signal, batch, masks

    def forward(self, t: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        run = StateRun(1, self.batch, states)
        call_base(self.base, run, self.signal(t), self.masks)
        return run.all_rates()


class Masks:
    """Dropout masks of one sequence: drawn at the first call of each layer, and the same at every step."""

    def __init__(self, base: nn.Module, batch: int) -> None:
        self.layers = [m for m in base.modules() if isinstance(m, DROPOUT_LAYERS)]
        self.batch = batch
        self.drawn: dict[tuple[int, int], Tensor] = {}

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Around one call of ``base``, and around that call once more in backward."""
        calls: dict[int, int] = {}
        masking: list[nn.Module] = []

        def before(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]
            if not layer.training or not self.batch or x.shape[0] % self.batch:
                return args
            calls[id(layer)] = calls.get(id(layer), 0) + 1
            key = id(layer), calls[id(layer)]
            steps = x.unflatten(0, (-1, self.batch))
            if key not in self.drawn:
                self.drawn[key] = layer.forward(torch.ones_like(steps[0]))
            layer.training = False  # it has nothing more to do
            masking.append(layer)
            return ((steps * self.drawn[key]).flatten(0, 1), *args[1:])

        def after(layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            if layer in masking:
                masking.remove(layer)
                layer.training = True

        handles = [layer.register_forward_pre_hook(before) for layer in self.layers]
        handles += [layer.register_forward_hook(after) for layer in self.layers]
        try:
            yield
        finally:
            for layer in masking:  # something was raised in between
                layer.training = True
            for handle in handles:
                handle.remove()


@uncompiled_alone
def call_base(base: nn.Module, run: Run, x: Tensor, masks: Masks | None) -> Any:
    """``base(x)``, its neurons run by ``run``."""
    with driven_by(run), contextlib.nullcontext() if masks is None else masks.held():
        return base(x)


def each(out: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``out`` with every tensor in it changed, in whatever it is nested."""
    if isinstance(out, Tensor):
        return change(out)
    if isinstance(out, dict):
        return _like(out, {key: each(value, change) for key, value in out.items()})
    if isinstance(out, tuple) and hasattr(out, "_fields"):
        return type(out)(*(each(value, change) for value in out))
    if isinstance(out, (list, tuple)):
        return type(out)(each(value, change) for value in out)
    return out


def _like(mapping: dict[Any, Any], values: dict[Any, Any]) -> Any:
    """A mapping of the same kind with other values."""
    new = copy.copy(mapping)
    new.update(values)
    return new


def tensors_of(out: Any) -> list[Tensor]:
    """Every tensor in an output, in whatever it is nested."""
    found: list[Tensor] = []
    each(out, lambda t: found.append(t) or t)  # type: ignore[func-returns-value]
    return found


def joined(parts: list[Any]) -> Any:
    """Outputs over consecutive times as one."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts) if first.dim() else first  # (a number is that of one part, the only one)
    if isinstance(first, dict):
        return _like(first, {key: joined([part[key] for part in parts]) for key in first})
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*map(joined, map(list, zip(*parts, strict=True))))
    if isinstance(first, (list, tuple)):
        return type(first)(map(joined, map(list, zip(*parts, strict=True))))
    return first
