"""Runs the kernels of ``cpu_events``: closed-form neurons on the CPU, where no gradient is wanted.

They need numba (``pip install "spikede-plugins[fast]"``); everything else is left to the torch definition in
``spikede_plugins.event_intervals``, which finds the same to rounding.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from spikede_plugins.engine import cpu
from spikede_plugins.engine.buffers import empty
from spikede_plugins.engine.threads import in_tiles

#: About what a neuron's interval costs, in the multiply-adds that threads are shared out by.
_WORK = 60
#: Neurons of a tile.
_TILE = 16
#: Numbers of a first guess at the spikes of a neuron: one an interval, and a few.
_ROOM = 16


class Ran(NamedTuple):
    """State ``[n]``, spikes ``[T, n]``, times ``[n, K]`` (inf behind the last, K > 0), ``number [n]``."""

    v: Tensor
    held: Tensor
    counts: Tensor
    times: Tensor
    number: Tensor


@cache
def _kernels() -> Any:
    from spikede_plugins.engine import cpu_events

    return cpu_events


def serves(v: Tensor) -> bool:
    """Whether the kernels take potentials like these."""
    return (
        v.device.type == "cpu"
        and v.dtype in (torch.float32, torch.float64)
        and type(v) is Tensor
        and not torch.compiler.is_compiling()
        and cpu.available()
    )


def run(
    leaky: bool, currents: Tensor, before: Tensor | None, ramp: bool, v: Tensor, held: Tensor, begun: float,
    duration: float, refractory: float, values: Tensor, limit: int,
) -> Ran:  # fmt: skip
    """All intervals of ``currents [T, n]``.

    Args:
        leaky: whether the potential leaks.
        before: the newest current before these, where there is one ``[n]``.
        ramp: whether the current is a ramp from sample to sample.
        values: rest, threshold, reset, tau, capacity ``[5, 1 or width]``, float64.
        limit: the most spikes of a neuron in an interval; ``number`` is -1 for one that has more.
    """
    steps, n = currents.shape
    at = currents.detach().contiguous().numpy()
    tiles = np.array([[i, min(_TILE, n - i), 0] for i in range(0, n, _TILE)], np.int64).reshape(-1, 3)
    kind = 0 if not ramp else (2 if before is None else 1)
    first = (v if before is None else before).detach().contiguous().numpy()
    parameters = np.ascontiguousarray(values.numpy())
    room = 2 * steps + _ROOM
    while True:
        potentials, waits = (t.detach().clone(memory_format=torch.contiguous_format) for t in (v, held))
        counts = empty((steps, n), v)
        # Float64 until they are handed out, since late times in float32 would round away.
        times = empty((n, room), v.new_empty(0, dtype=torch.float64)).numpy()
        number = np.zeros(n, np.int64)
        if n and steps:
            k = _kernels()
            in_tiles(
                k.events, k.share_events, tiles, _WORK * n * steps, leaky, at, first, kind, begun, duration,
                refractory, parameters, limit, potentials.numpy(), waits.numpy(), counts.numpy(), times,
                number,
            )  # fmt: skip
        most = int(number.max(initial=0))
        if most <= room:
            break
        room = most  # more spikes than there was room for: now it is known how many
    spikes = torch.from_numpy(number)
    most = max(most, 1)  # where nothing fired, a column of inf
    found = torch.from_numpy(times)[:, :most].to(v.dtype)
    found.masked_fill_(torch.arange(most) >= spikes[:, None], torch.inf)
    return Ran(potentials, waits, counts, found, spikes)
