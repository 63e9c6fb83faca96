"""What ``fdeint`` costs: against a plain loop, against other packages, and over longer and longer runs.

    python benchmarks/solve.py [--out DIR] [--repeat N] [--only loop,packages,growth] [--smoke] [--threads 2]

Writes ``solve.json`` and ``solve.md``. ``--only`` measures some groups anew and keeps the others as they are.
Nothing here fails for a time: the tables say what must be reached, and whether it was. The packages compared
with are optional (``pip install FDEint pycaputo``); without one its row says so.

The problem: ``D^0.7 y = t - lambda y``, y(0) = 1, for as many lambda in [0.5, 1.5] as there are states, steps
of 1/256. Its solution is ``E_a(-lambda t^a) + t^(1+a) E_{a,2+a}(-lambda t^a)``. Errors are the largest
differences from it: over the run (in its first 16 steps, where y begins like t^a, and at 16 later times), and
at its end.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import command
import numpy as np
import torch
from measure import Demand, Row, Run, Setting, at_least, clear, median_time, seconds
from tables import Column, Table, time_text
from torch import Tensor

from spikede_plugins import get_solver
from spikede_plugins.fdeint import fdeint
from spikede_plugins.mittag_leffler import mittag_leffler

ALPHA, STEP = 0.7, 1.0 / 256.0
LOOP_FACTOR, PACKAGE_FACTOR = at_least(50.0), at_least(10.0)
#: Seconds that the slower side of one row may take in all, as far as its first run leaves a choice.
BUDGET = 30.0
STATES, STEPS = 1000, 2000
#: The graphs of the others take T^2 memory: at 2 000 steps 8 GB (FDEint) and 18 GB (the loop) in float32.
STEPS_BACKWARD = 1000
#: Rounding leaves FDEint in float32 an error that abm has with steps so many times as long, after 2 000 of
#: FDEint's steps (forward) and after 1 000 (forward + backward).
COARSER = {False: 4, True: 2}
#: The sides of a row: each gives the whole solution ``[steps + 1, states]``.
Solve = Callable[["Problem"], Tensor]


class Problem(NamedTuple):
    """The problem at the head of this file.

    Attributes:
        rates: lambda ``[states]``, which may require a gradient.
        start: ``y(0) [states]``, likewise.
        t: the times ``[steps + 1]``.
    """

    rates: Tensor
    start: Tensor
    t: Tensor

    @classmethod
    def make(
        cls, states: int, steps: int, dtype: torch.dtype, learn: bool = False, step: float = STEP
    ) -> Problem:
        rates = torch.linspace(0.5, 1.5, states, dtype=dtype).requires_grad_(learn)
        start = torch.ones(states, dtype=dtype).requires_grad_(learn)
        return cls(rates, start, torch.arange(steps + 1, dtype=dtype) * step)

    def f(self, t: Any, y: Any) -> Any:
        return t - self.rates * y

    def errors(self, y: Tensor) -> dict[str, float]:
        """The largest difference from the solution over the run, and at its end."""
        steps = len(self.t) - 1
        first, later = torch.arange(1, min(16, steps) + 1), torch.linspace(0, steps, 17).long()[1:]
        at = torch.unique(torch.cat([first, later]))
        t, rates = self.t[at, None].double(), self.rates.double()
        z = -rates * t**ALPHA
        exact = mittag_leffler(z, ALPHA) + t ** (1 + ALPHA) * mittag_leffler(z, ALPHA, 2 + ALPHA)
        off = (y[at].double() - exact).abs().amax(1)
        return {"run": float(off.max()), "end": float(off[-1])}


# -- the sides ------------------------------------------------------------------------------------


def plain_loop(problem: Problem) -> Tensor:
    """Gruenwald-Letnikov as it is written in textbooks: at every step a loop over all states before."""
    alpha = torch.tensor(ALPHA, dtype=torch.float64)
    gain = float(get_solver("gl").gain(alpha, STEP))
    weights = get_solver("gl").weights(alpha, len(problem.t)).tolist()
    y, ys = problem.start, [problem.start]
    deviations: list[Tensor] = []
    for k in range(1, len(problem.t)):
        total = gain * problem.f(problem.t[k - 1], y)
        for m in range(1, k):
            total = total - weights[m - 1] * deviations[k - 1 - m]
        y = problem.start + total
        deviations.append(total)
        ys.append(y)
    return torch.stack(ys)


def of_fdeint_package(problem: Problem) -> Tensor:
    """FDEint's predictor-corrector."""
    from FDEint import FDEint

    alpha = torch.tensor(ALPHA, dtype=problem.t.dtype)
    found: Tensor = FDEint(problem.f, problem.t, problem.start, alpha, h=STEP, dtype=problem.t.dtype)
    return found[0]


