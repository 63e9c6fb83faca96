"""What fractional costs: against the integer model it came from, in long runs, and against the machine.

    python benchmarks/layers.py [--out DIR] [--repeat N] [--only layer,soe] [--smoke] [--threads 2]

Writes ``layers.json``, ``layers.md`` (the tables that the README shows) and ``growth.png``. ``--only``
measures some groups anew and keeps the others as they are in ``layers.json``. Nothing here fails for a time:
the tables say what must be reached, and whether it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import against_integer
import command
import continuous_time
import limits
import long_runs
import on_gpu
from tables import Column, Table, time_text

JOBS: dict[str, Callable[..., Any]] = {
    "layer_peak": against_integer.layer_peak,
    "single_steps": long_runs.single_steps,
    "wrapper_peak": continuous_time.wrapper_peak,
    "wrapper_times": continuous_time.wrapper_times,
}


# -- how numbers are written ----------------------------------------------------------------------


def ratio_text(value: float) -> str:
    return f"{value:.2f}"


def range_text(values: list[float]) -> str:
    return " – ".join(f"{value:.2f}" for value in values)


def share_text(value: float) -> str:
    """Per cent, exact enough to tell 99.99 from 100."""
    return f"{100 * value:.4f} %" if 0.999 <= value < 1.0 else f"{100 * value:.0f} %"


def growth_text(value: float) -> str:
    return f"{value:.3f}"


def small_text(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def memory_text(mb: float) -> str:
    return f"{mb:.0f} MB"


def count_text(value: float) -> str:
    """With a prefix: M or G."""
    scaled, prefix = (value / 1e9, "G") if value >= 1e9 else (value / 1e6, "M")
    return f"{scaled:.{2 if scaled < 10 else 0}f} {prefix}"


PAIR = (
    Column("integer", "integer_s", time_text),
    Column("fractional", "fractional_s", time_text),
    Column("ratio", "ratio", ratio_text),
    Column("quartiles", "ratio_quartiles", range_text),
)


GROUPS: dict[str, Table] = {
    "layer": Table(
        "one f-LIF layer, forward + backward, against SpikingJelly's integer layer",
        against_integer.layers,
        (*PAIR, Column("peak memory, ratio", "memory_ratio", ratio_text)),
    ),
    "soe": Table("the same layer over more steps, memory of constant size", against_integer.soe_layers, PAIR),
    "cnn": Table("training step of a CNN with three spiking layers", against_integer.networks, PAIR),
    "wrapper": Table(
        "training step of the same CNN in SNNWrapper, against the converted SpikingJelly model",
        continuous_time.wrappers,
        (
            Column("converted", "integer_s", time_text),
            Column("wrapper", "fractional_s", time_text),
            *PAIR[2:],
            Column("peak memory", "peak_mb", memory_text),
        ),
    ),
    "loop": Table("snnTorch loop of single steps, forward + backward", against_integer.loops, PAIR),
    "steps": Table(
        "many single steps without gradient, soe; early: the 1 000 steps up to the first memory sample, "
        "late: the last 1 000",
        long_runs.steps,
        (
            Column("resident, first", "first_mb", memory_text),
            Column("resident, last", "last_mb", memory_text),
            Column("largest / first", "memory_growth", growth_text),
            Column("a step, early", "early_s", time_text),
            Column("a step, late", "late_s", time_text),
            Column("late / early", "cost_ratio", ratio_text),
        ),
    ),
    "spikes": Table(
        "soe (tolerance 1e-6) against full memory: 2 000 neurons, 2 000 steps, random drive",
        long_runs.spikes,
        (
            Column("spikes a step", "rate", ratio_text),
            Column("identical", "identical", share_text),
            Column("largest difference in v before", "voltage_off", small_text),
        ),
    ),
    "growth": Table(
        f"time of one layer of {long_runs.NEURONS} neurons as T grows; slope: of log time over log T from "
        "10^3 steps on",
        long_runs.growth,
        (
            *(Column(f"T = 10^{len(str(n)) - 1}", f"s:{n}", time_text) for n in (100, 1000, 10_000, 100_000)),
            Column("slope", "slope", ratio_text),
        ),
    ),
    "limits": Table(
        "the layer against the bandwidth and the multiply-add rate of the machine",
        limits.limits,
        (
            Column("bytes", "bytes", count_text),
            Column("multiply-adds", "multiply_adds", count_text),
            Column("bound by", "bound"),
            Column("at the limits", "limit_s", time_text),
            Column("measured", "measured_s", time_text),
            Column("share", "share", share_text),
        ),
    ),
    "gpu": Table(
        "on a GPU, forward + backward; share: of the bandwidth of its memory, were every array moved once",
        on_gpu.gpu,
        (
            *PAIR,
            Column("peak memory, ratio", "memory_ratio", ratio_text),
            Column("share", "share", share_text),
        ),
    ),
}


if __name__ == "__main__":
    command.run(
        "layers", __doc__, GROUPS, jobs=JOBS,
        figures={"growth": lambda out, rows: long_runs.plot_growth(rows, out / "growth.png")},
    )  # fmt: skip
