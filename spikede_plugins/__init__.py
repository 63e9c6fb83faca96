"""Fractional spiking neurons for existing SpikingJelly and snnTorch models.

    from spikede_plugins import convert_to_fractional
    fnet = convert_to_fractional(net, alpha=0.7)

Importing this package imports torch and no SNN framework.
"""

from importlib.metadata import version

from spikede_plugins.adapter import Adapter, Support
from spikede_plugins.conversion import (
    conversion_report,
    convert_to_fractional,
    plan_conversion,
    restore_native,
)
from spikede_plugins.errors import (
    ConversionError,
    ExportError,
    MissingExtraError,
    OptionError,
    OptionTypeError,
    OrderError,
    PluginError,
    SpikedeError,
    SpikedeWarning,
    StateError,
    UnknownNameError,
    UnsupportedNeuronError,
)
from spikede_plugins.memory import AutoMemory, FullMemory, Memory, SumOfExponentials, WindowMemory
from spikede_plugins.orders import MultiTerm, PerChannel
from spikede_plugins.registry import (
    available_adapters,
    available_solvers,
    get_solver,
    refresh_plugins,
    register_solver,
)
from spikede_plugins.report import ConversionReport, ReportRow
from spikede_plugins.solvers import CorrectorSolver, ExplicitSolver, Solver

__version__ = version("spikede-plugins")

__all__ = [
    "Adapter",
    "AutoMemory",
    "ConversionError",
    "ConversionReport",
    "CorrectorSolver",
    "ExplicitSolver",
    "ExportError",
    "FullMemory",
    "Memory",
    "MissingExtraError",
    "MultiTerm",
    "OptionError",
    "OptionTypeError",
    "OrderError",
    "PerChannel",
    "PluginError",
    "ReportRow",
    "Solver",
    "SpikedeError",
    "SpikedeWarning",
    "StateError",
    "SumOfExponentials",
    "Support",
    "UnknownNameError",
    "UnsupportedNeuronError",
    "WindowMemory",
    "__version__",
    "available_adapters",
    "available_solvers",
    "conversion_report",
    "convert_to_fractional",
    "get_solver",
    "plan_conversion",
    "refresh_plugins",
    "register_solver",
    "restore_native",
]
