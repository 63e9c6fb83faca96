"""The event-driven layer against fixed steps and against sc-neurocore's layer of the same name.

    python benchmarks/spiking_ode.py [--out DIR] [--repeat N] [--only speed,accuracy] [--smoke] [--threads 2]

Writes ``spiking_ode.json``, ``spiking_ode.md`` and ``spiking_ode.png``. Nothing here fails for a time: the
tables say what must be reached, and whether it was. sc-neurocore is optional (``pip install sc-neurocore``);
without it its row says so.

The problem: 1 000 leaky neurons (tau 20 ms, threshold 1, reset 0), currents from 0.03 to 1, for 1 000
intervals of 1 ms, float64. Spike k of a neuron is at k tau log(tau I / (tau I - 1)). An error of a time is
that of the k-th spike against the exact k-th one, the largest over all spikes that both have.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import command
import numpy as np
import torch
from measure import Demand, Row, Run, Setting, at_least, at_most, clear, seconds
from tables import Column, Table, time_text
from torch import Tensor

from spikede_plugins import ODELIFDynamics, SpikingDynamics, SpikingODELayer

TAU, NEURONS, INTERVALS = 20.0, 1000, 1000
#: How many times as fast the layer must be.
FASTER: dict[str, Demand] = {"Euler, 0.01 ms": at_least(50.0), "sc-neurocore": at_least(10.0)}
CLOSE = at_most(1e-6)


class Found(NamedTuple):
    """Spikes of each neuron ``[n]``; their times ``[n, K]`` (inf behind the last), where they are told."""

    counts: Tensor
    times: Tensor | None


class Side(NamedTuple):
    """One way to run the problem: ``run(currents, intervals)`` counts, ``times`` also tells when."""

    name: str
    run: Callable[[Tensor, int], Found]
    times: Callable[[Tensor, int], Found]


def exact(currents: Tensor, intervals: int) -> Tensor:
    """Every spike time ``[n, K]``; inf behind the last."""
    level = TAU * currents
    period = torch.where(level > 1.0, TAU * torch.log(level / (level - 1.0)), torch.inf)
    number = int((intervals / period).max())
    times = period[:, None] * torch.arange(1, number + 1, dtype=currents.dtype)
    return torch.where(times <= intervals, times, torch.inf)


# -- the sides ------------------------------------------------------------------------------------


def layer_of(currents: Tensor, dynamics: SpikingDynamics, **options: Any) -> SpikingODELayer:
    layer = SpikingODELayer(1, len(currents), dynamics, dtype=currents.dtype, **options)
    layer.weight.data = currents[:, None].clone()
    return layer


def event_driven(dynamics: SpikingDynamics, interval: int = 1, **options: Any) -> Side:
    @torch.no_grad()
    def run(currents: Tensor, intervals: int) -> Found:
        layer = layer_of(currents, dynamics, **options)
        steps = intervals // interval
        counts = layer(torch.ones(steps, 1, dtype=currents.dtype), interval=float(interval)).sum(0)
        return Found(counts, layer.spike_times.times)

    return Side("event-driven", run, run)


def euler(step: float) -> Side:
    """v <- v + h (I - v / tau), in place; a spike is where v is not below the threshold after a step."""

    @torch.no_grad()
    def run(currents: Tensor, intervals: int) -> Found:
        v, counts, push = (torch.zeros_like(currents) for _ in range(3))
        push.add_(currents, alpha=step)
        for _ in range(round(intervals / step)):
            v.mul_(1.0 - step / TAU).add_(push)
            fired = v >= 1.0
            counts += fired
            v.masked_fill_(fired, 0.0)
        return Found(counts, None)

    @torch.no_grad()
    def times(currents: Tensor, intervals: int) -> Found:
        v, push = torch.zeros_like(currents), currents * step
        seen: list[tuple[float, Tensor]] = []
        for k in range(round(intervals / step)):
            v.mul_(1.0 - step / TAU).add_(push)
            fired = v >= 1.0
            v.masked_fill_(fired, 0.0)
            if bool(fired.any()):
                seen.append(((k + 1) * step, fired))
        return _collected(seen, len(currents), currents.dtype)

    return Side(f"Euler, {step:g} ms", run, times)


def _collected(seen: list[tuple[float, Tensor]], neurons: int, dtype: torch.dtype) -> Found:
    fired = torch.stack([mask for _, mask in seen]) if seen else torch.zeros(0, neurons, dtype=torch.bool)
    at = torch.tensor([t for t, _ in seen], dtype=dtype)
    counts = fired.sum(0)
    times = torch.full((neurons, int(counts.max())), torch.inf, dtype=dtype)
    order = fired.cumsum(0) - 1
    steps, who = fired.nonzero(as_tuple=True)
    times[who, order[steps, who]] = at[steps]
    return Found(counts.to(dtype), times)


def sc_neurocore() -> Side | None:
    if importlib.util.find_spec("sc_neurocore") is None:
        return None
    from sc_neurocore.spike_ode import SpikingODELayer as Other

    def run(currents: Tensor, intervals: int) -> Found:
        layer = Other(1, len(currents))
        layer.W = currents.numpy().reshape(layer.W.shape)
        counts = layer.forward(np.ones((intervals, 1)), interval=1.0)
        return Found(torch.from_numpy(np.asarray(counts, dtype=np.float64).sum(0)), None)

    return Side("sc-neurocore", run, run)


def in_a_row(run: Run) -> float:
    """The median of three runs: the first after the other side's second may find its memory paged out."""
    return statistics.median(seconds(run) for _ in range(3))


