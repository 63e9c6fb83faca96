"""Models as programs without a hidden state, for torch.export, ONNX and TorchScript.

:func:`step_module` gives one time step with the state as inputs and outputs, :func:`sequence_module` a whole
sequence that starts from a reset in every call. Both are copies; the model is not changed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from spikede_plugins.engine.rolling import RollingOperator
from spikede_plugins.errors import ConversionError, ExportError, OptionError
from spikede_plugins.registry import adapters_in_use
from spikede_plugins.selection import show
from spikede_plugins.tree import check_model, copy_model, find_neurons


class StepModule(nn.Module):
    """One time step of a model as a function ``(*inputs, *states) -> (*outputs, *states)``.

    Made by :func:`step_module`.

    Attributes:
        state_names: the states in order, ``"<path of the neuron>.<variable>"``: its potential (and what else
            its framework keeps), ``history`` ``[L, *shape]``, and of a compressed memory ``traces``
            ``[P, *shape]``.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        super().__init__()
        self.model = model
        self._inputs = len(inputs)
        self._neurons = find_neurons(model, adapters_in_use())
        self._prepare()
        with torch.no_grad():
            self.model(*inputs)
        self._names: list[list[str]] = []
        for i, neuron in enumerate(self._neurons):
            start = neuron.adapter.state_at_start(neuron.module)
            self._names.append(list(start))
            for name, value in start.items():
                self.register_buffer(f"start_{i}_{name}", value.detach().contiguous(), persistent=False)
        # Nothing that is handed in may be found inside as well: a compiler would take note of it.
        self._spread(tuple(state.clone() for state in self.initial_states()))

    @property
    def state_names(self) -> tuple[str, ...]:
        """The names of the states, in the order in which they are taken and given."""
        prefixes = [f"{neuron.paths[0]}." if neuron.paths[0] else "" for neuron in self._neurons]
        return tuple(p + name for p, names in zip(prefixes, self._names, strict=True) for name in names)

    def initial_states(self) -> tuple[Tensor, ...]:
        """The states before the first step, for inputs of the shape of the example."""
        return tuple(
            self._buffers[f"start_{i}_{name}"]  # type: ignore[misc]
            for i, names in enumerate(self._names)
            for name in names
        )

    def forward(self, *args: Any) -> tuple[Any, ...]:
        """One step: inputs followed by states; gives outputs followed by states.

        Raises:
            OptionError: for another number of arguments, or states that do not fit the input.
            ExportError: if the model gives something else than a tensor or a tuple or list of them.
        """
        states, count = args[self._inputs :], sum(map(len, self._names))
        if len(states) != count:
            raise OptionError(
                f"this step takes {self._inputs} input(s) and {count} states, got {len(args)} arguments; "
                "step.initial_states() are the states before the first step."
            )
        with ExitStack() as stack:
            for neuron in self._neurons:
                stack.callback(_keep(neuron.module))
            self._spread(states)
            out = self.model(*args[: self._inputs])
            after = [n.adapter.state(n.module) for n in self._neurons]
        outputs = (out,) if isinstance(out, Tensor) else out
        if not isinstance(outputs, (tuple, list)):
            raise ExportError(
                f"{type(self.model).__name__} gives a {type(out).__name__}; a captured step gives tensors: "
                "wrap it in a module that returns a tensor or a tuple of tensors."
            )
        kept = [found[name] for found, names in zip(after, self._names, strict=True) for name in names]
        for name, before, later in zip(self.state_names, states, kept, strict=True):
            if before.shape != later.shape:
                raise OptionError(
                    f"the state {name} has shape {tuple(before.shape)}, but this input makes it "
                    f"{tuple(later.shape)}; start from initial_states() of step_module(model, x) for this x."
                )
        return (*outputs, *kept)

    def _spread(self, states: tuple[Tensor, ...]) -> None:
        left = iter(states)
        for neuron, names in zip(self._neurons, self._names, strict=True):
            neuron.adapter.set_state(neuron.module, {name: next(left) for name in names})

    def _prepare(self) -> None:
        adapters = {id(n.adapter): n.adapter for n in self._neurons}
        others = [path for adapter in adapters.values() for path in adapter.stateful_layers(self.model)]
        if others:
            raise ExportError(
                f"{', '.join(others)} keeps a state that cannot be handed in and out; only neurons' can."
            )
        for adapter in adapters.values():
            adapter.fold_time(self.model)
        for neuron in self._neurons:
            path = show(neuron.paths[0])
            if not neuron.fractional:
                support = neuron.adapter.support(neuron.module)
                if not support.supported:
                    raise ExportError(f"{path}: the state of {neuron.kind} cannot be handed in and out.")
                neuron.adapter.reset_state(neuron.module)
                continue
            try:
                operator = RollingOperator(neuron.adapter.operator(neuron.module))
            except ExportError as error:
                raise ExportError(f"{path} ({neuron.kind}): {error}") from error
            neuron.adapter.carry_state(neuron.module, operator)


