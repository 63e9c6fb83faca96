"""snnTorch's neurons with a fractional membrane.

A fractional neuron derives from its native class and replaces one thing: the charge of the membrane,

    mem_k = charge(mem) + (gain - 1) (charge(mem) - mem) - sum_{m>=1} (w_m + [m = 1]) u_{k-m}

with ``u`` the deviation of the membranes *as returned* from the one the sequence started with. The native
``forward`` does all the rest: resets and their delay, firing, inhibition, quantisation, synaptic currents,
recurrence, and what is returned. A delayed reset is an impulse at the step it acts in.
"""

from __future__ import annotations

import types
from typing import Any, ClassVar

import snntorch as snn
import torch
from torch import Tensor, nn

from spikede_plugins.engine import (
    FRESH,
    FractionalOperator,
    History,
    HistoryLog,
    RollingStep,
    Step,
    begin_step,
    forget_fired,
    state_dtype,
)
from spikede_plugins.errors import ExportError, OptionTypeError
from spikede_plugins.exporting import check_capture, refuse

from .closures import unwrap, wrap
from .codes import delayed_reset
from .entries import GivenPast, Past
from .pasts import Pasts

#: What a fractional neuron has and its native one has not.
_OWN = ("_pasts", "_step", "_past", "_last", "_entered", "_others")

#: What these neurons hand in and out beside the membrane.
_OTHERS = ("spk", "syn", "syn_exc", "syn_inh")


