"""How things are measured: alternating medians, repeated runs, peak and resident memory, demands.

Two sides alternate in one process, so that a machine that slows down slows both. What depends on the state
of a process, its memory above all, is measured in a process of its own.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from spikede_plugins.engine import buffers

Run = Callable[[], None]
#: One line of a table: names and numbers, and under ``demands`` what some of them must reach.
Row = dict[str, Any]
#: The lowest and the highest value that is good enough; None for no bound.
Demand = tuple[float | None, float | None]

PAGE_MB = 4 / 1024


class Setting(NamedTuple):
    """What the command line asks for.

    Attributes:
        repeat: how many pairs, or runs, a median is taken of.
        smoke: tiny sizes, which show that everything runs and measure nothing.
        threads: of torch and of the engine.
    """

    repeat: int
    smoke: bool
    threads: int


Group = Callable[[Setting], Iterator[Row]]


def at_most(value: float) -> Demand:
    return (None, value)


def at_least(value: float) -> Demand:
    return (value, None)


def reached(row: Row, key: str) -> bool | None:
    """Whether a number of the row is what it must be; None if nothing is asked of it or it is missing."""
    low, high = row.get("demands", {}).get(key, (None, None))
    value = row.get(key)
    if value is None or (low is None and high is None):
        return None
    return (low is None or value >= low) and (high is None or value <= high)


# -- time -----------------------------------------------------------------------------------------


def seconds(run: Run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def clear() -> None:
    """Forget what earlier cases left, so that each starts with the same memory."""
    gc.collect()
    buffers.release()


def alternate(integer: Run, fractional: Run, repeat: int) -> Row:
    """Medians of both sides in turn, their ratio, and the quartiles of the ratio of each pair."""
    for run in (integer, fractional) * 2:  # allocates, compiles: TorchScript not before the second call
        run()
    pairs = [(seconds(integer), seconds(fractional)) for _ in range(repeat)]
    a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
    quartiles = np.quantile([after / before for before, after in pairs], (0.25, 0.75))
    return {"integer_s": a, "fractional_s": b, "ratio": b / a, "ratio_quartiles": quartiles.tolist()}


def median_time(run: Run, repeat: int, budget: float = 20.0) -> float:
    """The median of as many runs as fit into the budget of seconds, ``repeat`` at most.

    A first run warms up; where no other fits, it is what counts.
    """
    first = seconds(run)
    times = [seconds(run) for _ in range(min(repeat, int(budget / max(first, 1e-9))))]
    return statistics.median(times or [first])


def best_rate(run: Run, amount: float, repeat: int) -> float:
    """Amount a second in the best of several runs: a limit is what the machine can do."""
    run()
    return amount / min(seconds(run) for _ in range(repeat))


# -- memory ---------------------------------------------------------------------------------------


def _status_mb(field: str) -> float:
    """A size that Linux tells of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def resident_mb() -> float:
    """Resident memory of this process."""
    return _status_mb("VmRSS")


def peak_rise_mb(run: Run) -> float:
    """By how much resident memory rises above what it is now while ``run`` runs."""
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew
    before = resident_mb()
    run()
    return max(_status_mb("VmHWM") - before, PAGE_MB)


def in_own_process(job: str, **given: Any) -> Any:
    """What ``JOBS[job](**given)`` of ``layers.py`` returns, from another process with as many threads."""
    script, threads = Path(__file__).with_name("layers.py"), torch.get_num_threads()
    command = [sys.executable, str(script), "--threads", str(threads), "--job", json.dumps([job, given])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