# -- what is measured -----------------------------------------------------------------------------


def errors_of(side: Side, currents: Tensor, intervals: int) -> Row:
    """Neurons with another number of spikes than the exact one, and the largest error of a time."""
    known, found = exact(currents, intervals), side.times(currents, intervals)
    # A spike at the very end of the run may round to either side of it.
    near = ((known - intervals).abs() < 1e-6).any(1)
    wrong = (found.counts != torch.isfinite(known).sum(1)) & ~near
    row: Row = {"wrong": int(wrong.sum())}
    if found.times is not None:
        both = min(known.shape[1], found.times.shape[1])
        off = (known[:, :both] - found.times[:, :both]).abs()
        off = off[torch.isfinite(off)]
        row["error"] = float(off.max()) if off.numel() else 0.0
    return row


def speed(given: Setting) -> Iterator[Row]:
    """The layer and each other side in turn."""
    neurons, intervals = (16, 10) if given.smoke else (NEURONS, INTERVALS)
    currents = torch.linspace(0.03, 1.0, neurons, dtype=torch.float64)
    own = event_driven(ODELIFDynamics())
    others = {"Euler, 0.1 ms": euler(0.1), "Euler, 0.01 ms": euler(0.01), "sc-neurocore": sc_neurocore()}
    for name, side in others.items():
        if side is None:
            yield {"case": f"not run: {name} is not installed (pip install sc-neurocore)"}
            continue
        clear()
        runs: tuple[Run, Run] = (
            lambda side=side: side.run(currents, intervals), lambda: own.run(currents, intervals)
        )  # fmt: skip
        for run in runs:
            run()
        pairs = [(in_a_row(runs[0]), in_a_row(runs[1])) for _ in range(given.repeat)]
        other_s, own_s = (statistics.median(times) for times in zip(*pairs, strict=True))
        found, ours = errors_of(side, currents, intervals), errors_of(own, currents, intervals)
        quartiles = np.quantile([a / b for a, b in pairs], (0.25, 0.75)).tolist()
        demands = {"own_error": CLOSE}
        if name in FASTER:
            demands["faster"] = FASTER[name]
        yield {
            "case": name, "other_s": other_s, "own_s": own_s, "faster": other_s / own_s,
            "quartiles": quartiles, "other_wrong": found["wrong"], "own_wrong": ours["wrong"],
            **({"other_error": found["error"]} if "error" in found else {}),
            "own_error": ours["error"], "demands": demands,
        }  # fmt: skip


class Integrated(SpikingDynamics):
    """The same neuron as custom dynamics: by torchdiffeq."""

    def dvdt(self, v: Tensor, current: Tensor) -> Tensor:
        return current - v / TAU


