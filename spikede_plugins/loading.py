"""Loading a checkpoint with learned orders: all of it, or nothing.

``load_state_dict`` copies one tensor after the other and raises at the end, when all that fits is loaded. An
order that is damaged, or that the model has no place for, would leave other weights beside old orders; so a
model with fractional orders looks at all of them before the first tensor is copied.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from spikede_plugins.errors import LoadError
from spikede_plugins.orders import LEARNED, FractionalOrder


def watch_loading(model: nn.Module) -> None:
    """Have ``model`` check the orders of a checkpoint before it loads, if it has orders; else no more."""
    hooks = model._load_state_dict_pre_hooks
    present = [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is _check_orders]
    if not any(isinstance(module, FractionalOrder) for module in model.modules()):
        for key in present:
            del hooks[key]
    elif not present:
        model.register_load_state_dict_pre_hook(_check_orders)


def _check_orders(
    model: nn.Module, state_dict: Any, prefix: str, local_metadata: Any, _: Any, missing_keys: list[str],
    *rest: Any,
) -> None:  # fmt: skip
    unfit: dict[str, str] = {}
    without_place: dict[str, str] = {}
    missing: dict[str, str] = {}
    found = False
    for path, order in model.named_modules(remove_duplicate=False):
        if not isinstance(order, FractionalOrder):
            continue
        for name in LEARNED:
            key = f"{prefix}{path}.{name}" if path else f"{prefix}{name}"
            value, present = state_dict.get(key), key in state_dict
            learned = order._parameters.get(name) is not None
            found |= present
            if learned and not present:
                missing[key] = (
                    "learned in this model, but missing in the checkpoint, which has others; pass "
                    "strict=False to keep the model's own"
                )
            elif learned and (problem := order.unfit(name, value)):
                unfit[key] = problem
            elif present and not learned:
                without_place[key] = (
                    f"learned in the checkpoint, but fixed in this model ({order.describe()}); convert with "
                    "learn_alpha=True to take it over, or pass strict=False to keep the model's own"
                )
    if not found:  # a checkpoint of the integer model
        return
    missing_keys += missing
    problems = {**unfit, **without_place, **missing} if _is_strict() else unfit
    if problems:
        listed = "\n".join(f"  {key}: {problem}." for key, problem in problems.items())
        raise LoadError(
            f"the checkpoint does not fit the orders of {type(model).__name__}; nothing of it was loaded:\n"
            f"{listed}"
        )


def _is_strict() -> bool:
    """Whether ``load_state_dict`` was asked to be strict: it keeps that to itself until the end."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is nn.Module.load_state_dict.__code__:
            return bool(frame.f_locals.get("strict", False))
        frame = frame.f_back  # type: ignore[assignment]
    return False
