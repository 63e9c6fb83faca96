"""What the fuzz tests draw: orders, memories, shapes, layouts in memory, dtypes; and how often they draw.

``SPIKEDE_FUZZ_SEED=n`` draws other examples than the ones of every run.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import scale
import torch
from fuzz_reference import F64, Rule
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from spikede_plugins import MultiTerm, PerChannel, SumOfExponentials
from spikede_plugins.errors import SpikedeError, SpikedeWarning

EXPLICIT = ("gl", "l1", "pred", "glmulti")
CORRECTORS = ("abm", "trap")
FLOATS = (torch.float32, torch.float64)


def fuzz(quick: int, full: int) -> Callable[[Any], Any]:
    """So many examples in the default and in the full run; put below ``@given``."""
    given = os.environ.get("SPIKEDE_FUZZ_SEED")
    chosen = settings(
        max_examples=scale.scale(quick, full),
        deadline=None,
        derandomize=given is None,
        database=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    return chosen if given is None else lambda test: seed(int(given))(chosen(test))


class Count:
    """How many examples were compared, and how many ended in the error that they should end in."""

    def __init__(self, what: str) -> None:
        self.what, self.counts = what, Counter[str]()

    def add(self, unit: str, count: int = 1) -> None:
        self.counts[unit] += count

    def record(self, least: float = 0.4) -> None:
        """Report; most examples must have come to a comparison, or nothing was tested."""
        cases, errors = self.counts["cases"], self.counts["expected errors"]
        assert cases >= least * (cases + errors), self.counts
        for unit, count in self.counts.items():
            scale.record(self.what, count, unit)


# -- orders, solvers, memories --------------------------------------------------------------------

#: The ends of the interval and what lies beside them; else round numbers, for which fits are kept.
ORDERS = st.one_of(
    st.integers(2, 19).map(lambda n: n / 20),
    st.sampled_from([1e-6, 1e-3, 0.01, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999999, 1.0]),
    st.floats(0.05, 1.0),
)
STEP_SIZES = st.sampled_from([1.0, 1.0, 1.0, 0.5, 0.1, 1.5, 1])
HORIZONS = (20, 64, 200, 1000)


@dataclass(frozen=True)
class Operator:
    """Options of a conversion, and the same as a rule of the reference.

    Attributes:
        options: keywords of ``convert_to_fractional``.
        rule: without its channel dimension, which the shape of a step decides.
        soe: the tolerance and horizon of a compressed memory, else None.
        folds: with how many states a compressed memory may begin to fold.
    """

    options: dict[str, Any]
    alpha: Any
    window: int
    soe: tuple[float, int] | None
    folds: int

    @property
    def method(self) -> str:
        return self.options["method"]

    def rule(self, shape: torch.Size, learned: bool = False) -> Rule:
        """The rule for steps of this shape; with ``learned`` its orders are leaves with a gradient."""
        coefficients = dim = None
        if isinstance(self.alpha, PerChannel):
            alpha, dim = torch.tensor(self.alpha.alphas, dtype=F64), self.alpha.dim % len(shape)
        elif isinstance(self.alpha, MultiTerm):
            alpha = torch.tensor(self.alpha.orders, dtype=F64)
            coefficients = torch.tensor(self.alpha.coefficients, dtype=F64)
        else:
            alpha = torch.tensor(self.alpha, dtype=F64)
        return Rule(
            self.method, alpha.requires_grad_(learned), coefficients, dim, float(self.options["step_size"]),
            self.window, self.options["memory_reset"] == "spike",
        )  # fmt: skip

    def impossible(self) -> bool:
        """Whether the conversion has to refuse these options."""
        return self.soe is not None and self.method in CORRECTORS and self.options["memory"] != "auto"

    def fits(self, shape: torch.Size) -> bool:
        """Whether the orders fit steps of this shape."""
        if not isinstance(self.alpha, PerChannel):
            return True
        dim = self.alpha.dim
        return -len(shape) <= dim < len(shape) and shape[dim] == len(self.alpha.alphas)

    def error(self, steps: int) -> float:
        """How far a compressed memory may carry a potential away from that of a full one, relative."""
        if self.soe is None or steps <= self.folds or self.method in CORRECTORS:
            return 0.0
        return 30.0 * self.soe[0]

    def until(self, steps: int) -> int:
        """Up to which step a run has to agree: a memory is fitted to its horizon."""
        return steps if self.soe is None or steps <= self.folds else min(steps, self.soe[1])


@st.composite
def operators(
    draw: Any, channels: int, dim: int = 1, methods: tuple[str, ...] = EXPLICIT + CORRECTORS
) -> Any:
    """Options that make up a fractional operator; orders a channel are mostly as many as channels."""
    method = draw(st.sampled_from(methods))
    kind = draw(st.sampled_from(["one", "one", "one", "channel", "terms"]))
    alpha: Any
    if kind == "channel":
        count = draw(st.sampled_from([max(channels, 1)] * 4 + [channels + 1]))
        alpha = PerChannel(draw(st.lists(ORDERS, min_size=count, max_size=count)), dim=dim)
    elif kind == "terms" and method in ("gl", "glmulti"):
        orders = draw(st.lists(ORDERS, min_size=1, max_size=3))
        factors = draw(st.lists(st.sampled_from([0.1, 0.5, 1.0, 3.0]), min_size=3, max_size=3))
        alpha, method = MultiTerm(orders, factors[: len(orders)]), "glmulti"
    else:
        alpha = draw(ORDERS)
    memory = draw(
        st.one_of(
            st.sampled_from(["full", "full", "auto", "soe"]),
            st.integers(1, 40),
            st.sampled_from(HORIZONS).flatmap(
                lambda horizon: st.sampled_from([1e-3, 1e-6, 1e-9]).map(
                    lambda tolerance: SumOfExponentials(tolerance=tolerance, horizon=horizon)
                )
            ),
        )
    )
    if method in CORRECTORS and not isinstance(memory, int) and memory != "auto" and draw(st.integers(0, 3)):
        memory = "full"  # a compressed one is refused, which a few examples are enough to see
    soe, folds = None, 10**9
    if memory in ("auto", "soe"):
        soe, folds = (1e-6, 10_000), 128 if memory == "auto" else 32
    elif isinstance(memory, SumOfExponentials):
        soe, folds = (memory.tolerance, memory.horizon), 32
    options = {
        "alpha": alpha,
        "method": "gl" if method == "glmulti" and kind == "terms" and draw(st.booleans()) else method,
        "memory": memory,
        "step_size": draw(STEP_SIZES),
        "memory_reset": draw(st.sampled_from(["never", "never", "never", "spike"])),
        "learn_alpha": draw(st.booleans()),
        "checkpoint": draw(st.sampled_from([None, None, None, 1, 2, 7, 16, 1000])),
    }
    return Operator(options, alpha, memory if isinstance(memory, int) else 0, soe, folds)


# -- inputs ---------------------------------------------------------------------------------------

LAYOUTS = ("plain", "plain", "transposed", "strided", "expanded", "channels_last", "offset")


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers, lying in memory in another way."""
    if layout == "transposed" and x.dim() >= 2:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided" and x.dim() >= 1:
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 7.0).to(x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "expanded" and x.dim() >= 2 and x.shape[1]:
        return x[:, :1].expand_as(x)  # one sample for the whole batch: other numbers, drawn all the same
    if layout == "channels_last" and x.dim() == 5:
        return x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    if layout == "offset" and x.numel():
        flat = torch.empty(x.numel() + 3, dtype=x.dtype)
        flat[3:] = x.reshape(-1)
        return flat[3:].reshape(x.shape)
    return x


#: Shapes of one time step: none, empty, odd, over the edges of tiles, images.
SHAPES = st.one_of(
    st.sampled_from(
        [(), (1,), (0,), (3,), (0, 4), (4, 0), (2, 3), (1, 1), (3, 17), (2, 300), (1, 4099), (2, 3, 5)]
    ),
    st.sampled_from([(2, 3, 4, 5), (1, 2, 17, 16), (2, 3, 1, 1), (1, 3, 20, 20)]),
)
#: Lengths: none, one, at and around the blocks of 16 and the 128 steps of "auto".
LENGTHS = st.one_of(
    st.integers(1, 12), st.sampled_from([0, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 65]),
    st.sampled_from([127, 128, 129, 145, 200]),
)  # fmt: skip


def drive(steps: int, shape: tuple[int, ...], start: int, size: float, offset: float) -> Tensor:
    """An input ``[T, *shape]`` in float64, exact in bfloat16 as well."""
    generator = torch.Generator().manual_seed(start)
    x = torch.randn(steps, *shape, generator=generator, dtype=F64) * size + offset
    return x.to(torch.bfloat16).to(F64)


@st.composite
def pieces(draw: Any, steps: int) -> list[int]:
    """``steps`` cut into calls: all at once, one by one, or anything between."""
    kind = draw(st.sampled_from(["whole", "whole", "single", "cut", "cut"]))
    if kind == "whole" or steps < 2:
        return [steps]
    if kind == "single":
        return [1] * steps
    cuts = sorted(draw(st.sets(st.integers(1, steps - 1), min_size=1, max_size=4)))
    return [b - a for a, b in zip([0, *cuts], [*cuts, steps], strict=True)]


# -- calls ----------------------------------------------------------------------------------------


def attempt(call: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What a call gives, or the error it raises; frameworks' own warnings are not ours to test."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call(), None
    except Exception as error:  # the point is to see which
        return None, error


def ours(error: BaseException | None) -> bool:
    return isinstance(error, SpikedeError)


def warned(call: Callable[[], Any], about: str) -> tuple[Any, int]:
    """What a call gives and how many of our warnings say ``about``."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = call()
    return found, sum(issubclass(w.category, SpikedeWarning) and about in str(w.message) for w in caught)
