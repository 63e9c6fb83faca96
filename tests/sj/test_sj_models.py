"""Models that come with SpikingJelly, random ones, and compiled ones."""

from __future__ import annotations

import copy
import importlib

import pytest

pytest.importorskip("spikingjelly.activation_based")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sj_cases import AVAILABLE, build, convert, drive
from spikede_spikingjelly import FractionalNode
from spikede_spikingjelly.release import EXPLICIT_STATES
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

from spikede_plugins import conversion_report, restore_native
from spikede_plugins.registry import available_solvers


def exercise(model, x, spiking_layers):
    """Convert, train a step, reset, reload the original checkpoint, restore."""
    functional.set_step_mode(model, "m")
    original = copy.deepcopy(model.state_dict())
    net = convert(model, alpha=0.8, learn_alpha=True)
    nodes = [module for module in net.modules() if isinstance(module, FractionalNode)]
    assert len(nodes) == spiking_layers == len(conversion_report(net).rows)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    y = net(x)
    assert y.isfinite().all()
    y.mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    optimizer.step()
    functional.reset_net(net)
    assert all(node.history is None for node in nodes)
    missing = [key for key in net.state_dict() if key not in original]
    assert all("fractional" in key for key in missing)
    net.load_state_dict(original, strict=True)
    for key, value in original.items():
        assert torch.equal(net.state_dict()[key], value)
    net.eval()
    assert torch.equal(net(x), (functional.reset_net(net), net(x))[1])
    native = restore_native(net).eval()
    functional.reset_net(native)
    reference = model.eval()
    functional.reset_net(reference)
    assert torch.equal(native(x), reference(x))


def test_parametric_lif_net():
    from spikingjelly.activation_based.model import parametric_lif_net

    torch.manual_seed(0)
    model = parametric_lif_net.MNISTNet(
        channels=4, spiking_neuron=neuron.ParametricLIFNode, surrogate_function=surrogate.ATan(),
        detach_reset=True,
    )  # fmt: skip
    exercise(model, torch.rand(4, 2, 1, 28, 28), 4)


@pytest.mark.slow
def test_spikformer():
    if not EXPLICIT_STATES:
        pytest.skip("this release has no spikformer")
    from spikingjelly.activation_based.model.spikformer import Spikformer

    torch.manual_seed(0)
    model = Spikformer(
        T=2, in_channels=3, img_size_h=32, img_size_w=32, patch_size=16, num_classes=5, embed_dims=32,
        num_heads=2, mlp_ratio=2.0, depths=1,
    )  # fmt: skip
    functional.set_step_mode(model, "m")
    neurons = sum(isinstance(module, neuron.BaseNode) for module in model.modules())
    assert neurons > 3
    exercise(model, torch.rand(2, 3, 32, 32), neurons)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "make"),
    [
        ("spiking_resnet", "spiking_resnet18"),
        ("sew_resnet", "sew_resnet18"),
        ("spiking_vgg", "spiking_vgg11"),
    ],
)
def test_torchvision_models(module, make):
    try:
        models = importlib.import_module(f"spikingjelly.activation_based.model.{module}")
    except Exception as error:  # whatever stops torchvision on this machine
        pytest.skip(f"{module} cannot be imported here: {type(error).__name__}: {error}")
    options = {"cnf": "ADD"} if module == "sew_resnet" else {}
    torch.manual_seed(0)
    model = getattr(models, make)(spiking_neuron=neuron.IFNode, num_classes=5, **options)
    functional.set_step_mode(model, "m")
    neurons = sum(isinstance(one, neuron.BaseNode) for one in model.modules())
    exercise(model, torch.rand(2, 2, 3, 32, 32), neurons)


# Random architectures

#: The polynomial ones overflow now and then; the native LIAFNode is another neuron in each step mode.
SMALL = [name for name in AVAILABLE if name not in ("QIFNode", "EIFNode", "IzhikevichNode", "LIAFNode")]


