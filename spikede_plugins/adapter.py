"""The contract between the conversion and a framework adapter.

An adapter knows one framework. It recognises that framework's spiking neurons, says which of them
have a fractional form, and builds a fractional neuron from a native one and back. It is found through
the entry-point group ``spikede_plugins.adapters``; name the entry point after the framework's import
package (``spikingjelly``, ``snntorch``), so that it is loaded only once that package is in use.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spikede_plugins.engine import FractionalOperator
from spikede_plugins.engine.choice import engine_of
from spikede_plugins.engine.rows import Snapshot
from spikede_plugins.errors import ExportError, OptionError, StateError
from spikede_plugins.surrogate import Surrogate


@dataclass(frozen=True)
class Support:
    """What an adapter says of one spiking neuron.

    Attributes:
        supported: whether a fractional form exists.
        kind: the native neuron's name as a user knows it, e.g. ``"LIFNode"``.
        reason: why there is no fractional form (empty if there is one).
        note: something the report should tell about the conversion (e.g. a backend that changes).
    """

    supported: bool
    kind: str
    reason: str = ""
    note: str = ""


class Adapter(ABC):
    """Conversion between one framework's neurons and their fractional forms.

    ``name`` is the framework's import package. All methods are called with modules found in a user's
    model; none but ``finish`` may change the model itself.
    """

    name: str

    @abstractmethod
    def is_neuron(self, module: nn.Module) -> bool:
        """Whether ``module`` is a native (not fractional) spiking neuron of this framework."""

    @abstractmethod
    def is_fractional(self, module: nn.Module) -> bool:
        """Whether ``module`` is a fractional neuron made by this adapter."""

    @abstractmethod
    def support(self, module: nn.Module) -> Support:
        """Whether this native neuron has a fractional form, and if not, why.

        The exact class counts: a subclass whose dynamics were changed is not its parent.
        """

    @abstractmethod
    def to_fractional(self, module: nn.Module, operator: FractionalOperator) -> nn.Module:
        """A new fractional neuron with the native one's parameters, buffers, hooks and settings.

        The parameters are the same objects; ``module`` is not changed. The state starts fresh.
        """

    @abstractmethod
    def to_native(self, module: nn.Module) -> nn.Module:
        """A new native neuron from a fractional one: the inverse of :meth:`to_fractional`."""

    @abstractmethod
    def operator(self, module: nn.Module) -> FractionalOperator:
        """The fractional operator (order, solver, memory, step size) of a fractional neuron."""

    def engine(self, module: nn.Module, operator: FractionalOperator) -> str:
        """What runs this neuron, native or fractional, with this operator, as reports show it.

        Here: of a neuron that goes step by step through ``charge_step``.
        """
        return engine_of(operator, None)

    @abstractmethod
    def reset_state(self, module: nn.Module) -> None:
        """Put a native or fractional neuron's state back to its start, as the framework would."""

    def use_surrogate(self, module: nn.Module, surrogate: Surrogate) -> None:
        """Give a fractional neuron another surrogate gradient; :meth:`to_native` gives its own back.

        Raises:
            OptionError: if this neuron cannot have another.
        """
        raise OptionError(
            f"the adapter {self.name!r} does not change surrogates; set it on the neuron before converting."
        )

    def carry_state(self, module: nn.Module, operator: FractionalOperator) -> None:
        """Prepare a fractional neuron for :meth:`set_state`: it takes ``operator`` and starts afresh.

        Raises:
            ExportError: if the adapter does not offer it.
        """
        raise ExportError(
            f"the adapter {self.name!r} does not hand the state of its neurons in and out; "
            "restore_native(model) gives the integer model."
        )

    def state(self, module: nn.Module) -> dict[str, Tensor]:
        """What a native or fractional neuron carries from step to step, by name, after a step."""
        return {}

    def potential(self, module: nn.Module) -> Tensor:
        """The membrane potential ``[B, ...]`` that a neuron with a state of its own carries after a step."""
        for name in ("v", "mem"):
            value = getattr(module, name, None)
            if isinstance(value, Tensor):
                return value
        return next(iter(self.state(module).values()))

    def state_at_start(self, module: nn.Module) -> dict[str, Tensor]:
        """The same before the first step, in the shapes that it has after one."""
        return {name: torch.zeros_like(value) for name, value in self.state(module).items()}

    def set_state(self, module: nn.Module, state: dict[str, Tensor]) -> None:
        """Let the next step continue from this state."""
        return

    # -- the state as users save, pick and put it back (spikede_plugins.state) --

    #: The name of the membrane potential among the variables of a snapshot.
    membrane: str = "v"

    def carries_state(self, module: nn.Module) -> bool:
        """Whether :meth:`snapshot` knows what this layer carries from one call to the next."""
        return self.is_fractional(module) or self.is_neuron(module)

    def snapshot(self, module: nn.Module) -> Snapshot:
        """What a layer carries now: tensors as they are, not copied, with their graph.

        Raises:
            StateError: if the adapter does not offer it.
        """
        raise StateError(
            f"the adapter {self.name!r} does not hand out the state of {type(module).__name__}; "
            "it would define snapshot, restore and start_values."
        )

    def restore(self, module: nn.Module, snapshot: Snapshot) -> None:
        """Let the layer go on from this snapshot, whose tensors now belong to it."""
        raise StateError(f"the adapter {self.name!r} does not set the state of {type(module).__name__}.")

    def start_values(self, module: nn.Module) -> dict[str, float | Tensor]:
        """What each variable of :meth:`snapshot` is after a reset; 0 for those that are not named."""
        return {}

    def sequence_obstacle(self, module: nn.Module) -> str:
        """Why :meth:`run_sequence` cannot run this native neuron; empty if it can."""
        return f"the adapter {self.name!r} does not run sequences"

    def stateful_layers(self, model: nn.Module) -> list[str]:
        """Layers of this framework, besides neurons, that carry something from step to step, by path."""
        return []

    def fold_time(self, model: nn.Module) -> None:
        """Make the framework's stateless layers in ``model`` take ``[T * B, ...]``."""
        return

    def run_sequence(self, module: nn.Module, operator: FractionalOperator, x_seq: Tensor) -> Tensor:
        """The spikes ``[T, B, ...]`` of a fractional neuron that takes ``operator`` and starts afresh.

        Its state is fresh afterwards as well. Asked only of neurons without a :meth:`sequence_obstacle`.

        Raises:
            OptionError: if the adapter does not offer it.
        """
        raise OptionError(self.sequence_obstacle(module))

    def stepping(self, module: nn.Module, operator: FractionalOperator) -> nn.Module:
        """A copy of a fractional neuron that takes ``operator``, starts afresh and is called once a step.

        The copy shares the parameters of ``module``, which stays as it is. Asked only of neurons without a
        :meth:`sequence_obstacle`.

        Raises:
            OptionError: if the adapter does not offer it.
        """
        raise OptionError(
            f"the adapter {self.name!r} runs whole sequences and no single steps, which a model that mixes "
            'samples or keeps a state needs; use time="fold" if the model treats each sample alone.'
        )

    def finish(
        self, model: nn.Module, replaced: Sequence[nn.Module], added: Sequence[nn.Module]
    ) -> None:
        """Called once after the neurons in ``model`` were swapped (caches, instance lists)."""
        return

    def abandon(self, made: Sequence[nn.Module]) -> None:
        """Called with neurons built by a conversion that then failed (undo any registration)."""
        return

    def adopt(self, copied: Sequence[nn.Module]) -> None:
        """Called with this framework's neurons in a fresh deep copy of a model, before conversion."""
        return
