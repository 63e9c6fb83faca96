"""Which engine runs what, and why: for reports and ``spikede doctor``.

| engine | serves |
|---|---|
| fused CPU (numba) | sequences of affine neurons, steps of Leaky, history sums of all other single steps |
| fused GPU (Triton) | sequences of affine neurons |
| torch | everything, on every device |
"""

from __future__ import annotations

from collections.abc import Iterable

from spikede_plugins.engine import cpu, gpu
from spikede_plugins.engine.operator import FractionalOperator
from spikede_plugins.engine.scan import ElementwiseNeuron, can_scan

_AFFINE = "whole sequences of affine neurons (IF, LIF, parametric LIF), float32 and float64"


def engines() -> list[tuple[str, bool, str]]:
    """Every engine: its name, whether it is active, and what it serves or why it is off."""
    no_numba, no_triton, not_kept = cpu.missing(), gpu.missing(), cpu.not_kept()
    compiled = f"; compiled anew in every process: {not_kept}" if not_kept else ""
    return [
        ("fused CPU (numba)", not no_numba, no_numba or f"{_AFFINE}; history sums of single steps{compiled}"),
        ("fused GPU (Triton)", not no_triton, no_triton or _AFFINE),
        ("torch", True, "every neuron, order and device that the others do not serve"),
    ]


def say_if_slow(operators: Iterable[FractionalOperator]) -> None:
    """Say once what neurons with these operators miss where the fused CPU engine is not available.

    Where a GPU engine is, nothing is said before something runs on the CPU (``cpu.available``).
    """
    why = cpu.missing()
    if why and gpu.missing() and any(can_scan(each) or each.steps_in_blocks for each in operators):
        cpu.say_slow(why)


def engine_of(
    operator: FractionalOperator, neuron: ElementwiseNeuron | None, *, whole_steps: bool = False
) -> str:
    """What runs a neuron layer with this operator, as reports show it.

    Args:
        operator: order, solver, memory, step size.
        neuron: the neuron as the scan takes it; None for one that goes step by step.
        whole_steps: whether a kernel can take a whole step of it, charge and firing (``Step.fire``).
    """
    if neuron is not None and can_scan(operator):
        if neuron.code is None:
            return "torch"
        kinds = [kind for kind, engine in (("CPU", cpu), ("GPU", gpu)) if not engine.missing()]
        if not kinds:
            return "torch (no numba)" if not cpu.installed() else "torch (numba fails, see spikede doctor)"
        wide = ", wide channels only" if operator.order.channel_dim is not None else ""
        return f"fused {' and '.join(kinds)}{wide}"
    if operator.steps_in_blocks and not cpu.missing():
        return "fused CPU, step by step" if whole_steps else "torch, fused CPU history sums"
    return "torch, step by step"
