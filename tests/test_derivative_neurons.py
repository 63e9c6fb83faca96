"""Neurons that fire on what they have before the step, with the reset in their rate: scan against a loop."""

from __future__ import annotations

import itertools

import pytest
import torch

from spikede_plugins.engine import FRESH, AffineCode, FractionalOperator, HistoryLog, affine_neuron, cpu, scan
from spikede_plugins.engine.affine import _native
from spikede_plugins.errors import OptionError
from spikede_plugins.memory import as_memory
from spikede_plugins.orders import FractionalOrder, MultiTerm, PerChannel
from spikede_plugins.solvers.gl import GrunwaldLetnikov
from spikede_plugins.solvers.glmulti import MultiTermGrunwaldLetnikov
from spikede_plugins.surrogate import spike

LEAKS = {
    "integrate": {"leak": "none"},
    "leak": {"leak": "divide", "tau": 2.5},
    "leak, learned": {"leak": "multiply"},
    "input scaled": {"leak": "divide", "tau": 2.5, "pull": False},
    "input scaled, learned": {"leak": "multiply", "pull": False},
}


def make(leak, *, alpha=0.6, memory="full", solver=None, step_size=1.0, dtype=torch.float64):
    factor = torch.tensor(0.4, dtype=dtype, requires_grad=True)
    code = AffineCode(
        **LEAKS[leak], threshold=0.8, reset=None, detach_reset=True, surrogate="atan", surrogate_alpha=2.0,
        in_rate=True,
    )  # fmt: skip
    operator = FractionalOperator(
        FractionalOrder(alpha, True), solver or GrunwaldLetnikov(), as_memory(memory), step_size
    ).to(dtype)
    return operator, affine_neuron(code, (factor,) if code.leak == "multiply" else ())


def inputs(dtype=torch.float64, steps=21, shape=(3, 40)):
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(steps, *shape, generator=generator, dtype=dtype)
    return x.requires_grad_(), torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()


def plain_loop(operator, neuron, x, v):
    """``v_k = g rate(v_{k-1}, x_k) - sum w u``, the definition, by autograd alone."""
    code, start, past, spikes = neuron.code, v, [], []
    kernel = operator.kernel(len(x), v.detach())
    for x_k in x:
        charge = _native(code, v, x_k, *neuron.params)
        fired = spike(charge - code.threshold, code.surrogate, code.surrogate_alpha)
        factor = neuron.params[0] if neuron.params else (1.0 / code.tau if code.leak == "divide" else 1.0)
        rate = charge - v - fired.detach() * code.threshold * factor
        total = sum(
            (kernel.weights[m] * u for m, u in enumerate(reversed(past))), torch.zeros_like(v)
        )  # fmt: skip
        v = v + kernel.gain * rate - total
        past.append(v - start)
        spikes.append(fired)
    return torch.stack(spikes), v


def gradients(run, operator, neuron, x, v):
    spikes, last = run(operator, neuron, x, v)
    scale = torch.linspace(-1, 1, spikes.numel(), dtype=x.dtype).reshape(spikes.shape)
    wanted = [x, v, *operator.parameters(), *neuron.params]
    return spikes, last, torch.autograd.grad((spikes * scale).sum() + last.square().sum(), wanted)


def scanned(operator, neuron, x, v, sizes=(21,)):
    past, log, parts = FRESH, HistoryLog(), []
    for part in x.split(list(sizes)):
        spikes, v, past, _ = scan(operator, neuron, part, v, past, log)
        parts.append(spikes)
    return torch.cat(parts), v


