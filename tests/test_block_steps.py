"""Single steps by the fused kernels against the same steps in torch: any charge, the graph of every step."""

from __future__ import annotations

import pytest
import torch

from spikede_plugins import PerChannel, SumOfExponentials
from spikede_plugins.engine import FRESH, FractionalOperator, HistoryLog, Step, charge_step, cpu
from spikede_plugins.engine.blocks import blocks
from spikede_plugins.errors import StateError
from spikede_plugins.exponentials import BLOCK
from spikede_plugins.memory import as_memory
from spikede_plugins.orders import FractionalOrder
from spikede_plugins.solvers.gl import GrunwaldLetnikov
from spikede_plugins.surrogate import spike

SHAPE = (2, 3, 20)
MEMORIES = {"full": "full", "soe": SumOfExponentials(tolerance=1e-8, horizon=300)}


@pytest.fixture(params=["fused", "torch"])
def engine(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(cpu, "serves_steps", lambda *_: False)
    elif cpu.missing():
        pytest.skip(cpu.missing())


def make_operator(memory="full", learn=True, alpha=0.6):
    order = FractionalOrder(alpha, learn)
    return FractionalOperator(order, GrunwaldLetnikov(), as_memory(MEMORIES.get(memory, memory))).double()


def make_input(steps=75):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(steps, *SHAPE, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), torch.randn(SHAPE, generator=generator, dtype=torch.float64).requires_grad_()


def charge(v, x):
    """Not affine, so that nothing but the step itself knows it."""
    return v + (x + 0.3 - v + 0.1 * v * v.tanh()) / 3.0


def march(operator, x, v, history=FRESH, log=None):
    """Potentials and spikes of all steps; the reset makes the potential jump between the steps."""
    log, found = log or HistoryLog(), []
    for one in x:
        h, history = Step(operator, v, history, log).charge(lambda u, one=one: charge(u, one))
        s = spike(h - 0.5)
        v = h - 0.5 * s
        found += [h, s]
    return torch.stack(found), v, history, log


def with_torch(monkeypatch, run):
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "serves_steps", lambda *_: False)
        return run()


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * max(1.0, float(b.detach().abs().max())))


@pytest.mark.parametrize("alpha", [0.6, PerChannel([0.3, 0.6, 0.9], dim=-2)], ids=["one order", "channels"])
@pytest.mark.parametrize("memory", ["full", "soe"])
@pytest.mark.parametrize("learn", [False, True], ids=["fixed", "learned"])
def test_values_and_gradients_are_those_of_torch(monkeypatch, memory, learn, alpha):
    operator = make_operator(memory, learn, alpha)
    x, v = make_input()

    def run():
        out, last, history, _ = march(operator, x, v)
        loss = (out * torch.linspace(-1, 1, len(out), dtype=x.dtype).reshape(-1, 1, 1, 1)).sum() + last.sum()
        loss = loss + history.rows.square().sum()
        if history.traces is not None:
            loss = loss + history.traces.square().sum()
        return [out, *torch.autograd.grad(loss, [x, v, *operator.parameters()])]

    assert_same(run(), with_torch(monkeypatch, run))


