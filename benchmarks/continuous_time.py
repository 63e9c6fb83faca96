"""SNNWrapper against a converted SpikingJelly model: a training step of the same CNN, and its peak memory."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import numpy as np
import torch
from against_integer import ALPHA, cnn, training_step
from measure import Row, Run, Setting, alternate, at_most, clear, in_own_process, peak_rise_mb, seconds
from torch import nn

from spikede_plugins import LIFNeuron, SNNWrapper, convert_to_fractional

#: What is left of 24 GB for one training step.
ROOM_MB = 24_000


def wrapped_cnn() -> SNNWrapper:
    """The CNN of ``against_integer`` with derivative-style neurons."""

    def lif() -> nn.Module:
        return LIFNeuron(tau=2.0, surrogate_grad_scale=2.0)

    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), lif(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), lif(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 7 * 7, 128), lif(), nn.Linear(128, 10),
    )  # fmt: skip
    return SNNWrapper(net, "fdeint", alpha=ALPHA)


def wrapped_step(net: nn.Module, x: torch.Tensor) -> Run:
    optimizer, times = torch.optim.SGD(net.parameters(), lr=1e-3), torch.arange(float(len(x)))

    def run() -> None:
        optimizer.zero_grad()
        net(x, times).mean().backward()
        optimizer.step()

    return run


def wrapper_peak(steps: int, batch: int) -> float:
    """Peak memory in MB of one training step; for a process of its own."""
    net = wrapped_cnn()
    wrapped_step(net, torch.rand(steps, 1, 1, 28, 28))()  # compiles
    clear()
    return peak_rise_mb(wrapped_step(net, torch.rand(steps, batch, 1, 28, 28)))


def sides(steps: int, batch: int) -> tuple[Run, Run]:
    """A training step of the converted and of the wrapped CNN."""
    x = torch.rand(steps, batch, 1, 28, 28)
    return training_step(convert_to_fractional(cnn(), alpha=ALPHA), x), wrapped_step(wrapped_cnn(), x)


def wrapper_times(steps: int, batch: int, side: int, repeat: int) -> list[float]:
    """Seconds of training steps of one side; for a process of its own."""
    run = sides(steps, batch)[side]
    run()
    return [seconds(run) for _ in range(repeat)]


def _in_turn(steps: int, batch: int, repeat: int) -> Row:
    """Both sides in turn, each in a process of its own.

    Steps that let go of gigabytes keep them for their next step; two models in one process would take them
    from each other.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(2):
        for side in (0, 1):
            times[side].extend(
                in_own_process("wrapper_times", steps=steps, batch=batch, side=side, repeat=repeat)
            )
    a, b = map(statistics.median, times)
    quartiles = np.quantile([after / before for before, after in zip(*times, strict=True)], (0.25, 0.75))
    return {"integer_s": a, "fractional_s": b, "ratio": b / a, "ratio_quartiles": quartiles.tolist()}


def wrappers(given: Setting) -> Iterator[Row]:
    """A training step of the CNN, wrapped, against the converted one."""
    lengths, batch = ((4,), 2) if given.smoke else ((16, 64, 256), 32)
    for steps in lengths:
        clear()
        if steps > 64:
            row = _in_turn(steps, batch, min(given.repeat, 4))
        else:
            row = alternate(*sides(steps, batch), given.repeat)
            clear()
        yield {
            "case": f"T = {steps}, batch {batch}{', each in its own process' * (steps > 64)}",
            **row,
            "peak_mb": in_own_process("wrapper_peak", steps=steps, batch=batch),
            "demands": {"ratio": at_most(1.1), "peak_mb": at_most(ROOM_MB)},
        }