def accuracy(given: Setting) -> Iterator[Row]:
    """Error against cost: 100 neurons for 100 ms, which the layer takes 10 ms at a time."""
    neurons, intervals = (4, 10) if given.smoke else (100, 100)
    currents = torch.linspace(0.06, 1.0, neurons, dtype=torch.float64)
    steps = (1.0, 0.25, 0.1, 0.025, 0.01, 0.0025) if not given.smoke else (0.1,)
    tolerances = (1e-2, 1e-4, 1e-6, 1e-8) if not given.smoke else (1e-5,)
    sides: list[tuple[str, str, Side]] = []
    sides += [("Euler", f"Euler, {step:g} ms", euler(step)) for step in steps]
    if importlib.util.find_spec("torchdiffeq") is not None:
        for tolerance in tolerances:
            side = event_driven(Integrated(), 10, dt_init=5.0, rtol=tolerance, atol=tolerance)
            sides.append(("adaptive", f"adaptive, tolerance {tolerance:.0e}", side))
    sides.append(("exact", "closed form", event_driven(ODELIFDynamics(), 10)))
    for kind, case, side in sides:
        clear()
        side.run(currents, intervals)
        repeat = max(1, given.repeat // 3)
        times = [seconds(lambda side=side: side.run(currents, intervals)) for _ in range(repeat)]
        row = errors_of(side, currents, intervals)
        found = {"own_error": row["error"], "own_wrong": row["wrong"]}
        yield {"case": case, "kind": kind, "own_s": statistics.median(times), **found}


def error_text(value: float) -> str:
    return f"{value:.1e}"


def factor_text(value: float) -> str:
    return f"{value:.{1 if value < 100 else 0}f}"


def range_text(values: list[float]) -> str:
    return " – ".join(map(factor_text, values))


GROUPS: dict[str, Table] = {
    "speed": Table(
        f"{NEURONS} neurons, {INTERVALS} intervals of 1 ms, counts and (layer) spike times",
        speed,
        (
            Column("other", "other_s", time_text),
            Column("layer", "own_s", time_text),
            Column("times faster", "faster", factor_text),
            Column("quartiles", "quartiles", range_text),
            Column("neurons with a wrong count, other", "other_wrong"),
            Column("layer", "own_wrong"),
            Column("error of times (ms), other", "other_error", error_text),
            Column("layer", "own_error", error_text),
        ),
        "against",
    ),
    "accuracy": Table(
        "100 neurons for 100 ms: the error of spike times and what it costs",
        accuracy,
        (
            Column("time", "own_s", time_text),
            Column("error of times (ms)", "own_error", error_text),
            Column("neurons with a wrong count", "own_wrong"),
        ),
    ),
}


# -- the figure -----------------------------------------------------------------------------------


def draw(path: Path, rows: list[Row]) -> None:
    """Error against cost."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.0, 4.0), layout="constrained")
    styles = {"Euler": "o-", "adaptive": "s-", "exact": "*"}
    labels = {"Euler": "Euler, fixed steps", "adaptive": "adaptive steps and search", "exact": "closed form"}
    for kind, style in styles.items():
        points = [(row["own_s"] * 1e3, max(row["own_error"], 1e-16)) for row in rows if row["kind"] == kind]
        if points:
            size = 12 if kind == "exact" else 6
            axes.loglog(*zip(*points, strict=True), style, label=labels[kind], markersize=size)
    for row in rows:
        text = row["case"].removeprefix("Euler, ").removeprefix("adaptive, tolerance ")
        if row["kind"] != "exact":
            at = (row["own_s"] * 1e3, row["own_error"])
            axes.annotate(text, at, xytext=(7, 4), textcoords="offset points", fontsize=7)
    axes.set(xlabel="time (ms)", ylabel="largest error of a spike time (ms)")
    axes.set_title("100 leaky neurons for 100 ms", fontsize=10)
    axes.margins(x=0.12)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    found = importlib.util.find_spec("sc_neurocore")
    command.run(
        "spiking_ode", __doc__, GROUPS,
        more={"sc-neurocore": importlib.metadata.version("sc-neurocore") if found else "not installed"},
        figures={"accuracy": lambda out, rows: draw(out / "spiking_ode.png", rows)},
    )  # fmt: skip
