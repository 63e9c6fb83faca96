"""Integrate-and-fire neurons in plain numbers: charge affine in v, threshold, hard or soft reset.

    none:      c = v + x
    divide:    c = v + (x - (v - rest)) / tau           or  v - (v - rest) / tau + x
    multiply:  c = v + (x - (v - rest)) f               or  v - (v - rest) f + x,      f = params[0]
    fire:      s = [c >= threshold] (or >),    v = c - threshold s    or    (1 - s) c + reset s

or, of a derivative-style neuron (``in_rate``), which fires on its native charge p and resets within its rate,

    p = v + (x - (v - rest)) f   (or v + x f),    s = [p >= threshold],    c = p - threshold f s,    v = h

where h is the potential that memory makes of c.

A neuron of this form needs no Python callback, so a compiled graph can carry it as one operation (and
a fused kernel can run it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spikede_plugins.engine.scan import Derivatives, ElementwiseNeuron, Local, Pulled
from spikede_plugins.errors import OptionError
from spikede_plugins.surrogate import available_surrogates, slope, spike

LEAKS = ("none", "divide", "multiply")


@dataclass(frozen=True)
class AffineCode:
    """The numbers of such a neuron.

    Attributes:
        leak: ``"none"`` (perfect integrator), ``"divide"`` (time constant ``tau``) or ``"multiply"``
            (the leak factor is the tensor ``params[0]``, e.g. ``sigmoid(w)`` of a parametric LIF).
        tau: time constant in steps, for ``"divide"``.
        decay_input: whether the input goes through the leak as well.
        pull: whether the potential does; without, the leak factor scales the input alone.
        rest: the potential the leak pulls to.
        short_decay: write the leak without input decay at rest 0 as ``v (1 - 1/tau) + x``, as some
            frameworks do (the same number, rounded differently).
        threshold, reset: firing threshold; reset potential, or None for soft reset.
        strict: fire above the threshold only (``>``), not at it (``>=``).
        detach_reset: keep the reset out of the gradient.
        surrogate, surrogate_alpha: the surrogate gradient by name (see ``spikede_plugins.surrogate``).
        in_rate: firing is decided on the native charge, and the reset, kept out of the gradient, is part of
            the rate: ``threshold`` times the leak factor is taken from it.
    """

    leak: str = "none"
    tau: float = 1.0
    decay_input: bool = True
    rest: float = 0.0
    short_decay: bool = False
    threshold: float = 1.0
    reset: float | None = 0.0
    detach_reset: bool = False
    surrogate: str = "sigmoid"
    surrogate_alpha: float = 4.0
    strict: bool = False
    pull: bool = True
    in_rate: bool = False

    def __post_init__(self) -> None:
        if self.leak not in LEAKS:
            raise OptionError(f"leak must be one of {LEAKS}, got {self.leak!r}.")
        if self.surrogate not in available_surrogates():
            raise OptionError(f"unknown surrogate {self.surrogate!r}.")
        if not self.pull and not (self.leak in ("divide", "multiply") and self.decay_input):
            raise OptionError("pull=False needs a leak that the input goes through.")
        if self.in_rate and not (self.decay_input and self.reset is None and self.detach_reset):
            raise OptionError("in_rate needs decay_input, a soft reset and detach_reset.")


def _native(code: AffineCode, v: Tensor, x: Tensor, *params: Tensor) -> Tensor:
    if code.leak == "none":
        return v + x
    if not code.pull:
        return v + (x / code.tau if code.leak == "divide" else x * params[0])
    if code.leak == "divide":
        if code.decay_input:
            return v + (x - (v - code.rest)) / code.tau
        if code.short_decay and code.rest == 0.0:
            return v * (1.0 - 1.0 / code.tau) + x
        return v - (v - code.rest) / code.tau + x
    factor = params[0]
    if code.decay_input:
        return v + (x - (v - code.rest)) * factor
    if code.short_decay and code.rest == 0.0:
        return v * (1.0 - factor) + x
    return v - (v - code.rest) * factor + x


def charge(code: AffineCode, v: Tensor, x: Tensor, *params: Tensor) -> Tensor:
    """The charge of one step (or, broadcast, of many): the native one, less a reset that is in the rate."""
    c = _native(code, v, x, *params)
    if not code.in_rate:
        return c
    return c - _fires(c.detach() - code.threshold, code) * _drop(code, params)


def _fires(z: Tensor, code: AffineCode) -> Tensor:
    return (z > 0 if code.strict else z >= 0).to(z.dtype)


def _drop(code: AffineCode, params: Sequence[Tensor]) -> Tensor | float:
    """What a spike takes from the charge of a derivative-style neuron."""
    if code.leak == "multiply":
        return code.threshold * params[0]
    return code.threshold / code.tau if code.leak == "divide" else code.threshold


def spike_before(code: AffineCode, v: Tensor, x: Tensor, *params: Tensor) -> Tensor:
    """The spikes of a derivative-style neuron, from what it has before the step."""
    z = _native(code, v, x, *params) - code.threshold
    return spike(z, code.surrogate, code.surrogate_alpha, code.strict)


def fire(
    code: AffineCode, h: Tensor, surrogate: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Spike and potential after reset; ``surrogate`` is used in place of the named one."""
    z = h - code.threshold
    s = spike(z, code.surrogate, code.surrogate_alpha, code.strict) if surrogate is None else surrogate(z)
    held = s.detach() if code.detach_reset else s
    if code.reset is None:
        return s, h - held * code.threshold
    return s, (1.0 - held) * h + held * code.reset


