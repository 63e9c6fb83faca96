"""The fractional neurons against the definition: a plain loop over a list of states, through autograd."""

from __future__ import annotations

import copy
import warnings

import pytest

pytest.importorskip("spikingjelly.activation_based")

import torch
from sj_cases import ADAPTER, AVAILABLE, build, drive, fractional, operator
from spikede_spikingjelly.dynamics import DYNAMICS
from spikede_spikingjelly.release import EXPLICIT_STATES
from spikingjelly.activation_based import neuron, surrogate
from torch import nn

from spikede_plugins.errors import SpikedeWarning

SOLVERS = ["gl", "l1", "pred", "abm", "trap"]
EXPLICIT = ["gl", "l1", "pred"]


def reference(node, x_seq, v, alpha, charge, fire):
    """``u_k = gain rate - sum w_m u_{k-m}`` as it is written, explicit solvers only."""
    solver = node.fractional.solver
    a = alpha.double()
    gain, weights = solver.gain(a, 1.0).to(v.dtype), solver.weights(a, len(x_seq)).to(v.dtype)
    start, past, outputs = v, [], []
    for x in x_seq:
        h = start + gain * (charge(v, x) - v)
        for m, u in enumerate(reversed(past), start=1):
            h = h - weights[m - 1] * u
        s, v = fire(h)
        past.append(v - start)
        outputs.append(s)
    return torch.stack(outputs), v


