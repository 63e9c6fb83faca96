"""The fused layer against what the machine can do: bytes at its bandwidth, multiply-adds at its rate."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from against_integer import ALPHA, SHAPE, lif, sequence
from measure import Row, Run, Setting, best_rate, clear, median_time
from spikingjelly.activation_based import functional

from spikede_plugins import convert_to_fractional
from spikede_plugins.engine import FractionalOperator, cpu
from spikede_plugins.engine.blocks import Reach, blocks
from spikede_plugins.exponentials import BLOCK

#: Bytes a neuron and step in float32. Forward: input, spikes, deviations; for backward also who fired, one
#: byte. Backward: deviations, who fired, the gradient that comes in and the one that goes out.
FORWARD_BYTES, MARK_BYTES, BACKWARD_BYTES = 4 + 4 + 4, 1, 4 + 1 + 4 + 4


# -- the machine ----------------------------------------------------------------------------------


def bandwidth(given: Setting) -> tuple[float, float]:
    """Bytes a second of a copy (one read, one write) and of ``a = b + s c`` (two reads, one write)."""
    count, repeat = (1 << 16, 1) if given.smoke else (1 << 26, 9)  # 256 MB each: in no cache
    a, b, c = torch.zeros(count), torch.ones(count), torch.ones(count)
    copied = best_rate(lambda: a.copy_(b), 8 * count, repeat)  # type: ignore[arg-type, return-value]
    triad = best_rate(lambda: torch.add(b, c, alpha=2.0, out=a), 12 * count, repeat)  # type: ignore[arg-type]
    return copied, triad


def multiply_adds(given: Setting) -> float:
    """Float32 multiply-adds a second: of registers alone, or of a matrix product where that is faster."""
    size, repeat = (64, 1) if given.smoke else (2048, 5)
    a, b = torch.rand(size, size), torch.rand(size, size)
    out = torch.empty(size, size)
    rate = best_rate(lambda: torch.mm(a, b, out=out), size**3, repeat)  # type: ignore[arg-type]
    return rate if cpu.missing() else max(rate, _registers(given))


def _registers(given: Setting) -> float:
    """Four independent chains of multiply-adds an element, 64 in all, on data in the first cache."""
    from numba import njit

    @njit(fastmath={"contract"}, nogil=True)
    def chains(x, factor, term, times):  # type: ignore[no-untyped-def]
        for _ in range(times):
            for i in range(x.shape[0]):
                a = x[i]
                b = a + term
                c = b + term
                d = c + term
                for _ in range(16):  # unrolled: it stays in registers
                    a = a * factor + term
                    b = b * factor + term
                    c = c * factor + term
                    d = d * factor + term
                x[i] = (a + b) + (c + d)

    number, count = np.float32, 2048
    times, repeat = (1, 1) if given.smoke else (20_000, 5)
    data = [np.ones(count, number) for _ in range(given.threads)]
    chains(data[0], number(0.5), number(0.1), 1)  # compiles
    with ThreadPoolExecutor(given.threads) as pool:

        def run() -> None:
            list(pool.map(lambda x: chains(x, number(0.5), number(0.1), times), data))

        return best_rate(run, 64.0 * count * times * given.threads, repeat)


# -- what the layer has to do ---------------------------------------------------------------------


def history_work(steps: int, reach: Reach, traces: int) -> int:
    """Multiply-adds a neuron of the history sums of one pass over a fresh run; backward takes as many.

    Within a block step i sums i lags; what is older than the block enters each of its steps directly, and by
    one product with each trace once there are any; a fold adds BLOCK rows to each trace.
    """
    total, folded = 0, False
    for block in blocks(0, steps, reach, False):
        count = block.last - block.first
        folded = folded or block.folds > 0
        total += count * block.place + count * (count - 1) // 2
        total += count * (block.before + (traces if folded else 0))
        total += block.folds * BLOCK * traces
    return total


def limits(given: Setting) -> Iterator[Row]:
    """The layer against the limits of the machine."""
    copied, triad = bandwidth(given)
    rate = multiply_adds(given)
    clear()
    yield {"case": "measured: copy", "bytes": copied, "per_second": True}
    yield {"case": "measured: a = b + s c", "bytes": triad, "per_second": True}
    yield {"case": "measured: multiply-adds", "multiply_adds": rate, "per_second": True}
    cases = [(16, 32, "full"), (32, 32, "full"), (64, 32, "full"), (256, 4, "soe"), (1024, 4, "soe")]
    for steps, batch, memory in [(8, 1, "full"), (48, 1, "soe")] if given.smoke else cases:
        for backward in (False, True):
            clear()
            node: Any = convert_to_fractional(lif(), alpha=ALPHA, memory=memory)
            operator = next(m for m in node.modules() if isinstance(m, FractionalOperator))
            x = torch.randn(steps, batch, *SHAPE)
            run = sequence(node, x.requires_grad_()) if backward else _forward(node, x)
            measured = median_time(run, given.repeat)
            moved = (FORWARD_BYTES + (MARK_BYTES + BACKWARD_BYTES if backward else 0)) * x.numel()
            work = history_work(steps, operator.reach(), _traces(operator)) * (2 if backward else 1)
            work *= x[0].numel()
            at_limit = max(moved / max(copied, triad), work / rate)
            yield {
                "case": f"[{steps}, {batch}, {', '.join(map(str, SHAPE))}], {memory}, "
                + ("forward + backward" if backward else "forward"),
                "bytes": moved,
                "multiply_adds": work,
                "bound": "memory" if moved / max(copied, triad) >= work / rate else "arithmetic",
                "limit_s": at_limit,
                "measured_s": measured,
                "share": at_limit / measured,
            }


def _traces(operator: FractionalOperator) -> int:
    kernel = operator.kernel(BLOCK * BLOCK, torch.zeros(1), operator.folds)
    return 0 if kernel.decay is None else len(kernel.decay)


def _forward(node: Any, x: torch.Tensor) -> Run:
    def run() -> None:
        functional.reset_net(node)
        with torch.no_grad():
            node(x)

    return run
