"""The fractional neuron written out in float64, for the fuzz tests to compare with.

    u_k = gain rate(v_{k-1}, x_k) + jump_k - sum_{m=1..k-1} w_m u_{k-m},        v_k = start + u_k

over the whole history, summed up anew at every step: nothing of the package, of a fused kernel or of a state
that is handed on. Weights are written from their formulas (DESIGN: gl, l1, pred; Diethelm 2002: abm, trap) in
plain torch, so that autograd gives the gradients to orders and coefficients as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

F64 = torch.float64
NUDGES = 8


def _reciprocal(series: list[Tensor]) -> list[Tensor]:
    """``1 / (1 + s_1 z + s_2 z^2 + ...)``"""
    head = torch.stack(series)
    found = [torch.ones_like(series[0])]
    for n in range(1, len(series)):
        found.append(-(head[1 : n + 1] * torch.stack(found[::-1])).sum(0))
    return found


def _gl(a: Tensor, n: int) -> list[Tensor]:
    weights = [torch.ones_like(a)]
    for m in range(1, n + 1):
        weights.append(weights[-1] * (m - 1.0 - a) / m)
    return weights[1:]


def _l1(a: Tensor, n: int) -> list[Tensor]:
    b = [(m + 1.0) ** (1.0 - a) - (float(m) ** (1.0 - a) if m else torch.zeros_like(a)) for m in range(n + 1)]
    return [b[m] - b[m - 1] for m in range(1, n + 1)]


def _pred(a: Tensor, n: int) -> list[Tensor]:
    return _reciprocal([(m + 1.0) ** a - (float(m) ** a if m else 0.0) for m in range(n + 1)])[1:]


def _trapezoid(a: Tensor, n: int) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and starting weights of the product trapezoidal rule on states."""

    def power(m: int) -> Tensor:
        return float(m) ** (1.0 + a) if m else torch.zeros_like(a)

    on_rates = [torch.ones_like(a)] + [power(m + 1) - 2.0 * power(m) + power(m - 1) for m in range(1, n + 1)]
    start = [torch.zeros_like(a)] + [power(k - 1) - (k - 1.0 - a) * float(k) ** a for k in range(1, n + 1)]
    inverse = _reciprocal(on_rates)
    first = torch.stack(start)
    starts = [(torch.stack(inverse[: k + 1][::-1]) * first[: k + 1]).sum(0) for k in range(1, n + 1)]
    return inverse[1:], starts


def _solve(charge: Callable[[Tensor], Tensor], known: Tensor, gain: Tensor, base: Tensor) -> Tensor:
    """``v = known + gain (charge(v) - v)``: the solution that Newton's method comes to from ``base``.

    Without a solution: the rate at ``base``. A solution solves the equation of the tangent at itself as well,
    ``charge(u) = a u + b``, which says what depends on what.
    """
    at = base.detach().clone()
    for _ in range(100):
        at.requires_grad_()
        with torch.enable_grad():
            there = charge(at) + 0.0 * at  # a charge need not read v
            a = torch.autograd.grad(there.sum(), at)[0]
        b = (there - a * at).detach()
        off = (known + gain * (there - at) - at).detach().abs()
        solved = off <= 1e-11 * (1.0 + at.detach().abs())
        if bool(solved.all()):
            break
        at = ((known + gain * b) / (1.0 + gain * (1.0 - a))).detach()
    a, at = torch.where(solved, a, 0.0), torch.where(solved, at, 0.0).detach()
    tangent = (known + gain * (charge(at) - a * at)) / (1.0 + gain * (1.0 - a))
    return torch.where(solved, tangent, known + gain * (charge(base) - base))