def assert_same(one, other, tolerance=1e-9):
    assert torch.equal(one[0], other[0])
    assert 0.05 < one[0].mean() < 0.95
    torch.testing.assert_close(one[1], other[1], rtol=tolerance, atol=tolerance)
    for a, b in zip(one[2], other[2], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("engine", ["fused", "torch"])
@pytest.mark.parametrize("sizes", [(21,), (6, 15)], ids=["whole", "in two"])
@pytest.mark.parametrize("leak", LEAKS)
def test_scan_is_the_plain_loop(monkeypatch, leak, sizes, engine):
    if engine == "torch":
        monkeypatch.setattr(cpu, "serves", lambda *_: False)
    operator, neuron = make(leak, step_size=0.5)
    x, v = inputs()
    expected = gradients(plain_loop, operator, neuron, x, v)
    found = gradients(lambda *given: scanned(*given, sizes), operator, neuron, x, v)
    assert_same(found, expected)


@pytest.mark.parametrize("start", [False, True], ids=["from zero", "from v"])
@pytest.mark.parametrize(
    ("memory", "order"),
    list(itertools.product(["full", "soe", 5], ["one", "channels", "terms"])),
    ids=str,
)
def test_both_engines_agree(monkeypatch, memory, order, start):
    several = {"channels": PerChannel([0.3, 0.6, 0.9], dim=0), "terms": MultiTerm([0.3, 0.8], [1.0, 0.5])}
    solver = MultiTermGrunwaldLetnikov() if order == "terms" else None
    operator, neuron = make("leak, learned", alpha=several.get(order, 0.7), memory=memory, solver=solver)
    x, v = inputs(steps=60)
    if not start:
        v = torch.zeros_like(v).requires_grad_()
    run = lambda *given: scanned(*given, (60,))  # noqa: E731
    fused = gradients(run, operator, neuron, x, v)
    monkeypatch.setattr(cpu, "serves", lambda *_: False)
    assert_same(fused, gradients(run, operator, neuron, x, v))


@pytest.mark.skipif(bool(cpu.missing()), reason=cpu.missing())
def test_the_kernels_are_used_and_keep_the_input_alone():
    operator, neuron = make("leak", dtype=torch.float32)
    x = inputs(torch.float32, shape=(3, 700))[0]
    assert cpu.serves(neuron, type("Past", (), {"v": x[0], "channel_dim": None}), x, operator.kernel(21, x))
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        scan(operator, neuron, x, torch.zeros(3, 700), FRESH, HistoryLog())
    assert sum(saved.values()) < 1.2 * x.numel() * 4


def test_an_order_of_one_is_the_forward_euler_step():
    """At alpha = 1 nothing is remembered: ``v + h rate``."""
    operator, neuron = make("leak", alpha=1.0, step_size=0.25)
    x, v = inputs()
    _, _, _, potentials = scan(operator, neuron, x, v, FRESH, HistoryLog(), keep_v=True)
    for x_k, reached in zip(x, potentials, strict=True):
        fired = (v + (x_k - v) / 2.5 >= 0.8).to(v.dtype)
        v = v + 0.25 * ((x_k - v) / 2.5 - fired * 0.8 / 2.5)
        torch.testing.assert_close(reached, v)


def test_checkpoints_keep_less_and_change_nothing():
    operator, neuron = make("leak, learned")
    x, v = inputs()
    expected = gradients(scanned, operator, neuron, x, v)
    operator.checkpoint = 4
    assert_same(gradients(scanned, operator, neuron, x, v), expected, 1e-12)


def test_a_captured_graph_gives_the_same():
    operator, neuron = make("input scaled")
    x, v = inputs()

    def run(x, v):
        return scan(operator, neuron, x, v, FRESH, HistoryLog())[:2]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = gradients(lambda o, n, x, v: run(x, v), operator, neuron, x, v)
    assert_same(gradients(lambda o, n, x, v: compiled(x, v), operator, neuron, x, v), expected)


@pytest.mark.parametrize(
    "change",
    [{"reset": 0.1}, {"detach_reset": False}, {"decay_input": False}],
    ids=["hard reset", "reset in the gradient", "input undecayed"],
)
def test_what_such_a_neuron_cannot_be(change):
    numbers = {"leak": "divide", "tau": 2.0, "reset": None, "detach_reset": True, "in_rate": True, **change}
    with pytest.raises(OptionError, match="in_rate needs"):
        AffineCode(**numbers)
