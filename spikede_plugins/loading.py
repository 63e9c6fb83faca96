"""Loading a checkpoint of a fractional model: all of it, or nothing.

``load_state_dict`` copies one tensor after the other and raises at the end, when all that fits is loaded. An
order that is damaged, or that the model has no place for, would leave other weights beside old orders; so a
model with fractional orders looks at all of them, and at the settings of its layers, before the first tensor
is copied.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from spikede_plugins.errors import LoadError
from spikede_plugins.orders import LEARNED, FractionalOrder
from spikede_plugins.selection import show
from spikede_plugins.settings import (
    EXTRA_STATE,
    HOW,
    SettingsTravel,
    is_strict,
    settings_are_ignored,
    unpack,
    warn_kept,
)

#: What wrappers put into the path of a module and leave out of the keys of a checkpoint.
_WRAPPED = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def watch_loading(model: nn.Module, wanted: bool = False) -> None:
    """Have ``model`` check the orders and settings of a checkpoint before it loads; without any, no more.

    Args:
        model: a model, converted or restored.
        wanted: check also without any: the model was converted with orders of 1, which left it as it was.
    """
    hooks = model._load_state_dict_pre_hooks
    present = [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is _check_orders]
    if not wanted and not any(isinstance(m, (FractionalOrder, SettingsTravel)) for m in model.modules()):
        for key in present:
            del hooks[key]
    elif not present:
        model.register_load_state_dict_pre_hook(_check_orders)


@dataclass
class _Findings:
    """What does not fit, by key (orders) or by layer (settings).

    Attributes:
        unfit: orders whose values cannot be loaded at all.
        misplaced: orders that are learned on one side only.
        missing: learned orders of the model that the checkpoint lacks.
        unlike: settings that differ.
        absent: layers that are fractional on one side only.
        idle: keys of settings that differ.
    """

    unfit: dict[str, str] = field(default_factory=dict)
    misplaced: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    unlike: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    idle: list[str] = field(default_factory=list)


def _key(state_dict: Any, prefix: str, path: str, name: str) -> str:
    """The key of an entry of the module at ``path``, as this checkpoint spells it."""
    key = f"{prefix}{path}.{name}" if path else f"{prefix}{name}"
    if key not in state_dict:
        for part in _WRAPPED:
            path = path.replace(part, "")
        plain = f"{prefix}{path}.{name}" if path else f"{prefix}{name}"
        return plain if plain in state_dict else key
    return key


def _check_orders(
    model: nn.Module, state_dict: Any, prefix: str, local_metadata: Any, _: Any, missing_keys: list[str],
    *rest: Any,
) -> None:  # fmt: skip
    extra = [key for key in state_dict if key.startswith(prefix) and key.endswith(EXTRA_STATE)]
    saved = {key: theirs for key in extra if (theirs := unpack(state_dict[key])) is not None}
    found = _Findings()
    fixed = _compare_settings(model, state_dict, prefix, saved, found)
    some = _compare_orders(model, state_dict, prefix, fixed, found)
    if not some:  # a checkpoint of the integer model
        found.misplaced.clear()
        found.missing.clear()
    missing_keys += found.missing
    strict = is_strict()
    if settings_are_ignored():
        # An order that is learned on one side only is a setting as well: the model keeps its own.
        foreign = tuple(key.removesuffix(EXTRA_STATE) for key in saved if _layer(key) in found.absent)
        found.idle = [key for key in state_dict if key in saved or key in found.misplaced]
        found.idle += [key for key in state_dict if foreign and key not in saved and key.startswith(foreign)]
        missing_keys[:] = [key for key in missing_keys if key not in found.missing]
        for group in (found.unlike, found.absent, found.misplaced, found.missing):
            group.clear()
    problems = dict(found.unfit)
    settings: dict[str, str] = {}
    if strict:
        problems |= {**found.misplaced, **found.missing}
        settings = {**found.unlike, **found.absent}
    if problems or settings:
        listed = "\n".join(
            f"  {show(key)}: {problem}." for key, problem in {**problems, **settings}.items()
        )
        raise LoadError(
            f"the checkpoint does not fit the orders of {type(model).__name__}; nothing of it was loaded:\n"
            f"{listed}" + (f"\n{HOW}" if settings else "")
        )
    if kept := {**found.unlike, **found.absent}:  # misplaced orders are among torch's unexpected keys
        warn_kept(kept)
    for key in found.idle:  # dealt with; the layer itself need not look at them once more
        del state_dict[key]


def _compare_settings(
    model: nn.Module, state_dict: Any, prefix: str, saved: dict[str, dict[str, Any]], found: _Findings
) -> set[str]:
    """Settings of the checkpoint and of the layers; the paths of orders that are fixed in the checkpoint."""
    fixed: set[str] = set()
    here: set[str] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, SettingsTravel):
            continue
        key = _key(state_dict, prefix, path, EXTRA_STATE)
        here.add(key)
        layer = _layer(key)
        theirs = saved.get(key)
        if theirs is not None:
            fixed |= {f"{path}.order.{name}" for name in LEARNED if theirs.get(name) is not None}
            if unlike := module.unlike(theirs):
                found.unlike[layer] = "; ".join(unlike)
                found.idle.append(key)
        elif saved and key not in state_dict:
            found.absent[layer] = "it is an integer neuron in the checkpoint and fractional in this model"
    for key, settings in saved.items():
        if key not in here:
            order = settings.get("alpha")
            text = f"fractional (alpha {'learned' if order is None else order}) in the checkpoint"
            found.absent[_layer(key)] = f"it is {text} and not in this model"
    return fixed


def _layer(key: str) -> str:
    """The path of the layer whose operator has this key for its settings."""
    return key.removesuffix(EXTRA_STATE).rstrip(".").rpartition(".")[0]


def _compare_orders(
    model: nn.Module, state_dict: Any, prefix: str, fixed: set[str], found: _Findings
) -> bool:
    """Learned orders of the checkpoint and of the model; whether the checkpoint has any."""
    some = False
    for path, order in model.named_modules(remove_duplicate=False):
        if not isinstance(order, FractionalOrder):
            continue
        for name in LEARNED:
            key = _key(state_dict, prefix, path, name)
            value, present = state_dict.get(key), key in state_dict
            learned = order._parameters.get(name) is not None
            some |= present
            if learned and not present:
                if f"{path}.{name}" not in fixed:  # a fixed one was compared as a setting
                    found.missing[key] = (
                        "learned in this model, but missing in the checkpoint, which has others; pass "
                        "strict=False to keep the model's own"
                    )
            elif learned and (problem := order.unfit(name, value)):
                found.unfit[key] = problem
            elif present and not learned:
                found.misplaced[key] = (
                    f"learned in the checkpoint, but fixed in this model ({order.describe()}); convert with "
                    "learn_alpha=True to take it over, or pass strict=False to keep the model's own"
                )
    return some
