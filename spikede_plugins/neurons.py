"""Neurons written as derivatives: what they do to their potential in time, and when they fire.

    tau D^alpha v = -v + I - threshold s          (leaky; without -v: integrate-and-fire)
    s = [v + (-v + I) / tau >= threshold]

A neuron holds no state: ``neuron(v_mem, current_input)`` is ``(dv_dt, spike)``. Inside a model that
:class:`~spikede_plugins.SNNWrapper` runs, it is called with its input current alone, like a layer, and gives
its spikes; the wrapper keeps the potentials and integrates them.

A neuron of your own derives from :class:`BaseNeuron` and defines ``forward(v_mem, current_input)``.

Sources: Gerstner, Kistler, Naud & Paninski, *Neuronal Dynamics* (2014), chapter 1; Teka, Marinov &
Santamaria, PLoS Computational Biology 10 (2014), for the fractional form.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from spikede_plugins.checks import flag, is_finite, is_readable
from spikede_plugins.engine import AffineCode, ElementwiseNeuron, affine_neuron
from spikede_plugins.errors import OptionError, OptionTypeError, StateError, UnknownNameError, nearest
from spikede_plugins.surrogate import spike, surrogate_name
from spikede_plugins.uncompiled import uncompiled, uncompiled_alone

#: What runs the neurons of a model: from a neuron and its input current to its spikes.
Driver = Callable[["BaseNeuron", Tensor], Tensor]

_driver: ContextVar[Driver | None] = ContextVar("spikede_driver", default=None)


@contextlib.contextmanager
def driven_by(driver: Driver) -> Iterator[None]:
    """Inside, neurons that are called with their input alone are run by ``driver``."""
    token = _driver.set(driver)
    try:
        yield
    finally:
        _driver.reset(token)


def current_driver() -> Driver | None:
    """What runs neurons here; None outside a wrapper."""
    return _driver.get()


Dynamics = Callable[..., Any]


def _like_a_layer(dynamics: Dynamics) -> Dynamics:
    """``forward`` of a neuron: its dynamics, or, called with its input alone, its spikes."""

    @uncompiled_alone
    @functools.wraps(dynamics)
    def forward(self: BaseNeuron, v_mem: Tensor, current_input: Tensor | None = None) -> Any:
        if current_input is not None:
            return dynamics(self, v_mem, current_input)
        return _as_layer(self, v_mem)

    forward._spikede_layer = True  # type: ignore[attr-defined]
    return forward


@uncompiled
def _as_layer(neuron: BaseNeuron, x: Tensor) -> Tensor:
    driver = current_driver()
    if driver is None:
        raise StateError(
            f"{type(neuron).__name__} was called with its input alone, but nothing runs it: call the model "
            "through SNNWrapper(model, ...), or the neuron as neuron(v_mem, current_input). (In backward "
            'of a model that checkpoints parts of itself: integrator="fdeint_adjoint" does that.)'
        )
    for name in ("threshold", "initial_tau"):
        _check_fits(neuron, name, x)
    return driver(neuron, x)


def _check_fits(neuron: BaseNeuron, name: str, x: Tensor) -> None:
    """Nothing, if a number a neuron fits the input ``x [B, ...]``.

    Raises:
        OptionError: if it does not.
    """
    value = getattr(neuron, name, None)
    if not isinstance(value, Tensor) or not value.dim():
        return
    try:
        fits = torch.broadcast_shapes(value.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise OptionError(
            f"{name.removeprefix('initial_')} of {type(neuron).__name__} has shape {tuple(value.shape)}, "
            f"which does not fit its input of shape {tuple(x.shape)}; give one number, or one a neuron."
        )


#: Processors may take smaller numbers than this for 0, and divide by that.
_SMALLEST = 1e-30


def number(value: Any, what: str, *, positive: bool = True) -> float:
    """``value`` (a number of Python or NumPy, or a tensor of one element) as a finite (positive) float.

    Raises:
        OptionTypeError: if it is not a number.
        OptionError: if it is not finite, or not positive where it must be.
    """
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise OptionTypeError(f"{what} must be a number, got {value!r} ({type(value).__name__}).")
    if not is_finite(value) or (positive and value <= 0):
        raise OptionError(f"{what} must be finite{' and positive' * positive}, got {value}; e.g. {what}=1.0.")
    if positive and value < _SMALLEST:
        raise OptionError(f"{what} must be at least {_SMALLEST:g}, got {value}: its inverse is used.")
    return float(value)


def _plain(value: Any) -> Any:
    """A number of NumPy or a tensor of one element as one of Python; anything else as it is."""
    if isinstance(value, Tensor):
        return value.item() if is_readable(value) and value.numel() == 1 else value
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def number_or_tensor(value: Any, what: str, *, positive: bool = True) -> float | Tensor:
    """``value`` as a float, or, where it is to be trained or has one number a neuron, the tensor itself.

    Raises:
        OptionTypeError: if it is neither a number nor a tensor of real numbers.
        OptionError: if a number in it is not finite, or not positive where it must be.
    """
    if is_lazy(value):
        raise OptionTypeError(f"{what} must hold numbers, got a parameter that is not initialised.")
    if not isinstance(value, Tensor) or not (value.requires_grad or value.numel() != 1):
        return number(value, what, positive=positive)
    if not value.is_floating_point() or value.numel() == 0:
        raise OptionTypeError(
            f"{what} must hold floating point numbers, got {value.dtype} of shape {tuple(value.shape)}."
        )
    if is_readable(value):
        for one in (value.detach().amin(), value.detach().amax()):  # NaN is both
            number(one, what, positive=positive)
    return value


def shown(value: float | Tensor) -> str:
    """A number, or what is trained or has one number a neuron, as ``repr`` shows it."""
    if not isinstance(value, Tensor):
        return f"{value:.4g}"
    single = value.numel() == 1 and is_readable(value)
    text = f"{value.detach().item():.4g}" if single else str([*value.shape])
    return text + " (learned)" * value.requires_grad


class BaseNeuron(nn.Module):
    """A spiking neuron; subclasses define ``forward(v_mem, current_input) -> (dv_dt, spike)``.

    Args:
        tau: time constant, > 0, in the unit of time of the run.
        threshold: firing threshold. An ``nn.Parameter`` (0-dim, or one number a neuron) is trained; so is
            one put in the place of ``neuron.threshold`` afterwards.
        surrogate_grad_scale: the surrogate's scale, ``a`` in the table of ``spikede_plugins.surrogate``.
        surrogate_opt: the surrogate gradient by name, with or without ``_surrogate`` behind it; or
            ``"noisy"``, a threshold with logistic noise (:func:`noisy_threshold_spike`).
        tau_learnable: train tau, which starts at ``tau`` and stays positive.

    Attributes:
        tau_param: ``log(tau / initial_tau)``, if it is trained.
        surrogate_f: ``(v - threshold, scale) -> spike``.
        elementwise: whether ``forward`` acts on each element alone, and all it trains are parameters. Set it
            in a class of your own where that is so: all steps are then one node of the graph. If it is False,
            as here, any ``forward`` is right (but for implicit solvers, which need it).

    Raises:
        OptionError, OptionTypeError: for numbers that cannot be used.
        UnknownNameError: for an unknown surrogate.
    """

    fractional_by_itself = (
        "is a neuron written as a derivative: spikede_plugins.SNNWrapper(model, alpha=...) makes a model of "
        "such neurons fractional"
    )

    elementwise = False

    def __init__(
        self,
        tau: float | Tensor = 0.5,
        threshold: float | Tensor = 1.0,
        surrogate_grad_scale: float = 5.0,
        surrogate_opt: str = "arctan",
        tau_learnable: bool = False,
    ) -> None:
        super().__init__()
        self.initial_tau: float | Tensor
        self.threshold: float | Tensor
        for name, value, positive in (("initial_tau", tau, True), ("threshold", threshold, False)):
            given = number_or_tensor(value, name.removeprefix("initial_"), positive=positive)
            if isinstance(given, Tensor) and not given.requires_grad:
                self.register_buffer(name, given, persistent=False)
            else:
                setattr(self, name, given)
        self.surrogate_grad_scale = number(surrogate_grad_scale, "surrogate_grad_scale")
        if not isinstance(tau_learnable, bool):
            raise OptionTypeError(f"tau_learnable must be True or False, got {tau_learnable!r}.")
        noisy = isinstance(surrogate_opt, str) and surrogate_opt.removesuffix("_surrogate") == "noisy"
        self.surrogate_opt = "noisy" if noisy else surrogate_name(surrogate_opt, "noisy")
        self.tau_learnable = tau_learnable
        self.tau_param = nn.Parameter(torch.zeros(())) if tau_learnable else None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls.forward, "_spikede_layer"):  # its own, or one that a mixin brings
            cls.forward = _like_a_layer(cls.forward)  # type: ignore[method-assign]

    @property
    def tau(self) -> float | Tensor:
        """The time constant as it is now."""
        return self.get_tau()

    def get_tau(self) -> float | Tensor:
        """The time constant: a number, or a 0-dim tensor with its graph if it is trained."""
        return self.initial_tau if self.tau_param is None else self.initial_tau * torch.exp(self.tau_param)

    def surrogate_f(self, z: Tensor, scale: float) -> Tensor:
        """1 where ``z >= 0``, else 0, with the surrogate gradient."""
        if self.surrogate_opt == "noisy":
            return noisy_threshold_spike(z, scale, self.training)
        return spike(z, self.surrogate_opt, scale)

    def forward(self, v_mem: Tensor, current_input: Any = None) -> Any:
        """``(dv_dt, spike)``, both ``[B, ...]`` like ``v_mem`` and ``current_input``."""
        raise NotImplementedError(
            f"{type(self).__name__} defines no forward(v_mem, current_input) -> (dv_dt, spike)."
        )

    def dynamics(self, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(dv_dt, spike)`` of :meth:`forward`, checked.

        Raises:
            OptionError: if that is not what it returned.
        """
        out = self.forward(v, x)
        shapes = [tuple(t.shape) for t in out if isinstance(t, Tensor)] if isinstance(out, tuple) else []
        if shapes != [tuple(v.shape)] * 2:
            raise OptionError(
                f"{type(self).__name__}.forward must return (dv_dt, spike), two tensors shaped like v_mem, "
                f"{tuple(v.shape)}; got {type(out).__name__} of {shapes}."
            )
        return out  # type: ignore[no-any-return]

    def as_elementwise(self) -> ElementwiseNeuron | None:
        """The neuron as the scan engine takes it, or None: then it is run step by step."""
        if not self._says_elementwise() or self.surrogate_opt == "noisy":
            return None
        if any(isinstance(value, Tensor) and value.requires_grad for value in vars(self).values()):
            return None  # what is trained through a tensor that is no parameter: autograd follows the loop
        bare = _Bare(self)
        params = tuple(bare.parameters())
        names = [name for name, _ in bare.named_parameters()]

        def call(v: Tensor, x: Tensor, *values: Tensor) -> Any:
            return torch.func.functional_call(bare, dict(zip(names, values, strict=True)), (v, x))

        return ElementwiseNeuron(
            charge=lambda v, x, *p: v + call(v, x, *p)[0],
            fire=lambda h, *p: (h, h),
            params=params,
            spike=lambda v, x, *p: call(v, x, *p)[1],
        )

    def _says_elementwise(self) -> bool:
        """Whether ``elementwise`` was said of the very ``forward`` that is used, not of one it replaced."""
        order = type(self).__mro__
        says, defines = (
            next(i for i, cls in enumerate(order) if name in vars(cls)) for name in ("elementwise", "forward")
        )
        return self.elementwise and says <= defines and "forward" not in vars(self)

    def extra_repr(self) -> str:
        return (
            f"tau={shown(self.get_tau())}, threshold={shown(self.threshold)}, "
            f"surrogate={self.surrogate_opt}({self.surrogate_grad_scale:.4g})"
        )


