"""Runs a solver over time: one step of any neuron, or a scan over T steps of elementwise ones."""

from spikede_plugins.engine.affine import AffineCode, affine_neuron
from spikede_plugins.engine.fire_steps import DelayedReset
from spikede_plugins.engine.history import HistoryLog
from spikede_plugins.engine.operator import FractionalOperator, Kernel
from spikede_plugins.engine.rolling import RollingOperator, RollingStep
from spikede_plugins.engine.scan import ElementwiseNeuron, can_scan, scan
from spikede_plugins.engine.step import (
    FRESH,
    History,
    Step,
    begin_step,
    charge_step,
    forget_fired,
    state_dtype,
)

__all__ = [
    "FRESH",
    "AffineCode",
    "DelayedReset",
    "ElementwiseNeuron",
    "FractionalOperator",
    "History",
    "HistoryLog",
    "Kernel",
    "RollingOperator",
    "RollingStep",
    "Step",
    "affine_neuron",
    "begin_step",
    "can_scan",
    "charge_step",
    "forget_fired",
    "scan",
    "state_dtype",
]
