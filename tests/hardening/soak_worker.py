"""A long stream in a process of its own, whose resident memory is that of the stream.

    python soak_worker.py WHAT STEPS        prints one JSON object

The neurons run on and on without a reset. What they did is compared with the sum over their whole history,
formed anew in NumPy from the formula, at steps up to the very last.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import psutil
import torch
from torch import nn

from spikede_plugins import ODELIFDynamics, SpikingODELayer, SumOfExponentials, convert_to_fractional

ALPHA, NEURONS, PERIOD, CHUNK = 0.6, 8, 997, 1000
#: Weights to 1e-5, sums of float32 numbers: how far a membrane may be from the formula.
TOLERANCE = 2e-5

#: The input repeats, but not with the blocks of 16 steps that the engine works in.
DRIVE = torch.rand(PERIOD, 1, NEURONS, generator=torch.Generator().manual_seed(0)) * 2.2

Stream = Iterator[tuple[int, torch.Tensor, torch.Tensor]]


def fractional(neuron: nn.Module, steps: int) -> nn.Module:
    torch.manual_seed(0)
    memory = SumOfExponentials(tolerance=1e-5, horizon=steps)
    return convert_to_fractional(neuron, alpha=ALPHA, memory=memory)


def inputs(first: int, count: int) -> torch.Tensor:
    return DRIVE[torch.arange(first, first + count) % PERIOD]


# -- streams: each yields (first step, spikes [n, 8], membranes [n, 8]) ----------------------------


def spikingjelly_steps(steps: int) -> tuple[nn.Module, Stream]:
    from spikingjelly.activation_based import neuron

    node = fractional(neuron.LIFNode(tau=2.0), steps)

    def stream() -> Stream:
        for k in range(steps):
            spike = node(DRIVE[k % PERIOD])
            yield k, spike, node.v

    return node, stream()


def spikingjelly_chunks(steps: int) -> tuple[nn.Module, Stream]:
    """The same stream, a thousand steps a call."""
    from spikingjelly.activation_based import neuron

    node = fractional(neuron.LIFNode(tau=2.0, step_mode="m"), steps)
    node.store_v_seq = True

    def stream() -> Stream:
        for k in range(0, steps, CHUNK):
            spikes = node(inputs(k, min(CHUNK, steps - k)))
            yield k, spikes[:, 0], node.v_seq[:, 0]

    return node, stream()


def snntorch_hidden(steps: int) -> tuple[nn.Module, Stream]:
    import snntorch

    node = fractional(snntorch.Leaky(beta=0.5, init_hidden=True), steps)

    def stream() -> Stream:
        for k in range(steps):
            yield k, node(DRIVE[k % PERIOD]), node.mem

    return node, stream()


def snntorch_mem(steps: int) -> tuple[nn.Module, Stream]:
    """The membrane in the user's hands."""
    import snntorch

    node = fractional(snntorch.Leaky(beta=0.5), steps)

    def stream() -> Stream:
        mem = node.reset_mem()
        for k in range(steps):
            spike, mem = node(DRIVE[k % PERIOD], mem)
            yield k, spike, mem

    return node, stream()


# -- what the formula says -------------------------------------------------------------------------


