"""Tiles shared among threads: the same bits by one thread, by OpenMP's and by our own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spikede_plugins.engine import (
    FRESH,
    AffineCode,
    FractionalOperator,
    HistoryLog,
    affine_neuron,
    cpu,
    scan,
    threads,
)
from spikede_plugins.memory import as_memory
from spikede_plugins.orders import FractionalOrder
from spikede_plugins.solvers.gl import GrunwaldLetnikov

pytestmark = pytest.mark.skipif(bool(cpu.missing()), reason=cpu.missing())
if not cpu.missing():
    from numba import njit

    from spikede_plugins.engine.outlined import share

    @njit(nogil=True)
    def fill(out, tiles, first, last):
        for t in range(first, last):
            if tiles[t, 0] < 0:
                raise ValueError("a tile before the first")
            for i in range(tiles[t, 0], tiles[t, 0] + tiles[t, 1]):
                out[i] += 1.0

    @njit(nogil=True)
    def fill_shared(arguments, tiles, pieces, threads, parallel):
        return share(fill, arguments, tiles, pieces, threads, parallel)


@pytest.fixture(params=["OpenMP", "own"])
def two_threads(request, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    if request.param == "own":
        monkeypatch.setattr(threads, "_openmp", lambda: 0)
    elif not threads._openmp():
        pytest.skip("torch has loaded no GNU OpenMP here")
    yield
    torch.set_num_threads(before)


def tiles_of(first, count):
    starts = np.arange(first, first + 64 * count, 64)
    return np.stack([starts, np.full(count, 64), np.zeros_like(starts)], 1)


@pytest.mark.parametrize("count", [1, 2, 3, 1000])
def test_every_tile_is_run_once(two_threads, count):
    out = np.zeros(64 * count)
    threads.in_tiles(fill, fill_shared, tiles_of(0, count), 10**9, out)
    assert (out == 1.0).all()


def test_an_error_in_a_kernel_is_raised(two_threads):
    tiles = tiles_of(0, 10)
    tiles[7, 0] = -1
    with pytest.raises(ValueError, match="a tile before the first"):
        threads.in_tiles(fill, fill_shared, tiles, 10**9, np.zeros(640))


def run(steps):
    """Spikes, gradients of the input and of the order; ``steps`` at a time."""
    torch.manual_seed(0)
    order = FractionalOrder(0.7, True)
    operator = FractionalOperator(order, GrunwaldLetnikov(), as_memory("soe")).to(torch.float32)
    code = AffineCode(leak="divide", tau=2.0, reset=None, detach_reset=True, surrogate="atan")
    neuron = affine_neuron(code, ())
    x = (torch.randn(40, 3, 3000) + 0.5).requires_grad_()
    v, past, log, spikes = torch.zeros(3, 3000), FRESH, HistoryLog(), []
    for part in x.split(steps):
        fired, v, past, _ = scan(operator, neuron, part, v, past, log)
        spikes.append(fired)
    spikes = torch.cat(spikes)
    return spikes, *torch.autograd.grad((spikes * torch.randn_like(spikes)).sum(), [x, *order.parameters()])


@pytest.mark.parametrize("steps", [40, 1])
def test_threads_change_no_bit(two_threads, steps):
    shared = run(steps)
    torch.set_num_threads(1)
    alone = run(steps)
    assert torch.equal(shared[0], alone[0])
    assert torch.equal(shared[1], alone[1])
    torch.testing.assert_close(shared[2], alone[2], rtol=1e-4, atol=0.0)  # summed in another order
