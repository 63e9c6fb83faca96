"""The conversion between native and fractional SpikingJelly neurons."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from spikingjelly.activation_based import base, functional
from torch import Tensor, nn

from spikede_plugins.adapter import Adapter, Support
from spikede_plugins.engine import FRESH, FractionalOperator, History, HistoryLog
from spikede_plugins.engine.choice import engine_of
from spikede_plugins.engine.rows import Carried, Snapshot
from spikede_plugins.errors import OptionError, UnsupportedNeuronError
from spikede_plugins.surrogate import Surrogate, is_step
from spikede_plugins.tree import copy_of_state
from spikede_spikingjelly.classes import from_native, to_native
from spikede_spikingjelly.edits import left
from spikede_spikingjelly.node import FractionalNode
from spikede_spikingjelly.state import HISTORY, native_memories, pack, unpack
from spikede_spikingjelly.support import dynamics_of, is_neuron, support_of

#: Memories that are no state of their own: a recording, and the constant that a run from a reset starts at.
_DERIVED = ("v_seq", "history_start")


class SpikingJellyAdapter(Adapter):
    """Knows SpikingJelly's neurons, in every release that has ``spikingjelly.activation_based``."""

    name = "spikingjelly"

    def is_neuron(self, module: nn.Module) -> bool:
        return is_neuron(module)

    def is_fractional(self, module: nn.Module) -> bool:
        return isinstance(module, FractionalNode)

    def support(self, module: nn.Module) -> Support:
        return support_of(module)

    def to_fractional(self, module: nn.Module, operator: FractionalOperator) -> nn.Module:
        dynamics = dynamics_of(module)
        if dynamics is None:
            found = support_of(module)
            raise UnsupportedNeuronError(f"{found.kind} has no fractional form: {found.reason}.")
        return from_native(module, operator, dynamics)

    def to_native(self, module: nn.Module) -> nn.Module:
        return to_native(_fractional(module))

    def operator(self, module: nn.Module) -> FractionalOperator:
        return _fractional(module).fractional

    def engine(self, module: nn.Module, operator: FractionalOperator) -> str:
        node: Any = module
        dynamics = node._spikede.dynamics if isinstance(module, FractionalNode) else dynamics_of(module)
        if dynamics is not None and node._step_mode == "m":
            dynamics = dynamics.in_sequence(module, node.__dict__.get("_store_v_seq", False))
        scans = dynamics is not None and dynamics.scannable(module)
        return engine_of(operator, dynamics.elementwise(module) if dynamics is not None and scans else None)

    def reset_state(self, module: nn.Module) -> None:
        if isinstance(module, base.MemoryModule):
            module.reset()

    def use_surrogate(self, module: nn.Module, surrogate: Surrogate) -> None:
        node: Any = _fractional(module)
        if not is_step(node.surrogate_function):
            raise OptionError(
                f"the surrogate of {node.native_class.__name__} is no step but "
                f"{type(node.surrogate_function).__name__}, which is part of what the neuron computes."
            )
        node._spikede.surrogate = (node.surrogate_function,)
        node.surrogate_function = Surrogate(surrogate.name, surrogate.alpha)

    def carry_state(self, module: nn.Module, operator: FractionalOperator) -> None:
        node: Any = _fractional(module)
        node._modules["fractional"] = operator
        node.reset()

    def state(self, module: nn.Module) -> dict[str, Tensor]:
        node: Any = module
        found = {n: v for n, v in node._memories.items() if isinstance(v, Tensor) and n not in _DERIVED}
        if isinstance(module, FractionalNode):
            traces = unpack(node.fractional, *(node._memories[name] for name in HISTORY)).traces
            if traces is not None:
                found["traces"] = traces
        return found

    def state_at_start(self, module: nn.Module) -> dict[str, Tensor]:
        node: Any = module
        start = {}
        for name, value in self.state(module).items():
            number = node._memories_rv.get(name)
            start[name] = torch.full_like(value, 0.0 if number is None else number)
        return start

    def set_state(self, module: nn.Module, state: dict[str, Tensor]) -> None:
        node: Any = module
        own = {name: value for name, value in state.items() if name != "traces"}
        node._memories.update(own)
        if isinstance(node, FractionalNode):
            v, rv = state["v"], node._memories_rv["v"]
            start = torch.full((), rv, dtype=v.dtype, device=v.device)
            traces = state.get("traces")
            if traces is not None:
                start = start.expand(v.shape)
            past = pack(History(state.get("history"), start, traces), None)
            node._memories.update(zip(HISTORY, past, strict=True))

    def carries_state(self, module: nn.Module) -> bool:
        if is_neuron(module) or isinstance(module, FractionalNode):
            return isinstance(module, base.MemoryModule)
        # Of other layers those with plain variables (filters); a container of neurons must not hide them.
        if not isinstance(module, base.MemoryModule) or list(module.children()):
            return False
        starts = module._memories_rv.values()
        return bool(starts) and all(type(number) in (int, float) for number in starts)

    def snapshot(self, module: nn.Module) -> Snapshot:
        node: Any = module
        variables = {n: value for n, value in native_memories(node).items() if n != "v_seq"}
        if not isinstance(module, FractionalNode) or not isinstance(node._memories["history"], Tensor):
            return Snapshot(variables)
        history = unpack(node.fractional, *(node._memories[name] for name in HISTORY))
        return Snapshot(variables, (Carried(history, node._spikede.log),))

    def restore(self, module: nn.Module, snapshot: Snapshot) -> None:
        node: Any = module
        node._memories.update(snapshot.variables)
        if isinstance(module, FractionalNode):
            past = snapshot.pasts[0] if snapshot.pasts else Carried(FRESH, HistoryLog())
            node._memories.update(zip(HISTORY, pack(past.history, None), strict=True))
            node._spikede.log = past.log
            node._spikede.left = left(node)

    def start_values(self, module: nn.Module) -> dict[str, float | Tensor]:
        node: Any = module
        return {name: value for name, value in node._memories_rv.items() if value is not None}

    def sequence_obstacle(self, module: nn.Module) -> str:
        return ""

    def stateful_layers(self, model: nn.Module) -> list[str]:
        inside: set[int] = set()
        found = []
        for path, module in model.named_modules():
            if is_neuron(module) or isinstance(module, FractionalNode):
                inside.update(map(id, module.modules()))
            elif isinstance(module, base.MemoryModule) and id(module) not in inside:
                found.append(f"{path or '(the model)'} ({type(module).__name__})")
        return found

    def fold_time(self, model: nn.Module) -> None:
        functional.set_step_mode(model, "s")

    def run_sequence(self, module: nn.Module, operator: FractionalOperator, x_seq: Tensor) -> Tensor:
        node: Any = _fractional(module)
        own = node.fractional
        node._modules["fractional"] = operator
        node.reset()
        node.step_mode = "m"
        try:
            spikes: Tensor = node(x_seq)
        finally:
            node.reset()
            node._modules["fractional"] = own  # the order is another module's: it must not be found here
        return spikes

    def stepping(self, module: nn.Module, operator: FractionalOperator) -> nn.Module:
        alone: Any = copy_of_state(_fractional(module))
        alone._modules["fractional"] = operator
        alone.step_mode = "s"
        alone.reset()
        return alone

    def finish(self, model: nn.Module, replaced: Sequence[nn.Module], added: Sequence[nn.Module]) -> None:
        for module in model.modules():
            _rewire(module)
        # Some releases remember which modules of a net to reset; nets nested in this one do so too.
        forget = getattr(functional, "invalidate_reset_cache", None)
        if forget is not None:
            for module in model.modules():
                forget(module)
        # So does a net that ``model`` is a part of, which cannot be found from here: forget all of them.
        cache = getattr(getattr(functional, "net_config", None), "_RESET_MODULE_CACHE", None)
        if cache is not None:
            cache.clear()


def _fractional(module: nn.Module) -> FractionalNode:
    if not isinstance(module, FractionalNode):
        raise TypeError(f"expected a FractionalNode of SpikingJelly, got {type(module).__name__}.")
    return module


def _rewire(module: nn.Module) -> None:
    """``memopt.checkpoint_module`` keeps a function of the layer it wraps: make it one of the new layer."""
    wrapped = module._modules.get("_checkpoint_wrapped_module")
    call: Any = module.__dict__.get("checkpoint_fn")
    if wrapped is None or not isinstance(call, functools.partial):
        return
    if "functional_forward" in call.keywords:
        given = {**call.keywords, "functional_forward": base.to_functional_forward(wrapped)}
        module.__dict__["checkpoint_fn"] = functools.partial(call.func, *call.args, **given)