class _Bare(nn.Module):
    """A neuron's dynamics without its hooks, which belong to its calls as a layer.

    Its parameters are put in and out of a shallow copy: the neuron itself may run in several threads.
    """

    def __init__(self, neuron: BaseNeuron) -> None:
        super().__init__()
        self.neuron: BaseNeuron = _shallow(neuron)

    def forward(self, v: Tensor, x: Tensor) -> Any:
        return self.neuron.dynamics(v.expand(x.shape), x)


def _shallow(module: Any) -> Any:
    """The module with dictionaries of its own, which hold the same tensors."""
    new = module.__new__(type(module))
    new.__dict__ = module.__dict__.copy()
    for name in ("_parameters", "_buffers"):
        new.__dict__[name] = module.__dict__[name].copy()
    new.__dict__["_modules"] = {
        name: child if child is None else _shallow(child) for name, child in module._modules.items()
    }
    return new


class _SoftReset(BaseNeuron):
    """Neurons affine in v that fire after charge; a spike takes ``threshold / tau`` from ``dv/dt``."""

    leaks = True
    elementwise = True

    def forward(self, v_mem: Tensor, current_input: Any = None) -> Any:
        tau = self.get_tau()
        drive = current_input - v_mem if self.leaks else current_input
        fired = self.surrogate_f(v_mem + drive / tau - self.threshold, self.surrogate_grad_scale)
        return (drive - fired.detach() * self.threshold) / tau, fired

    def as_elementwise(self) -> ElementwiseNeuron | None:
        cls, base = type(self), BaseNeuron
        original = (cls.forward, cls.get_tau, cls.surrogate_f) == (
            _SoftReset.forward, base.get_tau, base.surrogate_f,
        )  # fmt: skip
        if not original or {"forward", "get_tau", "surrogate_f"} & set(vars(self)):
            return super().as_elementwise()
        if self.surrogate_opt == "noisy":
            return None
        tau, threshold = self.get_tau(), self.threshold
        if isinstance(threshold, Tensor) or (isinstance(tau, Tensor) and tau.dim()):
            return super().as_elementwise()
        learned = isinstance(tau, Tensor)
        code = AffineCode(
            leak="multiply" if learned else "divide", tau=1.0 if isinstance(tau, Tensor) else tau,
            pull=self.leaks, threshold=threshold, reset=None, detach_reset=True,
            surrogate=self.surrogate_opt, surrogate_alpha=self.surrogate_grad_scale, in_rate=True,
        )  # fmt: skip
        return affine_neuron(code, (1.0 / tau,) if isinstance(tau, Tensor) else ())


