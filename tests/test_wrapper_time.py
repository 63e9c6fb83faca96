"""Models that mix the samples of a batch, or keep something of their own, against a loop over time.

The loop runs the model's own pieces at each time, and the neurons on what they get, which SNNWrapper around a
neuron alone does right whatever the model is.
"""

from __future__ import annotations

import logging
import math
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spikede_plugins import ClassificationHead, IFNeuron, LIFNeuron, SNNWrapper
from spikede_plugins.errors import OptionError
from spikede_plugins.time_check import find_out

T, NODES, WIDTH = 8, 5, 4
TIMES = torch.arange(float(T))
SOURCE = torch.arange(NODES)
TARGET = (SOURCE + 1) % NODES


def samples(scale=3.0, shape=(T, NODES, WIDTH)):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Between(nn.Module):
    """``mix`` before each of two neurons; a subclass says what it mixes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.first, self.second = nn.Linear(WIDTH, WIDTH), LIFNeuron(2.0, 0.5), IFNeuron(2.0, 0.5)

    def mix(self, x):
        raise NotImplementedError

    def forward(self, x):
        return self.second(2 * self.mix(self.first(2 * self.mix(self.fc(x)))))


class Messages(Between):
    """A graph layer: nodes are the batch."""

    def mix(self, x):
        return x + torch.zeros_like(x).index_add(0, TARGET, x[SOURCE])


class Dense(Between):
    def __init__(self):
        super().__init__()
        self.adjacency = torch.rand(NODES, NODES)

    def mix(self, x):
        return self.adjacency @ x


class Centred(Between):
    def mix(self, x):
        return x - x.mean(0, keepdim=True)


class Attending(Between):
    """Every sample of a batch looks at all others."""

    def mix(self, x):
        return torch.softmax(x @ x.T, -1) @ x


class Gated(Between):
    """A gate that starts at 0, behind which samples are mixed: not seen in the first values."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))

    def mix(self, x):
        return x + self.gate * x.mean(0)


class Quiet(Between):
    """Mixes only where something fires."""

    def mix(self, x):
        return x * (1 + (x > 0.5).float().mean(0))


class Placed(Between):
    """Something for each place in the batch, as many as a larger batch might have."""

    def __init__(self):
        super().__init__()
        self.places = nn.Parameter(torch.randn(64, WIDTH))

    def mix(self, x):
        return x + self.places[: len(x)]


class Looking(Between):
    """A branch for the whole batch."""

    def mix(self, x):
        return -x if x[0].sum() > x[1].sum() else x


class Recurrent(Between):
    """Cells with hidden states of their own."""

    def __init__(self):
        super().__init__()
        self.cell, self.h = nn.GRUCell(WIDTH, WIDTH), None

    def mix(self, x):
        self.h = self.cell(x, self.h)
        return 5 * self.h


class LongShort(Between):
    def __init__(self):
        super().__init__()
        self.cell, self.state = nn.LSTMCell(WIDTH, WIDTH), {"hc": None}

    def mix(self, x):
        self.state["hc"] = self.cell(x, self.state["hc"])
        return 5 * self.state["hc"][0]


class Running(Between):
    """A running average in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(WIDTH))

    def mix(self, x):
        self.average = 0.5 * self.average + 0.5 * x.detach()[0]
        return x - self.average


class Counting(Between):
    """Does something else from its tenth call on."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def mix(self, x):
        self.calls += 1
        return x if self.calls < 10 else -x


UNSAFE = [
    Messages, Dense, Centred, Attending, Gated, Quiet, Placed, Looking, Recurrent, LongShort, Running,
    Counting,
]  # fmt: skip
STATEFUL = (Recurrent, LongShort, Running, Counting)
#: Every way to integrate on a grid: a model, the integrator, and its method.
WAYS = [
    *((kind, "fdeint", "gl") for kind in UNSAFE),
    *((kind, "fdeint_adjoint", "l1") for kind in UNSAFE),
    *((kind, "odeint", "euler") for kind in (Messages, Recurrent)),
    *((kind, "odeint_adjoint", "euler") for kind in (Attending, LongShort)),
    *((kind, "fdeint", "abm") for kind in (Messages, Gated)),  # which the loop of stateful models has not
]


