"""A pytest plugin: every neuron that a test constructs is a fractional one, of order 1 and learned.

At order 1 a fractional neuron gives what the native one gives, to the last bit, and a learned order keeps it
from being the native neuron itself. So a framework's own tests, which know nothing of fractions, say whether
its fractional neurons behave like the neurons they replace:

    python -m pytest -p replaced_neurons path/to/the/framework/tests

with this folder on ``PYTHONPATH``. ``REPLACED_NEURONS_LOG`` names a file that counts the neurons replaced.
"""

from __future__ import annotations

import functools
import os
import threading
from collections import Counter
from typing import Any

import torch
from torch import nn

from spikede_plugins import convert_to_fractional
from spikede_plugins.errors import SpikedeError

REPLACED: Counter[str] = Counter()
_building = threading.local()


def _replacing(init: Any) -> Any:
    """``__init__`` after which the neuron is a fractional one, if it has such a form."""

    @functools.wraps(init)
    def constructor(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        outermost = not getattr(_building, "active", False)
        _building.active = True
        try:
            init(self, *args, **kwargs)
            if outermost and not torch.compiler.is_compiling():
                _replace(self)
        finally:
            if outermost:
                _building.active = False

    return constructor


def _replace(neuron: nn.Module) -> None:
    name = type(neuron).__name__
    try:
        convert_to_fractional(neuron, alpha=1.0, learn_alpha=True, inplace=True)
    except SpikedeError as error:
        REPLACED[f"left: {name}: {str(error).splitlines()[0]:.90}"] += 1
        return
    # The order stays out of the way of tests that count parameters and gradients.
    neuron.fractional.requires_grad_(False)
    REPLACED[name] += 1


def _watch(root: type, package: str) -> None:
    """Replace the neurons of every class below ``root`` that is defined in ``package``."""
    pending, seen = [root], set()
    while pending:
        kind = pending.pop()
        if kind in seen:
            continue
        seen.add(kind)
        pending += kind.__subclasses__()
        if "__init__" in vars(kind) and kind.__module__.startswith(package):
            kind.__init__ = _replacing(kind.__init__)  # type: ignore[misc]


def pytest_configure(config: Any) -> None:
    try:
        from spikingjelly.activation_based import base, neuron
    except ImportError:
        pass
    else:
        _watch(base.MemoryModule, neuron.__name__)
    try:
        import snntorch
    except ImportError:
        pass
    else:
        _watch(snntorch.SpikingNeuron, "snntorch")


def pytest_unconfigure(config: Any) -> None:
    path = os.environ.get("REPLACED_NEURONS_LOG")
    if path:
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(f"{count:6d}  {name}\n" for name, count in REPLACED.most_common())