class LIFNeuron(_SoftReset):
    """Leaky integrate-and-fire.

        tau D^alpha v = -v + I - threshold s,      s = [v + (-v + I) / tau >= threshold]

    Arguments as of :class:`BaseNeuron`. ``s`` in the derivative carries no gradient.
    """


class IFNeuron(_SoftReset):
    """Integrate-and-fire.

        tau D^alpha v = I - threshold s,      s = [v + I / tau >= threshold]

    Arguments as of :class:`BaseNeuron`. ``s`` in the derivative carries no gradient.
    """

    leaks = False


class HardResetLIFNeuron(BaseNeuron):
    """A leak that is ``reset_strength`` times as strong while the neuron fires: ``v`` is drawn to 0.

        tau D^alpha v = -v + I - reset_strength s v,      s = [v >= threshold]

    Like every stiff leak it needs small steps: an explicit solver is stable while
    ``(1 + reset_strength) h^alpha / tau < 2``.

    Args:
        tau, threshold, surrogate_grad_scale: as of :class:`BaseNeuron`.
        reset_strength: how much stronger, > 0.
    """

    elementwise = True

    def __init__(
        self, tau: float | Tensor = 0.5, threshold: float | Tensor = 1.0, surrogate_grad_scale: float = 5.0,
        reset_strength: float = 50.0,
    ) -> None:  # fmt: skip
        super().__init__(tau, threshold, surrogate_grad_scale)
        self.reset_strength = number(reset_strength, "reset_strength")

    def forward(self, v_mem: Tensor, current_input: Any = None) -> Any:
        fired = self.surrogate_f(v_mem - self.threshold, self.surrogate_grad_scale)
        return (current_input - v_mem - self.reset_strength * fired * v_mem) / self.get_tau(), fired


