"""The fused CPU engine against the torch engine: the same spikes and gradients, a step or a sequence."""

from __future__ import annotations

import itertools
import multiprocessing
import threading

import pytest
import torch

from spikede_plugins.engine import FRESH, AffineCode, FractionalOperator, HistoryLog, affine_neuron, cpu, scan
from spikede_plugins.engine import threads as shared_work
from spikede_plugins.memory import as_memory
from spikede_plugins.orders import FractionalOrder, MultiTerm, PerChannel
from spikede_plugins.solvers.gl import GrunwaldLetnikov
from spikede_plugins.solvers.glmulti import MultiTermGrunwaldLetnikov
from spikede_plugins.solvers.pred import Predictor
from spikede_plugins.surrogate import available_surrogates

pytestmark = pytest.mark.skipif(bool(cpu.missing()), reason=cpu.missing())

CHARGES = {
    "integrate": {},
    "leak": {"leak": "divide", "tau": 2.5},
    "leak, input undecayed": {"leak": "divide", "tau": 2.5, "decay_input": False, "rest": 0.1},
    "leak, short form": {"leak": "divide", "tau": 2.5, "decay_input": False, "short_decay": True},
    "factor": {"leak": "multiply", "rest": 0.1},
    "factor, input undecayed": {"leak": "multiply", "decay_input": False, "rest": 0.1},
    "factor, short form": {"leak": "multiply", "decay_input": False, "short_decay": True},
}


def both_engines(monkeypatch, run):
    """What ``run`` returns with the fused engine, and with torch alone."""
    fused = run()
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "serves", lambda *_: False)
        patch.setattr(cpu, "serves_steps", lambda *_: False)
        return fused, run()


def make_case(charge, dtype, *, alpha=0.6, learn=True, memory="full", solver=None, **code):
    factor = torch.tensor(0.3, dtype=dtype, requires_grad=True)
    defaults = {"threshold": 0.8, "surrogate": "atan", "surrogate_alpha": 2.0}
    settings = AffineCode(**{**defaults, **CHARGES[charge], **code})
    operator = FractionalOperator(
        FractionalOrder(alpha, learn), solver or GrunwaldLetnikov(), as_memory(memory)
    ).to(dtype)
    return operator, affine_neuron(settings, (factor,) if settings.leak == "multiply" else ())


def make_input(dtype, steps=13, shape=(3, 101)):
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(steps, *shape, generator=generator, dtype=dtype)
    return x.requires_grad_(), torch.randn(shape, generator=generator, dtype=dtype)


def two_chunks(operator, neuron, x, v):
    """Outputs and gradients of a run in two chunks, whose history carries gradients across."""
    log = HistoryLog()
    s1, v1, past, seq1 = scan(operator, neuron, x[:6], v, FRESH, log, keep_v=True)
    s2, v2, past, seq2 = scan(operator, neuron, x[6:], v1, past, log, keep_v=True)
    scale = torch.linspace(-1, 1, len(x), dtype=x.dtype).reshape(-1, 1, 1)
    loss = (torch.cat([s1, s2]) * scale).sum() + v2.sum() + past.rows.square().sum()
    grads = torch.autograd.grad(loss, [x, *operator.parameters(), *neuron.params])
    return torch.cat([s1, s2]), torch.cat([seq1, seq2]), grads


def assert_same(fused, plain, dtype):
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    assert torch.equal(fused[0], plain[0])
    torch.testing.assert_close(fused[1], plain[1], rtol=tolerance, atol=tolerance)
    for a, b in zip(fused[2], plain[2], strict=True):
        torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=tolerance * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("reset", "detach"), list(itertools.product([None, 0.1], [False, True])))
@pytest.mark.parametrize("charge", CHARGES)
def test_every_charge_and_reset(monkeypatch, charge, reset, detach, dtype):
    operator, neuron = make_case(charge, dtype, reset=reset, detach_reset=detach)
    x, v = make_input(dtype)
    assert_same(*both_engines(monkeypatch, lambda: two_chunks(operator, neuron, x, v)), dtype)


@pytest.mark.parametrize("reset", [None, 0.1])
def test_gradients_to_the_initial_potential_and_of_stored_potentials(monkeypatch, reset):
    """What the kernels leave to torch: the start, and gradients that come in through stored potentials."""
    operator, neuron = make_case("leak", torch.float64, reset=reset)
    x, v = make_input(torch.float64)
    v.requires_grad_()

    def run():
        spikes, last, _, stored = scan(operator, neuron, x, v, FRESH, HistoryLog(), keep_v=True)
        loss = spikes.sum() + last.square().sum() + stored.square().sum()
        return spikes, stored, torch.autograd.grad(loss, [x, v, *operator.parameters()])

    assert_same(*both_engines(monkeypatch, run), torch.float64)


def test_a_soft_reset_saves_one_byte_a_neuron_and_step():
    """What backward needs beyond the history, which is state: who fired. The input is not kept."""
    operator, neuron = make_case("leak", torch.float32, learn=False, reset=None)
    x, v = make_input(torch.float32, steps=40)
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        scan(operator, neuron, x, v, FRESH, HistoryLog())
    assert x.numel() <= sum(saved.values()) <= 1.25 * x.numel()


