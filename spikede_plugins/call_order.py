"""Which of several orders a neuron takes: the n-th order is that of the n-th neuron that is called.

The order of calls is found by tracing the model symbolically, where it can be traced, else in the first run
(neurons then take their places as they are called). A neuron that is called several times has one order for
all its calls, or, if as many orders are given as there are calls, one for each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from spikede_plugins.errors import OrderError
from spikede_plugins.tree import copy_of_state, without_hooks


def traced_calls(base: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[str] | None:
    """The paths of the neurons of ``base`` in the order of their calls; None if it cannot be traced."""
    if isinstance(base, kinds):
        return ["base"]

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, kinds) or super().is_leaf_module(m, module_qualified_name)

    try:
        model = without_hooks(copy_of_state(base, detached=True))
        graph = Tracer().trace(model)
        # A module may be registered under several paths: the first one is its name here.
        names = {id(module): name for name, module in model.named_modules()}
        called = [model.get_submodule(node.target) for node in graph.nodes if node.op == "call_module"]
        return [names[id(module)] for module in called if isinstance(module, kinds)]
    except Exception:  # control flow that looks at values, unusual containers, ...
        return None


class CallOrder:
    """The places of a model's neurons in a list of orders.

    Args:
        names: the neurons as they are registered.
        calls: the same in the order of their calls, with repetitions; None if that is not known yet.
        count: how many orders there are; None for one that all layers take.

    Attributes:
        labels: what to call each order, as far as that is known.
        by_use: whether each call of a neuron has an order of its own.

    Raises:
        OrderError: if there are neither as many orders as neurons nor as many as calls.
    """

    def __init__(self, names: Sequence[str], calls: Sequence[str] | None, count: int | None) -> None:
        self.names = list(names)
        self.by_use = False
        self.settled = count is None
        self.ranks: list[str] = []
        if count is None:
            self.ranks = list(names)
        elif calls is not None and count == len(calls) > len(names) and set(calls) == set(names):
            self.by_use = True
        elif count != len(names) and (calls is not None or count < len(names)):
            raise OrderError("")
        elif count != len(names):  # how often neurons are called is seen in the first run
            self.by_use = True
        elif calls is not None:
            self.ranks = list(dict.fromkeys(calls))
            self.ranks += [name for name in names if name not in self.ranks]
        self.count = count
        self.calls = list(calls) if calls is not None else None

    @property
    def labels(self) -> list[str]:
        """What to call each order: its neuron, or, while that is not known, its place."""
        if self.by_use:
            if self.calls is None:
                return [f"call {i + 1}" for i in range(self.count or 0)]
            return [use_name(self.calls, i) for i in range(len(self.calls))]
        missing = len(self.names) - len(self.ranks)
        return [*self.ranks, *(f"call {len(self.ranks) + i + 1}" for i in range(missing))]

    def place(self, name: str, call: int) -> int:
        """Which order the ``call``-th neuron call of a step takes, of the neuron ``name``."""
        if self.by_use:
            if self.count is None or call >= self.count:
                raise OrderError(
                    f"{name} is called as neuron {call + 1} of a step, but there are {self.count} orders; "
                    "give one for each neuron, or one for each call of one."
                )
            return call
        if name not in self.ranks:
            self.ranks.append(name)
        return self.ranks.index(name)

    def check(self, called: int) -> None:
        """After a step: as many orders as calls, where each call has one of its own."""
        if self.by_use and called != self.count:
            raise OrderError(
                f"there are {self.count} orders, but {len(self.names)} neurons, called {called} times in a "
                "step; give one order for each neuron, or one for each call."
            )


def use_name(calls: Sequence[str], i: int) -> str:
    """The name of the i-th call: the neuron's, with the number of the call from its second one on."""
    before = list(calls[:i]).count(calls[i])
    return f"{calls[i]} (call {before + 1})" if before else calls[i]