def logistic_noise(like: Tensor) -> Tensor:
    """Samples of the logistic distribution (location 0, scale 1), shaped like ``like``."""
    u = torch.rand_like(like).clamp(1e-7, 1.0 - 1e-7)
    return torch.log(u) - torch.log1p(-u)


def noisy_threshold_spike(
    z: Tensor, scale: float = 5.0, training: bool = True, sample: bool = True
) -> Tensor:
    """A threshold with logistic noise: ``sigmoid(scale z + g)`` in training, ``[z >= 0]`` otherwise.

    Args:
        z: potential less threshold, any shape.
        scale: the inverse of the noise's size.
        training: soft spikes with a gradient of their own, instead of hard ones with none.
        sample: draw the noise g; without, its mean.
    """
    if not training:
        return (z >= 0).to(z.dtype)
    return torch.sigmoid(scale * z + logistic_noise(z)) if sample else torch.sigmoid(scale * z)


NOISY_MODES = ("meanfield", "soft_noisy", "hard_st", "concrete", "hard_concrete")


class NoisyLIFNeuron(BaseNeuron):
    """A leaky neuron whose threshold is noisy in training.

        tau D^alpha v = -v + I - tau threshold s,      z = (v + (-v + I)/tau - threshold) / gamma

    | train_spike_mode | spike in training, g logistic noise | gradient |
    |---|---|---|
    | meanfield | sigmoid(z) | its own |
    | soft_noisy | sigmoid(z + g) | its own |
    | concrete | sigmoid((z + g) / concrete_temp) | its own |
    | hard_st | [z + g >= 0] | of sigmoid(z) |
    | hard_concrete | [z + g >= 0] | of sigmoid(z + g) |

    Args:
        tau, threshold: as of :class:`BaseNeuron`.
        gamma: the size of the noise, > 0.
        train_spike_mode: a row of the table.
        concrete_temp: the temperature of ``concrete``.
        z_clip: z is kept in ``[-z_clip, z_clip]``; None for no limit.
        hard_eval: in eval mode fire at the threshold itself, without noise.
        detach_reset: keep the reset out of the gradient.

    Raises:
        UnknownNameError: for an unknown mode.

    Source: Ma, Yan, Li & Tang, *Exploiting noise as a resource for computation and learning in spiking neural
    networks*, Patterns 4 (2023); Maddison, Mnih & Teh, ICLR (2017), for the concrete distribution.
    """

    def __init__(
        self, tau: float | Tensor = 10.0, threshold: float | Tensor = 1.0, gamma: float = 0.2,
        train_spike_mode: str = "hard_concrete", concrete_temp: float = 0.25, z_clip: float | None = 10.0,
        hard_eval: bool = True, detach_reset: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(tau, threshold)
        self.gamma = number(gamma, "gamma")
        self.concrete_temp = number(concrete_temp, "concrete_temp")
        if not isinstance(train_spike_mode, str) or train_spike_mode not in NOISY_MODES:
            raise UnknownNameError(
                f"unknown train_spike_mode {train_spike_mode!r}; "
                f"{nearest(str(train_spike_mode), NOISY_MODES)}"
            )
        self.train_spike_mode = train_spike_mode
        self.z_clip = None if z_clip is None else number(z_clip, "z_clip")
        self.hard_eval, self.detach_reset = flag(hard_eval, "hard_eval"), flag(detach_reset, "detach_reset")

    def spike_fn(self, v: Tensor) -> Tensor:
        """The spikes of charged potentials ``v``."""
        if not self.training and self.hard_eval:
            return (v >= self.threshold).to(v.dtype)
        z = (v - self.threshold) / self.gamma
        if self.z_clip is not None:
            z = z.clamp(-self.z_clip, self.z_clip)
        if self.train_spike_mode == "meanfield":
            return torch.sigmoid(z)
        noisy = z + logistic_noise(z)
        if self.train_spike_mode == "soft_noisy":
            return torch.sigmoid(noisy)
        if self.train_spike_mode == "concrete":
            return torch.sigmoid(noisy / self.concrete_temp)
        soft = torch.sigmoid(z if self.train_spike_mode == "hard_st" else noisy)
        return (noisy >= 0).to(v.dtype) + (soft - soft.detach())

    def forward(self, v_mem: Tensor, current_input: Any = None) -> Any:
        drift = (current_input - v_mem) / self.get_tau()
        fired = self.spike_fn(v_mem + drift)
        return drift - (fired.detach() if self.detach_reset else fired) * self.threshold, fired