@dataclass(frozen=True)
class Rule:
    """A solver with its orders and its memory.

    Attributes:
        method: gl, l1, pred, abm, trap or glmulti.
        alpha: ``[]`` one order, ``[C]`` one a channel, ``[K]`` of terms; float64.
        coefficients: ``[K]`` of terms, else None.
        dim: the channel dimension of a step, counted from 0; None for one order.
        step_size: h.
        window: how many states are summed; 0 for all.
        forgets: whether a neuron that fires forgets its past.
    """

    method: str
    alpha: Tensor
    coefficients: Tensor | None = None
    dim: int | None = None
    step_size: float = 1.0
    window: int = 0
    forgets: bool = False

    def spread(self, number: Tensor, shape: torch.Size) -> Tensor:
        """An order's number shaped to broadcast with a step."""
        if self.dim is None or number.dim() == 0:
            return number
        return number.reshape([-1 if d == self.dim else 1 for d in range(len(shape))])


class Trajectory:
    """One layer's potential over time.

    Args:
        rule: the solver.
        steps: how many are going to be taken.
        start: the potential before the first one, ``[*shape]``.
    """

    def __init__(self, rule: Rule, steps: int, start: Tensor) -> None:
        self.rule, self.v, self.start = rule, start, start
        self.us: list[Tensor] = []
        self.age = torch.zeros_like(start.detach())  # how many states each neuron remembers
        self.start_rate = torch.zeros_like(start)
        a, h, n = rule.alpha, rule.step_size, steps + 1
        self.corrector_gain = None
        if rule.coefficients is not None:
            scaled = rule.coefficients * h ** (-a)
            table = torch.stack(_gl(a, n))  # [n, K]
            self.gain = 1.0 / scaled.sum()
            self.weights = list((table * scaled).sum(1) / scaled.sum())
        elif rule.method in ("gl", "glmulti"):
            self.gain, self.weights = h**a, _gl(a, n)
        elif rule.method == "l1":
            self.gain, self.weights = h**a * torch.exp(torch.lgamma(2.0 - a)), _l1(a, n)
        else:
            self.gain, self.weights = h**a / torch.exp(torch.lgamma(1.0 + a)), _pred(a, n)
            if rule.method in ("abm", "trap"):
                self.corrector_gain = h**a / torch.exp(torch.lgamma(2.0 + a))
                self.corrector_weights, self.start_weights = _trapezoid(a, n)

    def _past(self, weights: list[Tensor]) -> Tensor:
        total = torch.zeros_like(self.start)
        for m in range(1, len(self.us) + 1):
            if self.rule.window and m > self.rule.window:
                break
            w = self.rule.spread(weights[m - 1], self.start.shape)
            total = total + w * torch.where(self.age >= m, self.us[-m], 0.0)
        return total

    def charged(self, charge: Callable[[Tensor], Tensor], base: Tensor | None = None) -> Tensor:
        """The potential before firing; ``base`` is what the charge starts from, if that is not v."""
        base = self.v if base is None else base
        jump = base - self.v
        gain = self.rule.spread(self.gain, self.start.shape)
        rate = charge(base) - base
        self.start_rate = torch.where(self.age == 0, rate, self.start_rate)
        explicit = self.start + jump + gain * rate - self._past(self.weights)
        if self.corrector_gain is None:
            return explicit
        gain = self.rule.spread(self.corrector_gain, self.start.shape)
        known = self.start + jump - self._past(self.corrector_weights)
        for age in self.age.unique().tolist():
            if not (self.rule.window and age > self.rule.window):
                s = self.rule.spread(self.start_weights[int(age)], self.start.shape)
                known = known + torch.where(self.age == age, gain * s * self.start_rate, 0.0)
        if self.rule.method == "abm":
            return known + gain * (charge(explicit) - explicit)
        return _solve(charge, known, gain, base)

    def restart(self, rows: Tensor) -> None:
        """The samples ``rows [B]`` begin anew at the potential that they have now."""
        rows = rows.reshape(-1, *([1] * (self.v.dim() - 1)))
        self.start = torch.where(rows, self.v, self.start)
        self.age = torch.where(rows, torch.zeros_like(self.age), self.age)

    def carry(self, v: Tensor, fired: Tensor | None = None) -> None:
        """The potential after firing, which the framework carries into the next step."""
        self.us.append(v - self.start)
        self.v = v
        self.age = self.age + 1
        if self.rule.forgets and fired is not None:
            fired = fired.detach() != 0
            self.start = torch.where(fired, v, self.start)
            self.age = torch.where(fired, torch.zeros_like(self.age), self.age)


