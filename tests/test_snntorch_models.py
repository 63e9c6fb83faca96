"""Whole snnTorch models: the tutorial's convolutional net, a hand-written loop, and random nets."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

snn = pytest.importorskip("snntorch")

from snntorch import functional, surrogate, utils
from snntorch_cases import MECHANISMS

from spikede_plugins.conversion import convert_to_fractional, restore_native


def tutorial_net():
    """snnTorch's tutorial 6: a convolutional network for 28 x 28 images."""
    options = {"beta": 0.5, "spike_grad": surrogate.fast_sigmoid(slope=25), "init_hidden": True}
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 12, 5),
        nn.MaxPool2d(2),
        snn.Leaky(**options),
        nn.Conv2d(12, 64, 5),
        nn.MaxPool2d(2),
        snn.Leaky(**options),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
        snn.Leaky(**options, output=True),
    )


def forward(net, data, steps=4):
    utils.reset(net)
    outputs = [net(data) for _ in range(steps)]
    return torch.stack([o[0] for o in outputs]), torch.stack([o[1] for o in outputs])


@pytest.fixture
def images():
    return torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(1))


def test_tutorial_net(images):
    native = tutorial_net()
    checkpoint = copy.deepcopy(native.state_dict())
    spikes, membranes = forward(native, images)
    one = convert_to_fractional(native, alpha=1.0, learn_alpha=True)
    assert torch.equal(forward(one, images)[1], membranes)

    net = convert_to_fractional(native, alpha=[0.6, 0.7, 0.8], learn_alpha=True)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    first = None
    for _ in range(3):
        loss = functional.ce_rate_loss()(forward(net, images)[0], torch.tensor([1, 2, 3]))
        first = loss if first is None else first
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
        optimizer.step()
    assert net[2].fractional.order.alpha.item() != pytest.approx(0.6, abs=1e-6)

    a, b = forward(net, images), forward(net, images)
    assert torch.equal(a[1], b[1])
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    copied = copy.deepcopy(net)
    x = images * 0.9
    expected = net(x)[1]
    assert torch.equal(loaded(x)[1], expected)
    assert torch.equal(copied(x)[1], expected)

    net.load_state_dict(checkpoint)
    restored = restore_native(net)
    restored.load_state_dict(checkpoint)
    assert torch.equal(forward(restored, images)[1], membranes)
    assert torch.equal(forward(native, images)[0], spikes)


def test_backprop_of_snntorch(images):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from snntorch import backprop

    net = convert_to_fractional(tutorial_net(), alpha=0.7, learn_alpha=True)
    before = [p.detach().clone() for p in net.parameters()]
    data = [(images, torch.tensor([1, 2, 3]))]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for train, options in ((backprop.BPTT, {}), (backprop.TBPTT, {"K": 2})):
        loss = train(
            net, data, num_steps=4, optimizer=optimizer, criterion=functional.ce_rate_loss(),
            time_var=False, **options,
        )
        assert torch.as_tensor(loss).isfinite()
    assert sum(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True)) > 3


