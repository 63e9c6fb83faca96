"""Time steps of a fractional node, from a state to a state; the node itself is not changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikede_plugins.engine import can_scan, charge_step, forget_fired, scan
from spikede_plugins.exporting import is_exporting
from spikede_spikingjelly.dynamics import Dynamics, Others
from spikede_spikingjelly.state import State


def step(node: Any, dynamics: Dynamics, x: Tensor, state: State) -> tuple[Tensor, State]:
    """One time step of any neuron: native charge made fractional, native firing and reset."""
    found = _scan(node, dynamics, x.unsqueeze(0), state, keep=False)
    if found is not None:
        return found[0].squeeze(0), found[1]
    dynamics.check(node, x.shape)
    cell = dynamics.cell(node, x.to(state.v.dtype), state.others)
    charged, history = charge_step(
        node.fractional, cell.charge, state.v, state.history, node._spikede.log, affine=dynamics.affine
    )
    output, v, others = cell.fire(charged)
    if node.fractional.memory_reset == "spike":
        history = forget_fired(history, v, dynamics.fired(node, charged, output))
    return _as_output(output, x), State(v, others, history)


def _scan(
    node: Any, dynamics: Dynamics, x_seq: Tensor, state: State, keep: bool
) -> tuple[Tensor, State, Tensor | None] | None:
    """Time steps ``[T, *shape]`` by the scan engine; None for neurons and options that it does not serve.

    A single step takes this way as well: the same sums in the same order give the same bits.
    """
    if not can_scan(node.fractional) or not dynamics.scannable(node):
        return None
    if is_exporting():  # a program of torch's own operations: ONNX knows no other, and it loads anywhere
        return None
    cell = dynamics.elementwise(node)
    # A captured graph takes the scan as one operation or, without a code for it, step by step.
    if cell is None or (cell.code is None and torch.compiler.is_compiling()):
        return None
    spikes, v, history, v_seq = scan(
        node.fractional, cell, x_seq, state.v, state.history, node._spikede.log, keep_v=keep
    )
    return _as_output(spikes, x_seq), State(v, state.others, history), v_seq


def run(
    node: Any, dynamics: Dynamics, x_seq: Tensor, state: State, keep: bool
) -> tuple[Tensor, State, Tensor | None, list[Others]]:
    """All time steps; with ``keep`` also the potentials ``[T, *shape]`` and other variables of each."""
    found = _scan(node, dynamics, x_seq, state, keep)
    if found is not None:
        return *found, []
    outputs, potentials, others = [], [], []
    for x in x_seq:
        output, state = step(node, dynamics, x, state)
        outputs.append(output)
        if keep:
            potentials.append(state.v)
            others.append(state.others)
    return torch.stack(outputs), state, torch.stack(potentials) if keep else None, others


def _as_output(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.dtype) if x.is_floating_point() else values
