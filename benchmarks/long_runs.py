"""Long runs: single steps at constant cost and memory, the same spikes, time that grows as T does."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import snntorch as snn
import torch
from against_integer import ALPHA, lif
from measure import Row, Setting, at_least, at_most, clear, in_own_process, median_time, resident_mb
from spikingjelly.activation_based import functional

from spikede_plugins import SumOfExponentials, convert_to_fractional
from spikede_plugins.exponentials import BLOCK


def reaching(steps: int) -> SumOfExponentials:
    """Fitted for so long a run: no step lies beyond its horizon, and its traces are as many as that takes."""
    return SumOfExponentials(horizon=steps)


# -- single steps ---------------------------------------------------------------------------------

FRAMEWORKS = {"SpikingJelly": "SpikingJelly LIFNode", "snnTorch": "snnTorch Leaky"}


def _stepper(framework: str, size: Sequence[int], memory: Any) -> Callable[[int], None]:
    """A function that takes the k-th step of a converted neuron."""
    inputs = 2.0 * torch.rand(31, *size)  # 31: no two blocks of 16 steps see the same
    if framework == "SpikingJelly":
        node: Any = convert_to_fractional(lif("s"), alpha=ALPHA, memory=memory)

        def step(k: int) -> None:
            node(inputs[k % 31])
    else:
        leaky: Any = convert_to_fractional(snn.Leaky(beta=0.9), alpha=ALPHA, memory=memory)
        mem = leaky.reset_mem()

        def step(k: int) -> None:
            nonlocal mem
            _, mem = leaky(inputs[k % 31], mem)

    return step


def single_steps(framework: str, size: list[int], samples: list[int], window: int) -> Row:
    """Run to the last of the samples; for a process of its own.

    Resident memory is taken after each of ``samples`` steps. The cost of a step is that of a block of steps,
    by its median: among the ``window`` steps up to the first sample, and among the last ones.
    """
    step = _stepper(framework, size, reaching(samples[-1]))
    first, last = samples[0], samples[-1]
    blocks: dict[bool, list[float]] = {False: [], True: []}
    resident = []
    with torch.no_grad():
        k = 0
        while k < last:
            late = k >= last - window
            if late or first - window <= k < first:
                count = min(BLOCK, (last if late else first) - k)
                begin = time.perf_counter()
                for n in range(k, k + count):
                    step(n)
                blocks[late].append((time.perf_counter() - begin) / count)
                k += count
            else:
                step(k)
                k += 1
            if k in samples:
                resident.append(resident_mb())
    early, late_cost = (statistics.median(blocks[side]) for side in (False, True))
    return {
        "resident_mb": resident,
        "first_mb": resident[0],
        "last_mb": resident[-1],
        "memory_growth": max(resident) / resident[0],
        "early_s": early,
        "late_s": late_cost,
        "cost_ratio": late_cost / early,
        "early_mean_s": statistics.fmean(blocks[False]),
        "late_mean_s": statistics.fmean(blocks[True]),
    }


def steps(given: Setting) -> Iterator[Row]:
    """Many single steps, no gradient."""
    size, samples, window = [16, 1000], [2_000, 10_000, 50_000, 100_000], 1_000
    if given.smoke:
        size, samples, window = [2, 20], [96, 144, 192, 240], 48
    for framework, name in FRAMEWORKS.items():
        clear()
        options: dict[str, Any] = {
            "framework": framework, "size": size, "samples": samples, "window": window,
        }  # fmt: skip
        found = single_steps(**options) if given.smoke else in_own_process("single_steps", **options)
        yield {
            "case": f"{name} {size}, {samples[-1]} steps",
            "samples": samples,
            **found,
            "demands": {"memory_growth": at_most(1.01), "cost_ratio": at_most(1.1)},
        }


# -- spikes ---------------------------------------------------------------------------------------


def _trains(method: str, alpha: float, memory: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Spikes and potentials ``[T, N]`` of one layer."""
    node: Any = convert_to_fractional(lif(store_v_seq=True), alpha=alpha, method=method, memory=memory)
    functional.reset_net(node)
    with torch.no_grad():
        spikes = node(x)
    return spikes, node.v_seq