@st.composite
def networks(draw):
    """A stack of linear layers and neurons, nested, with some neurons shared."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    shared = build(draw(st.sampled_from(SMALL)))
    blocks = []
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(SMALL))
        one = build(name)
        if draw(st.booleans()):
            one.v_threshold = draw(st.sampled_from([0.5, 0.8]))
        block = nn.Sequential(layer.Linear(4, 4), one)
        with torch.no_grad():
            block[0].weight.mul_(4.0)
        blocks.append(nn.Sequential(block) if draw(st.booleans()) else block)
    if draw(st.booleans()):
        blocks.append(shared)
    return nn.Sequential(*blocks)


@settings(max_examples=25)
@given(
    networks(),
    st.floats(0.05, 1.0),
    st.sampled_from(["gl", "l1", "pred", "abm", "trap"]),
    st.sampled_from(["full", 1, 3]),
    st.integers(1, 6),
)
def test_random_architectures(net, alpha, method, memory, steps):
    assert method in available_solvers()
    functional.set_step_mode(net, "m")
    native_keys = set(net.state_dict())
    fnet = convert(net, alpha=alpha, method=method, memory=memory)
    new = set(fnet.state_dict()) - native_keys
    assert native_keys <= set(fnet.state_dict()) and all(key.endswith("._extra_state") for key in new)
    x = drive(steps, 2, 4)
    whole = fnet(x)
    assert whole.shape == x.shape
    functional.reset_net(fnet)
    functional.set_step_mode(fnet, "s")
    assert torch.equal(torch.stack([fnet(one) for one in x]), whole)
    functional.reset_net(fnet)
    functional.set_step_mode(fnet, "m")
    fnet(x.requires_grad_()).sum().backward()
    functional.detach_net(fnet)
    copy.deepcopy(fnet)(x)
    native = restore_native(fnet)
    functional.reset_net(net)
    assert torch.equal(native(x), net(x))
    one = convert(net, alpha=1.0, learn_alpha=True, method=method, memory=memory)
    functional.reset_net(net)
    if method in ("gl", "l1", "pred"):
        assert torch.equal(one(x), net(x))


# Compiled


@pytest.mark.slow
@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("name", ["KLIFNode", "IzhikevichNode", "QIFNode", "TernaryLIFNode"])
def test_neurons_without_a_code_compile_step_by_step(name, step_mode):
    if name not in AVAILABLE:
        pytest.skip(f"this release has no {name}")
    node = convert(nn.Sequential(build(name, step_mode)), alpha=0.6)
    torch._dynamo.reset()
    compiled = torch.compile(node, fullgraph=True, backend="aot_eager")
    parts = [drive(2, 2, 3), drive(2, 2, 3, seed=1)] if step_mode == "m" else list(drive(2, 2, 3))
    found = [compiled(part) for part in parts]
    functional.reset_net(node)
    for part, y in zip(parts, found, strict=True):
        assert torch.equal(node(part), y)


@pytest.mark.slow
@pytest.mark.parametrize("v_reset", [0.0, None])
@pytest.mark.parametrize("learn_alpha", [False, True])
def test_compiled_without_graph_breaks(v_reset, learn_alpha):
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Linear(4, 6), neuron.LIFNode(v_reset=v_reset),
        layer.Linear(6, 5), neuron.IFNode(v_reset=v_reset, surrogate_function=surrogate.ATan()),
        layer.Linear(5, 3), neuron.ParametricLIFNode(v_reset=v_reset, decay_input=False),
    )  # fmt: skip
    with torch.no_grad():
        for index in (0, 2, 4):
            net[index].weight.abs_().mul_(2.0)
    functional.set_step_mode(net, "m")
    eager = convert(net, alpha=0.6, learn_alpha=learn_alpha)
    twin = copy.deepcopy(eager)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x = drive(5, 2, 4)
    for _ in range(2):
        functional.reset_net(eager)
        functional.reset_net(twin)
        loss = found = 0.0
        for _ in range(2):  # the second call continues the state of the first
            expected, y = eager(x), compiled(x)
            assert torch.equal(y, expected)
            loss, found = loss + expected.sum(), found + y.sum()
        assert expected.sum() > 0
        for a, b in zip(
            torch.autograd.grad(loss, list(eager.parameters())),
            torch.autograd.grad(found, list(twin.parameters())),
            strict=True,
        ):
            assert a.abs().sum() > 0
            torch.testing.assert_close(a, b)