def of_pycaputo(scheme: str, **options: Any) -> Solve:
    """One of pycaputo's explicit schemes with fixed steps; NumPy, float64."""

    def solve(problem: Problem) -> Tensor:
        from pycaputo.controller import make_fixed_controller
        from pycaputo.derivatives import CaputoDerivative
        from pycaputo.events import StepAccepted
        from pycaputo.fode import caputo
        from pycaputo.stepping import evolve

        rates = problem.rates.numpy()
        equation = getattr(caputo, scheme)(
            ds=(CaputoDerivative(ALPHA),) * len(rates),
            control=make_fixed_controller(STEP, tstart=0.0, tfinal=float(problem.t[-1])),
            source=lambda t, y: t - rates * y,
            y0=(problem.start.numpy(),),
            **options,
        )
        events = evolve(equation, dtinit=STEP)
        return torch.from_numpy(np.array([e.y for e in events if isinstance(e, StepAccepted)]))

    return solve


def in_turn(other: Run, own: Run, repeat: int) -> Row:
    """Medians of both sides in turn, and by how much the second is faster.

    Where the first is slow, fewer pairs are taken. The second, which takes a hundredth of the time, is run
    once more before it is timed: the gigabytes that the first has just given back would be part of it.
    """
    own()
    once = seconds(other)
    count = min(repeat, max(3, int(BUDGET / max(once, 1e-9))))
    pairs = []
    for _ in range(count):
        slow = seconds(other)
        own()
        pairs.append((slow, seconds(own)))
    a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
    quartiles = np.quantile([slow / fast for slow, fast in pairs], (0.25, 0.75))
    return {"other_s": a, "own_s": b, "faster": a / b, "quartiles": quartiles.tolist(), "pairs": count}


