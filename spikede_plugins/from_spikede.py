"""What a program written for spikeDE says, in our words: methods, options, attributes and names.

docs/coming-from-spikede.md lists every difference. Here is what the wrapper and the package ask when they
meet a word of spikeDE's: a method or an option that has another name here is taken, with a warning where the
result is another one; what has no counterpart is an error that names the call to use.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from spikede_plugins.errors import SpikedeError, SpikedeWarning, UnknownNameError
from spikede_plugins.orders import FractionalOrder

_PAGE = "docs/coming-from-spikede.md"

#: Methods of spikeDE's ``fdeint_adjoint``; its trapezoidal weights are those of L1.
METHODS = {
    "gl-f": "gl", "gl-o": "gl", "l1-f": "l1", "l1-o": "l1", "trap-f": "l1", "trap-o": "l1",
    "pred-f": "pred", "pred-o": "pred",
}  # fmt: skip

#: Integrators of spikeDE that step neurons which update their own potential.
_STEPPERS = {
    "odeint_mem": 'integrator="odeint", method="euler"',
    "fdeint_mem": 'integrator="fdeint", method="gl"',
}

#: Options that spikeDE's training scripts pass and that nothing there reads.
_IDLE_OPTIONS = ("glmulti_chunk", "glmulti_detach_conv")

_SHAPES = "shapes are found when the model runs; nothing has to be set before"
_NOT_TRACED = "nothing is traced: the model itself is wrapper.base"
_SOLVERS = "choose a method by name (available_solvers()); fdeint(func, y0, t, alpha=...) solves any equation"

#: Attributes of spikeDE's wrapper that this one does not have, and what does their part.
ATTRIBUTES = {
    "ode_func": "there is no traced function and no count of its evaluations (a grid has one a step); the "
    "model is wrapper.base",
    "_ode_func_uncompiled": _NOT_TRACED,
    "_ode_gm": _NOT_TRACED,
    "traced_backbone": _NOT_TRACED,
    "post_neuron_module": "what follows the last neuron is called with the rest of the model, wrapper.base",
    "integrator_indicator": "use wrapper.integrator, which is the name here",
    "neuron_instances": "use [wrapper.base.get_submodule(name) for name in wrapper.neuron_names]",
    "neuron_count": "use len(wrapper.neuron_names)",
    "neuron_shapes": _SHAPES,
    "boundary_shapes": _SHAPES,
    "n_boundaries": _SHAPES,
    "_is_initialized": _SHAPES,
    "_alpha_config": "use wrapper.print_alpha_info() and wrapper.get_per_layer_alpha()",
    "_alpha_spec": "use wrapper.get_per_layer_alpha()",
    "_multi_coefficient_spec": "use wrapper.get_per_layer_coefficient()",
    "_reset_mem": "no neuron keeps a state between two calls; there is nothing to reset",
}

_WRITTEN_OUT = (
    "SpikingJelly's LIFNode(tau=..., decay_input=True, v_reset=None, detach_reset=True) is that neuron: "
    'in SNNWrapper with integrator="odeint", method="euler"'
)
_BATCHED = "use interpolate(x, x_time, t, method)"

#: Public names of spikeDE's modules that this package does not have, and what does their part.
NAMES = {
    "SNN": "write the network as a torch.nn.Module and give it to SNNWrapper",
    "LIFNeuronFDE": "SpikingJelly's LIFNode(tau=..., v_reset=None, detach_reset=True) with "
    'convert_to_fractional(model, alpha=beta, method="gl", step_size=h, memory=n) is that neuron',
    "LIFNeuron_OrderOne": _WRITTEN_OUT,
    "NoisyLIFNeuron_OrderOne": f"use NoisyLIFNeuron; {_WRITTEN_OUT}, without its noise",
    "ODEFuncFromFX": "nothing is traced: SNNWrapper(base, ...) calls base as it is",
    "SNNLeafTracer": _NOT_TRACED,
    "symbolic_trace_leaf_neurons": _NOT_TRACED,
    "remove_dead_code": _NOT_TRACED,
    "BoundaryShapeRecorder": _SHAPES,
    "ShapeRecorder": _SHAPES,
    "requires_initialization": _SHAPES,
    "PerLayerAlphaConfig": "give alpha, alpha_mode and multi_coefficient to SNNWrapper; MultiTerm and "
    "PerChannel say an order on their own",
    "get_integrator": "give SNNWrapper(integrator=...) the name",
    "linear_interpolate_batched": _BATCHED,
    "nearest_interpolate_batched": _BATCHED,
    "cubic_interpolate_batched": _BATCHED,
    "akima_interpolate_batched": _BATCHED,
    "surrogate_f": 'give surrogate_opt the name, e.g. "arctan"',
    "SigmoidSurrogate": 'use Surrogate("sigmoid", scale)',
    "ArctanSurrogate": 'use Surrogate("arctan", scale)',
    "PiecewiseLinearSurrogate": 'use Surrogate("piecewise_linear", width)',
    "GaussianSurrogate": 'use Surrogate("gaussian", width)',
    "sigmoid_surrogate": 'use Surrogate("sigmoid", scale)',
    "arctan_surrogate": 'use Surrogate("arctan", scale)',
    "piecewise_linear_surrogate": 'use Surrogate("piecewise_linear", width)',
    "gaussian_surrogate": 'use Surrogate("gaussian", width)',
    "noisy_threshold_spike": "use spikede_plugins.neurons.noisy_threshold_spike, or "
    'surrogate_opt="noisy" of a neuron',
    "NoisyThresholdSpikeModule": 'use surrogate_opt="noisy" of a neuron',
    "SOLVERS": _SOLVERS,
    "SOLVERS_Forward": _SOLVERS,
    "SOLVERS_Backward": _SOLVERS,
    "SNNFractionalMethod": "derive from ExplicitSolver (gain and weights) and register_solver it",
    "SNNSolverConfig": _SOLVERS,
    "PerLayerAlphaInfo": _SOLVERS,
    "GrunwaldLetnikovSNN": 'use method="gl"',
    "GrunwaldLetnikovMultitermSNN": 'use method="glmulti"',
    "ProductTrapezoidalSNN": 'its weights are those of method="l1"; method="trap" is the implicit product '
    "trapezoidal rule",
    "L1MethodSNN": 'use method="l1"',
    "AdamsBashforthSNN": 'use method="pred"',
    "FDEAdjointMethod": "use fdeint_adjoint(func, y0, t, alpha=...)",
    "find_parameters": "use fdeint_adjoint(func, y0, t, alpha=...), which finds them",
    **{
        name: _SOLVERS
        for name in (
            "euler_integrate_tuple", "euler_integrate_tuple_compiled", "step_dynamics", "snn_solve",
            "get_memory_bounds", "gl_integrate_tuple", "trap_integrate_tuple", "l1_integrate_tuple",
            "pred_integrate_tuple", "glmethod_multiterm_integrate_tuple", "forward_gl", "forward_l1",
            "forward_trap", "forward_pred", "forward_euler_w_history", "forward_euler_wo_history",
            "backward_gl", "backward_l1", "backward_trap", "backward_pred", "backward_euler_w_history",
            "backward_euler_wo_history",
        )
    },
    **dict.fromkeys(
        ("neuron", "layer", "snn", "odefunc", "solver", "utils"),
        "there are no modules of that name: import everything from spikede_plugins itself",
    ),
    "ReversedListView": _SOLVERS,
}  # fmt: skip


class AbsentNameError(SpikedeError, AttributeError):
    """A name of spikeDE's that this package does not have; the message tells what does its part."""


