"""The settings of a fractional layer as they travel with a checkpoint.

A ``state_dict`` holds numbers that are learned. A fixed order, the solver, the memory and the step size are
not among them, and yet the weights were trained for them. So a layer adds its settings to the ``state_dict``
as an extra state: a text (JSON) as a tensor of bytes, since tensors are all that safetensors, averages of
checkpoints and some other readers of a ``state_dict`` can take.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from spikede_plugins.errors import SpikedeWarning

#: The end of the key in a ``state_dict``, as torch spells it.
EXTRA_STATE = "_extra_state"
#: What tells these settings from the extra state of other modules: the version of the form.
_MARK = "spikede_plugins"
_VERSION = 1
#: Fixed orders in a checkpoint and learned ones in the model, in float32 perhaps, count as equal up to this.
_CLOSE = 1e-6

HOW = (
    "Convert the model with the settings of the checkpoint, or load it inside "
    "`with spikede_plugins.ignore_settings():` to keep the settings of the model."
)

_ignored: ContextVar[bool] = ContextVar("spikede_plugins_ignore_settings", default=False)


@contextmanager
def ignore_settings() -> Iterator[None]:
    """Checkpoints made with other settings load in here; the model keeps its own settings.

    Outside of it ``load_state_dict`` refuses a checkpoint whose order, solver, memory, step size or memory
    reset is not the model's (:class:`LoadError`), since its weights were trained for another neuron.

    Example::

        with spikede_plugins.ignore_settings():
            model.load_state_dict(torch.load("checkpoint.pt", weights_only=True))
    """
    token = _ignored.set(True)
    try:
        yield
    finally:
        _ignored.reset(token)


def settings_are_ignored() -> bool:
    """Whether this is inside of :func:`ignore_settings`."""
    return _ignored.get()


def pack(settings: dict[str, Any]) -> Tensor:
    """Settings (numbers, texts, lists and None by name) as a tensor of bytes."""
    text = json.dumps({_MARK: _VERSION, **settings})
    return torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu")


def unpack(value: Any) -> dict[str, Any] | None:
    """The settings in an extra state; None if it holds none of ours, or none that can be read.

    A cast of the bytes to another dtype, or an average over checkpoints of equal settings, is read as well.
    """
    if not isinstance(value, Tensor) or value.dim() != 1 or value.is_complex() or not value.numel():
        return None
    try:
        content = value.detach().to(device="cpu", dtype=torch.float64).round().clamp(0, 255)
        found = json.loads(bytes(content.to(torch.uint8).tolist()))
    except (ValueError, RuntimeError, NotImplementedError):  # no text of ours; meta and fake tensors
        return None
    if not isinstance(found, dict) or _MARK not in found:
        return None
    return {name: content for name, content in found.items() if name != _MARK}


def differences(saved: dict[str, Any], own: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What the settings of a checkpoint and of a model differ in, a phrase each that names both.

    Args:
        saved: the settings in the checkpoint.
        own: the settings of the model; None for what is learned.
        now: the present numbers of what is learned in the model, where they can be read.
    """
    found = []
    for name, value in saved.items():
        if name not in own:  # of a newer form
            continue
        mine = own[name]
        if value == mine or value is None:  # a learned number is loaded, which the keys of it look after
            continue
        if mine is None and (name not in now or _close(value, now[name])):
            continue
        shown = f"learned (now {_show(now[name])})" if mine is None else _show(mine)
        found.append(f"{name} is {_show(value)} in the checkpoint and {shown} in this model")
    return found


def _close(a: Any, b: Any) -> bool:
    first, second = (x if isinstance(x, list) else [x] for x in (a, b))
    if len(first) != len(second):
        if len(first) != 1 and len(second) != 1:
            return False
        first, second = (x * max(len(first), len(second)) if len(x) == 1 else x for x in (first, second))
    return all(abs(x - y) <= _CLOSE for x, y in zip(first, second, strict=True))


def _show(value: Any) -> str:
    if isinstance(value, list):
        items = ", ".join(map(_show, value[:6]))
        return f"[{items}{', ...' if len(value) > 6 else ''}]"
    return f"{value:.6g}" if isinstance(value, float) else repr(value)


class SettingsTravel(nn.Module):
    """A module whose settings are part of its ``state_dict`` and are looked at when one is loaded."""

    #: torch.distributed.checkpoint looks this name up, of a module that FSDP wraps by itself.
    _extra_state = None

    def settings(self) -> dict[str, Any]:
        """The settings by name: numbers, texts and lists of them; None for what is learned."""
        raise NotImplementedError

    def learned_now(self) -> dict[str, Any]:
        """The present numbers of what is None in :meth:`settings`, where they can be read."""
        return {}

    def unlike(self, saved: dict[str, Any]) -> list[str]:
        """What the settings of a checkpoint and of this module differ in, a phrase each."""
        return differences(saved, self.settings(), self.learned_now())

    def get_extra_state(self) -> Tensor:
        return pack(self.settings())

    def set_extra_state(self, state: Any) -> None:
        """Nothing: settings are not taken over from a checkpoint, only compared."""

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:
        # A model looks at the settings of all its layers before (loading.py); this is for a layer taken out.
        saved = unpack(state_dict.get(prefix + EXTRA_STATE))
        unlike = [] if saved is None or settings_are_ignored() else self.unlike(saved)
        if unlike and is_strict():  # torch itself hands True down in any case
            error_msgs.append(f"{prefix[:-1]}: {'; '.join(unlike)}. {HOW}")
        elif unlike:
            warn_kept({prefix[:-1]: "; ".join(unlike)})
        mine: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, mine, unexpected_keys, error_msgs
        )
        # Checkpoints of integer models, and those made before settings travelled, have none.
        missing_keys += [key for key in mine if key != prefix + EXTRA_STATE]


def warn_kept(unlike: dict[str, str]) -> None:
    """Say that a checkpoint of other settings was loaded and the model keeps its own."""
    listed = "; ".join(f"{layer or '(the model itself)'}: {text}" for layer, text in unlike.items())
    warnings.warn(
        f"strict=False loaded a checkpoint that was made with other settings, and the model keeps its own: "
        f"{listed}. Inside `with spikede_plugins.ignore_settings():` nothing is said.",
        SpikedeWarning,
        stacklevel=4,
    )


def is_strict() -> bool:
    """Whether ``load_state_dict`` was asked to be strict: it keeps that to itself until the end."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is nn.Module.load_state_dict.__code__:
            return bool(frame.f_locals.get("strict", False))
        frame = frame.f_back  # type: ignore[assignment]
    return False