def test_spikes_may_be_changed_in_place_after_the_scan():
    operator, neuron = make_case("leak", torch.float32, reset=None)
    x, v = make_input(torch.float32)
    spikes = scan(operator, neuron, x, v, FRESH, HistoryLog())[0]
    (expected,) = torch.autograd.grad(spikes.sum(), x, retain_graph=True)
    spikes += 1.0
    (found,) = torch.autograd.grad(spikes.sum(), x)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("surrogate", available_surrogates())
def test_every_surrogate(monkeypatch, surrogate):
    operator, neuron = make_case("leak", torch.float64, surrogate=surrogate)
    x, v = make_input(torch.float64)
    assert_same(*both_engines(monkeypatch, lambda: two_chunks(operator, neuron, x, v)), torch.float64)


TWO_TERMS = {
    "alpha": MultiTerm([0.9, 0.4], [1.0, 0.5], learn_coefficients=True),
    "solver": MultiTermGrunwaldLetnikov(),
}


@pytest.mark.parametrize(
    "options",
    [{"memory": 5}, {"learn": False}, {"solver": Predictor()}, TWO_TERMS],
    ids=["window", "fixed", "pred", "two terms"],
)
def test_window_fixed_order_and_other_solvers(monkeypatch, options):
    operator, neuron = make_case("leak", torch.float64, **options)
    x, v = make_input(torch.float64, steps=40)
    assert_same(*both_engines(monkeypatch, lambda: two_chunks(operator, neuron, x, v)), torch.float64)


@pytest.mark.parametrize("memory", ["full", 5])
def test_one_step_at_a_time_gives_the_same_bits(memory):
    operator, neuron = make_case("leak", torch.float32, memory=memory)
    x, v = make_input(torch.float32, steps=50, shape=(700,))
    with torch.no_grad():
        whole = scan(operator, neuron, x, v, FRESH, HistoryLog())
        past, log, spikes = FRESH, HistoryLog(), []
        for step in x:
            s, v, past, _ = scan(operator, neuron, step.unsqueeze(0), v, past, log)
            spikes.append(s)
    assert torch.equal(torch.cat(spikes), whole[0])
    assert torch.equal(v, whole[1])


def test_native_bits_at_a_learnable_alpha_of_one():
    for charge in CHARGES:
        operator, neuron = make_case(charge, torch.float32, alpha=1.0)
        x, v = make_input(torch.float32, steps=30)
        spikes, last, _, _ = scan(operator, neuron, x, v, FRESH, HistoryLog())
        for k in range(30):
            s, v = neuron.fire(neuron.charge(v, x[k], *neuron.params), *neuron.params)
            assert torch.equal(s, spikes[k]), charge
        assert torch.equal(v, last), charge


def test_an_order_a_channel_goes_to_torch():
    operator, neuron = make_case("leak", torch.float32, alpha=PerChannel([0.5, 0.7, 0.9]))
    x, v = make_input(torch.float32, shape=(2, 3))
    assert scan(operator, neuron, x, v, FRESH, HistoryLog())[0].shape == (13, 2, 3)


def test_views_and_non_contiguous_inputs():
    operator, neuron = make_case("leak", torch.float32)
    x, v = make_input(torch.float32, shape=(8, 6))
    turned = x.detach().transpose(1, 2).contiguous().transpose(1, 2)
    expected = scan(operator, neuron, x, v, FRESH, HistoryLog())[0]
    assert torch.equal(scan(operator, neuron, turned, v, FRESH, HistoryLog())[0], expected)
    expanded = x[:, :1].expand(-1, 8, -1)
    assert torch.equal(
        scan(operator, neuron, expanded, v, FRESH, HistoryLog())[0],
        scan(operator, neuron, expanded.contiguous(), v, FRESH, HistoryLog())[0],
    )


#: Shared among threads by our kernels, too small for torch, which in a forked process would wait for the
#: OpenMP threads that its parent had, if an earlier test made any.
BELOW_TORCHS_THREADS = (4, 500)


def large_run(shape=(4, 5000)):
    operator, neuron = make_case("leak", torch.float32, learn=False)
    x, v = make_input(torch.float32, steps=16, shape=shape)
    spikes = scan(operator, neuron, x, v, FRESH, HistoryLog())[0]
    return torch.autograd.grad(spikes.sum(), x)[0]


def test_threads_share_the_work_and_do_not_disturb_each_other():
    expected = large_run()
    found = [None] * 6

    def work(i):
        found[i] = large_run()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, expected) for one in found)


def _forked(queue):
    torch.set_num_threads(2)
    found = float(large_run(BELOW_TORCHS_THREADS).sum())
    queue.put((found, shared_work._pool_size))


def test_a_forked_worker_makes_threads_of_its_own():
    expected = float(large_run(BELOW_TORCHS_THREADS).sum())
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=_forked, args=(queue,))
    worker.start()
    found, others = queue.get(timeout=60)
    assert found == pytest.approx(expected, rel=1e-6)
    assert others == 1
    worker.join(timeout=60)
    assert worker.exitcode == 0


def test_nan_goes_through():
    operator, neuron = make_case("leak", torch.float32)
    x, v = make_input(torch.float32)
    x = x.detach().clone()
    x[2, 0, 0] = float("nan")
    potentials = scan(operator, neuron, x, v, FRESH, HistoryLog(), keep_v=True)[3]
    assert potentials[2:, 0, 0].isnan().all()
    assert potentials.isnan().sum() == 11