class AbsentImportError(SpikedeError, ImportError):
    """The same in an import statement."""


def absent_name(name: str) -> Exception:
    """The error for a name that the package does not have, as a module's ``__getattr__`` raises it.

    An import statement keeps no message of an ``AttributeError``: there an ``ImportError`` is needed.
    """
    if name not in NAMES:
        return AttributeError(f"module 'spikede_plugins' has no attribute {name!r}")
    text = f"{name} is a name of spikeDE's; here {NAMES[name]} ({_PAGE})."
    importing = sys._getframe(2).f_code.co_name == "_handle_fromlist"
    return AbsentImportError(text) if importing else AbsentNameError(text)


def absent_attribute(name: str) -> AbsentNameError | None:
    """The error for an attribute that spikeDE's wrapper has and this one has not; None for any other."""
    if name not in ATTRIBUTES:
        return None
    return AbsentNameError(f"SNNWrapper has no {name}, as spikeDE's has: {ATTRIBUTES[name]} ({_PAGE}).")


def orders_as_there(wrapper: nn.Module, name: str) -> Any:
    """What spikeDE's wrapper says of its orders in the attribute ``name``; None if that is no such attribute.

    ``per_layer_alpha_params`` and ``per_layer_coefficient_params`` are the parameters themselves where they
    are learned. ``_alpha_case`` tells what the orders are, not how they were written.
    """
    if name not in ("per_layer_alpha_params", "per_layer_coefficient_params", "_alpha_case"):
        return None
    orders = [order for order in wrapper.orders if isinstance(order, FractionalOrder)]  # type: ignore[union-attr]
    if name == "_alpha_case":
        terms = [order.alphas().tolist() for order in orders]
        same = all(one == terms[0] for one in terms)
        several = any(order.multi_term for order in orders)
        return ("B" if same else "C") if several else "A_scalar" if same else "A"
    own = "alpha" if name == "per_layer_alpha_params" else "coefficients"
    return [_values(order, own) for order in orders]


