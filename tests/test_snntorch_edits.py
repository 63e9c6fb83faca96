"""A membrane handed back changed goes on with its history; the change is an impulse that is remembered."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

snn = pytest.importorskip("snntorch")

from snntorch import utils
from snntorch.functional import quant

from spikede_plugins import convert_to_fractional, get_state, reset_rows, select_rows, set_state
from spikede_plugins.errors import SpikedeWarning, StateError

BETA, ALPHA = 0.875, 0.5  # exact in float32


def drive(steps=20, batch=3, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, batch, width, generator=generator, dtype=torch.float64) + 0.2


def neuron(**options):
    options = {"alpha": ALPHA, **options}
    arguments = {"beta": BETA, **options.pop("arguments", {})}
    dtype = options.pop("dtype", torch.float64)
    return convert_to_fractional(snn.Leaky(**arguments), **options).to(dtype)


def by_hand(x, edit=lambda k, mem: mem, threshold=1.0, begin=None):
    """Grünwald-Letnikov sums written out; ``begin[k]`` are the rows that begin anew before step k."""
    weights = [1.0]
    for m in range(1, len(x) + 1):
        weights.append(weights[-1] * (1.0 - (1.0 + ALPHA) / m))
    mem, mems = torch.zeros_like(x[0]), []
    us = [torch.zeros_like(x[0])]  # deviations from zero, where every history begins
    for k, xk in enumerate(x):
        if begin is not None and k in begin:
            keep = torch.ones(x.shape[1], 1, dtype=x.dtype)
            keep[begin[k]] = 0.0
            us = [u * keep for u in us]
        fired = (mem > threshold).to(x.dtype)
        memory = sum(weights[m] * us[-m] for m in range(1, len(us) + 1))
        mem = BETA * mem + xk - mem - memory - fired * threshold
        mem = edit(k, mem)
        us.append(mem)
        mems.append(mem)
    return torch.stack(mems)


def play(lif, x, edit=lambda k, mem: mem, mem=None):
    mem, mems = (torch.zeros_like(x[0]) if mem is None else mem), []
    for k, xk in enumerate(x):
        _, mem = lif(xk, mem)
        mem = edit(k, mem)
        mems.append(mem)
    return torch.stack(mems)


NOISE = 0.05 * torch.randn(20, 3, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
MASK = (torch.rand(20, 3, 6, generator=torch.Generator().manual_seed(6)) > 0.3).double()
EDITS = {
    "clamp": lambda k, m: m.clamp(min=0.0),
    "clamp both": lambda k, m: m.clamp(-0.3, 0.4),
    "relu": lambda k, m: torch.relu(m),
    "noise": lambda k, m: m + NOISE[k].to(m),
    "mask": lambda k, m: m * MASK[k].to(m),
    "round": lambda k, m: torch.round(m * 4) / 4,
    "coarse": lambda k, m: torch.round(m),
    "leak": lambda k, m: 0.8 * m,
    "shift": lambda k, m: m - 0.1,
    "now and then": lambda k, m: m.clamp(min=0.0) if k % 4 == 1 else m,
}


# -- the value ------------------------------------------------------------------------------------


#: float32 steps of a Leaky neuron run in a fused kernel, float64 ones in the native code.
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fused", "native"])


def near(found, expected):
    tolerance = 1e-4 if found.dtype == torch.float32 else 1e-9
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


@DTYPES
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", EDITS)
def test_an_edited_membrane_goes_on(name, gradients, dtype):
    x = drive().to(dtype)
    with torch.set_grad_enabled(gradients):
        found = play(neuron(dtype=dtype), x.requires_grad_(gradients), EDITS[name])
    near(found.detach(), by_hand(x.detach().double(), EDITS[name]))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("copied", ["clone", "times one", "detached clone", "through complex", "pickle"])
def test_a_copy_goes_on_as_the_membrane_itself(copied, batch):
    ways = {
        "clone": lambda m: m.clone(),
        "times one": lambda m: m * 1.0,
        "detached clone": lambda m: m.detach().clone(),
        "through complex": lambda m: m.to(torch.complex128).real.clone(),
        "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    }
    x = drive(batch=batch)
    with torch.no_grad():
        assert torch.equal(play(neuron(), x, lambda k, m: ways[copied](m)), play(neuron(), x))


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.clamp_(min=0.0), lambda m: m.mul_(0.5), lambda m: m[1, :2].zero_(),
        lambda m: m[2].add_(0.3),
    ],
)  # fmt: skip
@DTYPES
@pytest.mark.parametrize("gradients", [True, False, None])
def test_a_membrane_edited_in_place_goes_on(edit, gradients, dtype):
    x = drive().to(dtype)

    def inside(k, m):
        if k % 3 == 1:
            edit(m)
        return m

    def outside(k, m):
        m = m.clone()
        return inside(k, m)

    with torch.inference_mode() if gradients is None else torch.set_grad_enabled(gradients):
        near(play(neuron(dtype=dtype), x, inside), by_hand(x.double(), outside))


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32"])
def test_a_membrane_kept_in_another_dtype_goes_on(kind):
    x = drive().float()
    lif = convert_to_fractional(snn.Leaky(beta=BETA, threshold=50.0), alpha=ALPHA)
    dtype = getattr(torch, kind)
    found = play(lif, x, lambda k, m: m.to(dtype))
    expected = by_hand(x.double(), lambda k, m: m.to(dtype).double(), threshold=50.0)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"method": "l1"}, {"method": "pred"}, {"method": "abm"}, {"method": "trap"}, {"memory": 5},
        {"memory": "soe"}, {"memory_reset": "spike"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("mechanism", ["subtract", "zero", "none"])
def test_every_solver_and_memory_takes_an_edit_from_a_copy_as_in_place(options, mechanism):
    """In place the membrane is known by its memory, so nothing has to be found."""
    x = drive(steps=40)
    arguments = {"reset_mechanism": mechanism}

    def inside(k, m):
        m.mul_(0.9).add_(NOISE[k % 20])
        return m

    with torch.no_grad():
        found = play(neuron(arguments=arguments, **options), x, lambda k, m: m * 0.9 + NOISE[k % 20])
        torch.testing.assert_close(found, play(neuron(arguments=arguments, **options), x, inside))
        unedited = play(neuron(arguments=arguments, **options), x)
    assert not torch.allclose(found, unedited)


NATIVE = {
    "Lapicque": lambda **o: snn.Lapicque(beta=0.6, threshold=0.5, **o),
    "Synaptic": lambda **o: snn.Synaptic(alpha=0.7, beta=0.8, **o),
    "Alpha": lambda **o: snn.Alpha(alpha=0.9, beta=0.8, **o),
    "RLeaky": lambda **o: snn.RLeaky(beta=0.9, all_to_all=False, V=0.4, **o),
    "RSynaptic": lambda **o: snn.RSynaptic(alpha=0.7, beta=0.8, all_to_all=False, V=0.4, **o),
    "no delay": lambda **o: snn.Leaky(beta=0.9, reset_delay=False, **o),
    "quantised": lambda **o: snn.Leaky(beta=0.9, state_quant=quant.state_quant(num_bits=4), **o),
}


def explicit(lif, x, edit, states=None):
    recurrent = isinstance(lif, (snn.RLeaky, snn.RSynaptic))
    if states is None:
        count = sum(hasattr(lif, name) for name in ("syn", "syn_exc", "syn_inh", "mem")) + recurrent
        states = tuple(torch.zeros_like(x[0]) for _ in range(count))
    mems = []
    for k, xk in enumerate(x):
        out = lif(xk, *states)
        states = tuple(out) if recurrent else tuple(out[1:])
        states = (*states[:-1], edit(k, states[-1]))
        mems.append(states[-1])
    return torch.stack(mems)


@pytest.mark.parametrize("name", NATIVE)
def test_neurons_with_more_variables_go_on(name):
    """The membrane edited as a copy, in place, and by hand in a neuron that holds its state."""
    x = drive()

    def inside(k, m):
        m.add_(NOISE[k].to(m.dtype))  # a quantised state is float32
        return m

    with torch.no_grad():
        make = lambda **o: convert_to_fractional(NATIVE[name](**o), alpha=ALPHA).double()  # noqa: E731
        found = explicit(make(), x, lambda k, m: m + NOISE[k].to(m.dtype))
        torch.testing.assert_close(found, explicit(make(), x, inside))
        hidden, mems = make(init_hidden=True), []
        for k, xk in enumerate(x):
            hidden(xk)
            hidden.mem = hidden.mem + NOISE[k].to(hidden.mem.dtype)
            mems.append(hidden.mem)
        torch.testing.assert_close(found, torch.stack(mems))


# -- the gradient ---------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ["clamp", "noise", "leak", "mask", "now and then"])
def test_gradients_flow_through_the_edit_and_the_history(name, inplace, dtype):
    x = drive(12).to(dtype).requires_grad_()
    lif = neuron(arguments={"threshold": 50.0}, dtype=dtype)

    def edit(k, m):
        if not inplace:
            return EDITS[name](k, m)
        m.mul_(0.7)
        return m

    by = edit if not inplace else (lambda k, m: m * 0.7)
    (found,) = torch.autograd.grad(play(lif, x, edit).pow(2).sum(), x)
    (expected,) = torch.autograd.grad(by_hand(x.double(), by, threshold=50.0).pow(2).sum(), x)
    near(found, expected)


def test_gradients_of_an_order_and_of_an_edit_are_finite_differences():
    x = drive(8)

    def loss(alpha, scale):
        lif = neuron(alpha=alpha, arguments={"threshold": 50.0}, learn_alpha=True)
        return play(lif, x, lambda k, m: (m * scale).clamp(min=-0.4)).pow(2).sum(), lif

    scale = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    value, lif = loss(0.5, scale)
    value.backward()
    eps = 1e-6
    with torch.no_grad():
        by_scale = (loss(0.5, scale + eps)[0] - loss(0.5, scale - eps)[0]) / (2 * eps)
    torch.testing.assert_close(scale.grad, by_scale, rtol=1e-5, atol=1e-7)
    (raw,) = [p for name, p in lif.named_parameters() if name.startswith("fractional.")]
    assert raw.grad.isfinite().all() and raw.grad.abs().sum() > 0


@pytest.mark.parametrize("learned", [False, True])
def test_a_detached_membrane_cuts_the_history_however_it_is_edited(learned):
    """Truncated backpropagation: an edit with a parameter of its own does not bring the old graph back."""
    x = drive(12).requires_grad_()
    lif = neuron(arguments={"threshold": 50.0})
    scale = torch.tensor(0.9, dtype=torch.float64, requires_grad=learned)
    mem = torch.zeros(3, 6, dtype=torch.float64)
    for chunk in x.split(4):
        mem = mem.detach() * scale
        mems = play(lif, chunk, lambda k, m: m.clamp(min=-0.2), mem)
        mem = mems[-1]
        (gradient,) = torch.autograd.grad(mems.sum(), x)  # a second pass through an old graph would raise
        inside = [k for k in range(12) if gradient[k].abs().sum() > 0]
        assert len(inside) <= 4


def test_edits_around_checkpointed_steps():
    x = drive(20).requires_grad_()
    found, lif = [], neuron(learn_alpha=True)
    for how in (None, False):
        mem, mems = torch.zeros(3, 6, dtype=torch.float64), []
        for xk in x:
            spike, mem = lif(xk, mem) if how is None else checkpoint(lif, xk, mem, use_reentrant=how)
            mem = mem * 0.9 + 0.01 * spike
            mems.append(mem)
        loss = torch.stack(mems).pow(2).sum()
        found.append(torch.autograd.grad(loss, [x, *(p for p in lif.parameters() if p.requires_grad)]))
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("edit", [lambda m: m, lambda m: m * 0.9])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_reentrant_checkpoint_is_refused(edit, steps):
    lif, x = neuron(), drive(8).requires_grad_()

    def block(chunk, mem):
        for xk in chunk:
            _, mem = lif(xk, mem)
        return mem

    mem = torch.zeros(3, 6, dtype=torch.float64)
    with pytest.raises(StateError, match="use_reentrant=False"):
        for chunk in x.split(steps):
            mem = edit(checkpoint(block, chunk, mem, use_reentrant=True))


# -- which history --------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("order", ["step by step", "chunks"])
@pytest.mark.parametrize("name", ["clamp", "noise", "mask", "round"])
def test_streams_with_edits_stay_apart(name, order, gradients):
    count = 2 if order == "chunks" and gradients else 3  # one sequence that has ended is kept with its graph
    streams = [drive(seed=seed) + 0.2 * seed for seed in range(count)]
    lif = neuron()
    mems = [torch.zeros(3, 6, dtype=torch.float64) for _ in streams]
    found = [[] for _ in streams]
    size = 1 if order == "step by step" else 5
    with torch.set_grad_enabled(gradients):
        for first in range(0, 20, size):
            for i, x in enumerate(streams):
                x = x.clone().requires_grad_(gradients)
                for k in range(first, first + size):
                    _, mem = lif(x[k], mems[i])
                    mems[i] = EDITS[name](k, mem)
                    found[i].append(mems[i])
    for x, mine in zip(streams, found, strict=True):
        torch.testing.assert_close(torch.stack(mine).detach(), by_hand(x, EDITS[name]))


def test_two_edits_of_one_membrane_are_two_branches():
    x = drive(12)
    for gradients in (True, False):
        lif = neuron()
        with torch.set_grad_enabled(gradients):
            saved = play(lif, x[:6].clone().requires_grad_(gradients))[-1]
            saved = lif.mem
            for low in (0.0, -0.5):
                edited = saved.clamp(min=low)
                found = play(lif, x[6:], mem=edited)
                edit = lambda k, m, low=low: m.clamp(min=low) if k == 5 else m  # noqa: E731
                torch.testing.assert_close(found, by_hand(x, edit)[6:])


def test_it_is_said_once_where_the_history_cannot_be_told():
    lif, x = neuron(), drive(6)
    with torch.no_grad():
        a = b = torch.zeros(3, 6, dtype=torch.float64)
        for xk in x:
            a, b = lif(xk, a)[1], lif(xk + 0.7, b)[1]
        unlike = 0.5 * (a + b) + 3.0
        with pytest.warns(SpikedeWarning, match="several of the sequences") as seen:
            play(lif, x[:1], mem=unlike)
            play(lif, x[:1], mem=unlike + 1.0)
    assert len(seen) == 1


@pytest.mark.parametrize(
    "start",
    [
        lambda lif: lif.init_leaky(), lambda lif: torch.zeros(3, 6), lambda lif: lif.reset_mem(),
        lambda lif: lif.reset_mem() + 0.3, lambda lif: torch.zeros(3, 6).requires_grad_(),
    ],
)  # fmt: skip
def test_a_start_of_the_framework_begins_anew(start):
    x = drive()
    lif = neuron()
    with torch.no_grad():
        play(lif, x, EDITS["clamp"])
        first = start(lif).double()
        assert torch.equal(play(lif, x, mem=first), play(neuron(), x, mem=first.clone()))


def test_a_membrane_set_by_hand_after_a_reset_begins_anew():
    x = drive()
    start = torch.full((3, 6), 0.3, dtype=torch.float64)
    lif = neuron(arguments={"init_hidden": True})
    [lif(xk) for xk in x]
    lif.reset_mem()
    lif.mem = start.clone()
    found = torch.stack([(lif(xk), lif.mem)[1] for xk in x])
    assert torch.equal(found, play(neuron(), x, mem=start))
    for reset in (lambda n: n.reset_mem(), lambda n: utils.reset(nn.Sequential(n))):
        lif = neuron()
        play(lif, x)
        reset(lif)
        assert torch.equal(play(lif, x, mem=start), found)


def test_batches_one_after_the_other_do_not_mix():
    """Recorded membranes of the last batch are alive while the next one runs."""
    lif = neuron()
    with torch.no_grad():
        for seed in range(3):
            x = drive(seed=seed)
            mem, record = lif.init_leaky(), []
            for k, xk in enumerate(x):
                _, mem = lif(xk, mem)
                mem = EDITS["leak"](k, mem)
                record.append(mem)
            torch.testing.assert_close(torch.stack(record), by_hand(x, EDITS["leak"]))


def test_sequences_that_nobody_holds_are_let_go_of():
    lif = neuron()
    held = []
    for _ in range(12):
        x = drive(20).requires_grad_()
        play(lif, x, EDITS["clamp"])
        held.append(weakref.ref(lif._pasts._newest_first()[0].past.history.rows))
    gc.collect()
    assert sum(row() is not None for row in held) <= 6  # four that have ended, the last, and the one before
    assert len(lif._pasts._entries) < 60


def test_rows_picked_by_hand_are_said_and_a_smaller_batch_is_not():
    x = drive()
    lif = neuron()
    with torch.no_grad():
        mem = play(lif, x)[-1].clone()
        for first in (lif.init_leaky()[:2], torch.zeros(2, 6, dtype=torch.float64)):
            play(lif, x[:, :2], mem=first)
        mem = play(lif, x)[-1].clone()
        for pick in (mem[[0, 2]], mem[:2], mem[[2]].clamp(min=0)):
            with pytest.warns(SpikedeWarning, match=r"select_rows\(model, index\)"):
                lif(x[0, : len(pick)], pick)
            mem = play(lif, x)[-1].clone()


def test_copies_go_on_from_an_edited_membrane():
    x = drive()
    with torch.no_grad():
        lif = neuron()
        mem = play(lif, x[:10])[-1]
        expected = by_hand(x, lambda k, m: m.clamp(min=0) if k == 9 else m)[10:]
        for other in (copy.deepcopy(lif), pickle.loads(pickle.dumps(lif))):
            torch.testing.assert_close(play(other, x[10:], mem=mem.clamp(min=0)), expected)


# -- samples that restart -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"method": "l1"}, {"method": "abm"}, {"method": "trap"}, {"memory": 5}, {"memory": "soe"},
     {"memory_reset": "spike"}, {"learn_alpha": True}],
    ids=str,
)  # fmt: skip
@DTYPES
@pytest.mark.parametrize("way", ["mask", "in place", "index", "mask and clamp"])
def test_a_sample_put_back_to_zero_restarts_alone(options, way, dtype):
    x = drive(40).to(dtype)
    options = {**options, "dtype": dtype}

    def put_back(k, m):
        if way == "mask and clamp":
            m = m.clamp(min=0.0)
        if k != 16:
            return m
        if way.startswith("mask"):
            return m * torch.tensor([[1.0], [0.0], [1.0]])
        if way == "in place":
            m[1] = 0.0
            return m
        m = m.clone()
        m[1] = 0.0
        return m

    always = (lambda k, m: m.clamp(min=0.0)) if way == "mask and clamp" else (lambda k, m: m)
    with torch.no_grad():
        found, on = play(neuron(**options), x, put_back), play(neuron(**options), x, always)
        fresh = play(neuron(**options), x[17:], always)
    tolerance = 1e-5 if options.get("memory") == "soe" or dtype == torch.float32 else 1e-9
    torch.testing.assert_close(found[:, [0, 2]], on[:, [0, 2]], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found[17:, 1], fresh[:, 1], rtol=tolerance, atol=tolerance)


def test_a_sample_restarts_by_hand():
    x = drive()
    put = lambda k, m: m * torch.tensor([[0.0], [1.0], [1.0]]) if k == 7 else m  # noqa: E731
    torch.testing.assert_close(play(neuron(), x, put), by_hand(x, put, begin={8: [0]}))


def test_a_restart_cuts_the_gradient_of_its_sample_only():
    x = drive(12).requires_grad_()
    put = lambda k, m: m * torch.tensor([[0.0], [1.0], [1.0]]) if k == 5 else m  # noqa: E731
    lif = neuron(arguments={"threshold": 50.0})
    (found,) = torch.autograd.grad(play(lif, x, put)[6:].pow(2).sum(), x)
    (expected,) = torch.autograd.grad(by_hand(x, put, 50.0, begin={6: [0]})[6:].pow(2).sum(), x)
    assert found[:6, 0].abs().sum() == 0
    torch.testing.assert_close(found, expected)


def test_a_synaptic_sample_restarts_only_with_its_current():
    x = drive()
    mask = torch.tensor([[0.0], [1.0], [1.0]])

    def run(whole):
        lif = convert_to_fractional(snn.Synaptic(alpha=0.7, beta=0.8), alpha=ALPHA).double()
        syn = mem = torch.zeros(3, 6, dtype=torch.float64)
        mems = []
        for k, xk in enumerate(x):
            if k == 8:
                mem, syn = mem * mask, syn * mask if whole else syn
            _, syn, mem = lif(xk, syn, mem)
            mems.append(mem)
        return torch.stack(mems), lif

    with torch.no_grad():
        both, lif = run(True)
        syn = mem = torch.zeros(3, 6, dtype=torch.float64)
        fresh = []
        for xk in x[8:]:
            _, syn, mem = lif(xk, syn, mem)
            fresh.append(mem)
        torch.testing.assert_close(both[8:, 0], torch.stack(fresh)[:, 0])
        assert not torch.allclose(run(False)[0][8:, 0], both[8:, 0])


# -- the state by name ----------------------------------------------------------------------------


def test_selected_rows_go_on_with_their_histories():
    x = drive()
    for gradients in (True, False):
        lif = neuron()
        with torch.set_grad_enabled(gradients):
            first = x[:10].clone().requires_grad_(gradients)
            mem = play(lif, first)[-1]
            select_rows(lif, [2, 0, 0])
            found = play(lif, x[10:, [2, 0, 0]], mem=mem[[2, 0, 0]])
        whole = x[:, [2, 0, 0]].clone().requires_grad_(gradients)
        expected = by_hand(whole)
        torch.testing.assert_close(found, expected[10:])
        if gradients:
            (mine,) = torch.autograd.grad(found.pow(2).sum(), first)
            (picked,) = torch.autograd.grad(expected[10:].pow(2).sum(), whole)
            theirs = torch.zeros_like(first).index_add_(1, torch.tensor([2, 0, 0]), picked[:10])
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("hidden", [True, False])
def test_rows_reset_by_name(hidden):
    x = drive()
    lif = neuron(arguments={"init_hidden": hidden})
    with torch.no_grad():
        if hidden:
            mems = []
            for k, xk in enumerate(x):
                if k == 8:
                    reset_rows(lif, [1])
                lif(xk)
                mems.append(lif.mem)
            found = torch.stack(mems)
        else:
            mem = play(lif, x[:8])[-1]
            reset_rows(lif, [1])
            mem[1] = 0.0
            found = torch.cat([torch.zeros_like(x[:8]), play(lif, x[8:], mem=mem)])
    mask = torch.tensor([[1.0], [0.0], [1.0]])
    expected = by_hand(x, lambda k, m: m * mask if k == 7 else m, begin={8: [1]})
    torch.testing.assert_close(found[8:], expected[8:])


@pytest.mark.parametrize("hidden", [True, False])
def test_a_state_is_saved_and_set_again(hidden, tmp_path):
    x = drive()
    net = nn.Sequential(nn.Linear(6, 6), snn.Leaky(beta=BETA, init_hidden=hidden, output=not hidden)).double()
    lif = convert_to_fractional(net, alpha=ALPHA)[1]

    def go_on(lif, part, mem):
        mems = []
        for xk in part:
            out = lif(xk) if hidden else lif(xk, mem)
            mem = lif.mem if hidden else out[1]
            mems.append(mem)
        return mems

    with torch.no_grad():
        mem = go_on(lif, x[:10], torch.zeros_like(x[0]))[-1].clone()
        torch.save(get_state(lif), tmp_path / "state.pt")
        expected = go_on(lif, x[10:], mem)
        go_on(lif, -x, torch.zeros_like(mem))
        for other in (lif, convert_to_fractional(net, alpha=ALPHA)[1]):
            set_state(other, torch.load(tmp_path / "state.pt", weights_only=True))
            for a, b in zip(go_on(other, x[10:], mem.clone()), expected, strict=True):
                torch.testing.assert_close(a, b)


def test_nothing_is_said_about_ordinary_use():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lif = neuron()
        for seed in range(3):
            for edit in EDITS.values():
                play(lif, drive(seed=seed), edit, lif.init_leaky())
                with torch.no_grad():
                    play(lif, drive(seed=seed, batch=3), edit)
                    play(lif, drive(seed=seed, batch=2), lambda k, m: m.clamp(min=0))
