"""When a model is captured as a program (torch.export, ONNX, TorchScript, torch.fx).

A captured program is a function of its inputs alone. The state of a spiking neuron (potential and history)
would be frozen into it as it is in the moment of the capture, and every call would start from there again: a
program that runs and is wrong. So a fractional neuron refuses to be captured, except where its state is an
input and an output (``step_module``) or begins and ends within the call (``sequence_module``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from spikede_plugins.errors import ExportError, StateError


def _older_is_exporting() -> bool:
    """Releases without ``is_exporting`` set this flag in an export (``strict=False``) and nowhere else."""
    return bool(getattr(torch.compiler, "_is_compiling_flag", False))


#: Whether a function transform of torch.func is at work.
_transformed = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)

is_exporting = getattr(torch.compiler, "is_exporting", _older_is_exporting)

_TRACE = "torch.jit.trace (which torch.onnx.export with dynamo=False uses)"
_EXPORT = "torch.export (which torch.onnx.export uses)"
_FX = "torch.fx (which exporters to NIR use)"


def check_capture(neuron: Any, kind: str, x: Any, captures: str, *, fresh: bool = False) -> None:
    """Nothing, unless a call with input ``x`` is being captured in a way that the neuron cannot follow.

    Args:
        neuron, kind: the neuron, and the class name a user knows it by.
        x: the input of the call.
        captures: what the neuron's operator is prepared for: ``"step"``, ``"sequence"`` or nothing.
        fresh: whether this call is a whole sequence that starts from a reset.

    Raises:
        ExportError: if the program would hold the neuron's state as a constant.
        StateError: under a transform of ``torch.func``.
    """
    if type(x) is not Tensor and isinstance(x, fx.Proxy):
        refuse(kind, _FX, _path(x, neuron))
    if not torch.compiler.is_compiling() and _transformed():
        raise StateError(
            f"the fractional {kind} does not run under torch.func transforms (vmap, grad, jvp): its state "
            "and history would have to be transformed as well. Call the models of an ensemble one after the "
            "other, and take gradients with backward() or torch.autograd.grad."
        )
    if torch.jit.is_tracing():
        if captures != "step":
            refuse(kind, _TRACE)
    elif is_exporting() and not fresh and not captures:
        refuse(kind, _EXPORT)


def refuse(kind: str, what: str, path: str = "") -> None:
    """Raise the error of a neuron that ``what`` captures.

    Raises:
        ExportError: always.
    """
    raise ExportError(
        f"{path and path + ': '}the fractional {kind} cannot be captured by {what}: its potential and "
        "history would become constants, and every call would start from them again. Capture "
        "spikede_plugins.step_module(model, x), one step with the state as inputs and outputs, or, with "
        "torch.export, sequence_module(model, x_seq), a whole sequence from a fresh state. A format that "
        "knows integer neurons only (NIR) can hold restore_native(model)."
    )


def _path(x: fx.Proxy, neuron: Any) -> str:
    """The dotted path of the neuron in what torch.fx traces."""
    try:
        return str(x.tracer.path_of_module(neuron))  # type: ignore[attr-defined]
    except (AttributeError, NameError):
        return ""