@pytest.mark.parametrize("method", EXPLICIT)
@pytest.mark.parametrize("v_reset", [0.0, -0.3, None])
@pytest.mark.parametrize("decay_input", [True, False])
@pytest.mark.parametrize("detach_reset", [True, False])
def test_parametric_lif_against_the_definition(method, v_reset, decay_input, detach_reset):
    """Values, and gradients to the input, alpha, the leak and the initial potential."""
    native = neuron.ParametricLIFNode(
        1.6, decay_input, 0.7, v_reset, surrogate.Sigmoid(2.0), detach_reset, step_mode="m"
    ).double()
    nodes = {
        "scan": fractional(native, alpha=0.6, learn_alpha=True, method=method),
        "steps": fractional(copy.deepcopy(native), alpha=0.6, learn_alpha=True, method=method).double(),
    }
    x0, v0 = drive(7, 2, 3, dtype=torch.float64), drive(2, 3, seed=5, dtype=torch.float64) * 0.2
    rest = 0.0 if v_reset is None else v_reset
    found = {}
    for name, node in nodes.items():
        node.double()
        x, v = x0.clone().requires_grad_(), v0.clone().requires_grad_()
        node.v = v
        if name == "steps":
            node.step_mode = "s"
            y = torch.stack([node(one) for one in x])
        else:
            y = node(x)
        alpha, w = node.fractional.order.alpha, node.w
        found[name] = (y, node.v, torch.autograd.grad(y.sum() + node.v.square().sum(), [x, alpha, w, v]))

    x, v = x0.clone().requires_grad_(), v0.clone().requires_grad_()
    # The learnable order was made in float32 and then widened.
    alpha, w = nodes["scan"].fractional.order.alpha.detach().clone().requires_grad_(), native.w

    def charge(v, x):
        q = w.sigmoid()
        return v + (x - (v - rest)) * q if decay_input else v - (v - rest) * q + x

    def fire(h):
        s = native.surrogate_function(h - 0.7)
        held = s.detach() if detach_reset else s
        return s, h - held * 0.7 if v_reset is None else (1.0 - held) * h + held * v_reset

    y, end = reference(nodes["scan"], x, v, alpha, charge, fire)
    grads = torch.autograd.grad(y.sum() + end.square().sum(), [x, alpha, w, v])
    assert y.sum() > 0
    for got_y, got_v, got_grads in found.values():
        torch.testing.assert_close(got_y, y, rtol=0, atol=0)
        torch.testing.assert_close(got_v, end, rtol=1e-12, atol=1e-12)
        for got, expected in zip(got_grads, grads, strict=True):
            torch.testing.assert_close(got.to(expected.dtype), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", AVAILABLE)
def test_every_neuron_against_the_definition(name):
    """The neuron's own charge and firing, one state variable at a time."""
    dynamics = DYNAMICS[getattr(neuron, name)]
    native = build(name).double()
    node = fractional(native, alpha=0.55)
    dynamics = dynamics.in_sequence(node, False)
    x_seq = drive(6, 2, 3, dtype=torch.float64)
    others = {n: torch.zeros(2, 3, dtype=torch.float64) + float(node._memories_rv[n]) for n in ("w", "c", "m")
              if n in node._memories}  # fmt: skip
    cells = {}

    def charge(v, x):
        cells["now"] = dynamics.cell(node, x, cells.get("others", others))
        return cells["now"].charge(v)

    def fire(h):
        s, v, cells["others"] = cells["now"].fire(h)
        return s, v

    start = torch.full((2, 3), float(native._memories_rv["v"]), dtype=torch.float64)
    expected, end = reference(node, x_seq, start, torch.tensor(0.55), charge, fire)
    y = node(x_seq)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(node.v, end)
    assert not torch.equal(y, native(x_seq)) or not torch.equal(node.v, native.v)


@pytest.mark.filterwarnings("ignore:an implicit step has no solution")  # QIF and Izhikevich, by this input
@pytest.mark.parametrize("name", AVAILABLE)
@pytest.mark.parametrize("method", SOLVERS)
def test_steps_equal_sequence_and_chunks(name, method):
    native = build(name)
    node = fractional(native, method=method)
    x = drive(9, 2, 3)
    whole, v = node(x), node.v
    node.reset()
    chunks = torch.cat([node(part) for part in (x[:1], x[1:4], x[4:])])
    assert torch.equal(chunks, whole)
    assert torch.equal(node.v, v)
    node.reset()
    node.step_mode = "s"
    steps = torch.stack([node(one) for one in x])
    if name == "LIAFNode":
        # Natively it gives its act in single-step mode and plain spikes in multi-step mode: two engines,
        # which add up the history in another order.
        torch.testing.assert_close(node.v, v, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(steps, whole)
        assert torch.equal(node.v, v)


@pytest.mark.parametrize("name", ["QIFNode", "EIFNode", "IzhikevichNode"])
def test_an_implicit_step_without_a_solution_fires_and_says_so(name):
    """A strong input takes the potential through infinity within a step: a spike."""
    x = torch.linspace(0.0, 30.0, 31).expand(40, 31)
    node = fractional(build(name), method="trap")
    with pytest.warns(SpikedeWarning, match=r"no solution .* smaller step_size .* method='abm'"):
        spikes = node(x).sum(0)
    assert node.v.isfinite().all()
    assert bool((spikes.diff() >= 0).all())  # a stronger input never fires less
    assert spikes[-1] == 40
    with warnings.catch_warnings():  # nothing to say about a moderate one, nor about nan
        warnings.simplefilter("error")
        fractional(build(name), method="trap")(torch.full((40, 2), 0.5))
        fractional(build(name), method="trap")(torch.tensor([[0.5, float("nan")]]).expand(40, 2))


@pytest.mark.parametrize("name", [name for name in AVAILABLE if name != "LIAFNode"])
def test_gradients_of_chunks_and_steps_equal_the_sequence(name):
    native = build(name).double()
    node = fractional(native, alpha=0.7, learn_alpha=True).double()
    leaf = drive(6, 2, 3, dtype=torch.float64).requires_grad_()
    found = []
    for mode in ("whole", "chunks", "steps"):
        node.reset()
        node.step_mode = "s" if mode == "steps" else "m"
        parts = {"whole": [leaf], "chunks": [leaf[:2], leaf[2:5], leaf[5:]], "steps": list(leaf)}[mode]
        loss = sum(node(part).square().sum() for part in parts)
        loss = loss + node.v.square().sum()
        found.append(torch.autograd.grad(loss, [leaf, *node.parameters()]))
    for grads in found[1:]:
        for a, b in zip(grads, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("memory", [1, 3, 100])
def test_window_memory_in_steps_and_sequence(memory):
    node = fractional(build("LIFNode"), memory=memory)
    x = drive(8, 2, 3)
    whole = node(x)
    node.reset()
    node.step_mode = "s"
    assert torch.equal(torch.stack([node(one) for one in x]), whole)
    assert node.history.shape[0] == min(7, memory)


def test_memory_reset_at_spikes_forgets_the_past():
    """After a spike the neuron is as one that starts at its reset potential."""
    x = torch.tensor([0.4, 3.0, 0.3, 0.2, 0.4]).reshape(5, 1)
    node = fractional(build("IFNode"), memory_reset="spike")
    y = node(x)
    assert y.flatten().tolist()[:2] == [0.0, 1.0]
    fresh = fractional(build("IFNode"), memory_reset="spike")
    fresh(x[2:])
    torch.testing.assert_close(node.v, fresh.v)
    remembering = fractional(build("IFNode"))
    remembering(x)
    assert not torch.allclose(remembering.v, fresh.v)


def test_memory_reset_of_an_analog_neuron_is_at_its_spikes():
    """What a LIAF neuron gives out is not what it fires."""
    if "LIAFNode" not in AVAILABLE:
        pytest.skip("this release cannot construct LIAFNode")
    x = torch.tensor([0.5, 0.4, 0.5, 0.4]).reshape(4, 1)  # below threshold throughout
    analog = fractional(build("LIAFNode", "s", tau=2.0, threshold_related=False), memory_reset="spike")
    assert all(analog(one) != 0 for one in x)
    plain = fractional(build("LIFNode", tau=2.0))
    assert plain(x).sum() == 0
    torch.testing.assert_close(analog.v, plain.v)


class Doubled(nn.Module):
    """A user's surrogate that mixes neurons: only the loop over steps can be right about it."""

    def forward(self, z):
        return surrogate.sigmoid.apply(z, 4.0) * (1.0 + 0.0 * z.mean())


def test_surrogates_of_users_take_the_steps():
    theirs = fractional(neuron.IFNode(surrogate_function=Doubled(), step_mode="m"))
    ours = fractional(neuron.IFNode(surrogate_function=surrogate.Sigmoid(4.0), step_mode="m"))
    dynamics = DYNAMICS[neuron.IFNode]
    assert not dynamics.scannable(theirs)
    assert dynamics.scannable(ours)
    x = drive(5, 2, 3)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    theirs(a).sum().backward()
    ours(b).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    hooked = fractional(neuron.IFNode(step_mode="m"))
    calls = []
    hooked.surrogate_function.register_forward_hook(lambda *_: calls.append(1))
    hooked(x)
    assert len(calls) == 5


FRAMEWORK_SURROGATES = [
    name
    for name in (
        *("Sigmoid", "ATan", "PiecewiseQuadratic", "PiecewiseExp", "SoftSign", "SuperSpike", "Erf"),
        *("NonzeroSignLogAbs", "PiecewiseLeakyReLU", "SquarewaveFourierSeries", "S2NN", "QPseudoSpike"),
        *("LeakyKReLU", "FakeNumericalGradient", "LogTailedReLU", "DeterministicPass", "Rect"),
    )
    # The older release cannot run the backward pass of its own NonzeroSignLogAbs.
    if hasattr(surrogate, name) and (EXPLICIT_STATES or name != "NonzeroSignLogAbs")
]


@pytest.mark.parametrize("name", FRAMEWORK_SURROGATES)
def test_every_surrogate_of_the_framework(name):
    """In the scan and in the loop, and at alpha = 1 the native gradient."""
    function = getattr(surrogate, name)()
    native = neuron.LIFNode(surrogate_function=function, step_mode="m").double()
    x = drive(6, 2, 3, dtype=torch.float64)
    results = []
    for node, mode in (
        (native, "m"),
        (fractional(native, alpha=1.0, learn_alpha=True), "m"),
        (fractional(native, alpha=1.0, learn_alpha=True), "s"),
    ):
        torch.manual_seed(0)
        node.step_mode = mode
        leaf = x.clone().requires_grad_()
        y = node(leaf) if mode == "m" else torch.stack([node(one) for one in leaf])
        (grad,) = torch.autograd.grad(y.sum() + node.v.sum(), leaf)
        results.append((y, grad))
    for y, grad in results[1:]:
        assert torch.equal(y, results[0][0])
        torch.testing.assert_close(grad, results[0][1], rtol=1e-6, atol=1e-7)


def test_per_channel_orders():
    from spikede_plugins import PerChannel

    native = build("LIFNode")
    node = ADAPTER.to_fractional(native, operator(PerChannel([0.4, 0.7, 1.0])))
    x = drive(6, 2, 3)
    y = node(x)
    for channel, alpha in enumerate([0.4, 0.7, 1.0]):
        one = fractional(build("LIFNode"), alpha=alpha)
        assert torch.equal(one(x[:, :, channel]), y[:, :, channel])


def test_threshold_of_each_sample():
    """functional.set_threshold_margin of the older release puts a tensor where a float was."""
    node = fractional(neuron.LIFNode(step_mode="m", surrogate_function=surrogate.ATan()))
    thresholds = torch.tensor([[0.5, 1.0, 2.0]])
    node.v_threshold = thresholds
    y = node(drive(6, 2, 3))
    for i, threshold in enumerate((0.5, 1.0, 2.0)):
        one = fractional(neuron.LIFNode(step_mode="m", v_threshold=threshold))
        assert torch.equal(one(drive(6, 2, 3)[:, :, i]), y[:, :, i])
