"""What fractional costs: a converted model against the integer model it came from, in one process.

    python benchmarks/layers.py [--out DIR] [--repeat N] [--only layer,cnn,loop]

A and B alternate; medians of wall time, forward and backward, and their ratio. Writes ``layers.json`` and
``layers.md``. Nothing here asserts a time: machines differ, ratios in one run are what counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import snntorch as snn
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

from spikede_plugins import convert_to_fractional
from spikede_plugins.engine import cpu

Run = Callable[[], None]


def lif() -> nn.Module:
    """The integer layer of the comparison: soft reset, detached, ATan."""
    return neuron.LIFNode(
        tau=2.0, v_reset=None, detach_reset=True, surrogate_function=surrogate.ATan(), step_mode="m"
    )


def sequence(net: nn.Module, x: torch.Tensor) -> Run:
    """Forward and backward of a SpikingJelly net over a whole sequence."""

    grad = torch.ones_like(x)  # what a next layer would hand back; the cost of making it is not ours

    def run() -> None:
        functional.reset_net(net)
        x.grad = None
        net(x).backward(grad)

    return run


def cnn() -> nn.Module:
    """conv32-LIF-pool-conv64-LIF-pool-fc128-LIF-fc10, the MNIST-size network of the design."""
    net = nn.Sequential(
        layer.Conv2d(1, 32, 3, padding=1), lif(), layer.MaxPool2d(2),
        layer.Conv2d(32, 64, 3, padding=1), lif(), layer.MaxPool2d(2),
        layer.Flatten(), layer.Linear(64 * 7 * 7, 128), lif(), layer.Linear(128, 10),
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    return net


def training_step(net: nn.Module, x: torch.Tensor) -> Run:
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)

    def run() -> None:
        functional.reset_net(net)
        optimizer.zero_grad()
        net(x).mean().backward()
        optimizer.step()

    return run


def snntorch_loop(net: nn.Module, x: torch.Tensor) -> Run:
    def run() -> None:
        mem, total = net.reset_mem(), torch.zeros(())
        for step in x:
            spikes, mem = net(step, mem)
            total = total + spikes.mean()
        x.grad = None
        total.backward()

    return run


def cases(only: set[str]) -> list[tuple[str, Callable[..., tuple[Run, Run]]]]:
    """Name and maker of (integer, fractional) for every comparison."""

    def layer_case(steps: int, batch: int, **options) -> Callable[..., tuple[Run, Run]]:
        def make(tiny: bool = False) -> tuple[Run, Run]:
            x = torch.randn(steps, 1 if tiny else batch, 32, 28, 28).requires_grad_()
            integer = lif()
            return sequence(integer, x), sequence(convert_to_fractional(integer, alpha=0.7, **options), x)

        return make

    def cnn_case(steps: int, **options) -> Callable[[], tuple[Run, Run]]:
        def make() -> tuple[Run, Run]:
            x = torch.rand(steps, 32, 1, 28, 28)
            integer = cnn()
            fractional = convert_to_fractional(integer, alpha=0.7, **options)
            return training_step(integer, x), training_step(fractional, x)

        return make

    def loop_case() -> tuple[Run, Run]:
        x = torch.rand(100, 128, 1000).requires_grad_()
        integer = snn.Leaky(beta=0.9)
        return snntorch_loop(integer, x), snntorch_loop(convert_to_fractional(integer, alpha=0.7), x)

    found: list[tuple[str, Callable[..., tuple[Run, Run]]]] = []
    if "layer" in only:
        for steps, batch in ((8, 32), (16, 32), (32, 32), (64, 32), (128, 4), (256, 4)):
            found.append((f"f-LIF layer [{steps}, {batch}, 32, 28, 28]", layer_case(steps, batch)))
        found.append(("the same, alpha learned, [16, 32, 32, 28, 28]", layer_case(16, 32, learn_alpha=True)))
    if "cnn" in only:
        found += [(f"CNN training step, T = {steps}", cnn_case(steps)) for steps in (16, 64)]
        found.append(("CNN training step, alpha learned, T = 16", cnn_case(16, learn_alpha=True)))
    if "loop" in only:
        found.append(("snnTorch loop, T = 100, Leaky [128, 1000], full memory", loop_case))
    return found


def measure(make: Callable[[], tuple[Run, Run]], repeat: int) -> dict[str, float]:
    a, b = make()
    a()
    b()  # compiles, allocates
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeat):
        for run, into in zip((a, b), times, strict=True):
            begin = time.perf_counter()
            run()
            into.append(time.perf_counter() - begin)
    integer, fractional = (statistics.median(t) for t in times)
    return {"integer_s": integer, "fractional_s": fractional, "ratio": fractional / integer}


def peak_memory(name: str, side: int) -> float:
    """Peak resident memory in MB of one side alone, measured in a process of its own."""
    command = [sys.executable, __file__, "--peak", name, "--side", str(side)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def _status(field: str) -> float:
    """A number of this process, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(field)).split()[1])


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--only", default="layer,cnn,loop")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--side", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    chosen = cases(set(given.only.split(",")))
    if given.peak:
        make = dict(chosen)[given.peak]
        make(tiny=True)[given.side]()  # compiles
        run = make()[given.side]
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew
        before = _status("VmRSS")
        run()
        print((_status("VmHWM") - before) / 1024)
        return
    rows = []
    for name, make in chosen:
        row = {"case": name, **measure(make, given.repeat)}
        if "layer [" in name and "[128" not in name and "[256" not in name:
            row["memory_ratio"] = peak_memory(name, 1) / peak_memory(name, 0)
        rows.append(row)
        memory = f"   memory {row['memory_ratio']:.2f}" if "memory_ratio" in row else ""
        print(
            f"{name:58s} {row['integer_s']:8.3f} s {row['fractional_s']:8.3f} s   "
            f"ratio {row['ratio']:.2f}{memory}",
            flush=True,
        )
    facts = {
        "threads": given.threads, "torch": torch.__version__, "machine": platform.machine(),
        "engine": cpu.missing() or "fused CPU", "repeat": given.repeat, "rows": rows,
    }  # fmt: skip
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "layers.json").write_text(json.dumps(facts, indent=1) + "\n")
    lines = [
        "| what (float32, forward + backward) | integer | fractional | ratio | peak memory, ratio |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        memory = f"{row['memory_ratio']:.2f}" if "memory_ratio" in row else ""
        lines.append(
            f"| {row['case']} | {row['integer_s']:.3f} s | {row['fractional_s']:.3f} s "
            f"| **{row['ratio']:.2f}** | {memory} |"
        )
    (given.out / "layers.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
