"""Sum-of-exponentials memory: certified weights, and the same run as with the full history.

    sum_m W_m u_{k-m}  ~  sum over the newest rows of W_m u_{k-m}  +  sum_p readout_p z_p
"""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikede_plugins import MultiTerm, PerChannel, SumOfExponentials
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
from spikede_plugins.engine import history as history_module
from spikede_plugins.errors import OptionError, OptionTypeError, SpikedeWarning
from spikede_plugins.exponentials import BLOCK, EXACT, choose_nodes, coefficients
from spikede_plugins.memory import as_memory
from spikede_plugins.orders import FractionalOrder
from spikede_plugins.solvers.abm import AdamsBashforthMoulton
from spikede_plugins.solvers.base import ExplicitSolver
from spikede_plugins.solvers.gl import GrunwaldLetnikov
from spikede_plugins.solvers.glmulti import MultiTermGrunwaldLetnikov
from spikede_plugins.solvers.l1 import L1
from spikede_plugins.solvers.pred import Predictor

TIGHT = SumOfExponentials(tolerance=1e-9, horizon=600)

CASES = {
    "gl": (0.6, GrunwaldLetnikov()),
    "l1, order a channel": (PerChannel([0.3, 0.5, 0.9]), L1()),
    "pred": (0.8, Predictor()),
    "two terms": (MultiTerm([0.9, 0.4], [1.0, 0.5], learn_coefficients=True), MultiTermGrunwaldLetnikov()),
}
CODE = AffineCode(leak="divide", tau=4.0, threshold=0.9, reset=None, surrogate="atan", surrogate_alpha=2.0)


def make_operator(case="gl", memory=TIGHT, learn=True, **options):
    alpha, solver = CASES[case]
    return FractionalOperator(FractionalOrder(alpha, learn), solver, as_memory(memory), **options).double()


def make_neuron(reset=None):
    return affine_neuron(
        AffineCode(leak="divide", tau=4.0, threshold=0.9, reset=reset, surrogate="atan", surrogate_alpha=2.0)
    )


def make_input(steps=150, shape=(2, 3, 4), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(steps, *shape, generator=generator, dtype=dtype) * 2
    return x.requires_grad_(), torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()


def whole(operator, neuron, x, v, history=FRESH, log=None):
    spikes, last, past, seq = scan(operator, neuron, x, v, history, log or HistoryLog(), keep_v=True)
    return spikes, seq, last, past


def stepwise(operator, neuron, x, v, history=FRESH, log=None):
    log = log or HistoryLog()
    spikes, potentials = [], []
    for one in x:
        h, history = charge_step(operator, lambda u, one=one: neuron.charge(u, one), v, history, log)
        s, v = neuron.fire(h)
        spikes.append(s)
        potentials.append(v)
    return torch.stack(spikes), torch.stack(potentials), v, history


def scanned_by_steps(operator, neuron, x, v, history=FRESH, log=None):
    log = log or HistoryLog()
    spikes, potentials = [], []
    for one in x:
        s, v, history, seq = scan(operator, neuron, one.unsqueeze(0), v, history, log, keep_v=True)
        spikes.append(s[0])
        potentials.append(seq[0])
    return torch.stack(spikes), torch.stack(potentials), v, history


def gradients(outputs, inputs):
    generator = torch.Generator().manual_seed(1)
    loss = sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outputs)
    return torch.autograd.grad(loss, inputs)


