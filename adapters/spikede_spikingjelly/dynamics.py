"""The native charge, firing and reset of each SpikingJelly neuron, as pure functions.

``charge`` takes the potential to its integer-order successor, ``fire`` the charged potential to the output
and the potential after reset. Formulas are written in the order in which the framework computes them, so that
at alpha = 1 the result is the native one to the last bit. Only the membrane is fractional; other variables
(adaptation, synaptic current, complementary potential) keep their integer update.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikede_plugins.engine import AffineCode, ElementwiseNeuron, affine_neuron
from spikede_plugins.errors import OptionError
from spikede_spikingjelly.release import EXPLICIT_STATES, neuron_class
from spikede_spikingjelly.surrogates import named, scannable

#: Further state variables by name (a value may be anything a neuron keeps).
Others = dict[str, Any]


class Cell(NamedTuple):
    """One time step with its input and other variables bound.

    Attributes:
        charge: ``v -> v'``, pure.
        fire: ``h -> (output, v, others)``, pure; called once, after ``charge``.
    """

    charge: Callable[[Tensor], Tensor]
    fire: Callable[[Tensor], tuple[Tensor, Tensor, Others]]


class Dynamics:
    """One kind of neuron; holds no state and no numbers (those stay attributes of the node).

    Attributes:
        affine: whether the charge is affine in v.
        restarts: whether a new input shape restarts the state (else it must broadcast with the old one).
        numbers: the node's settings that are numbers; a user may put tensors there, one number a channel.
    """

    affine = True
    restarts = EXPLICIT_STATES
    numbers: tuple[str, ...] = ("v_threshold", "v_reset")

    def in_sequence(self, node: Any, recorded: bool) -> Dynamics:
        """The dynamics of a multi-step run, ``recorded`` if it keeps the potential of every step."""
        return self

    def elementwise(self, node: Any) -> ElementwiseNeuron | None:
        """The neuron as functions of single elements, if it has no other state variables."""
        return None

    def scannable(self, node: Any) -> bool:
        """Whether :meth:`elementwise` may be evaluated for all time steps at once."""
        return scannable(node.surrogate_function) and all(_is_number(getattr(node, n)) for n in self.numbers)

    def check(self, node: Any, shape: torch.Size) -> None:
        """Nothing, if the settings that are tensors fit a time step ``shape``.

        Raises:
            OptionError: if one does not, by name.
        """
        for name in self.numbers:
            value = getattr(node, name)
            if not isinstance(value, Tensor):
                continue
            try:
                fits = torch.broadcast_shapes(value.shape, shape) == shape
            except RuntimeError:
                fits = False
            if not fits:
                raise OptionError(
                    f"{name} of the fractional {node.native_class.__name__} has shape {tuple(value.shape)}, "
                    f"which does not broadcast to one time step {tuple(shape)}; of a value for each channel "
                    f"make {name} a tensor of shape [C], or [C, 1, 1] for images."
                )

    def cell(self, node: Any, x: Tensor, others: Others) -> Cell:
        """One time step on input ``x`` ``[*shape]``."""
        neuron = self.elementwise(node)
        if neuron is None:
            raise NotImplementedError(type(self).__name__)
        charge, fire, params = neuron.charge, neuron.fire, neuron.params

        def fired(h: Tensor) -> tuple[Tensor, Tensor, Others]:
            output, v = fire(h, *params)
            return output, v, others

        return Cell(lambda v: charge(v, x, *params), fired)

    def fired(self, node: Any, h: Tensor, output: Tensor) -> Tensor:
        """Non-zero where a neuron fired."""
        return output

    def restart(self, node: Any) -> float:
        """The potential after a restart by a new input shape."""
        return 0.0 if node.v_reset is None else node.v_reset

    def other_start(self, node: Any, name: str) -> float | None:
        """The value another variable restarts from; None leaves it as the user keeps it."""
        return None


def _is_number(value: object) -> bool:
    """Whether kernels can take ``value``: a float, an int of a size that a float holds, None (soft reset)."""
    if isinstance(value, float) or value is None:
        return True
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 53


def after_reset(
    h: Tensor, spike: Tensor, threshold: Any, reset: float | None, detach: bool
) -> Tensor:
    """The potential after firing: soft ``h - threshold s``, hard ``(1 - s) h + reset s``."""
    held = spike.detach() if detach else spike
    if reset is None:
        return h - held * threshold
    return (1.0 - held) * h + held * reset


def one_threshold(node: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """``[h >= threshold]`` and the reset that follows."""

    def fire(h: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
        spike = node.surrogate_function(h - node.v_threshold)
        return spike, after_reset(h, spike, node.v_threshold, node.v_reset, node.detach_reset)

    return fire


class _Affine(Dynamics):
    """Charge affine in v and one threshold: what compiled graphs and fused kernels can carry."""

    def leak(self, node: Any) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
        """The part of the code that tells the leak, and its tensors."""
        raise NotImplementedError

    def elementwise(self, node: Any) -> ElementwiseNeuron:
        leak, params = self.leak(node)
        known = named(node.surrogate_function)
        # Not dataclasses.replace, which older releases of torch.compile cannot trace.
        slope: dict[str, Any] = {} if known is None else {"surrogate": known[0], "surrogate_alpha": known[1]}
        code = AffineCode(
            rest=0.0 if node.v_reset is None else node.v_reset,
            short_decay=not EXPLICIT_STATES,
            threshold=node.v_threshold,
            reset=node.v_reset,
            detach_reset=node.detach_reset,
            **slope,
            **leak,
        )
        neuron = affine_neuron(code, params, node.surrogate_function)
        if known is not None:
            return neuron
        # Only the framework itself knows this surrogate: no code for compiled graphs, no closed form.
        return ElementwiseNeuron(neuron.charge, neuron.fire, params)


class IntegrateAndFire(_Affine):
    """``h = v + x``"""

    def leak(self, node: Any) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
        return {"leak": "none"}, ()


class HalfThreshold(IntegrateAndFire):
    """Integrate-and-fire that starts at half its threshold."""

    def restart(self, node: Any) -> float:
        return node.v_threshold / 2.0


class LeakyIntegrateAndFire(_Affine):
    """``h = v + (x - (v - rest)) / tau`` or ``h = v - (v - rest) / tau + x``"""

    numbers = ("v_threshold", "v_reset", "tau")

    def leak(self, node: Any) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
        return {"leak": "divide", "tau": node.tau, "decay_input": node.decay_input}, ()


class ParametricLeaky(_Affine):
    """``h = v + (x - (v - rest)) sigmoid(w)`` or ``h = v - (v - rest) sigmoid(w) + x``"""

    def leak(self, node: Any) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
        return {"leak": "multiply", "decay_input": node.decay_input}, (node.w.sigmoid(),)


class _Plain(Dynamics):
    """One state variable, written as charge and fire."""

    def charge(self, node: Any) -> Callable[..., Tensor]:
        """``(v, x, *params) -> v'``"""
        raise NotImplementedError

    def fire(self, node: Any) -> Callable[..., tuple[Tensor, Tensor]]:
        """``(h, *params) -> (spike, v)``"""
        return one_threshold(node)

    def params(self, node: Any) -> tuple[Tensor, ...]:
        """Tensors that charge and fire depend on."""
        return ()

    def elementwise(self, node: Any) -> ElementwiseNeuron:
        return ElementwiseNeuron(self.charge(node), self.fire(node), self.params(node))


