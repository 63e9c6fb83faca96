"""A converted model against the integer model it came from: layers, a CNN, a step loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import snntorch as snn
import torch
from measure import Demand, Row, Run, Setting, alternate, at_most, clear, in_own_process, peak_rise_mb
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

from spikede_plugins import convert_to_fractional

ALPHA = 0.7
#: Channels and image size of the layer.
SHAPE = (32, 28, 28)
PEAK = at_most(1.2)


def lif(step_mode: str = "m", **options: Any) -> nn.Module:
    """The integer layer of every comparison: soft reset, detached, ATan."""
    return neuron.LIFNode(
        tau=2.0, v_reset=None, detach_reset=True, surrogate_function=surrogate.ATan(), step_mode=step_mode,
        **options,
    )  # fmt: skip


def sequence(net: nn.Module, x: torch.Tensor) -> Run:
    """Forward and backward of a SpikingJelly net over a whole sequence."""
    grad = torch.ones_like(x)  # what a next layer would hand back; the cost of making it is not ours

    def run() -> None:
        functional.reset_net(net)
        x.grad = None
        net(x).backward(grad)

    return run


def layer_sides(steps: int, batch: int, device: str = "cpu", **options: Any) -> tuple[Run, Run]:
    """The integer layer and its fractional form, on the same input ``[steps, batch, 32, 28, 28]``."""
    x = torch.randn(steps, batch, *SHAPE, device=device).requires_grad_()
    integer = lif().to(device)
    return sequence(integer, x), sequence(convert_to_fractional(integer, alpha=ALPHA, **options), x)


def layer_peak(steps: int, batch: int, options: dict[str, Any], side: int) -> float:
    """Peak memory in MB of one pass of one side; for a process of its own."""
    tiny = layer_sides(steps, 1, **options)[side]
    tiny()  # compiles
    tiny()
    clear()
    return peak_rise_mb(layer_sides(steps, batch, **options)[side])


def _layer_row(
    given: Setting, steps: int, batch: int, what: str, ratio: Demand | None, peak: bool = False,
    **options: Any,
) -> Row:  # fmt: skip
    clear()
    row: Row = {"case": f"[{steps}, {batch}, {', '.join(map(str, SHAPE))}], {what}"}
    row |= alternate(*layer_sides(steps, batch, **options), given.repeat)
    row["demands"] = {} if ratio is None else {"ratio": ratio}
    if peak:
        clear()
        sides = [
            in_own_process("layer_peak", steps=steps, batch=batch, options=options, side=side)
            for side in (0, 1)
        ]
        row["integer_peak_mb"], row["fractional_peak_mb"] = sides
        row["memory_ratio"] = sides[1] / sides[0]
        row["demands"]["memory_ratio"] = PEAK
    return row


def layers(given: Setting) -> Iterator[Row]:
    """One layer, the whole history."""
    if given.smoke:
        yield _layer_row(given, 8, 2, "full", at_most(0.6), peak=True, memory="full")
        yield _layer_row(given, 8, 1, "full, alpha learned", None, memory="full", learn_alpha=True)
        return
    for steps in (8, 16, 32, 64):
        bound = at_most(0.6 if steps <= 32 else 0.75)
        yield _layer_row(given, steps, 32, "full", bound, peak=True, memory="full")
    for steps in (16, 64):
        yield _layer_row(given, steps, 32, "default memory", at_most(0.6 if steps <= 32 else 0.75))
    yield _layer_row(given, 16, 32, "full, alpha learned", None, peak=True, memory="full", learn_alpha=True)


def soe_layers(given: Setting) -> Iterator[Row]:
    """One layer over many steps, a memory of constant size."""
    lengths, batch = ((48,), 1) if given.smoke else ((128, 256, 512, 1024), 4)
    for steps in lengths:
        yield _layer_row(given, steps, batch, "soe", at_most(1.0), memory="soe")
    for steps in lengths[:2]:
        yield _layer_row(given, steps, batch, "full", None, memory="full")
    for steps in lengths[1::2]:
        yield _layer_row(given, steps, batch, "default memory", at_most(1.0))


# -- a network ------------------------------------------------------------------------------------


def cnn() -> nn.Module:
    """conv32-LIF-pool-conv64-LIF-pool-fc128-LIF-fc10, for 28x28 images."""
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


def networks(given: Setting) -> Iterator[Row]:
    """A training step of a small CNN."""
    lengths, batch = ((4,), 2) if given.smoke else ((16, 64), 32)
    cases: list[tuple[int, dict[str, Any], Demand | None]] = [(steps, {}, at_most(1.1)) for steps in lengths]
    cases.append((lengths[0], {"learn_alpha": True}, None))
    for steps, options, bound in cases:
        clear()
        integer = cnn()
        x = torch.rand(steps, batch, 1, 28, 28)
        fractional = convert_to_fractional(integer, alpha=ALPHA, **options)
        learned = ", alpha learned" if options else ""
        yield {
            "case": f"T = {steps}, batch {batch}{learned}",
            **alternate(training_step(integer, x), training_step(fractional, x), given.repeat),
            "demands": {} if bound is None else {"ratio": bound},
        }


# -- single steps ---------------------------------------------------------------------------------


def step_loop(net: Any, x: torch.Tensor) -> Run:
    """Forward and backward through a loop of snnTorch steps."""

    def run() -> None:
        mem, total = net.reset_mem(), torch.zeros((), device=x.device)
        for step in x:
            spikes, mem = net(step, mem)
            total = total + spikes.mean()
        x.grad = None
        total.backward()

    return run


def loops(given: Setting) -> Iterator[Row]:
    """An snnTorch loop of single steps."""
    steps, size = (40, (4, 50)) if given.smoke else (100, (128, 1000))
    cases: list[tuple[str, Demand | None]] = [("soe", at_most(2.0)), ("full", None)]
    for memory, bound in cases:
        clear()
        x = torch.rand(steps, *size).requires_grad_()
        integer = snn.Leaky(beta=0.9)
        fractional = convert_to_fractional(integer, alpha=ALPHA, memory=memory)
        yield {
            "case": f"T = {steps}, Leaky {list(size)}, {memory}",
            **alternate(step_loop(integer, x), step_loop(fractional, x), given.repeat),
            "demands": {} if bound is None else {"ratio": bound},
        }