def _values(order: FractionalOrder, own: str) -> Tensor:
    learned = order._parameters.get(own)
    if learned is not None:
        return learned
    factors = order.term_coefficients()
    values = order.alphas() if own == "alpha" else torch.ones(1) if factors is None else factors
    return values.detach().reshape(-1).to(torch.get_default_dtype())


def refuse_integrator(integrator: Any) -> None:
    """Refuse the integrators of spikeDE that step neurons which update their own potential.

    Raises:
        UnknownNameError: for one of them, with the call that does the same.
    """
    if isinstance(integrator, str) and integrator in _STEPPERS:
        raise UnknownNameError(
            f"integrator={integrator!r} of spikeDE steps neurons that update their own potential "
            "(LIFNeuron_OrderOne, LIFNeuronFDE). Here such neurons are SpikingJelly's: put LIFNode(tau=..., "
            f"v_reset=None, detach_reset=True) into the model and use {_STEPPERS[integrator]} ({_PAGE})."
        )


def own_method(method: Any, integrator: str) -> Any:
    """A method by our name, which a name of spikeDE's ``fdeint_adjoint`` may have been given for."""
    if not isinstance(method, str) or method not in METHODS:
        return method
    ours = METHODS[method]
    warnings.warn(
        f"method={method!r} is run as method={ours!r}, integrator={integrator!r}: the output is that of "
        "every time, [T, B, ...], and gradients are exact. spikeDE gives the fractional integral of the "
        "spikes up to the end instead, [1, B, ...], with the first layer's order in all layers; see "
        f"{_PAGE}.",
        SpikedeWarning,
        stacklevel=2,
    )
    return ours


def own_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options without those that spikeDE's scripts pass and that nothing reads, there or here."""
    idle = [name for name in _IDLE_OPTIONS if name in options]
    if idle:
        warnings.warn(
            f"nothing reads {', '.join(idle)}, options of spikeDE's scripts, there or here; leave them out.",
            SpikedeWarning,
            stacklevel=2,
        )
    return {name: value for name, value in options.items() if name not in idle}


def means_all_times(wanted: Tensor, times: Tensor, steps: int, blur: float) -> bool:
    """Whether output times are those of all samples, with or without the end of the last step behind them.

    spikeDE's scripts give ``output_time`` the T + 1 points of their time grid, and its wrapper, which makes
    output times of its own, gives the T outputs at the beginnings of the steps.
    """
    if len(wanted) not in (steps, steps + 1):
        return False
    if len(wanted) == steps + 1 and len(times) == steps and steps > 1:
        times = torch.cat([times, 2.0 * times[-1:] - times[-2:-1]])
    if len(wanted) > len(times):  # one sample and no step to add
        return False
    slack = blur + (1e-4 * float(times.diff().min()) if len(times) > 1 else 0.0)
    return bool(((wanted - times[: len(wanted)]).abs() <= slack).all())