def derivatives(code: AffineCode) -> Derivatives:
    """The derivatives of charge and firing at all steps, in closed form.

        dc/dv = 1 - f,   dc/dx = f or 1,   dc/df = x - (v - rest) or -(v - rest),    f = 0, 1/tau or params[0]
        ds/dh = slope,   dv/dh = 1 - threshold slope   or   (1 - s) + (reset - h) slope

    with the slope of the surrogate, which counts in ``dv/dh`` only if the reset is not detached.
    """
    return _derivatives_in_rate(code) if code.in_rate else _derivatives(code)


def _derivatives_in_rate(code: AffineCode) -> Derivatives:
    """Of a derivative-style neuron: ``ds/dv = slope dp/dv``, and ``dc/df`` has ``-threshold s`` as well."""

    def at(v_prev: Tensor, x_seq: Tensor, h_seq: Tensor, params: Sequence[Tensor]) -> Local:
        z = _native(code, v_prev, x_seq, *params).detach() - code.threshold
        slopes = slope(z, code.surrogate, code.surrogate_alpha)
        factor = params[0].detach() if code.leak == "multiply" else z.new_tensor(_leak_number(code, 1.0))
        kept = 1.0 - factor if code.pull and code.leak != "none" else torch.ones_like(factor)

        def pull_back(into_c: Tensor, into_s: Tensor | None, into_v: Tensor | None) -> Pulled:
            into_p = into_c if into_s is None else torch.addcmul(into_c, slopes, into_s.to(into_c.dtype))
            if code.leak != "multiply":
                return into_p * factor, (None,) * len(params)
            lever = x_seq - (v_prev - code.rest) if code.pull else x_seq
            into_f = into_p * lever - into_c * (code.threshold * _fires(z, code))
            return into_p * factor, (into_f.sum_to_size(params[0].shape),)

        return Local(
            lambda: charge(code, v_prev, x_seq, *params).detach(), kept.expand(_time_shape(factor, z)),
            slopes * kept, z.new_ones(()), pull_back,
        )  # fmt: skip

    return at


def _derivatives(code: AffineCode) -> Derivatives:
    def at(v_prev: Tensor, x_seq: Tensor, h_seq: Tensor, params: Sequence[Tensor]) -> Local:
        z = h_seq - code.threshold
        spike_slope = slope(z, code.surrogate, code.surrogate_alpha)
        if code.reset is None:
            reset_slope = z.new_ones(()) if code.detach_reset else 1.0 - code.threshold * spike_slope
        else:
            reset_slope = (z <= 0 if code.strict else z < 0).to(z.dtype)
            if not code.detach_reset:
                reset_slope = torch.addcmul(reset_slope, code.reset - h_seq, spike_slope)
        factor = params[0].detach() if code.leak == "multiply" else z.new_tensor(_leak_number(code))

        def pull_back(into_c: Tensor, into_s: Tensor | None, into_v: Tensor | None) -> Pulled:
            scale = 1.0 if code.leak == "none" or not code.decay_input else factor
            if code.leak != "multiply":
                return into_c * scale, (None,) * len(params)
            lever = code.rest - v_prev if code.pull else torch.zeros_like(v_prev)
            if code.decay_input:
                lever = lever + x_seq
            return into_c * scale, ((into_c * lever).sum_to_size(params[0].shape),)

        return Local(
            lambda: charge(code, v_prev, x_seq, *params).detach(),
            (1.0 - factor if code.pull else torch.ones_like(factor)).expand(_time_shape(factor, z)),
            spike_slope, reset_slope, pull_back,
        )  # fmt: skip

    return at


def _leak_number(code: AffineCode, none: float = 0.0) -> float:
    return 1.0 / code.tau if code.leak == "divide" else none


def _time_shape(factor: Tensor, like: Tensor) -> torch.Size:
    """A single number stays one; a factor a neuron is the same at every step."""
    return factor.shape if factor.dim() == 0 else like.shape


def affine_neuron(
    code: AffineCode,
    params: tuple[Tensor, ...] = (),
    surrogate: Callable[[Tensor], Tensor] | None = None,
) -> ElementwiseNeuron:
    """The neuron of ``code`` for the scan engine.

    Args:
        code: its numbers.
        params: ``(factor,)`` for ``leak="multiply"``, else empty.
        surrogate: a framework's own surrogate function, to be called in place of the named one (the
            two must be the same function: gradients use the named one's slope).
    """
    return ElementwiseNeuron(
        charge=lambda v, x, *p: charge(code, v, x, *p),
        fire=lambda h, *p: fire(code, h, surrogate),
        params=params,
        code=code,
        derivatives=derivatives(code),
        spike=(lambda v, x, *p: spike_before(code, v, x, *p)) if code.in_rate else None,
    )