def spikes(given: Setting) -> Iterator[Row]:
    """The compressed memory against the whole history, spike by spike."""
    length, count = (64, 20) if given.smoke else (2_000, 2_000)
    alphas = (0.5,) if given.smoke else (0.3, 0.5, 0.7, 0.9)
    for method in ("gl", "l1", "pred"):
        for alpha in alphas:
            clear()
            x = 0.8 + torch.randn(length, count, generator=torch.Generator().manual_seed(0))
            full, v_full = _trains(method, alpha, "full", x)
            soe, v_soe = _trains(method, alpha, "soe", x)
            same = full == soe
            so_far = same.to(torch.uint8).cummin(0).values.bool()
            off = (v_full - v_soe).abs()[so_far]
            yield {
                "case": f"{method}, alpha {alpha}",
                "rate": float(full.mean()),
                "identical": float(same.double().mean()),
                "neurons_identical": float(same.all(0).double().mean()),
                "voltage_off": float(off.max()) if off.numel() else 0.0,
                "demands": {"identical": at_least(0.9999), "voltage_off": at_most(1e-4)},
            }


# -- growth ---------------------------------------------------------------------------------------

NEURONS = 256
LENGTHS = (100, 316, 1_000, 3_162, 10_000, 31_623, 100_000)
#: Ten times as long with the whole history takes a hundred times as long, and shows nothing new.
FULL_UP_TO = 31_623
#: The slope is that of the runs from here on: shorter ones are overhead.
UPPER = 1_000
PASSES = ("forward", "forward + backward")


def growth(given: Setting) -> Iterator[Row]:
    """How time grows with T, a row for each side and pass."""
    lengths, neurons = ((50, 100, 200), 8) if given.smoke else (LENGTHS, NEURONS)
    upper = lengths[0] if given.smoke else UPPER
    sides: dict[str, Any] = {"integer": None, "full": "full", "soe": reaching(lengths[-1])}
    for name, memory in sides.items():
        for what in PASSES:
            net = lif() if memory is None else convert_to_fractional(lif(), alpha=ALPHA, memory=memory)
            row: Row = {"case": f"{name}, {what}", "side": name, "pass": what, "neurons": neurons, "s": {}}
            for length in lengths:
                if name == "full" and length > FULL_UP_TO:
                    continue
                clear()
                x = torch.rand(length, neurons) + 0.3
                row["s"][str(length)] = median_time(_pass(net, x, what), given.repeat)
            row["slope"] = fitted_slope(row["s"], upper)
            row["demands"] = {"slope": (0.9, 1.1)} if name == "soe" else {}
            yield row


def _pass(net: Any, x: torch.Tensor, what: str) -> Callable[[], None]:
    if what == "forward":

        def run() -> None:
            functional.reset_net(net)
            with torch.no_grad():
                net(x)

        return run
    x.requires_grad_()
    grad = torch.ones_like(x)

    def both() -> None:
        functional.reset_net(net)
        x.grad = None
        net(x).backward(grad)

    return both


def fitted_slope(times: dict[str, float], upper: int) -> float:
    """The slope of log time over log T, by least squares, from ``upper`` steps on."""
    kept = {int(n): t for n, t in times.items() if int(n) >= upper}
    return float(np.polyfit([math.log(n) for n in kept], [math.log(t) for t in kept.values()], 1)[0])


def plot_growth(rows: list[Row], path: Path) -> None:
    """Time over T, both axes logarithmic, a panel for each pass."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    styles = {
        "integer": ("integer LIF", "#555555", "o", "-"),
        "full": ('fractional, memory="full"', "#c44e52", "s", "-"),
        "soe": ('fractional, memory="soe"', "#1f77b4", "D", "-"),
    }
    with plt.rc_context({"font.size": 12, "axes.titlesize": 12}):
        figure, axes = plt.subplots(1, 2, figsize=(9, 4.3), sharey=True, layout="constrained")
        for axis, what in zip(axes, PASSES, strict=True):
            for row in rows:
                if row["pass"] == what:
                    label, color, marker, line = styles[row["side"]]
                    lengths = [int(n) for n in row["s"]]
                    axis.loglog(
                        lengths, list(row["s"].values()), line, color=color, marker=marker, ms=5, label=label
                    )
            axis.set_title(what)
            axis.set_xlabel("time steps T")
            axis.grid(True, which="major", color="#dddddd")
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel(f"time of a run of {rows[0]['neurons']} neurons (s)")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path, dpi=130)
        plt.close(figure)
