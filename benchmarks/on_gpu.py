"""On a GPU: a converted layer, CNN and step loop against the integer model, and the layer against the memory.

SpikingJelly takes its own fused kernels there, where the installed release has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import snntorch as snn
import torch
from against_integer import ALPHA, SHAPE, cnn, lif, sequence, step_loop, training_step
from measure import Row, Run, Setting, alternate, at_most, best_rate, clear

from spikede_plugins import convert_to_fractional

MB = 2**20


def waits(run: Run) -> Run:
    """The device has done what it was asked for when the run ends."""

    def waiting() -> None:
        run()
        torch.cuda.synchronize()

    return waiting


def device_peak_mb(run: Run) -> float:
    """By how much the memory that torch has allocated on the device rises while ``run`` runs."""
    clear()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return max(torch.cuda.max_memory_allocated() - before, 1) / MB


def compared(given: Setting, integer: Run, fractional: Run) -> Row:
    """Times of both sides, and the ratio of their peak memory on the device."""
    sides = waits(integer), waits(fractional)
    row = alternate(*sides, given.repeat)
    row["integer_peak_mb"], row["fractional_peak_mb"] = peaks = [device_peak_mb(side) for side in sides]
    row["memory_ratio"] = peaks[1] / peaks[0]
    return row


def gpu(given: Setting) -> Iterator[Row]:
    """Everything that runs there; one row that says so where torch finds no GPU."""
    if not torch.cuda.is_available():
        yield {"case": "not run: torch finds no GPU here"}
        return
    yield from _layers(given)
    yield from _networks(given)
    yield from _loops(given)


def _layers(given: Setting) -> Iterator[Row]:
    bandwidth = _bandwidth(given)
    cases: list[tuple[int, int, str, dict[str, Any]]] = [
        (steps, 32, "full", {"memory": "full"}) for steps in ((8,) if given.smoke else (8, 16, 32, 64))
    ]
    if not given.smoke:
        cases += [
            (64, 32, "full, alpha learned", {"memory": "full", "learn_alpha": True}),
            (256, 8, "full", {"memory": "full"}),
            (256, 8, "soe", {"memory": "soe"}),
            (1024, 2, "soe", {"memory": "soe"}),
        ]
    for steps, batch, what, options in cases:
        clear()
        batch = 1 if given.smoke else batch
        x = torch.randn(steps, batch, *SHAPE, device="cuda").requires_grad_()
        integer = lif().to("cuda")
        fractional = convert_to_fractional(integer, alpha=ALPHA, **options)
        chosen = _fastest_backend(integer)
        row = compared(given, sequence(integer, x), sequence(fractional, x))
        # Forward reads x and writes spikes and history; backward reads both gradients' worth and writes one.
        least = 6 * x.numel() * x.element_size() / bandwidth
        yield {
            "case": f"[{steps}, {batch}, {', '.join(map(str, SHAPE))}], {what}; {_against(chosen)}",
            **row,
            "share": least / row["fractional_s"],
            "demands": {"ratio": at_most(1.2)} if what == "full" and steps <= 64 else {},
        }


def _networks(given: Setting) -> Iterator[Row]:
    for steps in (4,) if given.smoke else (16, 64):
        clear()
        batch = 2 if given.smoke else 128
        x = torch.rand(steps, batch, 1, 28, 28, device="cuda")
        integer = cnn().to("cuda")
        fractional = convert_to_fractional(integer, alpha=ALPHA)
        chosen = [_fastest_backend(node) for node in integer.modules() if hasattr(node, "surrogate_function")]
        yield {
            "case": f"CNN training step, T = {steps}, batch {batch}; {_against(chosen[0])}",
            **compared(given, training_step(integer, x), training_step(fractional, x)),
            "demands": {"ratio": at_most(1.1)},
        }


def _loops(given: Setting) -> Iterator[Row]:
    steps, size = (8, (4, 50)) if given.smoke else (100, (128, 1000))
    for memory in ("soe", "full"):
        clear()
        x = torch.rand(steps, *size, device="cuda").requires_grad_()
        integer = snn.Leaky(beta=0.9).to("cuda")
        fractional = convert_to_fractional(integer, alpha=ALPHA, memory=memory)
        yield {
            "case": f"snnTorch loop, T = {steps}, Leaky {list(size)}, {memory}",
            **compared(given, step_loop(integer, x), step_loop(fractional, x)),
        }


def _bandwidth(given: Setting) -> float:
    """Bytes a second of a large copy, those read and those written."""
    source = torch.empty(2**20 if given.smoke else 2**28, device="cuda").normal_()
    target = torch.empty_like(source)
    return best_rate(waits(lambda: target.copy_(source)), 2 * source.numel() * 4, 5)


def _against(backend: str) -> str:
    card = torch.cuda.get_device_name().removeprefix("NVIDIA ").split()[0]
    return f"SpikingJelly {version('spikingjelly')} on {backend} ({card})"


def _fastest_backend(node: Any) -> str:
    """Choose the fastest backend of a release that lets one choose; others choose for themselves."""
    offered = getattr(node, "supported_backends", None)
    if offered is None:
        return "its own choice"
    for name in ("triton", "cupy"):
        if name in offered:
            try:
                node.backend = name
            except (ImportError, ValueError, AssertionError):
                continue
            return name
    return "torch"