class Quadratic(_Plain):
    """``h = v + (x + a0 (v - v_rest) (v - v_c)) / tau``"""

    numbers = ("v_threshold", "v_reset", "tau", "a0", "v_rest", "v_c")
    affine = False

    def charge(self, node: Any) -> Callable[..., Tensor]:
        tau, a0, rest, critical = node.tau, node.a0, node.v_rest, node.v_c
        return lambda v, x: v + (x + a0 * (v - rest) * (v - critical)) / tau


class Exponential(_Plain):
    """``h = v + (x + v_rest - v + delta_T exp((v - theta_rh) / delta_T)) / tau``"""

    numbers = ("v_threshold", "v_reset", "tau", "v_rest", "theta_rh", "delta_T")
    affine = False

    def charge(self, node: Any) -> Callable[..., Tensor]:
        tau, rest, theta, delta = node.tau, node.v_rest, node.theta_rh, node.delta_T
        return lambda v, x: v + (x + rest - v + delta * torch.exp((v - theta) / delta)) / tau


class KLeaky(_Plain):
    """``h = relu(k (leaky charge))`` with a learnable k; ``scale_reset`` divides by k after firing."""

    numbers = ("v_threshold", "v_reset", "tau")
    affine = False

    def params(self, node: Any) -> tuple[Tensor, ...]:
        return (node.k,)

    def charge(self, node: Any) -> Callable[..., Tensor]:
        tau, rest = node.tau, 0.0 if node.v_reset is None else node.v_reset
        if node.decay_input:
            return lambda v, x, k: torch.relu(k * (v + (x - (v - rest)) / tau))
        return lambda v, x, k: torch.relu(k * (v - (v - rest) / tau + x))

    def fire(self, node: Any) -> Callable[..., tuple[Tensor, Tensor]]:
        threshold, v_reset, detach = node.v_threshold, node.v_reset, node.detach_reset
        if not node.scale_reset:
            return one_threshold(node)

        def fire(h: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            spike = node.surrogate_function(h - threshold)
            if v_reset is None and not EXPLICIT_STATES:
                return spike, after_reset(h, spike, threshold, None, detach) / k
            return spike, after_reset(h / k, spike, threshold / k, v_reset, detach)

        return fire


class Ternary(_Plain):
    """Spikes of both signs: ``s = [h >= threshold] - [-h >= threshold]``; the charge of ``kind``."""

    def __init__(self, kind: _Affine) -> None:
        self.kind = kind
        self.numbers = kind.numbers

    def charge(self, node: Any) -> Callable[..., Tensor]:
        return self.kind.elementwise(node).charge

    def fire(self, node: Any) -> Callable[..., tuple[Tensor, Tensor]]:
        threshold, v_reset, detach = node.v_threshold, node.v_reset, node.detach_reset

        def fire(h: Tensor) -> tuple[Tensor, Tensor]:
            positive = node.surrogate_function(h - threshold)
            negative = node.surrogate_function(-h - threshold)
            spike = positive - negative
            event = spike if v_reset is None else positive + negative
            return spike, after_reset(h, event, threshold, v_reset, detach)

        return fire


class IntegerLeaky(_Plain):
    """``h = (1 - 1/tau) v + x``; the spike counts whole thresholds, ``s = surrogate(h / threshold)``."""

    numbers = ("v_threshold", "tau")

    def charge(self, node: Any) -> Callable[..., Tensor]:
        decay = 1.0 - 1.0 / node.tau
        return lambda v, x: decay * v + x

    def fire(self, node: Any) -> Callable[..., tuple[Tensor, Tensor]]:
        threshold, detach = node.v_threshold, node.detach_reset

        def fire(h: Tensor) -> tuple[Tensor, Tensor]:
            spike = node.surrogate_function(h / threshold)
            return spike, after_reset(h, spike, threshold, None, detach)

        return fire


class LeakyAnalog(LeakyIntegrateAndFire):
    """A LIF neuron whose output is ``act(h)`` or ``act(h - threshold)``, not its spike.

    Where the native class takes its multi-step forward from LIFNode, that gives plain spikes (unless the
    potentials are stored), and so does the fractional neuron.
    """

    @staticmethod
    def plain_sequences(native_class: type) -> bool:
        """Whether the native class forgets ``act`` in multi-step mode."""
        name = "multi_step_functional_forward"
        parent = getattr(neuron_class("LIFNode"), name, None)
        return parent is not None and getattr(native_class, name, None) is parent

    def in_sequence(self, node: Any, recorded: bool) -> Dynamics:
        native = getattr(node, "native_class", type(node))  # reports ask before there is a fractional node
        return self if recorded or not self.plain_sequences(native) else _PLAIN_LEAKY

    def scannable(self, node: Any) -> bool:
        return False  # act may be any callable

    def fired(self, node: Any, h: Tensor, output: Tensor) -> Tensor:
        return h >= node.v_threshold

    def elementwise(self, node: Any) -> ElementwiseNeuron:
        plain = super().elementwise(node)

        def fire(h: Tensor) -> tuple[Tensor, Tensor]:
            output = node.act(h - node.v_threshold if node.threshold_related else h)
            return output, plain.fire(h)[1]

        return ElementwiseNeuron(plain.charge, fire)


_PLAIN_LEAKY = LeakyIntegrateAndFire()


class Izhikevich(Dynamics):
    """Quadratic charge minus a recovery variable w, which keeps its integer order."""

    numbers = ("v_threshold", "v_reset", "tau", "a0", "v_rest", "v_c", "a", "b", "tau_w")
    affine = False

    def cell(self, node: Any, x: Tensor, others: Others) -> Cell:
        w = others["w"]
        tau, a0, rest, critical = node.tau, node.a0, node.v_rest, node.v_c
        threshold, v_reset = node.v_threshold, node.v_reset

        def fire(h: Tensor) -> tuple[Tensor, Tensor, Others]:
            spike = node.surrogate_function(h - threshold)
            if EXPLICIT_STATES:
                w_next = w + (node.a * (h - rest) - w) / node.tau_w + node.b * spike
                v = after_reset(h, spike, threshold, v_reset, node.detach_reset)
                return spike, v, {**others, "w": w_next}
            w_next = w + 1.0 / node.tau_w * (node.a * (h - rest) - w)
            held = spike.detach() if node.detach_reset else spike
            # This release keeps the reset potential's own factor in the gradient.
            v = h - held * threshold if v_reset is None else (1.0 - held) * h + spike * v_reset
            return spike, v, {**others, "w": w_next + node.b * spike}

        return Cell(lambda v: v + (x + a0 * (v - rest) * (v - critical) - w) / tau, fire)

    def other_start(self, node: Any, name: str) -> float | None:
        return node.w_rest if name == "w" else None


class CurrentBased(Dynamics):
    """``c' = c_decay c + x``, ``h = v_decay v + c'``: the synaptic current c keeps its integer order."""

    numbers = ("v_threshold", "v_reset", "c_decay", "v_decay")

    def cell(self, node: Any, x: Tensor, others: Others) -> Cell:
        current = others["c"] * node.c_decay + x
        fire = one_threshold(node)
        return Cell(lambda v: v * node.v_decay + current, lambda h: (*fire(h), {**others, "c": current}))

    def other_start(self, node: Any, name: str) -> float | None:
        return 0.0 if name == "c" else None


class Complementary(Dynamics):
    """A LIF neuron whose reset grows with a complementary potential m (integer order)."""

    numbers = ("v_threshold", "tau")

    def cell(self, node: Any, x: Tensor, others: Others) -> Cell:
        m, tau, threshold = others["m"], node.tau, node.v_threshold
        surrogate = node.surrogate_function

        def fire(h: Tensor) -> tuple[Tensor, Tensor, Others]:
            # In eval the framework takes the step itself; it is the same number without a gradient.
            hard = not node.training and surrogate.spiking
            spike = (h - threshold >= 0).to(h) if hard else surrogate(h - threshold)
            m_next = m * torch.sigmoid(h / tau) + spike
            return spike, h - spike * (threshold + torch.sigmoid(m_next)), {**others, "m": m_next}

        return Cell(lambda v: v - (v - 0.0) / tau + x, fire)

    def other_start(self, node: Any, name: str) -> float | None:
        return 0.0 if name == "m" else None


class Broadcasting(Dynamics):
    """Mixed into a kind whose native neuron never looks at shapes: a state broadcasts with its input."""

    restarts = False


class SimpleIntegrateAndFire(Broadcasting, IntegrateAndFire):
    """``h = v + x``"""


class SimpleLeaky(Broadcasting, _Plain):
    """``h = v + (rest - v + x) / tau`` or ``h = v + (rest - v) / tau + x``"""

    numbers = ("v_threshold", "v_reset", "tau")

    def charge(self, node: Any) -> Callable[..., Tensor]:
        tau, rest = node.tau, 0.0 if node.v_reset is None else node.v_reset
        if node.decay_input:
            return lambda v, x: v + (rest - v + x) / tau
        return lambda v, x: v + (rest - v) / tau + x


_BY_NAME: dict[str, Dynamics] = {
    "IFNode": IntegrateAndFire(),
    "LIFNode": LeakyIntegrateAndFire(),
    "ParametricLIFNode": ParametricLeaky(),
    "QIFNode": Quadratic(),
    "EIFNode": Exponential(),
    "IzhikevichNode": Izhikevich(),
    "KLIFNode": KLeaky(),
    "LIAFNode": LeakyAnalog(),
    "HalfThresholdIFNode": HalfThreshold(),
    "SimpleIFNode": SimpleIntegrateAndFire(),
    "SimpleLIFNode": SimpleLeaky(),
    "CUBALIFNode": CurrentBased(),
    "ILIFNode": IntegerLeaky(),
    "TernaryIFNode": Ternary(IntegrateAndFire()),
    "TernaryLIFNode": Ternary(LeakyIntegrateAndFire()),
    "ComplementaryLIFNode": Complementary(),
}

#: The neuron classes of this release that have a fractional form.
DYNAMICS: dict[type, Dynamics] = {
    kind: dynamics
    for name, dynamics in _BY_NAME.items()
    if (kind := neuron_class(name)) is not None
}