@pytest.fixture(params=["fused", "torch"])
def engine(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(cpu, "serves", lambda *_: False)
        monkeypatch.setattr(cpu, "serves_steps", lambda *_: False)
    elif cpu.missing():
        pytest.skip(cpu.missing())


# -- the fit --------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [GrunwaldLetnikov(), L1(), Predictor()], ids=["gl", "l1", "pred"])
@pytest.mark.parametrize("alpha", [0.05, 0.3, 0.7, 0.95])
def test_every_weight_up_to_the_horizon_is_right_to_the_tolerance(solver, alpha):
    horizon, tolerance = 3000, 1e-7
    weights = solver.weights(torch.tensor([alpha], dtype=torch.float64), horizon)
    nodes = choose_nodes(weights, tolerance, horizon, solver.name)
    fitted = coefficients(weights, weights, nodes.rates, horizon)
    lags = torch.arange(EXACT + 1, horizon + 1, dtype=torch.float64)
    off = torch.exp(-nodes.rates * (lags - EXACT - 1).unsqueeze(1)) @ fitted / weights[EXACT:] - 1
    assert off.abs().max() <= tolerance
    assert off.abs().max().item() == pytest.approx(nodes.error, rel=1e-6)
    assert len(nodes.rates) <= 28


def test_traces_decay_over_a_block_without_rounding_in_float32():
    """However often a trace decays, its factor is the number the coefficients were fitted for."""
    kernel = make_operator(memory="soe").kernel(1000, torch.zeros(1, dtype=torch.float64))
    assert (kernel.decay.float().double() / kernel.decay - 1).abs().max() < 1e-14


@settings(max_examples=15, deadline=None)
@given(st.floats(0.02, 0.999), st.integers(1, 5000))
def test_any_order_and_horizon_has_a_fit(alpha, horizon):
    operator = FractionalOperator(
        FractionalOrder(alpha), GrunwaldLetnikov(), SumOfExponentials(tolerance=1e-5, horizon=horizon)
    )
    assert operator.memory_error() <= 1e-5


def test_nodes_of_a_learned_order_serve_wherever_it_gets_to():
    operator = make_operator(memory="soe")
    for alpha in (0.05, 0.2, 0.55, 0.97, 1.0):
        with torch.no_grad():
            operator.order.alpha.fill_(alpha)
        assert operator.memory_error() <= 1e-6


def test_an_unreachable_tolerance_says_what_can_be_reached():
    with pytest.raises(OptionError, match=r"tolerance 1e-15 up to lag 5000; the best has .* error of \d"):
        make_operator(memory=SumOfExponentials(tolerance=1e-15, horizon=5000))


class Alternating(ExplicitSolver):
    """Weights that no decaying exponentials make."""

    name = "alternating"

    def accuracy(self, alpha):
        return 1.0

    def gain(self, alpha, step_size):
        return torch.ones_like(alpha)

    def weights(self, alpha, n):
        m = torch.arange(1, n + 1, dtype=alpha.dtype)
        return torch.where(m == 1, -1.0, (-1.0) ** m * (1 - alpha.unsqueeze(-1)) / m)


def test_weights_that_are_no_exponentials_are_refused_or_kept_in_full():
    order = FractionalOrder(0.5)
    with pytest.raises(OptionError, match="solver 'alternating'"):
        FractionalOperator(order, Alternating(), as_memory("soe"))
    kept = FractionalOperator(order, Alternating(), as_memory("auto"))
    assert not kept.folds
    assert kept.memory_text() == "full"


def test_a_solver_without_weights_is_refused_and_told_which_have_them():
    with pytest.raises(OptionError, match="'abm' is not; gl, l1, pred and glmulti are"):
        FractionalOperator(FractionalOrder(0.5), AdamsBashforthMoulton(), as_memory("soe"))
    automatic = FractionalOperator(FractionalOrder(0.5), AdamsBashforthMoulton(), as_memory("auto"))
    assert automatic.memory_text() == "full"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"tolerance": 0.0}, OptionError),
        ({"tolerance": float("nan")}, OptionError),
        ({"tolerance": "1e-6"}, OptionTypeError),
        ({"horizon": 0}, OptionError),
        ({"horizon": 2.5}, OptionTypeError),
        ({"horizon": True}, OptionTypeError),
    ],
)
def test_bad_options(options, error):
    with pytest.raises(error):
        SumOfExponentials(**options)


def test_an_unknown_word_offers_the_nearest():
    with pytest.raises(OptionError, match="did you mean 'soe'"):
        as_memory("so")