def expected(what: str, v: np.ndarray, k: int, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spikes and membranes of step k, from all membranes before it.

    v_k = charge(v_{k-1}, x_k) - sum_{m >= 1} (w_m + [m = 1]) v_{k-m}, with every weight of Grünwald-Letnikov.
    """
    x = DRIVE[k % PERIOD, 0].double().numpy()
    before = v[k - 1].astype(np.float64) if k else np.zeros(NEURONS)
    past = weights[:k] @ v[:k][::-1].astype(np.float64)
    if what.startswith("spikingjelly"):
        charged = before + (x - before) / 2.0 - past
        spikes = charged >= 1.0
        return spikes, np.where(spikes, 0.0, charged)
    charged = 0.5 * before + x - past - (before > 1.0)
    return charged > 1.0, charged


def worst_error(what: str, spikes: np.ndarray, v: np.ndarray, steps: int) -> float:
    """The largest error of a membrane at some 60 steps up to the last; infinite for a wrong spike."""
    m = np.arange(1, steps + 1)
    weights = np.cumprod(1.0 - (1.0 + ALPHA) / m)
    weights[0] += 1.0
    places = {*np.geomspace(1, steps, 40).astype(int) - 1, *range(steps - 20, steps)}
    worst = 0.0
    for k in sorted(places):
        fired, membrane = expected(what, v, k, weights)
        if what.startswith("spikingjelly"):
            near = np.zeros(NEURONS, bool)
        else:
            near = np.abs(membrane - 1.0) < TOLERANCE
        off = np.abs(membrane - v[k])
        off[(fired != (spikes[k] > 0)) & ~near] = np.inf
        worst = max(worst, float(off.max()))
    return worst


# -- measuring -------------------------------------------------------------------------------------


def state_size(node: nn.Module, v: torch.Tensor) -> int:
    """Numbers in the state of the neuron: membrane, history, traces."""
    memories = getattr(node, "_memories", None)
    if memories is None:
        held = [v, *node._pasts.find(v).history]
    else:  # what is recorded for the comparison is no state
        held = [value for name, value in memories.items() if name != "v_seq"]
    return sum(t.numel() for t in held if isinstance(t, torch.Tensor))


def soak(what: str, steps: int, make: Callable[[int], tuple[nn.Module, Stream]]) -> dict[str, float]:
    process = psutil.Process()
    spikes = np.ones((steps, NEURONS), np.float32)  # written once here: it is resident from now on
    membranes = np.ones((steps, NEURONS), np.float32)
    every = max(1, steps // 200)
    resident, sizes = [], []
    start = time.perf_counter()
    node, stream = make(steps)
    following = 0
    for k, fired, v in stream:
        last = k + (1 if fired.shape[0] == 1 else len(fired))
        spikes[k:last], membranes[k:last] = fired.numpy(), v.numpy()
        if last >= following:
            following += every
            if last >= steps // 10:  # after the warm-up
                resident.append(process.memory_info().rss)
                sizes.append(state_size(node, v))
    seconds = time.perf_counter() - start
    return {
        "steps": steps,
        "seconds": round(seconds, 1),
        "resident at first": resident[0],
        "largest resident": max(resident),
        "resident at last": resident[-1],
        "samples": len(resident),
        "largest state": max(sizes),
        "finite": bool(np.isfinite(membranes).all()),
        "spikes a step": float(spikes.mean()),
        "late spikes a step": float(spikes[-steps // 10 :].mean()),
        "error": worst_error(what, spikes, membranes, steps),
    }


def soak_event_layer(calls: int) -> dict[str, float]:
    """An event-driven layer that goes on from call to call, against one call over all of it."""
    layer = SpikingODELayer(2, NEURONS, ODELIFDynamics(tau_mem=20.0))
    torch.manual_seed(0)
    layer.weight.data = torch.rand(NEURONS, 2, dtype=layer.weight.dtype) * 0.2
    drive = torch.rand(PERIOD, 1, 2, generator=torch.Generator().manual_seed(1), dtype=layer.weight.dtype)
    process, resident = psutil.Process(), []
    total = torch.zeros(1, NEURONS)
    start = time.perf_counter()
    for k in range(calls):
        total += layer.step(drive[k % PERIOD], 1.0)
        if k % max(1, calls // 200) == 0 and k >= calls // 10:
            resident.append(process.memory_info().rss)
    seconds = time.perf_counter() - start
    layer.reset()
    whole = torch.zeros(1, NEURONS)
    for first in range(0, calls, 10 * PERIOD):
        places = torch.arange(first, min(first + 10 * PERIOD, calls)) % PERIOD
        whole += layer(drive[places], interval=1.0).sum(0)
    return {
        "steps": calls,
        "seconds": round(seconds, 1),
        "resident at first": resident[0],
        "largest resident": max(resident),
        "resident at last": resident[-1],
        "samples": len(resident),
        "spikes": float(total.sum()),
        "different counts": float((total != whole).sum()),
    }


STREAMS = {
    "spikingjelly steps": spikingjelly_steps,
    "spikingjelly chunks": spikingjelly_chunks,
    "snntorch init_hidden": snntorch_hidden,
    "snntorch mem": snntorch_mem,
}


def main(framework: str, steps: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the frameworks' own
    from spikede_plugins import SpikedeWarning

    warnings.simplefilter("error", SpikedeWarning)  # of a run beyond its horizon, for one
    with torch.no_grad():
        if framework == "events":
            found = {"events": soak_event_layer(steps)}
        else:
            found = {n: soak(n, steps, make) for n, make in STREAMS.items() if n.startswith(framework)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
