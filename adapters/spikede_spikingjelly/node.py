"""The fractional form of SpikingJelly's neurons: one part, mixed in before each native class.

A fractional neuron is an object of a class made for its native class (``classes.fractional_class``): it is an
instance of the native class, has all its methods, and takes every time step here. All state is in the
framework's own ``memories``, so ``reset_net``, ``detach_net``, ``.to()`` and functional forward carry it.
"""

from __future__ import annotations

import copy
import sys
from typing import Any, ClassVar

import torch
from spikingjelly.activation_based import base
from torch import Tensor, fx, nn

from spikede_plugins.engine import FractionalOperator, HistoryLog
from spikede_plugins.errors import ExportError, OptionTypeError, StateError
from spikede_plugins.exporting import check_capture, refuse
from spikede_spikingjelly.dynamics import Dynamics
from spikede_spikingjelly.edits import Left, entered, followed, left
from spikede_spikingjelly.release import EXPLICIT_STATES
from spikede_spikingjelly.state import HISTORY, first_step, fit, named, packed, state_of
from spikede_spikingjelly.stepping import run, step


class Own:
    """What a fractional node keeps for itself beside its state.

    Attributes:
        dynamics: the native neuron as pure functions.
        log: the buffer that history rows live in.
        backend: the native neuron's backend, in releases that have one.
        surrogate: the native surrogate where another was chosen, in a tuple that hides it from the module.
        left: what the last call left behind, to see an edit by.
    """

    def __init__(self, dynamics: Dynamics, backend: str | None = None) -> None:
        self.dynamics, self.backend = dynamics, backend
        self.log = HistoryLog()
        self.surrogate: tuple[nn.Module] | None = None
        self.left: Left | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "left": None if self.left is None else self.left.sendable()}

    def replica(self) -> Own:
        """The same for a copy of the node that runs beside it."""
        new = copy.copy(self)
        new.log = HistoryLog()
        return new