def loop(model, x, integrator, method):
    """What the neurons get at each time, layer by layer, and what they make of it."""
    def run(neuron, current):
        exact = integrator.removesuffix("_adjoint")  # torchdiffeq's adjoint is that of another equation
        return SNNWrapper(neuron, exact, alpha=0.7, method=method)(current, TIMES)

    if isinstance(model, STATEFUL):
        return whole_loop(model, x, method)
    spikes = run(model.first, torch.stack([2 * model.mix(model.fc(step)) for step in x]))
    return run(model.second, torch.stack([2 * model.mix(step) for step in spikes]))


def whole_loop(model, x, method):
    """All of a model, time after time, its neurons in plain numbers: gl, l1, and Euler's steps."""
    out, past, v = [], [[], []], [torch.zeros(x.shape[1:]), torch.zeros(x.shape[1:])]
    weights, gain = scheme(method, len(x))
    for step in x:
        current, rates = 2 * model.mix(model.fc(step)), []
        for n, neuron in enumerate((model.first, model.second)):
            rate, spike = neuron(v[n], current)
            rates.append(rate)
            current = 2 * model.mix(spike) if n == 0 else spike
        out.append(current)
        for n, rate in enumerate(rates):
            memory = sum((weights[m] * u for m, u in enumerate(reversed(past[n]), 1)), torch.zeros(()))
            v[n] = gain * rate - memory
            past[n].append(v[n])
    return torch.stack(out)


def scheme(method, n, alpha=0.7):
    if method == "euler":
        return [1.0, -1.0] + [0.0] * n, 1.0
    if method == "gl":
        w = [1.0]
        for m in range(1, n + 1):
            w.append((1 - (1 + alpha) / m) * w[-1])
        return w, 1.0
    b = [(m + 1) ** (1 - alpha) - m ** (1 - alpha) for m in range(n + 1)]
    return [1.0, *(b[m] - b[m - 1] for m in range(1, n + 1))], math.gamma(2 - alpha)


@pytest.mark.parametrize(("kind", "integrator", "method"), WAYS)
def test_every_way_to_integrate_is_the_loop_over_time(kind, integrator, method):
    x = samples().requires_grad_()
    model = kind()
    found = SNNWrapper(model, integrator, alpha=0.7, method=method)(x, TIMES)
    again = kind()
    known = loop(again, x, integrator, method)
    assert torch.equal(found, known)
    assert 0.02 < found.mean() < 0.98
    scale = torch.linspace(-1, 1, found.numel()).reshape(found.shape)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    a = torch.autograd.grad((found * scale).sum(), [x, *model.parameters()], allow_unused=True)
    b = torch.autograd.grad((known * scale).sum(), [x, *again.parameters()], allow_unused=True)
    largest = max(other.abs().max().item() for other in b)
    for name, one, other in zip(["x", *names], a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * largest, msg=name)


@pytest.mark.parametrize("kind", UNSAFE)
def test_a_check_leaves_no_trace_and_names_the_layer(kind, caplog):
    model, x, heard = kind(), samples(), []
    model.fc.register_forward_hook(lambda *_: heard.append(1))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    parameters = [p.clone() for p in model.parameters()]
    finding = find_out(model, x)
    assert not finding.folds and finding.settled
    name = {Recurrent: "keeps 'h'", LongShort: "keeps 'state'", Running: "'average'", Counting: "'calls'"}
    assert name.get(kind, kind.__name__) in finding.reason
    assert torch.equal(before, torch.get_rng_state()) and not heard
    assert all(torch.equal(p, q) for p, q in zip(parameters, model.parameters(), strict=True))
    assert getattr(model, "h", None) is None and getattr(model, "calls", 0) == 0
    if kind is Running:
        assert not model.average.any()
    net = SNNWrapper(model, "fdeint")
    with caplog.at_level(logging.WARNING, "spikede_plugins"):
        net(x, TIMES)
        net(x, TIMES)
    assert len(caplog.records) == 1 and kind.__name__ in caplog.text


