"""Fractional orders: fixed or learnable, one for a layer, one a channel, or several terms.

The Caputo order alpha lives in (0, 1]; alpha = 1 is the ordinary derivative. A learnable order is an
``nn.Parameter`` that is *read* through :func:`bounded`, so what the solvers see never leaves the interval.

Where training is spread over processes or devices, what a forward pass sees may be a copy of the parameter
that the optimiser holds: gathered from shards (FSDP), or replicated (``DataParallel``). See
:meth:`FractionalOrder.keep_inside`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.parameter import UninitializedParameter, is_lazy

from spikede_plugins.errors import OptionTypeError, SpikedeWarning, StateError
from spikede_plugins.order_values import (
    MultiTerm,
    PerChannel,
    check_alpha,
    check_parameter,
    check_untrained,
)

__all__ = [
    "LEARNED",
    "FractionalOrder",
    "MultiTerm",
    "PerChannel",
    "bounded",
    "check_alpha",
    "check_parameter",
    "check_untrained",
]

#: A learnable order is kept at or above this value (weights and gain are smooth down to it).
ALPHA_MIN = 1e-4
#: And so is a learnable coefficient of a multi-term order: the terms must stay dissipative.
COEFFICIENT_MIN = 1e-4
#: The parameters that a learnable order has.
LEARNED = ("alpha", "coefficients")


class _Bounded(torch.autograd.Function):
    """Clamp whose gradient is stopped only where it would push further out of the interval."""

    @staticmethod
    def forward(
        ctx: Any, raw: Tensor, low: float, high: float, at_the_end: Callable[[], None] | None
    ) -> Tensor:
        # As it is now: by the backward pass shards may be gathered anew, from values further out.
        ctx.save_for_backward(raw > high, raw < low)
        ctx.at_the_end = at_the_end
        return raw.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        above, below = ctx.saved_tensors
        if ctx.at_the_end is not None:
            torch.autograd.Variable._execution_engine.queue_callback(ctx.at_the_end)  # type: ignore[attr-defined]
        # A descent step moves against the gradient: at the upper end a negative gradient pushes out.
        outward = (above & (grad < 0)) | (below & (grad > 0))
        return grad.masked_fill(outward, 0.0), None, None, None


def bounded(raw: Tensor, low: float, high: float, at_the_end: Callable[[], None] | None = None) -> Tensor:
    """``raw`` clamped to [low, high]; gradients that lead back inside pass, others stop.

    ``at_the_end`` is called when a backward pass through this is over.
    """
    return _Bounded.apply(raw, low, high, at_the_end)


_FLAT = (
    "a learned order ({}) has left its interval and cannot be put back on the edge, since it is a piece of "
    "FSDP's flat parameter. Neurons never see it outside, but the optimiser's value may differ from that "
    "of a single process. Pass use_orig_params=True to FullyShardedDataParallel."
)
_SHARDED = (
    "a learned order ({}) is sharded over processes and only a part of it is here; look at it where it is "
    "whole: after model.unshard(), in FullyShardedDataParallel.summon_full_params(model), or in a full "
    "state_dict."
)


def _is_shard(raw: Tensor, count: int) -> bool:
    """Whether this is a DTensor, or the piece of a parameter that FSDP has left with this process."""
    return hasattr(raw, "to_local") or raw.numel() != count


def _is_freed(raw: Tensor) -> bool:
    """Whether this is a view of a flat parameter that FSDP has freed."""
    return raw.untyped_storage().nbytes() == 0 < raw.numel()


class FractionalOrder(nn.Module):
    """The order(s) of one neuron layer.

    Args:
        alpha: a float in (0, 1], :class:`PerChannel`, :class:`MultiTerm`, or an ``nn.Parameter`` of one
            number.
        learn_alpha: make the order(s) a trainable parameter named ``alpha``. A parameter that was given is
            trained in any case, and is that very object.

    A fixed order holds no parameter and no buffer, so it adds no key to a ``state_dict``. A learnable
    one adds ``alpha`` (and ``coefficients``); a checkpoint without them loads and leaves them as they are,
    one with values that are none of theirs is refused.
    They are vectors (a single order has one element), since FSDP shards no scalars.

    Called, it gives what a solver needs, and as any module it may be sharded on its own.

    Raises:
        OrderError, OptionError, OptionTypeError: for values that cannot be used.
    """

    #: Whether the optimiser's own values may lie outside: put back at the end of the next backward pass.
    _outside = False
    _warned = False
    #: The order that this one is a replica of (``DataParallel``).
    _master: tuple[FractionalOrder, ...] = ()

    def __init__(
        self, alpha: float | PerChannel | MultiTerm | nn.Parameter, learn_alpha: bool = False
    ) -> None:
        super().__init__()
        if not isinstance(learn_alpha, bool):
            raise OptionTypeError(f"learn_alpha must be True or False, got {learn_alpha!r}.")
        self.channel_dim: int | None = None
        learn_coefficients = False
        coefficients: tuple[float, ...] | None = None
        parameter = factors = None
        values: float | tuple[float, ...]
        #: Whether the number of orders is settled; else it becomes the number of channels of the layer.
        self.sized = True
        if isinstance(alpha, PerChannel):
            values, self.channel_dim, self.sized = alpha.alphas, alpha.dim, alpha.sized
            parameter = alpha.parameter
        elif isinstance(alpha, MultiTerm):
            values, coefficients = alpha.orders, alpha.coefficients
            learn_coefficients = alpha.learn_coefficients
            parameter, factors = alpha.parameter, alpha.factors
        elif isinstance(alpha, nn.Parameter):
            check_parameter(alpha)
            values, parameter = float(alpha.item()), alpha
        else:
            check_untrained(alpha, "alpha")
            values = check_alpha(alpha)
        self.learned = learn_alpha or parameter is not None
        #: The parameters that are the caller's own objects.
        self.given = tuple(p for p in (parameter, factors) if p is not None)
        self.multi_term = coefficients is not None
        self._fixed_alpha: float | tuple[float, ...] | None = None
        self._fixed_coefficients: tuple[float, ...] | None = None
        #: How many orders: channels or terms.
        self.count = len(values) if isinstance(values, tuple) else 1
        self.low = min(ALPHA_MIN, *(values if isinstance(values, tuple) else (values,)))
        self.low_coefficient = min(COEFFICIENT_MIN, *(coefficients or (1.0,)))
        #: The order that channels start from whose number is not settled yet.
        self._first = values[0] if isinstance(values, tuple) else values
        if not self.learned:
            self._fixed_alpha = values
        elif parameter is not None:
            self.alpha = parameter
        elif self.sized:
            self.alpha = nn.Parameter(torch.tensor(values, dtype=torch.get_default_dtype()).reshape(-1))
        else:
            self.alpha = UninitializedParameter(dtype=torch.get_default_dtype())  # type: ignore[call-arg, assignment]
        if factors is not None:
            self.coefficients = factors
        elif learn_coefficients:
            self.coefficients = nn.Parameter(
                torch.tensor(coefficients, dtype=torch.get_default_dtype())
            )
        else:
            self._fixed_coefficients = coefficients

    def size(self, channels: int) -> None:
        """Settle the number of orders of ``PerChannel(alpha)``: as many as the layer has channels."""
        if self.sized:
            return
        if self._fixed_alpha is not None:
            self._fixed_alpha = (self._first,) * channels
        else:
            with torch.inference_mode(False), torch.no_grad():  # it is to be trained, whenever it is made
                if is_lazy(self.alpha):
                    self.alpha.materialize((channels,))  # type: ignore[attr-defined]
                else:  # moved to a device of another kind, on which it is another parameter in any case
                    self.alpha = nn.Parameter(self.alpha.new_empty(channels))
                self.alpha.fill_(self._first)
        self.count, self.sized = channels, True

    @property
    def fixed(self) -> bool:
        """Whether nothing here is trained, so that weights may be computed once and kept."""
        return self._fixed_alpha is not None and (
            not self.multi_term or self._fixed_coefficients is not None
        )

    @property
    def is_one(self) -> bool:
        """Whether this is the fixed integer order, for which the native neuron is the answer."""
        if self._fixed_alpha is None or self.multi_term:
            return False
        values = self._fixed_alpha if isinstance(self._fixed_alpha, tuple) else (self._fixed_alpha,)
        return all(v == 1.0 for v in values)

    def keep_inside(self) -> None:
        """Put learned orders and coefficients that an optimiser step pushed out back on the edge.

        What solvers see is bounded anyway; but a parameter left outside would drift on with the optimiser's
        momentum, and take as long to come back.

        In the forward pass of an FSDP module or of a replica these are copies. Clamping them gives the
        gradients of an ordinary module; the optimiser's own are at hand, and clamped, when the backward pass
        is over.
        """
        for name, low, high in (("alpha", self.low, 1.0), ("coefficients", self.low_coefficient, math.inf)):
            raw = getattr(self, name, None)
            if not isinstance(raw, Tensor) or is_lazy(raw) or raw.is_meta or isinstance(raw, FakeTensor):
                continue  # none, or a shape without numbers
            raw = raw.detach()
            raw = raw.to_local() if hasattr(raw, "to_local") else raw
            if not bool(((raw > high) | (raw < low)).any()):
                continue
            if name not in self._parameters and not self._master:
                if name in vars(self) and not self._warned:  # a piece of FSDP's flat parameter
                    self._warned = True
                    warnings.warn(_FLAT.format(name), SpikedeWarning, stacklevel=2)
                continue
            # Not `raw.clamp_`, which a view of several would refuse.
            raw.data.clamp_(low, high)
            self._outside = True

    def _put_back(self) -> None:
        self._outside = False
        for order in self._master or (self,):
            order.keep_inside()
            order._outside = False

    @property
    def _sharded(self) -> bool:
        learned = [getattr(self, name, None) for name in ("alpha", "coefficients")]
        return self.sized and any(
            _is_shard(raw, self.count) or _is_freed(raw) for raw in learned if raw is not None
        )

    @property
    def readable(self) -> bool:
        """Whether the orders, learned ones too, are whole and have numbers that can be looked at now."""
        learned = [getattr(self, name, None) for name in LEARNED]
        hidden = any(raw.is_meta or isinstance(raw, FakeTensor) for raw in learned if raw is not None)
        return not hidden and not self._sharded

    def settings(self) -> dict[str, Any]:
        """The orders as settings of a checkpoint: a number, or a list; None for what is learned.

        Equal orders of all channels are one number: how many channels there are is no setting.
        """

        def plain(values: float | tuple[float, ...] | None) -> Any:
            if not isinstance(values, tuple) or self.multi_term:
                return list(values) if isinstance(values, tuple) else values
            return values[0] if len(set(values)) == 1 else list(values)

        # Channels that are not counted yet have learned nothing: they have the order that they start from.
        found: dict[str, Any] = {"alpha": plain(self._fixed_alpha) if self.sized else self._first}
        if self.channel_dim is not None:
            found["channel dimension"] = self.channel_dim
        if self.multi_term:
            found["coefficients"] = plain(self._fixed_coefficients)
        return found

    def values(self) -> dict[str, list[float]]:
        """The present ``"orders"`` and ``"coefficients"`` as numbers; none where they cannot be read."""
        if not self.readable:
            return {}
        with torch.no_grad():
            found = {"orders": self.alphas(), "coefficients": self.term_coefficients()}
        return {name: value.reshape(-1).tolist() for name, value in found.items() if value is not None}

    def learned_now(self) -> dict[str, Any]:
        """The present numbers of what :meth:`settings` gives as None; nothing where they cannot be read."""
        values = self.values()
        return {"alpha" if name == "orders" else name: numbers for name, numbers in values.items()}

    def _replicate_for_data_parallel(self) -> FractionalOrder:
        replica = super()._replicate_for_data_parallel()
        replica._master = self._master or (self,)
        return replica

    def _read(self, name: str, device: torch.device | None, low: float, high: float) -> Tensor:
        raw = getattr(self, name)
        if not self.sized and name == "alpha":
            return torch.tensor([self._first], dtype=torch.float64, device=device)
        if raw.is_meta:  # of which only the shape is to be had
            device = raw.device
        if _is_shard(raw, self.count):
            raise StateError(_SHARDED.format(name))
        single = not (self.multi_term or self.channel_dim is not None)
        raw = raw.to(device=device, dtype=torch.float64).reshape(() if single else -1)
        return bounded(raw, low, high, self._put_back if self._outside else None)

    def forward(self, device: torch.device | None = None) -> list[Tensor]:
        """The orders and, of several terms, their coefficients, with a learned one put back inside before."""
        if not torch.compiler.is_compiling():
            self.keep_inside()
        coefficients = self.term_coefficients(device)
        return [self.alphas(device), *([] if coefficients is None else [coefficients])]

    def alphas(self, device: torch.device | None = None) -> Tensor:
        """The orders as seen by a solver: shape [] (one order), [C] (channels) or [K] (terms), float64.

        Raises:
            StateError: for a learned order that is sharded over processes and not gathered now.
        """
        if self._fixed_alpha is not None:
            return torch.tensor(self._fixed_alpha, dtype=torch.float64, device=device)
        return self._read("alpha", device, self.low, 1.0)

    def term_coefficients(self, device: torch.device | None = None) -> Tensor | None:
        """The factors of a multi-term order, shape [K], float64; None for a single order."""
        if not self.multi_term:
            return None
        if self._fixed_coefficients is not None:
            return torch.tensor(self._fixed_coefficients, dtype=torch.float64, device=device)
        return self._read("coefficients", device, self.low_coefficient, math.inf)

    def describe(self) -> str:
        """A short text for reports: the current value(s) and what is trained."""
        if not self.readable:
            return "sharded (learned)" if self._sharded else "without a number, on the meta device (learned)"
        if not self.sized:
            return f"{self._first:.4g} for every channel" + (" (learned)" if not self.fixed else "")
        values = self.alphas().detach().reshape(-1).tolist()
        shown = ", ".join(f"{v:.4g}" for v in values[:4]) + (", ..." if len(values) > 4 else "")
        if self.multi_term:
            factors = self.term_coefficients()
            text = " + ".join(
                f"{c:.4g} D^{a:.4g}"
                for c, a in zip(factors.detach().tolist() if factors is not None else [], values, strict=True)
            )
        elif self.channel_dim is not None:
            text = f"{len(values)} channels [{shown}]"
        else:
            text = shown
        return text + (" (learned)" if not self.fixed else "")

    def extra_repr(self) -> str:
        return self.describe()

    def unfit(self, name: str, value: Any) -> str:
        """Why ``value`` cannot be loaded as the parameter of this name; empty if it can."""
        own = self._parameters[name]
        if own is None or not isinstance(value, Tensor):
            return f"it is no tensor but {type(value).__name__}"
        # A single order may have been saved as a number; torch itself takes none of other shapes for it.
        if not self.sized:
            if value.dim() != 1:
                return f"it has the shape {tuple(value.shape)}, this model's is one order a channel"
        elif value.shape != own.shape and not (value.numel() == own.numel() == 1 and value.dim() < 2):
            return f"it has the shape {tuple(value.shape)}, this model's has {tuple(own.shape)}"
        if value.is_meta or isinstance(value, FakeTensor):
            return ""
        high, interval = (1.0, "(0, 1]") if name == "alpha" else (math.inf, "(0, inf)")
        wrong = ~(value.isfinite() & (value > 0) & (value <= high))
        if bool(wrong.any()):
            return f"it must lie in {interval}, but has {value[wrong].reshape(-1)[0].item():g}"
        return ""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.keep_inside()  # what an optimiser step left outside is no order
        if self.sized:
            super()._save_to_state_dict(destination, prefix, keep_vars)
        # else there is nothing yet but the number that all channels start from, a setting

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:
        learned = [name for name in LEARNED if self._parameters.get(name) is not None]
        given = {name: state_dict[prefix + name] for name in learned if prefix + name in state_dict}
        unfit = {prefix + name: why for name, value in given.items() if (why := self.unfit(name, value))}
        error_msgs += [f"{key}: {why}" for key, why in unfit.items()]
        state_dict = {key: value for key, value in state_dict.items() if key not in unfit}
        # A checkpoint of the integer model knows no order: it loads, and the order stays as it is.
        missing: list[str] = []
        for name in learned:
            saved = state_dict.get(prefix + name)
            if not isinstance(saved, Tensor):
                continue
            if not self.sized:
                self.size(len(saved))
            state_dict[prefix + name] = saved.reshape(self._parameters[name].shape)  # type: ignore[union-attr]
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