class FractionalNode(base.MemoryModule):
    r"""A spiking neuron with fractional membrane dynamics of order alpha; mixed in before a native class.

    .. math::
        h_k = c_k + (g - 1)(c_k - v_{k-1}) - \sum_{m \ge 1} (w_m + [m = 1]) u_{k-m}, \qquad
        c_k = \mathrm{charge}(v_{k-1}, x_k), \quad u = v - v_{start}

    followed by the native neuron's firing and reset. Gain g and weights w belong to the solver; at alpha = 1
    both brackets vanish and the native neuron remains, to the last bit. The history holds the potential after
    reset. Made from a native neuron by ``convert_to_fractional``, whose class it then derives from:

    >>> node = convert_to_fractional(neuron.LIFNode(tau=4.0), alpha=0.7)
    >>> isinstance(node, neuron.LIFNode), isinstance(node, FractionalNode)
    (True, True)

    Single-step input is ``[B, ...]``, multi-step input ``[T, B, ...]``.

    Raises:
        OptionError: for a sequence without time steps, or orders per channel that do not fit the input.
        StateError: for an input whose shape does not fit the state, where the native neuron raises too, and
            for a step that ``torch.utils.checkpoint`` repeats from the state that the first run left.
        ExportError: if a call is captured as a program (torch.export, ONNX, TorchScript, NIR) that would hold
            the state as a constant, or a hardware exchange would take the neuron for the integer one.
    """

    native_class: ClassVar[type[Any]]
    fractional: FractionalOperator
    _spikede: Own

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise OptionTypeError(
            f"{type(self).__name__} is made from a native neuron: convert_to_fractional(neuron, alpha=0.7)."
        )

    # Time: every way in which the framework runs a neuron ends in one of these

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # An exporter may take a neuron that it knows as a whole, without a look into its forward.
        if args and type(args[0]) is not Tensor and isinstance(args[0], fx.Proxy):
            self._check_capture(args[0])
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One time step or all of them, by ``step_mode``."""
        if self._step_mode == "s":
            return self.single_step_forward(*args, **kwargs)
        return self.multi_step_forward(*args, **kwargs)

    def single_step_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """One time step: input and output ``[B, ...]``; the state is kept in the node."""
        _no_more(self, args, kwargs)
        self._check_capture(x)
        self._check_repeated()
        x = fit(self, x, self._memories)
        output, state = step(self, self._spikede.dynamics, x, entered(self, x))
        self._keep(packed(state, self._memories))
        if EXPLICIT_STATES and self.__dict__.get("_store_v_seq"):
            source = None if "m" in state.others else state.v  # ComplementaryLIFNode keeps none in this mode
            if source is not None:
                self._append_v_seq(source)
        return output

    def multi_step_forward(self, x_seq: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """T time steps: input and output ``[T, B, ...]``; the state is kept in the node."""
        _no_more(self, args, kwargs)
        self._check_capture(x_seq, fresh=not isinstance(self._memories["v"], Tensor))
        self._check_repeated()
        x = fit(self, first_step(self, x_seq), self._memories)
        if x.shape != x_seq.shape[1:]:
            x_seq = x_seq.expand(-1, *x.shape)
        recorded = self.__dict__.get("_store_v_seq", False)
        pairs = self.__dict__.get("_store_state_seqs", False)
        dynamics = self._spikede.dynamics.in_sequence(self, recorded)
        outputs, state, v_seq, others = run(self, dynamics, x_seq, entered(self, x), recorded or pairs)
        self._keep(packed(state, self._memories))
        if recorded:
            self.v_seq = v_seq
        if pairs:
            self.state_seqs = [v_seq, torch.stack([other["m"] for other in others])]
        return outputs

    def materialize_states(self, inputs: Any, states: Any, step_mode: str) -> tuple[Any, ...]:
        """The states as tensors that fit the input, as functional forward wants them."""
        memories = named(self, states)
        x = fit(self, first_step(self, inputs[0]) if step_mode == "m" else inputs[0], memories)
        return tuple(packed(state_of(self, x, memories), memories).values())

    def single_step_functional_forward(
        self, inputs: Any, states: Any, **kwargs: Any
    ) -> tuple[tuple[Tensor], tuple[Any, ...]]:
        """One time step from given states (in the order of ``named_memories``); nothing is kept."""
        _no_more(self, inputs[1:], kwargs)
        memories = named(self, states)
        self._check_capture(inputs[0], fresh=True)
        x = fit(self, inputs[0], memories)
        output, state = step(self, self._spikede.dynamics, x, state_of(self, x, memories))
        return (output,), tuple(packed(state, memories).values())

    def multi_step_functional_forward(
        self, inputs: Any, states: Any, **kwargs: Any
    ) -> tuple[tuple[Tensor], tuple[Any, ...]]:
        """T time steps from given states (in the order of ``named_memories``); nothing is kept."""
        _no_more(self, inputs[1:], kwargs)
        memories, x_seq = named(self, states), inputs[0]
        self._check_capture(x_seq, fresh=True)
        x = fit(self, first_step(self, x_seq), memories)
        if x.shape != x_seq.shape[1:]:
            x_seq = x_seq.expand(-1, *x.shape)
        dynamics = self._spikede.dynamics.in_sequence(self, False)
        outputs, state, _, _ = run(self, dynamics, x_seq, state_of(self, x, memories), False)
        return (outputs,), tuple(packed(state, memories).values())

    def _keep(self, memories: dict[str, Any]) -> None:
        self._memories.update(memories)
        # A captured program is handed its state with every step: nobody edits it in between.
        if not torch.compiler.is_compiling():
            self._spikede.left = None if self.fractional.captures else left(self)

    # What else runs, captures or writes neurons

    def _check_capture(self, x: Any, fresh: bool = False) -> None:
        check_capture(self, self.native_class.__name__, x, self.fractional.captures, fresh=fresh)

    def _check_repeated(self) -> None:
        """A recomputation must find the state that its first run found, not the one it left."""
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() < 0:
            return
        if self._spikede.left is not None and self._spikede.left.unedited(self._memories):
            raise StateError(
                f"torch.utils.checkpoint runs the fractional {self.native_class.__name__} again from the "
                "state that its first run left, so gradients would be wrong: a neuron keeps its state "
                "between calls. Use spikingjelly.activation_based.memopt.checkpoint_module(net), which hands "
                "the state in and out, convert_to_fractional(net, checkpoint=16), or call "
                "functional.reset_net inside the function."
            )

    def __prepare_scriptable__(self) -> Any:
        refuse(self.native_class.__name__, "torch.jit.script")

    @property
    def step_mode(self) -> str:
        """``"s"`` or ``"m"``."""
        if not torch.compiler.is_compiling():
            _refuse_exchange(self)
        return self._step_mode  # type: ignore[no-any-return]

    @step_mode.setter
    def step_mode(self, value: str) -> None:
        super(FractionalNode, type(self)).step_mode.fset(self, value)  # type: ignore[attr-defined]

    @property
    def lava_s_cale(self) -> int:
        """The scale that the exchange with Lava reads, and nobody else."""
        _refuse_exchange(self)
        try:
            return self.__dict__["lava_s_cale"]  # type: ignore[no-any-return]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no attribute 'lava_s_cale'") from None

    @lava_s_cale.setter
    def lava_s_cale(self, value: int) -> None:
        self.__dict__["lava_s_cale"] = value

    @property
    def supported_backends(self) -> tuple[str, ...]:
        """Of releases with backends: torch alone, the others run integer neurons."""
        return ("torch",)

    # Life cycle

    def reset(self) -> None:
        """Back to the start, as the native class resets itself, and the history forgotten."""
        super().reset()
        for name in HISTORY:
            self._memories[name] = None
        self._spikede.log, self._spikede.left = HistoryLog(), None
        for name in ("v_seq", "state_seqs"):
            if name in self.__dict__:
                self.__dict__[name] = None

    def detach(self) -> None:
        """Cut the graph behind the state (truncated backpropagation); values stay."""
        # Not in place: the states of one run may be views of one tensor.
        memories = dict(self._memories)
        for name, value in self._memories.items():
            if isinstance(value, Tensor):
                self._memories[name] = value.detach()
        self._spikede.left = followed(self._spikede.left, self, memories)
        if isinstance(self.__dict__.get("v_seq"), Tensor):
            self.__dict__["v_seq"] = self.__dict__["v_seq"].detach()

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> FractionalNode:
        # Flat: a memory format such as channels_last is meant for images, not for their history.
        shapes = {n: t.shape for n in HISTORY if isinstance(t := self._memories[n], Tensor) and t.dim() > 2}
        for name in shapes:
            self._memories[name] = self._memories[name].flatten(1)
        try:
            return super()._apply(fn, *args, **kwargs)
        finally:
            for name, shape in shapes.items():
                self._memories[name] = self._memories[name].reshape(shape)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles carry values, not graphs (tensors with a graph refuse both), nor spare buffers.
        state = dict(self.__dict__)
        recorded = [name for name in ("v_seq", "state_seqs") if name in state]
        memories, recordings = self._spikede.log.to_send(
            [list(self._memories.values()), [state[name] for name in recorded]]
        )
        state["_memories"] = dict(zip(self._memories, memories, strict=True))
        state.update(zip(recorded, recordings, strict=True))
        return state

    def __reduce__(self) -> Any:
        from spikede_spikingjelly.classes import empty

        return empty, (self.native_class,), self.__getstate__()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__()

    def _replicate_for_data_parallel(self) -> FractionalNode:
        replica = super()._replicate_for_data_parallel()
        replica._memories = dict(self._memories)
        replica.__dict__["_spikede"] = self._spikede.replica()  # replicas run side by side
        return replica


def _no_more(node: FractionalNode, args: Any, kwargs: Any) -> None:
    if args or kwargs:
        raise TypeError(
            f"{node.native_class.__name__} takes one input, got {1 + len(args)} and {sorted(kwargs)}."
        )


def _refuse_exchange(node: FractionalNode) -> None:
    """An exchange with hardware asks for ``isinstance`` and then reads numbers: of an integer neuron.

    Raises:
        ExportError: if the property that calls this is read by SpikingJelly's exchange with Lynxi or Lava.
    """
    reader = str(sys._getframe(2).f_globals.get("__name__", ""))
    if reader.startswith("spikingjelly.") and reader.endswith(("lynxi_exchange", "lava_exchange")):
        raise ExportError(
            f"the fractional {node.native_class.__name__} cannot be handed to {reader.rpartition('.')[2]}: "
            "the hardware knows integer neurons only and would get one; call restore_native(model) first to "
            "hand over the integer model."
        )