class Side(NamedTuple):
    """One way to solve the problem.

    Attributes:
        name: as the tables show it.
        solve: gives the whole solution.
        coarser: how many times as long its steps are.
    """

    name: str
    solve: Solve
    coarser: int = 1

    @classmethod
    def ours(cls, method: str, coarser: int = 1) -> Side:
        def solve(problem: Problem) -> Tensor:
            found: Tensor = fdeint(problem.f, problem.start, problem.t, alpha=ALPHA, method=method)
            return found

        return cls(method, solve, coarser)

    def problem(self, states: int, steps: int, dtype: torch.dtype, learn: bool) -> Problem:
        return Problem.make(states, steps // self.coarser, dtype, learn, STEP * self.coarser)

    def run(self, states: int, steps: int, dtype: torch.dtype, backward: bool) -> Run:
        """A forward pass, or a forward and a backward one."""
        problem = self.problem(states, steps, dtype, backward)

        def forward() -> None:
            with torch.no_grad():
                self.solve(problem)

        def both() -> None:
            problem.rates.grad = problem.start.grad = None
            self.solve(problem).sum().backward()

        return both if backward else forward

    def errors(self, states: int, steps: int, dtype: torch.dtype) -> dict[str, float]:
        problem = self.problem(states, steps, dtype, False)
        with torch.no_grad():
            return problem.errors(self.solve(problem))


def compared(
    given: Setting, other: Side, own: Side, dtype: torch.dtype, demand: Demand, backward: bool = False
) -> Row:
    """One row: another way to solve the problem, and ours."""
    clear()
    states, steps = (20, 40) if given.smoke else (STATES, STEPS_BACKWARD if backward else STEPS)
    what = "forward + backward" if backward else "forward"
    return {
        "case": f"{other.name}, {steps} steps, {str(dtype).removeprefix('torch.')}, {what}",
        "own": own.name if own.coarser == 1 else f"{own.name}, {steps // own.coarser} steps",
        **in_turn(*(side.run(states, steps, dtype, backward) for side in (other, own)), given.repeat),
        "other_error": other.errors(states, steps, dtype),
        "own_error": own.errors(states, steps, dtype),
        "demands": {"faster": demand},
    }


# -- the groups -----------------------------------------------------------------------------------


def loop(given: Setting) -> Iterator[Row]:
    """Against the plain loop: the same scheme, the same numbers."""
    other, own = Side("plain loop", plain_loop), Side.ours("gl")
    for dtype in (torch.float64, torch.float32):
        yield compared(given, other, own, dtype, LOOP_FACTOR)
    yield compared(given, other, own, torch.float32, LOOP_FACTOR, backward=True)


def packages(given: Setting) -> Iterator[Row]:
    """Against what PyPI has: at equal or better accuracy first, then with the cheapest scheme."""
    other = Side("FDEint (PECE)", of_fdeint_package)
    if importlib.util.find_spec("FDEint") is None:
        yield {"case": f"{other.name}: not installed"}
    else:
        for method, dtype, coarser in (
            ("abm", torch.float64, None),
            ("abm", torch.float32, COARSER),
            ("abm", torch.float32, None),
            ("gl", torch.float64, None),
            ("gl", torch.float32, None),
        ):
            for backward in (False, True):
                own = Side.ours(method, coarser[backward] if coarser else 1)
                yield compared(given, other, own, dtype, PACKAGE_FACTOR, backward)
    if importlib.util.find_spec("pycaputo") is None:
        yield {"case": "pycaputo: not installed"}
        return
    pece, euler = of_pycaputo("PECE", corrector_iterations=1), of_pycaputo("ForwardEuler")
    for name, solve, method in (("PECE", pece, "abm"), ("ForwardEuler", euler, "pred")):
        other = Side(f"pycaputo ({name})", solve)
        yield compared(given, other, Side.ours(method), torch.float64, PACKAGE_FACTOR)


LENGTHS = (100, 316, 1_000, 3_162, 10_000, 31_623, 100_000)
#: Ten times as long with the whole history takes a hundred times as long, and shows nothing new.
FULL_UP_TO = 10_000
#: The slope is that of the runs from here on: shorter ones are overhead.
UPPER = 1_000


def growth(given: Setting) -> Iterator[Row]:
    """How time grows with the number of steps; only the last state is kept."""
    lengths, states, upper = ((50, 100, 200), 8, 50) if given.smoke else (LENGTHS, STATES, UPPER)
    for memory, most in (("soe", lengths[-1]), ("full", FULL_UP_TO)):
        row: Row = {"case": f"memory={memory!r}, {states} states, float32, forward", "s": {}}
        for steps in lengths:
            if steps > most:
                continue
            clear()
            row["s"][str(steps)] = median_time(_long_run(states, steps, memory), given.repeat)
        known = {int(n): s for n, s in row["s"].items() if int(n) >= upper}
        logs = [[math.log(value) for value in side] for side in (known, known.values())]
        row["slope"] = float(np.polyfit(*logs, 1)[0])
        row["demands"] = {"slope": (None, 1.1)} if memory == "soe" else {}
        yield row


def _long_run(states: int, steps: int, memory: str) -> Run:
    problem = Problem.make(states, 1, torch.float32)
    ends, options = torch.tensor([0.0, steps * STEP]), {"step_size": STEP}

    def run() -> None:
        with torch.no_grad():
            fdeint(problem.f, problem.start, ends, alpha=ALPHA, memory=memory, options=options)

    return run


# -- tables ---------------------------------------------------------------------------------------


def factor_text(value: float) -> str:
    return f"{value:.{1 if value < 100 else 0}f}"


def range_text(values: list[float]) -> str:
    return " – ".join(map(factor_text, values))


def errors_text(errors: dict[str, float]) -> str:
    return f"{errors['run']:.1e} ({errors['end']:.1e})"


COMPARED = (
    Column("fdeint's method", "own"),
    Column("other", "other_s", time_text),
    Column("fdeint", "own_s", time_text),
    Column("times faster", "faster", factor_text),
    Column("quartiles", "quartiles", range_text),
    Column("error (at the end), other", "other_error", errors_text),
    Column("error (at the end), fdeint", "own_error", errors_text),
)


GROUPS: dict[str, Table] = {
    "loop": Table(
        f"{STATES} states, against a plain Python loop over the history", loop, COMPARED, "against"
    ),
    "packages": Table(f"{STATES} states, against other packages", packages, COMPARED, "against"),
    "growth": Table(
        f"time as the number of steps grows; slope: of log time over log steps from {UPPER} steps on",
        growth,
        (
            *(Column(f"{n:_}".replace("_", " "), f"s:{n}", time_text) for n in LENGTHS if n % 10 == 0),
            Column("slope", "slope", "{:.2f}".format),
        ),
    ),
}


# -- the command ----------------------------------------------------------------------------------


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    command.run(
        "solve", __doc__, GROUPS, more={package: version_of(package) for package in ("FDEint", "pycaputo")}
    )