@pytest.mark.parametrize("memory", ["full", "soe"])
def test_a_graph_of_blocks_is_that_of_sums_over_all_rows(engine, memory):
    """Against an implementation of no more than the equation: every row, every step."""
    operator = make_operator(memory, learn=False)
    full = make_operator("full", learn=False)
    x, v = make_input()
    out, *_ = march(operator, x, v)
    kernel = full.kernel(len(x), v)
    at, rows, found = v, [], []
    for one in x:
        c = charge(at, one)
        h = c + (kernel.gain - 1.0) * (c - at)
        for lag, u in enumerate(reversed(rows)):
            h = h - kernel.weights[lag] * u
        s = spike(h - 0.5)
        at = h - 0.5 * s
        rows.append(at - v)
        found += [h, s]
    expected = torch.stack(found)
    tolerance = 1e-9 if memory == "full" else 1e-6
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    weights = torch.linspace(-1, 1, out.numel(), dtype=x.dtype).reshape(out.shape)
    for a, b in zip(
        torch.autograd.grad((out * weights).sum(), [x, v]),
        torch.autograd.grad((expected * weights).sum(), [x, v]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=tolerance * float(b.abs().max()))


def test_two_futures_of_one_state_and_a_second_backward_pass(engine):
    """What later steps hand back is summed, and no pass leaves anything behind for the next."""
    operator = make_operator("soe")
    x, v = make_input(60)
    _, at, history, log = march(operator, x[:36], v)
    one = march(operator, x[36:50], at, history, log)[0].square().sum()
    two = march(operator, x[36:60] * 0.5, at, history, log)[0].sum()
    inputs = [x, v, *operator.parameters()]
    both = torch.autograd.grad(one + two, inputs, retain_graph=True)
    apart = zip(*(torch.autograd.grad(f, inputs, retain_graph=True) for f in (one, two)), strict=True)
    assert_same(both, [a + b for a, b in apart])
    assert_same(torch.autograd.grad(one + two, inputs), both)


def test_a_loss_in_the_middle_and_a_detached_state(engine):
    operator = make_operator("soe", learn=False)
    x, v = make_input(60)
    out, at, history, log = march(operator, x[:45], v)
    (part,) = torch.autograd.grad(out[2 * 37].sum(), x, retain_graph=True)
    assert part[38:].abs().sum() == 0 and part[37].abs().min() > 0
    later, *_ = march(operator, x[45:], at.detach(), history.each(torch.Tensor.detach), log)
    (after,) = torch.autograd.grad(later.sum(), x)
    assert after[:45].abs().sum() == 0 and after[45:].abs().max() > 0
    joined = march(operator, x, v)[0]
    torch.testing.assert_close(torch.cat([out, later]), joined, rtol=0, atol=0)


def test_second_derivatives_with_a_fixed_order(engine):
    operator = make_operator("soe", learn=False)
    x, v = make_input(40)
    out, *_ = march(operator, x, v)
    (first,) = torch.autograd.grad(out[::2].square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert second.isfinite().all() and second.abs().max() > 0
    (plain,) = torch.autograd.grad(march(operator, x, v)[0][::2].square().sum(), x)
    assert_same([first], [plain])


def test_second_derivatives_with_a_learned_order_say_so(engine):
    operator = make_operator("full", learn=True)
    x, v = make_input(20)
    out, *_ = march(operator, x, v)
    with pytest.raises(StateError, match="second derivatives"):
        torch.autograd.grad(out.square().sum(), x, create_graph=True)


@pytest.mark.parametrize("length", [5, 40])
def test_a_charge_from_another_potential_and_a_second_charge(monkeypatch, length):
    """What a neuron with a reset of its own does in its step."""
    operator = make_operator("soe")
    x, v = make_input(length)

    def run():
        log, history, at, found = HistoryLog(), FRESH, v, []
        for one in x:
            step = Step(operator, at, history, log, several=True)
            h, history = step.charge(lambda u, one=one: charge(u, one), base=at * 0.9)
            again, _ = step.charge(lambda u, one=one: charge(u, one))
            at = 0.5 * (h + again)
            found.append(at)
        out = torch.stack(found)
        return [out, *torch.autograd.grad(out.square().sum(), [x, v, *operator.parameters()])]

    assert_same(run(), with_torch(monkeypatch, run))


@pytest.mark.parametrize("memory", ["full", "soe", "auto"])
@pytest.mark.parametrize("past", [1, 15, 16, 63, 64, 100, 127, 128])
def test_weights_reach_to_the_end_of_the_open_block(memory, past):
    """A block forms the sums of all its steps when it begins; kernels do not look whether a weight exists."""
    operator, v = make_operator(memory), torch.zeros(SHAPE, dtype=torch.float64)
    block = next(blocks(past, 1, operator.reach(), False))
    assert operator.kernel(past, v, rows=past).weights.shape[0] >= block.before + BLOCK - 1


def test_a_start_of_zeros_is_one_number():
    operator = make_operator("full")
    x, v = make_input(20)
    _, _, history, _ = march(operator, x, torch.zeros_like(v).detach())
    assert history.start.untyped_storage().nbytes() == 8 and history.start.shape == SHAPE


def test_a_start_that_is_one_number_for_all_neurons_is_that_number(engine):
    """Its strides are those of the one zero above, but it is not zero."""
    operator = make_operator("full")
    x, _ = make_input(20)
    rest = torch.tensor(-0.7, dtype=torch.float64)
    found, *_ = march(operator, x, rest.expand(SHAPE))
    expected, *_ = march(operator, x, rest.repeat(SHAPE))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("memory", ["full", "soe"])
def test_float32_and_half_precision_charges(engine, memory):
    operator = FractionalOperator(FractionalOrder(0.6), GrunwaldLetnikov(), as_memory(memory))
    x, v = (t.detach().float() for t in make_input())
    expected = march(operator.double(), x.double(), v.double())[0]
    found = march(operator.float(), x, v)[0]
    torch.testing.assert_close(found.double()[::2][:10], expected[::2][:10], rtol=1e-4, atol=1e-4)
    history, log, at = FRESH, HistoryLog(), v.requires_grad_()
    for one in x[:20]:
        step = Step(operator, at, history, log)
        at, history = step.charge(lambda u, one=one: charge(u, one).bfloat16())
    assert at.dtype == torch.float32
    at.sum().backward()
    assert v.grad.isfinite().all() and v.grad.abs().max() > 0


def test_a_learned_order_and_a_compressed_memory_leave_nothing_behind():
    """Without the garbage collector's help: a run is gone when its results are."""
    import gc

    operator = FractionalOperator(FractionalOrder(0.6, True), GrunwaldLetnikov(), as_memory("soe"))
    gc.collect()
    gc.disable()
    try:
        alive = []
        for _ in range(3):
            v, history, log = torch.zeros(50, dtype=torch.float64), FRESH, HistoryLog()
            for _ in range(80):
                v, history = charge_step(operator, lambda v: 0.9 * v + 1.0, v, history, log)
            v.sum().backward()
            del v, history, log
            alive.append(sum(type(o) is torch.Tensor and o.numel() >= 50 for o in gc.get_objects()))
        assert alive[2] == alive[1]
    finally:
        gc.enable()