class Loop(nn.Module):
    """The tutorials' other style: explicit ``mem``, neurons as attributes, one of them used twice."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(5, 6), nn.Linear(6, 3)
        self.lif1 = snn.Leaky(beta=0.9, learn_beta=True)
        self.lif2 = snn.Synaptic(alpha=0.8, beta=0.9, reset_mechanism="zero")
        self.alias = self.lif1

    def forward(self, x):
        mem1 = self.lif1.init_leaky()
        syn2, mem2 = self.lif2.init_synaptic()
        out = []
        for xk in x:
            spk1, mem1 = self.alias(self.fc1(xk), mem1)
            _, syn2, mem2 = self.lif2(self.fc2(spk1), syn2, mem2)
            out.append(mem2)
        return torch.stack(out)


def test_explicit_loop():
    x = torch.randn(7, 2, 5, generator=torch.Generator().manual_seed(2)) * 2
    net = Loop()
    native = net(x)
    assert torch.equal(convert_to_fractional(net, alpha=1, learn_alpha=True)(x), native)
    made = convert_to_fractional(net, alpha=0.6, learn_alpha=True)
    assert made.alias is made.lif1
    out = made(x)
    assert torch.equal(made(x), out)
    out.sum().backward()
    assert made(x[:, :1]).shape == (7, 1, 3)


def test_compiled(images):
    native = nn.Sequential(nn.Flatten(), nn.Linear(784, 6), snn.Leaky(0.8, init_hidden=True, output=True))
    net = convert_to_fractional(native, alpha=0.6)
    expected = forward(net, images)
    utils.reset(net)
    compiled = torch.compile(net, backend="eager")
    found = torch.stack([compiled(images)[1] for _ in range(4)])
    torch.testing.assert_close(found, expected[1])  # torch's sums in place of the fused ones


# -- random nets ----------------------------------------------------------------------------------

WIDTHS = st.integers(1, 5)


@st.composite
def layers(draw):
    kind = draw(st.sampled_from(["Leaky", "Lapicque", "Synaptic", "Alpha", "RLeaky", "RSynaptic"]))
    options = {"reset_mechanism": draw(st.sampled_from(MECHANISMS)), "learn_threshold": draw(st.booleans())}
    options["beta"] = draw(st.floats(0.3, 0.6))
    if kind in ("Synaptic", "Alpha", "RSynaptic"):
        options["alpha"] = draw(st.floats(0.7, 0.9))
    if kind in ("RLeaky", "RSynaptic"):
        options["all_to_all"] = False
    if kind in ("Leaky", "Synaptic", "RLeaky"):
        options["reset_delay"] = draw(st.booleans())
    return kind, options


def make_net(widths, kinds):
    torch.manual_seed(0)
    parts = []
    for (kind, options), a, b in zip(kinds, widths[:-1], widths[1:], strict=True):
        parts += [nn.Linear(a, b), getattr(snn, kind)(**options, init_hidden=True)]
    return nn.Sequential(*parts)


def states(net, x):
    utils.reset(net)
    for module in net:
        if hasattr(module, "reset_mem"):
            module.reset_mem()  # utils.reset forgets the spikes of RSynaptic
    out = []
    for xk in x:
        out += [net(xk), *(m.mem for m in net if hasattr(m, "mem"))]
    return out


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_random_nets(data):
    kinds = data.draw(st.lists(layers(), min_size=1, max_size=3))
    widths = data.draw(st.lists(WIDTHS, min_size=len(kinds) + 1, max_size=len(kinds) + 1))
    net = make_net(widths, kinds)
    x = torch.randn(5, 2, widths[0], generator=torch.Generator().manual_seed(1)) * 2
    listed = len(snn.SpikingNeuron.instances)
    expected = states(net, x)
    for learn in (True, False):
        one = convert_to_fractional(net, alpha=1.0, learn_alpha=learn)
        assert all(torch.equal(a, b) for a, b in zip(states(one, x), expected, strict=True))
    alphas = data.draw(st.lists(st.floats(0.1, 0.99), min_size=len(kinds), max_size=len(kinds)))
    made = convert_to_fractional(net, alpha=alphas, learn_alpha=True)
    first = states(made, x)
    assert all(torch.equal(a, b) for a, b in zip(states(made, x), first, strict=True))
    (gradient,) = torch.autograd.grad(first[-1].sum(), made[-1].fractional.order.alpha)
    assert gradient.isfinite()
    back = restore_native(made)
    assert all(torch.equal(a, b) for a, b in zip(states(back, x), expected, strict=True))
    gone = {id(m) for model in (net, one, made, back) for m in model}
    instances = snn.SpikingNeuron.instances
    instances[:] = [n for n in instances if id(n) not in gone]
    assert len(instances) <= listed