class FractionalNeuron(snn.SpikingNeuron):
    """The fractional part of a neuron; mixed in before a native snnTorch class.

    The history goes with ``mem``. The tensor that this neuron returned (or holds, with ``init_hidden``), or a
    view of it, continues its sequence, without a graph where ``mem`` has none. So does an edited ``mem``
    (clamped, masked, noised, rounded, cloned, of another dtype, written to in place): it continues the
    sequence that it came from with the changed potential, an impulse that is remembered, and the gradient
    flows through the edit. A new history begins with zeros that are no edit (``init_*``, ``reset_mem``,
    ``reset_hidden``, ``utils.reset``, ``torch.zeros``), with another shape, or with any ``mem`` after a
    reset; and for single samples whose whole state (``syn`` and its like too) is put back to its start. To
    clamp all elements puts no sample back.

    Several sequences may run through a neuron in turn, each with its own ``mem``. An edited one is told by
    its graph or, without one, by its values; a warning says where they do not tell.

    ``mem`` and history are float32 at least, also under autocast. With ``memory_reset="spike"`` a neuron that
    fires forgets its history in the step in which its reset acts: the step of the spike with
    ``reset_delay=False``, the next one otherwise.
    """

    native_class: ClassVar[type[nn.Module]]
    fractional: FractionalOperator
    _pasts: Pasts | GivenPast
    _step: Step | RollingStep | None
    _past: Past | None
    _last: Tensor | None
    _entered: Tensor | None
    _others: tuple[str, ...]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise OptionTypeError(
            f"{type(self).__name__} is made from a native neuron: "
            f"convert_to_fractional(snntorch.{self.native_class.__name__}(...), alpha=0.7)."
        )

    # -- one step ---------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One time step ``[B, ...]``, with the arguments and results of the native neuron.

        Raises:
            OptionError: if per-channel orders do not fit the input.
            OptionTypeError: if the input is a nested tensor.
            StateError: if the membrane comes from a checkpoint with ``use_reentrant=True``.
            ExportError: if the call is one of an export to NIR, which would write an integer neuron, or if it
                is captured as a program (torch.export, ONNX, TorchScript) that would hold the state as a
                constant.
        """
        if self.fractional.is_native:
            return super().forward(*args, **kwargs)
        _refuse_export(self)
        x = args[0] if args else kwargs.get("input_")
        if isinstance(x, Tensor) and x.is_nested:
            raise OptionTypeError(_NESTED.format(type(self).__name__))
        check_capture(self, self.native_class.__name__, x, self.fractional.captures)
        _put(self, "_last", self.mem)
        try:
            out = self._fused(*args, **kwargs)
            if out is not None:
                return out
            out = super().forward(*args, **kwargs)
            if self._past is not None:
                self._remember(self._past, out)
        finally:
            for name in ("_step", "_past", "_last"):
                _put(self, name, None)
        return out

    def _fused(self, *args: Any, **kwargs: Any) -> Any:
        """The whole step by a kernel, for neurons that have one; None to take the native way."""
        return None

    def mem_reset(self, mem: Tensor) -> Tensor:
        # The native forward asks for the reset once a step, when it has settled which membrane it starts
        # from and before it charges.
        if not self.fractional.is_native:
            step = self._step
            if step is None or step.v is not mem:  # else it began on the fused way
                step = self._begin_step(mem)
            mem = self.mem = step.v
        return super().mem_reset(mem)

    def reset_mem(self) -> Any:
        """The native reset: what is handed in next begins a new history, unless it is known."""
        self._pasts.reset()
        return super().reset_mem()

    def handed(self) -> tuple[Tensor, ...]:
        """The variables that are handed in and out beside the membrane."""
        buffers = self._buffers
        return tuple(buffers[name] for name in self._others)  # type: ignore[misc]

    def _begin_step(self, mem: Tensor) -> Step | RollingStep:
        past = self._pasts.find(mem, self)
        if past is None:
            past = Past(FRESH, HistoryLog())
        mem = mem.to(state_dtype(mem))
        history = _like(past.history, mem)
        twice = self.reset_mechanism == "zero"  # some neurons then charge from two membranes
        step = begin_step(self.fractional, mem, history, past.log, several=twice)
        _put(self, "_step", step)
        _put(self, "_past", past._replace(history=history))
        return step

    def _base_state_function(self, input_: Tensor) -> Any:
        return self._charged(super()._base_state_function, input_)

    def _base_state_reset_zero(self, input_: Tensor) -> Any:
        return self._charged(super()._base_state_reset_zero, input_)

    def _charged(self, native: Any, input_: Tensor) -> Any:
        """The native states after the charge, the last of them, the membrane, charged fractionally.

        Native code that resets to zero may charge twice a step, or from a membrane that it has reset itself.
        """
        step, past = self._step, self._past
        if step is None or past is None:  # the integer neuron
            return native(input_)
        base = self.mem
        states: list[Any] = []

        def charge(mem: Tensor) -> Tensor:
            if mem is not self.mem:
                self.mem = mem
            states.append(native(input_))
            last = states[-1]
            return last[-1] if isinstance(last, tuple) else last

        mem, history = step.charge(charge, None if base is step.v else base, affine=True)
        if base is not self.mem:
            self.mem = base
        if history.start is step.v:  # the user may write to the tensor that the sequence started from
            history = history._replace(start=step.v.clone())
        _put(self, "_past", past._replace(history=history))
        first = states[0]
        return (*first[:-1], mem) if isinstance(first, tuple) else mem

    def _remember(self, past: Past, out: Any) -> None:
        history = past.history
        if self.fractional.memory_reset == "spike":
            delayed = getattr(self, "reset_delay", True) or isinstance(self, snn.RSynaptic)
            spike = self.reset if delayed else (out[0] if isinstance(out, tuple) else out)
            history = forget_fired(history, self.mem, spike)
        self._pasts.add(self.mem, past._replace(history=history), self.handed())

    def __prepare_scriptable__(self) -> Any:
        if not self.fractional.is_native:
            refuse(self.native_class.__name__, "torch.jit.script")
        return self

    # -- moving and copying -----------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        past = self._pasts.find(self.mem)
        result = super()._apply(fn, recurse)
        if past is not None:
            self._pasts.add(self.mem, past._replace(history=past.history.each(fn)), self.handed())
        return result

    def _replicate_for_data_parallel(self) -> Any:
        """A replica with a state of its own: natively its ``state_function`` is that of the original."""
        replica = super()._replicate_for_data_parallel()
        for key, value in list(vars(replica).items()):
            if _is_method_of(self, value):
                vars(replica)[key] = types.MethodType(value.__func__, replica)
        _begin(replica)
        return replica

    def __getstate__(self) -> dict[str, Any]:
        """A state that can be copied and pickled after a forward pass too: the values, not the graph."""
        past = self._pasts.find(self.mem)
        if self._entered is not None:
            self.reset  # noqa: B018 - a fused step leaves it to whoever asks
        state = {key: value for key, value in vars(self).items() if key not in _OWN}
        state["_buffers"] = {key: _without_graph(value) for key, value in self._buffers.items()}
        if past is not None and past.history.rows is not None:
            state["_carried"] = Past(past.log.to_send(past.history), past.log.copy())
        return {key: wrap(_without_graph(value)) for key, value in state.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        carried = state.pop("_carried", None)
        super().__setstate__({key: unwrap(value) for key, value in state.items()})
        _begin(self)
        if carried is not None:
            self._pasts.add(self.mem, carried, self.handed())

    def __reduce__(self) -> Any:
        return _empty, (self.native_class,), self.__getstate__()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__()


def _put(neuron: nn.Module, name: str, value: Any) -> None:
    """Set an attribute that is no parameter, buffer or module, without the time it takes to find that out."""
    object.__setattr__(neuron, name, value)


def _like(history: History, mem: Tensor) -> History:
    rows = history.rows
    if rows is None or (rows.dtype == mem.dtype and rows.device == mem.device):
        return history
    return history.each(lambda t: t.to(mem))


def _without_graph(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) and value.grad_fn is not None else value


def _is_method_of(module: nn.Module, value: Any) -> bool:
    return isinstance(value, types.MethodType) and value.__self__ is module


def _begin(neuron: nn.Module) -> None:
    vars(neuron).update(_pasts=Pasts(), _step=None, _past=None, _last=None, _entered=None)
    vars(neuron)["_others"] = tuple(name for name in _OTHERS if name in neuron._buffers)


_NESTED = (
    "{} takes dense inputs: the history of a nested (jagged) tensor cannot be kept. Pad the samples, "
    "torch.nested.to_padded_tensor(x, 0.0), and put those that have ended back with reset_rows(model, rows)."
)


def _refuse_export(neuron: nn.Module) -> None:
    """``snntorch.export_nir`` takes a fractional Leaky for a Leaky; nirtorch runs the model to trace it."""
    if torch.compiler.is_compiling():
        return
    if getattr(nn.Module.__call__, "__module__", "").startswith("nirtorch"):
        raise ExportError(
            f"{type(neuron).__name__} cannot be exported: NIR has no fractional neuron and would hold an "
            "integer one; call restore_native(model) first to export the integer model."
        )


class FractionalLeaky(FractionalNeuron, snn.Leaky):
    """``Leaky``: charge(mem) = beta mem + x.

    With one beta, a fixed threshold, a delayed reset and a surrogate that the engine knows by name, a step is
    one fused kernel; else the native code with a fractional charge. Spikes and membrane are then two results
    of one operation: the gradient of a returned ``mem`` itself (``mem.retain_grad()``) has no part that comes
    through the spikes of its own step. Gradients of inputs, earlier steps and parameters are the same.
    """

    native_class = snn.Leaky

    def _fused(self, input_: Tensor, mem: Tensor | None = None) -> Any:
        given = self.mem if mem is None else mem
        if (
            torch.compiler.is_compiling()
            or self.fractional.captures
            or (mem is not None and self.init_hidden)
            or not isinstance(given, Tensor)
            or given.shape != input_.shape
            or given.dtype != torch.float32
            or not input_.is_floating_point()
        ):
            return None
        code = delayed_reset(self)
        if code is None or self.beta.numel() != 1:
            return None
        step = self._begin_step(given)
        past = self._past
        if isinstance(step, RollingStep) or not step.fires or past is None:
            return None
        leak = self.beta.clamp(0, 1).reshape(()).to(given)
        spikes, after, history = step.fire(code, input_.to(given.dtype), leak)
        if history.start is step.v:  # the user may write to the tensor that the sequence started from
            history = history._replace(start=step.v.clone())
        _put(self, "_entered", given.detach())
        # The user may write to the membrane, and the backward pass needs it as it was: he gets a copy.
        mem = self.mem = after.clone()
        self._pasts.add(mem, past._replace(history=history), (), after.detach())
        return spikes if self.init_hidden and not self.output else (spikes, mem)

    @property
    def reset(self) -> Tensor:
        """Where the newest step reset the membrane that it was given, as the native code leaves it."""
        if self._entered is not None:  # a fused step leaves it to whoever asks
            self.reset = (self._entered > self.threshold).to(self._entered.dtype)
        try:
            return vars(self)["reset"]  # type: ignore[no-any-return]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has taken no step, it has no reset.") from None

    @reset.setter
    def reset(self, value: Tensor) -> None:
        attributes = self.__dict__
        attributes.update(reset=value, _entered=None)


class FractionalLapicque(FractionalNeuron, snn.Lapicque):
    """``Lapicque``: charge(mem) = (1 - dt / RC) mem + dt x / C."""

    native_class = snn.Lapicque


class FractionalSynaptic(FractionalNeuron, snn.Synaptic):
    """``Synaptic``: syn' = alpha syn + x (integer), charge(mem) = beta mem + syn'."""

    native_class = snn.Synaptic


class FractionalAlpha(FractionalNeuron, snn.Alpha):
    """``Alpha``: two integer currents, charge(mem) = tau_alpha (syn_exc' + syn_inh').

    The native membrane has no memory of its own, so its rate is ``charge - mem``: relaxation to the currents.
    """

    native_class = snn.Alpha


class FractionalRLeaky(FractionalNeuron, snn.RLeaky):
    """``RLeaky``: charge(mem) = beta mem + x + recurrent(spk)."""

    native_class = snn.RLeaky


class FractionalRSynaptic(FractionalNeuron, snn.RSynaptic):
    """``RSynaptic``: syn' = alpha syn + x + recurrent(spk) (integer), charge(mem) = beta mem + syn'."""

    native_class = snn.RSynaptic


#: The fractional class of each native one; subclasses are added as they are met.
FRACTIONAL: dict[type[nn.Module], type[FractionalNeuron]] = {
    cls.native_class: cls
    for cls in (
        FractionalLeaky,
        FractionalLapicque,
        FractionalSynaptic,
        FractionalAlpha,
        FractionalRLeaky,
        FractionalRSynaptic,
    )
}


def fractional_class(native_class: type[nn.Module]) -> type[FractionalNeuron]:
    """The fractional class of a native neuron class or of a subclass of one."""
    if native_class not in FRACTIONAL:
        names = {"native_class": native_class, "__module__": __name__, "__doc__": native_class.__doc__}
        made = type(f"Fractional{native_class.__name__}", (FractionalNeuron, native_class), names)
        FRACTIONAL[native_class] = made
    return FRACTIONAL[native_class]


def _empty(native_class: type[nn.Module]) -> nn.Module:
    cls = fractional_class(native_class)
    return cls.__new__(cls)


def _rebuilt(module: nn.Module, cls: type[nn.Module], leave: tuple[str, ...]) -> nn.Module:
    """A ``cls`` with the contents of ``module``: own containers, the same parameters, hooks and settings."""
    new = cls.__new__(cls)
    for key, value in vars(module).items():
        if key in leave:
            continue
        if key in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            value = value.copy()
        elif _is_method_of(module, value):  # state_function
            value = types.MethodType(value.__func__, new)
        vars(new)[key] = value
    return new


def from_native(module: nn.Module, operator: FractionalOperator) -> FractionalNeuron:
    """A fractional neuron in its start state, with the native one's parameters, hooks and settings."""
    new: Any = _rebuilt(module, fractional_class(type(module)), ())
    _begin(new)
    new.fractional = operator
    new.reset_mem()
    return new


def to_native(module: Any) -> nn.Module:
    """The native neuron again, in its start state."""
    new: Any = _rebuilt(module, module.native_class, _OWN)
    del new._modules["fractional"]
    if "_native_spike_grad" in vars(new):
        new.spike_grad = vars(new).pop("_native_spike_grad")
    new.reset_mem()
    return new
