"""Fractional spiking neurons for SpikingJelly and snnTorch models, and for models in continuous time.

    from spikede_plugins import convert_to_fractional
    fnet = convert_to_fractional(net, alpha=0.7)

Importing this package imports torch and no SNN framework.
"""

from importlib.metadata import version
from typing import Any

from spikede_plugins.adapter import Adapter, Support
from spikede_plugins.capture import SequenceModule, StepModule, sequence_module, step_module
from spikede_plugins.conversion import (
    conversion_report,
    convert_to_fractional,
    plan_conversion,
    restore_native,
)
from spikede_plugins.errors import (
    ConversionError,
    ExportError,
    LoadError,
    MissingExtraError,
    OptionError,
    OptionTypeError,
    OrderError,
    PluginError,
    ReleaseError,
    SpikedeError,
    SpikedeWarning,
    StateError,
    UnknownNameError,
    UnsupportedNeuronError,
)
from spikede_plugins.fdeint import fdeint, fdeint_adjoint
from spikede_plugins.fractional_events import FractionalLIFDynamics
from spikede_plugins.from_spikede import absent_name as _absent_name
from spikede_plugins.heads import ClassificationHead, VotingLayer
from spikede_plugins.interpolation import interpolate
from spikede_plugins.learning import alphas, parameter_groups
from spikede_plugins.memory import AutoMemory, FullMemory, Memory, SumOfExponentials, WindowMemory
from spikede_plugins.mittag_leffler import mittag_leffler
from spikede_plugins.neurons import BaseNeuron, HardResetLIFNeuron, IFNeuron, LIFNeuron, NoisyLIFNeuron
from spikede_plugins.orders import FractionalOrder, MultiTerm, PerChannel
from spikede_plugins.registry import (
    available_adapters,
    available_solvers,
    get_solver,
    refresh_plugins,
    register_solver,
)
from spikede_plugins.report import ConversionReport, ReportRow
from spikede_plugins.settings import ignore_settings
from spikede_plugins.solvers import CorrectorSolver, ExplicitSolver, Solver
from spikede_plugins.spikede_checkpoints import load_spikede_state_dict
from spikede_plugins.spiking_dynamics import ODEIFDynamics, ODELIFDynamics, SpikingDynamics
from spikede_plugins.spiking_ode import SpikeTimes, SpikingODELayer
from spikede_plugins.state import get_state, reset_rows, select_rows, set_state
from spikede_plugins.surrogate import Surrogate
from spikede_plugins.wrapper import SNNWrapper

__version__ = version("spikede-plugins")

__all__ = [
    "Adapter",
    "AutoMemory",
    "BaseNeuron",
    "ClassificationHead",
    "ConversionError",
    "ConversionReport",
    "CorrectorSolver",
    "ExplicitSolver",
    "ExportError",
    "FractionalLIFDynamics",
    "FractionalOrder",
    "FullMemory",
    "HardResetLIFNeuron",
    "IFNeuron",
    "LIFNeuron",
    "LoadError",
    "Memory",
    "MissingExtraError",
    "MultiTerm",
    "NoisyLIFNeuron",
    "ODEIFDynamics",
    "ODELIFDynamics",
    "OptionError",
    "OptionTypeError",
    "OrderError",
    "PerChannel",
    "PluginError",
    "ReleaseError",
    "ReportRow",
    "SNNWrapper",
    "SequenceModule",
    "Solver",
    "SpikeTimes",
    "SpikedeError",
    "SpikedeWarning",
    "SpikingDynamics",
    "SpikingODELayer",
    "StateError",
    "StepModule",
    "SumOfExponentials",
    "Support",
    "Surrogate",
    "UnknownNameError",
    "UnsupportedNeuronError",
    "VotingLayer",
    "WindowMemory",
    "__version__",
    "alphas",
    "available_adapters",
    "available_solvers",
    "conversion_report",
    "convert_to_fractional",
    "fdeint",
    "fdeint_adjoint",
    "get_solver",
    "get_state",
    "ignore_settings",
    "interpolate",
    "load_spikede_state_dict",
    "mittag_leffler",
    "parameter_groups",
    "plan_conversion",
    "refresh_plugins",
    "register_solver",
    "reset_rows",
    "restore_native",
    "select_rows",
    "sequence_module",
    "set_state",
    "step_module",
]


def __getattr__(name: str) -> Any:
    """Names of spikeDE's that this package does not have: an error that tells what does their part."""
    raise _absent_name(name)