class Safe(nn.Module):
    """A skip connection, batch normalisation, functional dropout, paths dropped by sample, notes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.lif = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), LIFNeuron(2.0, 0.3)
        self.seen, self.notes, self.log = None, [], logging.getLogger("a model's own")

    def forward(self, x):
        assert not torch.isnan(x).any()
        y = F.dropout(self.norm(self.conv(x)), 0.5, self.training)
        kept = torch.rand(len(x), 1, 1, 1) if self.training else torch.ones(len(x), 1, 1, 1)
        y = y + self.lif(y) * (kept > 0.1)
        self.seen = y.detach()
        self.notes.append(y.detach())
        return y.flatten(1).sum(1, keepdim=True), y.mean()


@pytest.mark.parametrize("training", [True, False])
def test_models_that_treat_samples_alone_are_folded(training, caplog):
    model = Safe().train(training)
    x = samples(shape=(6, 2, 1, 5, 5))
    assert find_out(model, x).folds
    assert int(model.norm.num_batches_tracked) == 0 and model.seen is None and model.notes == []
    with caplog.at_level(logging.WARNING, "spikede_plugins"):
        SNNWrapper(model, "fdeint")(x, range(6))
    assert not caplog.records
    assert model.seen.shape[0] == 12 and len(model.notes) == 1  # called once, with all times


@pytest.mark.parametrize("x", [torch.zeros(6, 5, 4), torch.ones(6, 5, 4), torch.full((6, 5, 4), -0.3)])
def test_input_that_is_all_the_same_hides_nothing(x):
    assert not find_out(Centred(), x).folds
    assert not find_out(Messages(), x).folds


def test_what_never_changes_with_time_is_stepped_and_looked_at_again():
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.lif, self.low = LIFNeuron(), -100.0

        def forward(self, x):
            return self.lif(torch.relu(x + self.low).cumsum(0))

    model, x = Dead(), samples()
    finding = find_out(model, x)
    assert not finding.folds and not finding.settled
    net = SNNWrapper(model, "fdeint")
    assert net(x, TIMES).sum() == 0
    model.low = 0.0  # now it is alive
    step = SNNWrapper(model, "fdeint", time="step")
    assert torch.equal(net(x, TIMES), step(x, TIMES)) and step(x, TIMES).sum() > 0


def test_a_mode_in_which_samples_are_mixed_is_looked_at_by_itself():
    class InTraining(Centred):
        def mix(self, x):
            return super().mix(x) if self.training else x

    net, x = SNNWrapper(InTraining(), "fdeint").eval(), samples()
    assert torch.equal(net(x, TIMES), SNNWrapper(net.base, "fdeint", time="fold")(x, TIMES))
    net.train()
    assert torch.equal(net(x, TIMES), SNNWrapper(net.base, "fdeint", time="step")(x, TIMES))
    assert not torch.equal(net(x, TIMES), SNNWrapper(net.base, "fdeint", time="fold")(x, TIMES))


@pytest.mark.parametrize(("integrator", "method"), [("odeint", "rk4"), ("odeint_adjoint", "midpoint")])
def test_solvers_with_times_of_their_own(integrator, method):
    pytest.importorskip("torchdiffeq")
    x = samples()
    mixed = SNNWrapper(Centred(), integrator, method=method)
    ahead = SNNWrapper(nn.Sequential(nn.Linear(WIDTH, WIDTH), LIFNeuron(2.0, 0.5)), integrator, method=method)
    base = mixed.base

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.lif = base.fc, base.first

        def forward(self, x):
            y = self.fc(x)
            return self.lif(2 * (y - y.mean(0, keepdim=True)))

    centred = x - x.mean(1, keepdim=True)
    weight = torch.nn.Parameter(2 * base.fc.weight.detach())
    ahead.base[0].weight, ahead.base[0].bias = weight, nn.Parameter(torch.zeros(WIDTH))
    found = SNNWrapper(First(), integrator, method=method)(x, TIMES)
    torch.testing.assert_close(found, ahead(centred, TIMES))
    with pytest.raises(OptionError, match="keeps 'h' from one call to the next"):
        SNNWrapper(Recurrent(), integrator, method=method)(x, TIMES)


def test_nodes_that_are_pooled_before_a_neuron():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.lif, self.top = LIFNeuron(2.0, 0.3), LIFNeuron(2.0, 0.3)

        def forward(self, x):
            return self.top(3 * self.lif(x).mean(0, keepdim=True))

    x = samples()
    net = SNNWrapper(Pooled(), "fdeint", alpha=0.7)
    spikes = SNNWrapper(LIFNeuron(2.0, 0.3), "fdeint", alpha=0.7)(x, TIMES)
    pooled = 3 * spikes.mean(1, keepdim=True)
    assert torch.equal(net(x, TIMES), SNNWrapper(LIFNeuron(2.0, 0.3), "fdeint", alpha=0.7)(pooled, TIMES))
    assert net(x, TIMES, output_time=TIMES[[1, 4]]).shape == (2, 1, WIDTH)


@pytest.mark.parametrize("integrator", ["fdeint", "fdeint_adjoint"])
def test_a_head_behind_a_model_that_is_stepped(integrator):
    class Headed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = Centred(), ClassificationHead(2, 3)

        def forward(self, x):
            return torch.log_softmax(self.head(self.body(x).unflatten(-1, (2, 2))), -1)

    model, x = Headed(), samples()
    found = SNNWrapper(model, integrator, alpha=0.7)(x, TIMES)
    spikes = SNNWrapper(model.body, integrator, alpha=0.7)(x, TIMES)
    torch.testing.assert_close(found, torch.log_softmax(model.head(spikes.unflatten(-1, (2, 2))), -1))


@pytest.mark.parametrize("integrator", ["fdeint", "fdeint_adjoint"])
def test_a_head_behind_batch_statistics_is_the_head_applied_outside(integrator):
    torch.manual_seed(0)
    body, head = nn.Sequential(nn.BatchNorm1d(WIDTH), LIFNeuron(2.0, 0.3)), ClassificationHead(2, 3)
    x = samples() + TIMES[:, None, None] / 2
    whole = nn.Sequential(body, nn.Unflatten(-1, (2, 2)), head)
    found = SNNWrapper(whole, integrator, alpha=0.7)(x, TIMES)
    spikes = SNNWrapper(body, integrator, alpha=0.7)(x, TIMES)
    torch.testing.assert_close(found, head(spikes.unflatten(-1, (2, 2))))


@pytest.mark.parametrize("dropout", ["step", "sequence"])
def test_dropout_masks_of_a_model_that_is_stepped(dropout):
    class Dropping(Centred):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            dropped = self.drop(torch.ones_like(x))
            super().forward(x)
            return dropped

    out = SNNWrapper(Dropping(), "fdeint", dropout=dropout)(samples(), TIMES)
    assert set(out.unique().tolist()) == {0.0, 2.0}
    assert bool((out == out[0]).all()) == (dropout == "sequence")


def test_a_stepped_model_learns_its_orders_and_compiles():
    x = samples()
    net = SNNWrapper(Messages(), "fdeint", alpha=[0.4, 0.8], alpha_mode="per_layer", learn_alpha=True)
    out = net(x, TIMES)
    compiled = torch.compile(net, backend="eager")
    assert torch.equal(compiled(x, TIMES), out)
    adjoint = SNNWrapper(
        net.base, "fdeint_adjoint", alpha=[0.4, 0.8], alpha_mode="per_layer", learn_alpha=True
    )
    scale = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    a = torch.autograd.grad((out * scale).sum(), list(net.orders.parameters()))
    b = torch.autograd.grad((adjoint(x, TIMES) * scale).sum(), list(adjoint.orders.parameters()))
    for one, other in zip(a, b, strict=True):
        assert one.abs() > 0
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_numbers_of_each_step():
    class Rated(Centred):
        def forward(self, x):
            spikes = super().forward(x)
            return spikes, spikes.mean()

    spikes, rates = SNNWrapper(Rated(), "fdeint")(samples(), TIMES)
    torch.testing.assert_close(rates, spikes.mean((1, 2)))


def test_a_state_in_an_object_of_the_models_own():
    class Memory:
        def __init__(self):
            self.h = torch.zeros(NODES, WIDTH)

    class Keeping(Between):
        def __init__(self):
            super().__init__()
            self.memory, self.table = Memory(), [0.0] * 20_000

        def mix(self, x):
            self.memory.h = 0.5 * self.memory.h + x
            return self.memory.h

    x = samples()
    assert "keeps 'memory'" in find_out(Keeping(), x).reason
    found, exact = (SNNWrapper(Keeping(), i, alpha=0.7)(x, TIMES) for i in ("fdeint_adjoint", "fdeint"))
    assert torch.equal(found, exact) and 0.05 < found.mean() < 0.95


def test_what_cannot_be_copied_is_stepped():
    class Locked(Between):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()

        def mix(self, x):
            with self.lock:
                return x

    finding = find_out(Locked(), samples())
    assert not finding.folds and "it cannot be copied" in finding.reason
    model, x = Locked(), samples()
    stepped, folded = (SNNWrapper(model, "fdeint", time=time)(x, TIMES) for time in ("auto", "fold"))
    assert torch.equal(stepped, folded)


class Weakly(Between):
    """A little of the mean of the batch."""

    def __init__(self, share=0.1):
        super().__init__()
        self.share = torch.tensor(share)  # no parameter, no buffer

    def mix(self, x):
        return x - self.share.to(x) * x.mean(0)


class Casting(Weakly):
    """Its own type within."""

    def mix(self, x):
        return super().mix(x.to(torch.bfloat16)).to(x)


@pytest.mark.parametrize("kind", [Messages, Weakly, Casting, Recurrent])
@pytest.mark.parametrize("how", [torch.bfloat16, torch.float16, "autocast"])
def test_the_rounding_of_half_precision_hides_no_mixing(kind, how):
    cast = how == "autocast"
    x = samples() if cast else samples().to(how)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
        model = kind() if cast else kind().to(how)
        expected = SNNWrapper(kind().to(model.fc.weight.dtype), "fdeint", time="step")(x, TIMES)
        net = SNNWrapper(model, "fdeint")
        assert torch.equal(net(x, TIMES), expected)
    assert all(not finding.folds for finding in net._findings.values())
    assert model.fc.weight.dtype is (torch.float32 if cast else how)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_models_of_half_precision_that_treat_samples_alone_are_folded(half):
    net = SNNWrapper(Safe().to(half).eval(), "fdeint")
    net(samples(shape=(T, NODES, 1, 5, 5)).to(half), TIMES)
    assert all(finding.folds for finding in net._findings.values())


class Switched(Between):
    def __init__(self):
        super().__init__()
        self.on, self.kind = False, "alone"

    def mix(self, x):
        return x - x.mean(0) if self.on or self.kind == "together" else x


@pytest.mark.parametrize(
    ("name", "value"), [("on", True), ("kind", "together"), ("mix", lambda x: x - x.mean(0))]
)
def test_a_switch_that_is_turned_after_the_first_call_is_a_new_check(name, value):
    x, model = samples(), Switched()
    net = SNNWrapper(model, "fdeint")
    net(x, TIMES)
    assert [finding.folds for finding in net._findings.values()] == [True]
    setattr(model, name, value)
    expected = SNNWrapper(model, "fdeint", time="step")(x, TIMES)
    assert torch.equal(net(x, TIMES), expected)
    net(x, TIMES)
    assert len(net._findings) == 2  # one check for each


def test_an_input_of_other_dimensions_is_a_new_check():
    """Attention takes [B, L, E], and [L, E] as one sequence: there the batch is the sequence."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True, dropout=0.0)
    net = SNNWrapper(nn.Sequential(layer, LIFNeuron(0.3)), "fdeint")
    net(samples(shape=(T, NODES, 3, WIDTH)), TIMES)
    x = samples()
    expected = SNNWrapper(net.base, "fdeint", time="step")(x, TIMES)
    assert torch.equal(net(x, TIMES), expected)
    assert 0.02 < expected.mean() < 0.98
