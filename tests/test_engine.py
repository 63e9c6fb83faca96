"""The engines against the definition, written out in plain torch with autograd through every step.

    h_k = c_k + (gain - 1)(c_k - v_{k-1}) - sum_m (w_m + [m=1]) u_{k-m},   u = v - v_start
"""

from __future__ import annotations

import copy
import io
import itertools
from dataclasses import replace

import pytest
import torch

from spikede_plugins import MultiTerm, PerChannel
from spikede_plugins.engine import (
    FRESH,
    AffineCode,
    ElementwiseNeuron,
    FractionalOperator,
    HistoryLog,
    affine_neuron,
    charge_step,
    cpu,
    forget_fired,
    scan,
)
from spikede_plugins.errors import OptionError, SpikedeWarning
from spikede_plugins.memory import WindowMemory, as_memory
from spikede_plugins.orders import FractionalOrder
from spikede_plugins.registry import get_solver
from spikede_plugins.solvers.abm import AdamsBashforthMoulton
from spikede_plugins.solvers.gl import GrunwaldLetnikov
from spikede_plugins.solvers.glmulti import MultiTermGrunwaldLetnikov
from spikede_plugins.solvers.l1 import L1
from spikede_plugins.solvers.pred import Predictor
from spikede_plugins.solvers.trap import Trapezoidal
from spikede_plugins.surrogate import spike

CASES = {
    "gl": (0.6, GrunwaldLetnikov()),
    "l1, order a channel": (PerChannel([0.3, 0.5, 0.9]), L1()),
    "pred": (0.8, Predictor()),
    "two terms": (MultiTerm([0.9, 0.4], [1.0, 0.5], learn_coefficients=True), MultiTermGrunwaldLetnikov()),
}


def make_operator(case: str, memory: object = "full") -> FractionalOperator:
    alpha, solver = CASES[case]
    return FractionalOperator(FractionalOrder(alpha, learn_alpha=True), solver, as_memory(memory)).double()


def make_neuron(reset: float | None = None, detach: bool = False, nonlinear: bool = False):
    """A leaky neuron at rest -0.1 with trainable leak and threshold."""
    leak = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    threshold = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def charge(v, x, leak, threshold):
        c = v + (x - (v + 0.1)) * leak.sigmoid()
        return c + 0.05 * v * v if nonlinear else c

    def fire(h, leak, threshold):
        s = spike(h - threshold, "atan", 2.0)
        held = s.detach() if detach else s
        return s, h - held * threshold if reset is None else (1 - held) * h + held * reset

    return ElementwiseNeuron(charge, fire, (leak, threshold))


def reference(operator, neuron, x_seq, v):
    """The definition: Python lists, one autograd graph through all of the past."""
    kernel = operator.kernel(len(x_seq), v)
    shape = [1] * v.dim()
    if kernel.gain.numel() > 1:
        shape[1] = -1
    gain = kernel.gain.reshape(shape)
    start, past, spikes, potentials = v, [], [], []
    for k, x in enumerate(x_seq):
        if k:
            past.append(v - start)
        c = neuron.charge(v, x, *neuron.params)
        h = c + (gain - 1) * (c - v)
        lags = len(past) if not isinstance(operator.memory, WindowMemory) else operator.memory.length
        for m in range(1, min(len(past), lags) + 1):
            h = h - kernel.weights[m - 1].reshape(shape) * past[-m]
        s, v = neuron.fire(h, *neuron.params)
        spikes.append(s)
        potentials.append(v)
    return torch.stack(spikes), torch.stack(potentials)


def stepwise(operator, neuron, x_seq, v, history=FRESH, log=None):
    log = HistoryLog() if log is None else log
    spikes, potentials = [], []
    for x in x_seq:
        h, history = charge_step(
            operator, lambda u, x=x: neuron.charge(u, x, *neuron.params), v, history, log
        )
        s, v = neuron.fire(h, *neuron.params)
        spikes.append(s)
        potentials.append(v)
    return torch.stack(spikes), torch.stack(potentials), v, history