# -- the run --------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [whole, stepwise, scanned_by_steps])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("reset", [None, 0.1])
def test_runs_and_gradients_are_those_of_the_full_history(engine, case, reset, run):
    """Spikes, potentials, and gradients to input, start, orders and coefficients, over several folds."""
    full, folded = make_operator(case, "full"), make_operator(case)
    neuron = make_neuron(reset)
    x, v = make_input()
    expected, found = whole(full, neuron, x, v), run(folded, neuron, x, v)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-7, atol=1e-7)
    assert found[3].rows.shape[0] < EXACT + BLOCK
    assert found[3].traces is not None
    wanted = gradients(expected[:2], [x, v, *full.parameters()])
    for a, b in zip(gradients(found[:2], [x, v, *folded.parameters()]), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("cuts", [(75,), (1, 31, 32, 33, 47, 48, 100), tuple(range(5, 150, 7))])
@pytest.mark.parametrize("run", [whole, stepwise])
def test_a_run_in_chunks_is_the_run(engine, cuts, run):
    """Also the gradients that pass through rows and traces from chunk to chunk."""
    operator, neuron = make_operator("l1, order a channel"), make_neuron()
    x, v = make_input()
    inputs = [x, v, *operator.parameters()]
    expected = run(operator, neuron, x, v)
    history, log, spikes, potentials, last = FRESH, HistoryLog(), [], [], v
    for begin, end in itertools.pairwise((0, *cuts, 150)):
        s, p, last, history = run(operator, neuron, x[begin:end], last, history, log)
        spikes.append(s)
        potentials.append(p)
    found = torch.cat(spikes), torch.cat(potentials)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-10, atol=1e-10)
    for a, b in zip(gradients(found, inputs), gradients(expected[:2], inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * max(1.0, float(b.abs().max())))


def test_steps_with_a_detached_state_are_truncated_backpropagation(engine):
    """Detached in the middle of a block: the values of the run, the gradients of the last piece alone."""
    operator, neuron = make_operator(), make_neuron()
    x, v = make_input(60)
    *_, last, history = stepwise(operator, neuron, x[:41], v)
    cut = history.each(torch.Tensor.detach)
    log = HistoryLog()
    found = stepwise(operator, neuron, x[41:], last.detach(), cut, log)
    expected = whole(operator, neuron, x[41:], last.detach(), cut)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-10, atol=1e-10)
    inputs = [x, *operator.parameters()]
    for a, b in zip(gradients(found[:2], inputs), gradients(expected[:2], inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_an_older_state_may_be_taken_up_again(engine):
    operator, neuron = make_operator(learn=False), make_neuron()
    x, v = make_input(80)
    with torch.no_grad():
        log = HistoryLog()
        *_, last, history = stepwise(operator, neuron, x[:50], v, FRESH, log)
        one = stepwise(operator, neuron, x[50:], last, history, log)
        other = stepwise(operator, neuron, x[50:] + 1.0, last, history, log)
        again = stepwise(operator, neuron, x[50:], last, history, log)
    assert torch.equal(one[1], again[1])
    assert not torch.equal(one[1], other[1])


def test_a_changed_order_counts_from_the_next_step_on():
    operator, neuron = make_operator(), make_neuron()
    x, v = make_input(80)
    with torch.no_grad():
        log = HistoryLog()
        *_, last, history = stepwise(operator, neuron, x[:53], v, FRESH, log)
        operator.order.alpha.fill_(0.9)
        found = stepwise(operator, neuron, x[53:], last, history, log)
        expected = stepwise(operator, neuron, x[53:], last, history.each(torch.clone), HistoryLog())
    torch.testing.assert_close(found[1], expected[1], rtol=1e-12, atol=1e-12)


def test_the_engines_agree_to_the_last_bit_on_themselves_in_steps(engine):
    operator, neuron = make_operator(learn=False), make_neuron()
    x, v = make_input(90, dtype=torch.float32)
    operator = operator.float()
    with torch.no_grad():
        expected = whole(operator, neuron, x, v)
        found = scanned_by_steps(operator, neuron, x, v)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("memory", ["full", TIGHT])
def test_forgetting_at_spikes(memory):
    """A neuron that fires starts anew, whatever part of its past was folded already."""
    folded, full = make_operator(memory=TIGHT, memory_reset="spike"), make_operator(
        memory="full", memory_reset="spike"
    )
    neuron = make_neuron()
    x, v = make_input(120, (5,))
    x = x * 0.4

    def run(operator):
        history, log, at, spikes, potentials = FRESH, HistoryLog(), v, [], []
        for one in x:
            h, history = charge_step(operator, lambda u, one=one: neuron.charge(u, one), at, history, log)
            s, at = neuron.fire(h)
            history = forget_fired(history, at, s)
            spikes.append(s)
            potentials.append(at)
        return torch.stack(spikes), torch.stack(potentials)

    expected, found = run(full), run(folded)
    assert torch.equal(found[0], expected[0])
    assert 0 < expected[0].sum() < 300
    torch.testing.assert_close(found[1], expected[1], rtol=1e-7, atol=1e-7)
    inputs = [x, v]
    for a, b in zip(
        gradients(found, [*inputs, folded.order.alpha]), gradients(expected, [*inputs, full.order.alpha]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_nonlinear_neuron(engine):
    neuron = ElementwiseNeuron(
        lambda v, x: v + (x - v + 0.1 * v * v) / 4, lambda h: ((h > 1).to(h.dtype), h - (h > 1).to(h.dtype))
    )
    x, v = make_input()
    full, folded = whole(make_operator(memory="full"), neuron, x, v), whole(make_operator(), neuron, x, v)
    assert torch.equal(full[0], folded[0])
    torch.testing.assert_close(full[1], folded[1], rtol=1e-7, atol=1e-7)


def test_auto_is_full_up_to_128_steps_and_folds_then(engine):
    full, automatic = make_operator(memory="full", learn=False), make_operator(memory="auto", learn=False)
    neuron = make_neuron()
    x, v = make_input(200)
    with torch.no_grad():
        short = whole(automatic, neuron, x[:128], v)
        assert torch.equal(short[1], whole(full, neuron, x[:128], v)[1])
        assert short[3].traces is None
        long = whole(automatic, neuron, x, v)
        assert long[3].rows.shape[0] < EXACT + BLOCK
        torch.testing.assert_close(long[1], whole(full, neuron, x, v)[1], rtol=1e-5, atol=1e-5)


def test_the_state_does_not_grow(engine):
    """Neither the tensors, nor the storage they are views of."""
    operator, neuron = make_operator(memory="soe", learn=False), make_neuron()
    v, history, log = torch.zeros(10, dtype=torch.float64), FRESH, HistoryLog()
    sizes = []
    with torch.no_grad():
        for k in range(600):
            x = torch.full((1, 10), 0.3 + 0.001 * k, dtype=torch.float64)
            _, v, history, _ = scan(operator, neuron, x, v, history, log)
            sizes.append(sum(t.untyped_storage().nbytes() for t in history if t is not None))
            assert history.rows.shape[0] < EXACT + BLOCK
        long = torch.zeros(3000, 10, dtype=torch.float64)
        _, _, history, _ = scan(operator, neuron, long, v, history, log)
    assert max(sizes[300:]) <= max(sizes[100:300])
    assert sum(t.untyped_storage().nbytes() for t in history) <= 2 * max(sizes)


def test_beyond_the_horizon_it_says_so_once_with_a_bound_that_holds(engine):
    operator = make_operator(memory=SumOfExponentials(tolerance=1e-6, horizon=200), learn=False)
    neuron = ElementwiseNeuron(lambda v, x: v + (x - v) / 50, lambda h: (h * 0, h))
    x = torch.ones(1500, 1, dtype=torch.float64)
    v = torch.zeros(1, dtype=torch.float64)
    with pytest.warns(SpikedeWarning, match=r"horizon of its compressed memory, 200 steps") as caught:
        found = whole(operator, neuron, x, v)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole(operator, neuron, x, v)
    bound = float(str(caught[0].message).split("off by ")[1].split(" ")[0])
    full = whole(make_operator(memory="full", learn=False), neuron, x, v)
    # The sums differ by no more than the bound times the largest potential; potentials follow them.
    kernel = make_operator(memory="full", learn=False).kernel(1500, v)
    u = full[1][:, 0]
    exact = (kernel.weights[:1499, 0].flip(0) * u[:1499]).sum()
    inside = operator.kernel(1500, v, True)
    lags = torch.arange(1, 1500, dtype=torch.float64)
    fitted = torch.exp(-operator._nodes.rates * (lags - EXACT - 1).unsqueeze(1)) @ inside.readout[0, :, 0]
    weights = torch.where(lags <= EXACT, kernel.weights[:1499, 0], fitted)
    assert ((weights.flip(0) * u[:1499]).sum() - exact).abs() <= bound * u.abs().max()
    assert (found[1] - full[1]).abs().max() < 0.1


def test_copies_and_pickles_of_a_folded_state_continue_it():
    operator, neuron = make_operator(learn=False), make_neuron()
    x, v = make_input()
    with torch.no_grad():
        *_, last, history = whole(operator, neuron, x[:90], v)
        expected = whole(operator, neuron, x[90:], last, history)[1]
        copied = whole(copy.deepcopy(operator), neuron, x[90:], last, copy.deepcopy(history))[1]
    assert torch.equal(copied, expected)


@pytest.mark.parametrize("memory", ["full", "soe"])
def test_single_steps_of_a_scan_copy_no_history(memory, monkeypatch):
    """The rows of all steps share few buffers, each twice the last: no O(T^2) copies, no O(T^2) memory."""
    operator, neuron = make_operator(memory=memory, learn=False), make_neuron()
    x, v = make_input(400, (5,))
    made = []
    plain = history_module.empty

    def count(shape, like):
        made.append(shape[0])
        return plain(shape, like)

    monkeypatch.setattr(history_module, "empty", count)
    scanned_by_steps(operator, neuron, x, v.detach())
    assert len(made) <= (8 if memory == "full" else 40)
    assert sum(made) <= (4 * 400 if memory == "full" else 8 * 400)


def test_steps_are_counted_with_their_state():
    """Copies know how long they ran; an older state taken up again is no longer than it is."""
    operator, neuron = make_operator(memory=SumOfExponentials(1e-6, 300), learn=False), make_neuron()
    x, v = make_input(400, (5,))
    log = HistoryLog()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        _, _, early, past = whole(operator, neuron, x[:200], v, FRESH, log)
        _, _, v_late, late = whole(operator, neuron, x[200:290], early, past, log)
        copies = [copy.deepcopy(log), pickle.loads(pickle.dumps(log))]
        assert [copied.advance(copy.deepcopy(late).rows, 5, True) for copied in copies] == [295, 295]
        for _ in range(3):  # not 290 + 3 * 90 steps
            whole(operator, neuron, x[200:290], early, past, log)
    with torch.no_grad(), pytest.warns(SpikedeWarning, match="horizon"):
        whole(operator, neuron, x[290:310], v_late, late, copy.deepcopy(copies[0]))


# -- less training memory -------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 16, 37, 149])
@pytest.mark.parametrize("case", ["gl", "l1, order a channel", "two terms"])
@pytest.mark.parametrize("memory", ["full", "soe", 9])
@pytest.mark.parametrize("reset", [None, 0.1])
def test_recomputing_changes_neither_values_nor_gradients(engine, every, case, memory, reset):
    plain, thrifty = make_operator(case, memory), make_operator(case, memory, checkpoint=every)
    neuron = make_neuron(reset)
    x, v = make_input()

    def run(operator):
        """Two calls, so that gradients pass through the state handed on."""
        log = HistoryLog()
        one = whole(operator, neuron, x[:100], v, FRESH, log)
        two = whole(operator, neuron, x[100:], one[2], one[3], log)
        return torch.cat([one[0], two[0]]), torch.cat([one[1], two[1]])

    expected, found = run(plain), run(thrifty)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-12, atol=1e-12)
    wanted = gradients(expected, [x, v, *plain.parameters()])
    for a, b in zip(gradients(found, [x, v, *thrifty.parameters()]), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * max(1.0, float(b.abs().max())))


def test_recomputing_keeps_few_states():
    """Beside input and output: T/k states of P traces and fewer than 32 rows."""
    operator, neuron = make_operator(memory="soe", learn=False, checkpoint=64), make_neuron()
    x, v = make_input(640, (50,))
    spikes, *_ = whole(operator, neuron, x, v.detach())
    node = spikes.grad_fn
    kept = [t.numel() for state in node.states[1:] for t in state]
    traces = len(operator.kernel(640, v).decay)
    assert sum(kept) <= 9 * (1 + 32 + traces) * 50
    assert all(t.untyped_storage().nbytes() <= 8 * t.numel() for state in node.states[1:] for t in state)


@pytest.mark.parametrize(
    ("value", "error"), [(0, OptionError), (2.5, OptionTypeError), (True, OptionTypeError)]
)
def test_bad_checkpoints(value, error):
    with pytest.raises(error, match="checkpoint"):
        make_operator(checkpoint=value)