class SequenceModule(nn.Module):
    """A model that starts from a reset in every call and forgets what it ended with.

    Made by :func:`sequence_module`; takes and gives what the model does.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        super().__init__()
        self.model = model
        self._neurons = find_neurons(model, adapters_in_use())
        for neuron in self._neurons:
            neuron.adapter.reset_state(neuron.module)
        with torch.no_grad():
            self(*inputs)  # forms the weights of the memory, which a program then holds as numbers
        for neuron in self._neurons:
            if neuron.fractional:
                neuron.adapter.operator(neuron.module).captures = "sequence"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model on a whole sequence."""
        with ExitStack() as stack:
            for neuron in self._neurons:
                stack.callback(_keep(neuron.module))
                neuron.adapter.reset_state(neuron.module)
            return self.model(*args, **kwargs)


def step_module(model: nn.Module, *inputs: Any) -> StepModule:
    """One time step of a converted model with its state as inputs and outputs, to be captured or run.

    Args:
        model: a converted model that takes one step a call (of a SpikingJelly model the copy is put into
            single-step mode), with ``memory="soe"``, ``"auto"`` or a window and an explicit solver. Its
            orders are taken as they are now.
        *inputs: example inputs of one step; the states get the shapes that go with them.

    Returns:
        A module ``(*inputs, *states) -> (*outputs, *states)``; the first states are ``initial_states()``. A
        compressed memory folds at every step instead of once a block: a sum may differ from the model's own
        within the memory's tolerance.

    Raises:
        ExportError: for a memory that grows, a solver or reset without a step of fixed size, or a layer or
            neuron whose state cannot be handed in and out.
        ConversionError: if there is no fractional neuron in the model.
    """
    return StepModule(_copied(model), inputs)


def sequence_module(model: nn.Module, *inputs: Any) -> SequenceModule:
    """A converted model that runs a whole sequence from a fresh state in every call, to be captured.

    Args:
        model: a converted model whose call is a whole sequence: a SpikingJelly model in multi-step mode, or
            any model that loops over time steps itself. Its orders are taken as they are now.
        *inputs: example inputs of a sequence.

    Returns:
        A module with the inputs and outputs of the model, for ``torch.export`` and ``torch.onnx.export``
        (``dynamo=True``). The number of time steps is fixed by the capture.

    Raises:
        ConversionError: if there is no fractional neuron in the model.
    """
    return SequenceModule(_copied(model), inputs)


def _copied(model: nn.Module) -> nn.Module:
    neurons = find_neurons(check_model(model), adapters_in_use())
    if not any(neuron.fractional for neuron in neurons):
        raise ConversionError(
            f"there is no fractional neuron in {type(model).__name__}; convert_to_fractional(model) first."
        )
    return copy_model(model)


def _keep(module: nn.Module) -> Callable[[], None]:
    """What puts everything that a call may leave in ``module`` back to what it is now."""
    own = dict(vars(module))
    inner = [(value, dict(value)) for value in own.values() if type(value) is dict]

    def back() -> None:
        vars(module).clear()
        vars(module).update(own)
        for value, former in inner:
            value.clear()
            value.update(former)

    return back