def scanned(operator, neuron, x_seq, v, history=FRESH, log=None):
    s, last, history, potentials = scan(
        operator, neuron, x_seq, v, history, HistoryLog() if log is None else log, keep_v=True
    )
    return s, potentials, last, history


def make_input(steps=9, shape=(2, 3, 4)):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(steps, *shape, generator=generator, dtype=torch.float64) * 2
    v = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), v.requires_grad_()


def gradients(outputs, inputs):
    generator = torch.Generator().manual_seed(1)
    loss = sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outputs)
    return torch.autograd.grad(loss, inputs, retain_graph=True)


@pytest.mark.parametrize("nonlinear", [False, True], ids=["affine", "nonlinear"])
@pytest.mark.parametrize(("reset", "detach"), list(itertools.product([None, 0.1], [False, True])))
@pytest.mark.parametrize("memory", ["full", 3])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", [stepwise, scanned])
def test_engine_equals_the_definition(engine, case, memory, reset, detach, nonlinear):
    """Outputs, and gradients to input, start, leak, threshold, alpha and coefficients."""
    operator, neuron = make_operator(case, memory), make_neuron(reset, detach, nonlinear)
    x, v = make_input()
    inputs = [x, v, *neuron.params, *operator.parameters()]
    expected = reference(operator, neuron, x, v)
    found = engine(operator, neuron, x, v)[:2]
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_scan_equals_steps_to_the_last_bit(case, monkeypatch):
    """Both in torch; the kernels of the two sum in orders of their own."""
    monkeypatch.setattr(cpu, "serves_steps", lambda *_: False)
    operator, neuron = make_operator(case), make_neuron()
    x, v = make_input(steps=20)
    for a, b in zip(stepwise(operator, neuron, x, v)[:3], scanned(operator, neuron, x, v)[:3], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("memory", ["full", 3])
@pytest.mark.parametrize("engine", [stepwise, scanned])
def test_two_chunks_equal_the_whole(engine, memory):
    """Also the gradient that flows through the history from the second chunk into the first."""
    operator, neuron = make_operator("gl", memory), make_neuron(reset=0.1)
    x, v = make_input()
    whole = engine(operator, neuron, x, v)
    log = HistoryLog()
    first = engine(operator, neuron, x[:4], v, FRESH, log)
    second = engine(operator, neuron, x[4:], first[2], first[3], log)
    chunks = [torch.cat([a, b]) for a, b in zip(first[:2], second[:2], strict=True)]
    inputs = [x, v, *operator.parameters()]
    for a, b in zip(chunks, whole[:2], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(gradients(chunks, inputs), gradients(whole[:2], inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_two_futures_of_one_past_do_not_disturb_each_other():
    """A history is a view of a shared buffer; taking it up twice must not overwrite the first branch."""
    operator, neuron = make_operator("gl"), make_neuron()
    x, v = make_input(steps=12)
    log = HistoryLog()
    _, _, v4, past = stepwise(operator, neuron, x[:4], v, FRESH, log)
    one = stepwise(operator, neuron, x[4:8], v4, past, log)
    two = stepwise(operator, neuron, x[8:], v4, past, log)
    again = stepwise(operator, neuron, x[4:8], v4, past, HistoryLog())
    assert torch.equal(one[3].rows, again[3].rows)
    assert not torch.equal(one[1], two[1])
    inputs = [x, v]
    for a, b in zip(gradients(one[:2], inputs), gradients(again[:2], inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_single_steps_copy_no_history():
    """All histories of a run are views of one buffer: 200 steps allocate a few buffers, not 200."""
    operator, neuron = make_operator("gl"), make_neuron()
    v, history, log, buffers = torch.zeros(5, 3, dtype=torch.float64), FRESH, HistoryLog(), set()
    with torch.no_grad():
        for _ in range(200):
            h, history = charge_step(operator, lambda u: 0.5 * u + 0.1, v, history, log)
            _, v = neuron.fire(h, *neuron.params)
            buffers.add(history.rows.untyped_storage().data_ptr() if len(history.rows) else 0)
    assert history.rows.shape == (199, 5, 3)
    assert len(buffers) <= 8


def test_a_window_keeps_no_more_rows_than_its_length():
    operator, neuron = make_operator("gl", 5), make_neuron()
    x, v = make_input(steps=40)
    assert stepwise(operator, neuron, x, v)[3].rows.shape[0] == 5
    assert scanned(operator, neuron, x, v)[3].rows.shape[0] == 5


def test_a_potential_set_by_hand_is_remembered_as_an_impulse():
    """u of the newest step is read off the potential the framework carries, whoever changed it."""
    operator, neuron = make_operator("gl"), make_neuron()
    x, v = make_input(steps=6)
    _, _, v3, past = stepwise(operator, neuron, x[:3], v)
    _, moved = charge_step(operator, lambda u: u, v3 + 1.0, past, HistoryLog())
    torch.testing.assert_close(moved.rows[-1], v3 + 1.0 - v)


@pytest.mark.parametrize("memory", ["full", 4])
@pytest.mark.parametrize("method", ["gl", "l1", "pred", "abm", "trap"])
def test_forgetting_at_spikes_restarts_only_those_that_fired(method, memory):
    """With memory_reset="spike" a neuron that fired continues like one that starts at that potential."""
    alpha, solver = 0.6, get_solver(method)
    operator = FractionalOperator(
        FractionalOrder(alpha, learn_alpha=True), solver, as_memory(memory), memory_reset="spike"
    )
    v = torch.tensor([0.0, 0.3], dtype=torch.float64)
    history, log = FRESH, HistoryLog()
    for _ in range(3):
        v, history = charge_step(operator, lambda u: 0.5 * u + 0.2, v, history, log)
    fired = torch.tensor([1.0, 0.0], dtype=torch.float64)
    v = torch.where(fired > 0, torch.zeros_like(v), v)
    forgetful, kept = forget_fired(history, v, fired), history
    a, b, c = v, v, v[:1]
    fresh, apart = FRESH, 0.0
    for _ in range(7):
        a, forgetful = charge_step(operator, lambda u: 0.5 * u + 0.2, a, forgetful, HistoryLog())
        b, kept = charge_step(operator, lambda u: 0.5 * u + 0.2, b, kept, HistoryLog())
        c, fresh = charge_step(operator, lambda u: 0.5 * u + 0.2, c, fresh, HistoryLog())
        torch.testing.assert_close(a[0], c[0])
        torch.testing.assert_close(a[1], b[1])
        apart = max(apart, float((a[0] - b[0]).detach().abs()))
    assert apart > 1e-3


def forgetful_run(operator, neuron, x_seq, v):
    """Steps with memory_reset="spike"; also the spikes."""
    history, log, spikes = FRESH, HistoryLog(), []
    for x in x_seq:
        h, history = charge_step(
            operator, lambda u, x=x: neuron.charge(u, x, *neuron.params), v, history, log
        )
        s, v = neuron.fire(h, *neuron.params)
        history = forget_fired(history, v, s)
        spikes.append(s)
    return torch.stack(spikes), v


def forgetful_definition(operator, neuron, x_seq, v):
    """The same in plain torch, neuron by neuron: a past that is thrown away when the neuron fires."""
    kernel = operator.kernel(len(x_seq), v)
    last, all_spikes = [], []
    for i in range(v.numel()):
        u, start, past, spikes = v[i], v[i], [], []
        for k, x in enumerate(x_seq[:, i]):
            if k:
                past.append(u - start)
            c = neuron.charge(u, x, *neuron.params)
            h = c + (kernel.gain[0] - 1) * (c - u)
            for m in range(1, len(past) + 1):
                h = h - kernel.weights[m - 1, 0] * past[-m]
            s, u = neuron.fire(h, *neuron.params)
            if s > 0:
                start, past = u, []
            spikes.append(s)
        last.append(u)
        all_spikes.append(torch.stack(spikes))
    return torch.stack(all_spikes, 1), torch.stack(last)


@pytest.mark.parametrize("reset", [None, 0.1])
def test_forgetting_at_spikes_has_exact_gradients(reset):
    alpha, solver = CASES["gl"]
    operator = FractionalOperator(FractionalOrder(alpha, True), solver, memory_reset="spike").double()
    neuron = make_neuron(reset=reset)
    x, v = make_input(steps=12, shape=(6,))
    found = forgetful_run(operator, neuron, x, v)
    expected = forgetful_definition(operator, neuron, x, v)
    assert torch.equal(found[0], expected[0])
    assert found[0].sum() > 5
    inputs = [x, v, *operator.parameters(), *neuron.params]
    for a, b in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_forgetting_at_spikes_copies_no_history():
    """Training memory grows with T, not with T^2, also with a learned order."""
    alpha, solver = CASES["gl"]
    operator = FractionalOperator(FractionalOrder(alpha, True), solver, memory_reset="spike").double()
    neuron = make_neuron()

    def rows_alive(steps):
        x, v = make_input(steps=steps, shape=(50,))
        history, log, storages = FRESH, HistoryLog(), {}
        for step in x:
            h, history = charge_step(operator, lambda u, x=step: u + (x - u) / 2, v, history, log)
            s, v = neuron.fire(h, *neuron.params)
            history = forget_fired(history, v, s)
            kept = history.rows.untyped_storage()
            storages[kept.data_ptr()] = kept.nbytes()
        return sum(storages.values())

    assert rows_alive(256) <= 6 * rows_alive(64)


@pytest.mark.parametrize("engine", [stepwise, scanned])
def test_second_derivatives_are_refused_not_guessed(engine):
    operator, neuron = make_operator("gl"), make_neuron()
    x, v = make_input()
    loss = engine(operator, neuron, x, v)[1].square().sum()
    with pytest.raises(RuntimeError, match=r"second derivatives|differentiate twice"):
        (slope,) = torch.autograd.grad(loss, [operator.order.alpha], create_graph=True)
        slope.backward()


def test_learned_coefficients_stay_positive():
    order = FractionalOrder(MultiTerm([0.9, 0.4], [1.0, 0.5], learn_coefficients=True))
    operator = FractionalOperator(order, MultiTermGrunwaldLetnikov())
    optimizer = torch.optim.SGD(operator.parameters(), lr=100.0)
    for _ in range(3):
        optimizer.zero_grad()
        operator.kernel(8, torch.zeros(1)).gain.sum().neg().backward()
        optimizer.step()
        kernel = operator.kernel(8, torch.zeros(1))
        assert (order.coefficients > 0).all()
        assert torch.isfinite(kernel.weights).all()


@pytest.mark.parametrize("solver", [AdamsBashforthMoulton(), Trapezoidal()], ids=lambda s: s.name)
@pytest.mark.parametrize("affine", [True, False])
def test_corrector_steps_have_exact_gradients(solver, affine):
    operator = FractionalOperator(FractionalOrder(0.6, learn_alpha=True), solver).double()
    leak = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def run(x_seq, v, leak, alpha):
        with torch.no_grad():
            operator.order.alpha.copy_(alpha)
        history, log = FRESH, HistoryLog()
        for x in x_seq:
            v, history = charge_step(
                operator,
                lambda u, x=x: u + (x - u) * leak + (0.0 if affine else 0.05 * u * u),
                v, history, log, affine=affine,
            )  # fmt: skip
        return v

    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor(0.6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, v, leak: run(x, v, leak, alpha), (x, v, leak))
    (slope,) = torch.autograd.grad(run(x, v, leak, alpha).sum(), [operator.order.alpha])
    with torch.no_grad():
        up, down = run(x, v, leak, alpha + 1e-6).sum(), run(x, v, leak, alpha - 1e-6).sum()
    assert slope.item() == pytest.approx(((up - down) / 2e-6).item(), rel=1e-5)


def test_implicit_step_solves_its_equation():
    """trap at the first step: v = start + c (rate(v) + s_1 rate(start)), for a quadratic rate."""
    operator = FractionalOperator(FractionalOrder(0.7), Trapezoidal())
    start = torch.tensor([0.2], dtype=torch.float64)

    def rate(u):
        return 0.3 - 0.4 * u + 0.1 * u * u

    v, _ = charge_step(operator, lambda u: u + rate(u), start, FRESH, HistoryLog())
    kernel = operator.kernel(0, start)
    right = start + kernel.corrector_gain * (rate(v) + kernel.start_weights[0] * rate(start))
    torch.testing.assert_close(v, right)


def test_implicit_step_without_a_solution_takes_the_rate_before_it():
    """A quadratic rate that no potential catches up with; the neuron beside it has its solution."""
    operator = FractionalOperator(FractionalOrder(0.7, learn_alpha=True).double(), Trapezoidal())
    start = torch.tensor([0.2, 0.2], dtype=torch.float64)
    x = torch.tensor([-0.1, 3.0], dtype=torch.float64, requires_grad=True)

    def step(x):
        return charge_step(operator, lambda u: u + x + u * u, start, FRESH, HistoryLog())[0]

    with pytest.warns(SpikedeWarning, match="an implicit step has no solution for some neurons"):
        v = step(x)
    kernel = operator.kernel(0, start)
    rate = x + torch.stack([v[0], start[1]]).square()  # at the potential itself, at the one before
    right = start + kernel.corrector_gain * (rate + kernel.start_weights[0] * (x + start.square()))
    torch.testing.assert_close(v, right)

    to_x, to_alpha = torch.autograd.grad(v.sum(), [x, operator.order.alpha])
    with torch.no_grad(), pytest.warns(SpikedeWarning):
        for found, leaf, at in ((to_x[0], x, 0), (to_x[1], x, 1), (to_alpha, operator.order.alpha, ...)):
            leaf[at] += 1e-6
            up = step(x).sum()
            leaf[at] -= 2e-6
            down = step(x).sum()
            leaf[at] += 1e-6
            assert found.item() == pytest.approx(((up - down) / 2e-6).item(), rel=1e-6)


@pytest.mark.parametrize("engine", [stepwise, scanned])
def test_derivative_to_alpha_matches_finite_differences(engine):
    operator = make_operator("gl")
    neuron = ElementwiseNeuron(lambda v, x: v + (x - v) / 2, lambda h: (h * 0, h))
    x, v = make_input()
    (slope,) = torch.autograd.grad(engine(operator, neuron, x, v)[1].square().sum(), [operator.order.alpha])

    def value(shift):
        with torch.no_grad():
            operator.order.alpha += shift
            out = engine(operator, neuron, x, v)[1].square().sum()
            operator.order.alpha -= shift
        return out

    numeric = (value(1e-6) - value(-1e-6)) / 2e-6
    assert slope.item() == pytest.approx(numeric.item(), rel=1e-6)


def test_the_scan_is_one_node_and_keeps_two_numbers_a_neuron_and_step():
    """No O(T^2) graph: saved tensors grow linearly with T."""

    def saved_floats(steps):
        operator, neuron = make_operator("gl"), make_neuron()
        x, v = make_input(steps=steps, shape=(1, 3, 50))
        seen: dict[int, int] = {}

        def pack(t):
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = scanned(operator, neuron, x, v)
        node = out[0].grad_fn
        assert type(node).__name__ == "_ScanBackward"
        return sum(seen.values()) + node.all_rows.numel()

    small, large = saved_floats(32), saved_floats(128)
    assert large <= 4.2 * small
    assert large <= 3.5 * 128 * 150  # input, charged potential and deviation, a float each


@pytest.mark.parametrize("case", ["gl", "l1, order a channel", "pred"])
def test_alpha_one_is_the_native_step_to_the_last_bit(case):
    """Gain 1 and vanishing brackets, also where alpha is a parameter that happens to be 1."""
    _, solver = CASES[case]
    neuron = make_neuron()
    x, v = make_input(steps=30)
    for engine in (stepwise, scanned):
        operator = FractionalOperator(FractionalOrder(1.0, learn_alpha=True), solver).double()
        spikes, potentials, _, _ = engine(operator, neuron, x, v)
        u = v
        for k in range(30):
            s, u = neuron.fire(neuron.charge(u, x[k], *neuron.params), *neuron.params)
            assert torch.equal(s, spikes[k])
            assert torch.equal(u, potentials[k])


def test_operator_and_history_survive_copying_and_pickling():
    operator, neuron = make_operator("gl"), make_neuron()
    x, v = make_input()
    with torch.no_grad():
        _, _, last, past = scanned(operator, neuron, x[:5], v)
        expected = scanned(operator, neuron, x[5:], last, past)
        stream = io.BytesIO()
        torch.save((operator, past), stream)
        stream.seek(0)
        loaded, loaded_past = torch.load(stream, weights_only=False)
        for op, history in ((copy.deepcopy(operator), copy.deepcopy(past)), (loaded, loaded_past)):
            assert torch.equal(scanned(op, neuron, x[5:], last, history)[1], expected[1])


def test_inference_mode_and_training_may_alternate():
    operator, neuron = make_operator("gl"), make_neuron()
    x, v = make_input()
    log = HistoryLog()
    with torch.inference_mode():
        one = stepwise(operator, neuron, x[:5], v, FRESH, log)
        stepwise(operator, neuron, x[5:], one[2], one[3], log)
    stepwise(operator, neuron, x, v, FRESH, log)[1].sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_nan_goes_through_and_stays_where_it_is():
    operator, neuron = make_operator("gl"), make_neuron()
    x, v = make_input()
    x = x.detach().clone()
    x[2, 0, 0, 0] = float("nan")
    potentials = scanned(operator, neuron, x, v)[1]
    assert potentials[2:, 0, 0, 0].isnan().all()
    assert potentials.isnan().sum() == 7


@pytest.mark.parametrize("decay_input", [True, False])
@pytest.mark.parametrize("leak", ["none", "divide", "multiply"])
@pytest.mark.parametrize(("reset", "detach"), list(itertools.product([None, 0.1], [False, True])))
def test_closed_form_derivatives_equal_autograd(leak, decay_input, reset, detach):
    """Affine neurons: the same gradients with the closed forms as by differentiating charge and fire."""
    factor = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    code = AffineCode(
        leak=leak, tau=2.5, decay_input=decay_input, rest=0.1 if reset else 0.0, threshold=0.8,
        reset=reset, detach_reset=detach, surrogate="atan", surrogate_alpha=2.0,
    )  # fmt: skip
    neuron = affine_neuron(code, (factor,) if leak == "multiply" else ())
    x, v = make_input()
    operator = make_operator("gl")
    inputs = [x, v, *operator.parameters(), *neuron.params]
    closed = scanned(operator, neuron, x, v)
    found = scanned(operator, replace(neuron, derivatives=None), x, v)
    assert torch.equal(closed[0], found[0])
    for a, b in zip(gradients(closed[:2], inputs), gradients(found[:2], inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_an_empty_sequence_is_refused():
    operator, neuron = make_operator("gl"), make_neuron()
    x, v = make_input()
    with pytest.raises(OptionError, match="T = 0"):
        scanned(operator, neuron, x[:0], v)


def test_per_channel_orders_must_fit_the_shape():
    operator, neuron = make_operator("l1, order a channel"), make_neuron()
    x, v = make_input(shape=(2, 5, 4))
    for engine in (stepwise, scanned):
        with pytest.raises(OptionError, match="3 orders for dimension 1"):
            engine(operator, neuron, x, v)