@dataclass
class Reference:
    """What a run gives, and how far each element may be compared.

    Attributes:
        outputs, vs: ``[T, *shape]``, what the neuron gives and carries on.
        margins: ``[T, *shape]``, how far every potential compared with a threshold kept from it.
        others: further variables after the last step.
    """

    outputs: Tensor
    vs: Tensor
    margins: Tensor
    others: dict[str, Tensor] = field(default_factory=dict)

    def comparable(self, tolerance: float, largest: float = 1e3) -> Tensor:
        """Where rounding of size ``tolerance`` cannot have changed a spike, up to this step.

        A potential at its threshold may fall on either side of it in another rounding, and everything after
        that differs; so may what has grown so large that rounding is no longer small.
        """
        size = torch.cummax(torch.nan_to_num(self.vs.detach().abs(), nan=math.inf), 0).values
        fine = (self.margins.detach() > tolerance * (1.0 + size)) & (size < largest)
        return torch.cumprod(fine.to(torch.int64), 0).bool()


def nudged(x: Tensor, dtype: torch.dtype, draw: int) -> Tensor:
    """An input (float64) that differs from ``x`` by a few roundings of ``dtype``, drawn by number."""
    eps = 50.0 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return x + eps * torch.randn(x.shape, generator=torch.Generator().manual_seed(draw), dtype=F64) * (
        1 + x.abs()
    )


def steady(reference: Reference, other: Reference, tolerance: float) -> Tensor:
    """Where what a few roundings of the input make of the run is small against the tolerance, up to a step.

    An explicit scheme with too large a step multiplies every error from step to step, by the definition
    itself; there, no two ways to compute it agree.
    """
    size = 1.0 + torch.cummax(reference.vs.detach().abs(), 0).values
    moved = (reference.vs - other.vs).detach().abs() > 0.05 * tolerance * size
    return torch.cumprod((~moved).to(torch.int64), 0).bool()


def compare(
    reference: Reference,
    tolerance: float,
    *,
    outputs: Tensor | None = None,
    vs: Tensor | None = None,
    until: int | None = None,
    what: str = "",
    again: Callable[[int], Reference] | None = None,
) -> int:
    """Outputs and potentials ``[T, *shape]`` against the reference; how many elements were compared.

    Spikes have to be equal where they are comparable, potentials within the tolerance. ``again`` gives the
    reference for an input that is a few roundings off, to tell errors from an unstable scheme.
    """
    steps = reference.vs.shape[0] if until is None else min(until, reference.vs.shape[0])
    if not steps:
        return 0
    valid = reference.comparable(tolerance)[:steps]
    size = 1.0 + torch.cummax(reference.vs.detach()[:steps].abs(), 0).values
    for found, expected, name in ((outputs, reference.outputs, "output"), (vs, reference.vs, "potential")):
        if found is None:
            continue
        assert found.shape == expected.shape, f"{what}: {name} {found.shape}, expected {expected.shape}"
        off = (found.detach().to(F64)[:steps] - expected.detach()[:steps]).abs()
        wrong = valid & ~(off <= tolerance * size)
        if wrong.any() and again is not None:
            for draw in range(NUDGES):  # one alone may happen to leave an unstable mode alone
                valid = valid & steady(reference, again(draw), tolerance)[:steps]
            wrong = valid & wrong
        if wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            raise AssertionError(
                f"{what}: {name} at {at} is {found[at].item()!r}, by definition {expected[at].item()!r}; "
                f"{int(wrong.sum())} of {int(valid.sum())} comparable elements differ"
            )
    return int(valid.sum())
