"""State: resets, detaching, copies, files, shapes, dtypes, recordings, and what a conversion keeps."""

from __future__ import annotations

import copy
import io
import pickle

import pytest

pytest.importorskip("spikingjelly.activation_based")

import torch
from sj_cases import ADAPTER, AVAILABLE, build, convert, drive, fractional
from spikede_spikingjelly import FractionalNode
from spikede_spikingjelly.release import EXPLICIT_STATES
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from spikede_plugins import restore_native
from spikede_plugins.errors import OptionError, StateError


def network(step_mode="m", **options) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Linear(4, 6), neuron.LIFNode(**options), layer.Linear(6, 3), neuron.IFNode(**options)
    )
    with torch.no_grad():
        net[0].weight.mul_(3.0)
        net[2].weight.abs_()
    functional.set_step_mode(net, step_mode)
    return net


# Conversion and back


@pytest.mark.parametrize("name", AVAILABLE)
def test_conversion_keeps_everything_and_comes_back(name):
    native = build(name)
    handles = [native.register_forward_hook(lambda *_: seen.append("after"))]
    handles.append(native.register_forward_pre_hook(lambda *_: seen.append("before")))
    seen: list[str] = []
    native.note = "mine"
    node = fractional(native)
    assert isinstance(node, type(native))
    assert isinstance(node, FractionalNode)
    assert node.surrogate_function is native.surrogate_function
    for key, parameter in native.named_parameters():
        assert node.get_parameter(key) is parameter
    assert list(node.state_dict()) == [*native.state_dict(), "fractional._extra_state"]  # its settings
    assert node.note == "mine"
    back = ADAPTER.to_native(node)
    assert type(back) is type(native)
    assert set(vars(back)) == set(vars(native))
    assert list(back._memories) == list(native._memories)
    assert set(dir(back)) == set(dir(native))
    x = drive(5, 2, 3)
    node(x)
    assert seen == ["before", "after"]
    for handle in handles:
        handle.remove()
    node(x)
    assert len(seen) == 2
    functional.reset_net(native)
    assert torch.equal(back(x), native(x))


def test_native_is_untouched():
    native = build("LIFNode")
    before = {key: id(value) for key, value in vars(native).items()}
    node = fractional(native)
    node(drive(4, 2, 3))
    assert {key: id(value) for key, value in vars(native).items()} == before
    assert list(native._memories) == ["v"]
    assert native.v == 0.0


def test_reset_value_of_the_user_is_the_start():
    native = neuron.LIFNode(step_mode="m")
    native.set_reset_value("v", 0.3)
    native.reset()
    node = fractional(native)
    assert node.v == 0.3
    node(drive(4, 2, 3))
    torch.testing.assert_close(node.history_start, torch.full((2, 3), 0.3))
    node.reset()
    assert node.v == 0.3
    assert ADAPTER.to_native(node).v == 0.3


def test_cupy_backend_becomes_torch_and_returns():
    native = neuron.LIFNode(step_mode="m")
    if EXPLICIT_STATES:
        pytest.skip("this release has no backends")
    native._backend = "cupy"  # the setter wants CuPy installed
    assert "cupy" in ADAPTER.support(native).note
    node = fractional(native)
    assert node.backend == "torch"
    assert ADAPTER.to_native(node).backend == "cupy"


def test_set_backend_keeps_torch(caplog):
    if EXPLICIT_STATES:
        pytest.skip("this release has no backends")
    net = convert(network())
    functional.set_backend(net, "cupy")
    assert net[1].backend == "torch"
    functional.set_backend(net, "torch")


def test_repr_names_the_native_class():
    text = repr(convert(network()))
    assert "FractionalLIFNode" in text
    assert "v_threshold=1.0" in text
    assert "tau=2.0" in text
    assert "method='gl'" in text


def test_checkpoint_of_the_native_model_loads():
    native = nn.Sequential(layer.Linear(4, 3), neuron.ParametricLIFNode(3.0), neuron.KLIFNode())
    net = convert(native)
    other = nn.Sequential(layer.Linear(4, 3), neuron.ParametricLIFNode(5.0), neuron.KLIFNode())
    functional.set_step_mode(net, "m")
    net(drive(3, 2, 4))  # a state is never part of a checkpoint
    assert net.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(net[1].w, other[1].w)
    found = other.load_state_dict(net.state_dict(), strict=False)  # which has settings beside the weights
    assert not found.missing_keys and all(key.endswith("._extra_state") for key in found.unexpected_keys)


# Life cycle


def test_reset_net_restarts_everything():
    net = convert(network())
    x = drive(5, 2, 4)
    first = net(x)
    again = net(x)
    functional.reset_net(net)
    assert net[1].history is None
    assert net[1].v == 0.0
    assert torch.equal(net(x), first)
    assert not torch.equal(again, first)


def test_reset_net_sees_the_converted_neurons_of_a_net_reset_before():
    net = network()
    functional.reset_net(net)  # the newer release remembers what to reset
    inner = net
    outer = nn.Sequential(inner)
    functional.reset_net(outer)
    outer = convert(outer, inplace=True)
    x = drive(5, 2, 4)
    first = outer(x)
    functional.reset_net(outer)
    assert torch.equal(outer(x), first)
    functional.reset_net(inner)
    assert outer[0][1].history is None
    restored = restore_native(outer, inplace=True)
    restored(x)
    functional.reset_net(restored)
    assert restored[0][1].v == 0.0


def test_truncated_backpropagation():
    """Values go on, gradients stop at detach_net."""
    net = convert(network())
    twin = copy.deepcopy(net)
    x = drive(6, 2, 4)
    whole = twin(x)
    leaf = x[:3].clone().requires_grad_()
    net(leaf).sum().backward(retain_graph=True)
    functional.detach_net(net)
    leaf.grad = None
    late = net(x[3:])
    assert torch.equal(late, whole[3:])
    late.sum().backward()
    assert leaf.grad is None
    assert net[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("name", AVAILABLE)
def test_detach_and_copies_right_after_a_forward_pass(name, step_mode):
    node = fractional(build(name, step_mode), alpha=0.6, learn_alpha=True)
    x = drive(3, 2, 3, seed=3).requires_grad_()
    one = (lambda part: part) if step_mode == "m" else (lambda part: part[0])
    node(one(x))
    buffer = io.BytesIO()
    torch.save(node, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(node),
        pickle.loads(pickle.dumps(node)),
        torch.load(buffer, weights_only=False),
    ]
    node.detach()
    assert not any(m.requires_grad for m in node.memories() if isinstance(m, torch.Tensor))
    expected = node(one(x.detach()))
    for other in copies:
        assert torch.equal(other(one(x.detach())), expected)
        assert torch.equal(other.v, node.v)


def test_copies_are_small():
    """A history in the middle of its buffer is saved without the buffer."""
    node = fractional(build("IFNode", "s"))
    for x in drive(40, 2, 3):
        node(x)
    kept = copy.deepcopy(node).history
    assert kept.shape[0] == 39
    assert kept.untyped_storage().nbytes() == kept.numel() * 4


def test_train_equals_eval():
    for name in AVAILABLE:
        node = fractional(build(name))
        x = drive(6, 2, 3)
        trained = node(x)
        node.reset()
        node.eval()
        with torch.no_grad():
            assert torch.equal(node(x), trained), name


def test_initial_potential_set_by_hand_is_the_start():
    node = fractional(build("IFNode"))
    v = torch.full((2, 3), 0.4, requires_grad=True)
    node.v = v
    y = node(drive(4, 2, 3))
    assert torch.equal(node.history_start, v)
    (grad,) = torch.autograd.grad(y.sum() + node.v.sum(), v)
    assert grad.abs().sum() > 0


def test_a_number_set_by_hand_restarts():
    node = fractional(build("IFNode"))
    x = drive(4, 2, 3)
    first = node(x)
    node.v = 0.0
    assert torch.equal(node(x), first)


def test_module_apply_moves_state():
    node = fractional(build("LIFNode"))
    node(drive(4, 2, 3))
    node.double()
    assert node.history.dtype is torch.float64
    assert node.history_start.dtype is torch.float64
    assert node(drive(4, 2, 3, dtype=torch.float64)).dtype is torch.float64


# Shapes and dtypes


def test_batch_size_change_without_reset():
    """By the release's own rule: restart, or an error that names the call."""
    net, native = convert(network()), network()
    a, b = drive(4, 2, 4), drive(4, 5, 4)
    net(a)
    native(a)
    if EXPLICIT_STATES:
        native(b)
        y = net(b)
        functional.reset_net(net)
        assert torch.equal(net(b), y)
        return
    with pytest.raises(RuntimeError):
        native(b)
    with pytest.raises(StateError, match=r"LIFNode.*reset_net"):
        net(b)
    functional.reset_net(net)
    net(b)


def test_states_broadcast_where_the_native_ones_do():
    if EXPLICIT_STATES:
        native, node = build("SimpleIFNode"), fractional(build("SimpleIFNode"), alpha=1.0, learn_alpha=True)
    else:
        native, node = build("IFNode"), fractional(build("IFNode"), alpha=1.0, learn_alpha=True)
    one, many = drive(3, 1, 4), drive(3, 5, 4)
    for x in (one, many, one):
        assert torch.equal(node(x), native(x))
        assert torch.equal(node.v, native.v)
    half = fractional(build("SimpleIFNode" if EXPLICIT_STATES else "IFNode"))
    half(one)
    wide = half(many)
    each = fractional(build("SimpleIFNode" if EXPLICIT_STATES else "IFNode"))
    each(one.expand(3, 5, 4))
    assert torch.equal(each(many), wide)


def test_other_variables_restart_with_the_shape():
    for name in ("IzhikevichNode", "CUBALIFNode", "ComplementaryLIFNode"):
        if name not in AVAILABLE or not EXPLICIT_STATES:
            continue
        node = fractional(build(name))
        node(drive(4, 2, 3))
        y = node(drive(4, 5, 3))
        node.reset()
        assert torch.equal(node(drive(4, 5, 3)), y)


@pytest.mark.parametrize("name", AVAILABLE)
def test_no_time_steps(name):
    with pytest.raises(OptionError, match="T = 0"):
        fractional(build(name))(torch.zeros(0, 2, 3))


@pytest.mark.filterwarnings("ignore:an implicit step has no solution")  # QIF and Izhikevich, by this input
@pytest.mark.parametrize("name", AVAILABLE)
def test_nan_propagates(name):
    x = drive(4, 2, 3)
    x[1, 0, 0] = float("nan")
    for method in ("gl", "trap"):
        node = fractional(build(name), method=method)
        node(x)
        assert node.v[0, 0].isnan()
        assert not node.v[1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", AVAILABLE)
def test_half_precision_keeps_the_state_in_float32(name, dtype):
    node = fractional(build(name))
    y = node(drive(4, 2, 3).to(dtype))
    assert y.dtype is dtype
    assert node.v.dtype is torch.float32
    assert node.history.dtype is torch.float32


def test_autocast():
    net = convert(network(), alpha=0.6, learn_alpha=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(drive(5, 2, 4))
    assert net[1].history.dtype is torch.float32
    y.float().sum().backward()
    assert net[1].fractional.order.alpha.grad.isfinite()


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("name", AVAILABLE)
def test_autocast_leaves_the_history_sums_in_float32(name, step_mode):
    node = fractional(build(name, step_mode))
    parts = [drive(12, 2, 3)] if step_mode == "m" else list(drive(12, 2, 3))
    expected = torch.cat([node(part) for part in parts])
    v = node.v
    node.reset()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(torch.cat([node(part) for part in parts]), expected)
    assert torch.equal(node.v, v)


def test_unbatched_and_image_inputs():
    for shape in ((), (3,), (2, 3, 4, 4)):
        node = fractional(build("LIFNode"))
        assert node(drive(4, *shape)).shape == (4, *shape)


# Recordings


def test_store_v_seq():
    for name in AVAILABLE:
        if name.startswith("Simple") or name == "ComplementaryLIFNode":
            continue
        node = fractional(build(name))
        node.store_v_seq = True
        x = drive(5, 2, 3)
        y = node(x)
        v_seq = node.v_seq
        node.reset()
        assert node.v_seq is None
        node.step_mode = "s"
        for t in range(5):
            assert torch.equal(node(x[t]), y[t])
            assert torch.equal(node.v, v_seq[t])
        if EXPLICIT_STATES:
            assert torch.equal(node.v_seq, v_seq)
        copy.deepcopy(node)
        node.detach()


def test_store_state_seqs_of_the_complementary_neuron():
    if "ComplementaryLIFNode" not in AVAILABLE:
        pytest.skip("this release has no ComplementaryLIFNode")
    native = neuron.ComplementaryLIFNode(step_mode="m", store_state_seqs=True)
    node = fractional(copy.deepcopy(native), alpha=1.0, learn_alpha=True)
    x = drive(5, 2, 3)
    native(x)
    node(x)
    for ours, theirs in zip(node.state_seqs, native.state_seqs, strict=True):
        assert torch.equal(ours, theirs)
    copy.deepcopy(node)
    node.reset()
    assert node.state_seqs is None


@pytest.fixture
def monitor():
    pytest.importorskip("tensorboard", reason="spikingjelly's monitors need tensorboard")
    from spikingjelly.activation_based import monitor

    return monitor


def test_monitors(monitor):
    net = network()
    for module in net.modules():
        if isinstance(module, neuron.BaseNode):
            module.store_v_seq = True
    before = monitor.OutputMonitor(net, neuron.BaseNode)
    net = convert(net, inplace=True)
    outputs = monitor.OutputMonitor(net, neuron.BaseNode)
    fractional_only = monitor.OutputMonitor(net, FractionalNode)
    potentials = monitor.AttributeMonitor("v_seq", False, net, neuron.BaseNode)
    y = net(drive(5, 2, 4))
    assert outputs.monitored_layers == ["1", "3"] == fractional_only.monitored_layers
    assert torch.equal(outputs["3"][0], y)
    assert potentials["1"][0].shape == (5, 2, 6)
    assert torch.equal(before["3"][0], y)
    before.remove_hooks()
    net(drive(5, 2, 4))
    assert len(before["3"]) == 1
    for one in (outputs, fractional_only, potentials):
        one.remove_hooks()


def test_gradient_monitors(monitor):
    net = convert(network())
    grads = monitor.GradInputMonitor(net, neuron.BaseNode)
    net(drive(5, 2, 4).requires_grad_()).sum().backward()
    assert grads["1"][0].shape == (5, 2, 6)
    grads.remove_hooks()


# Containers


def test_containers():
    torch.manual_seed(0)
    inner = nn.Sequential(neuron.LIFNode(), neuron.IFNode())
    net = nn.Sequential(
        layer.SeqToANNContainer(nn.Linear(4, 6), nn.BatchNorm1d(6)), layer.MultiStepContainer(inner)
    )
    flat = nn.Sequential(
        layer.SeqToANNContainer(net[0][0], net[0][1]),
        neuron.LIFNode(step_mode="m"),
        neuron.IFNode(step_mode="m"),
    )
    x = drive(5, 3, 4) * 3
    assert torch.equal(convert(net)(x), convert(flat)(x))


def test_linear_recurrent_container():
    torch.manual_seed(0)
    net = layer.LinearRecurrentContainer(neuron.LIFNode(), 4, 4)
    net.step_mode = "m"
    converted = convert(net)
    y = converted(drive(5, 2, 4))
    functional.reset_net(converted)
    assert torch.equal(converted(drive(5, 2, 4)), y)


def test_set_step_mode():
    net = convert(network())
    functional.set_step_mode(net, "s")
    assert net[1].step_mode == "s"
    x = drive(5, 2, 4)
    single = torch.stack([net(one) for one in x])
    functional.reset_net(net)
    functional.set_step_mode(net, "m")
    assert torch.equal(net(x), single)


def test_data_parallel_replicas():
    """A replica as torch.nn.parallel.replicate makes it: parameters are attributes, state is its own."""
    net = convert(nn.Sequential(neuron.ParametricLIFNode(step_mode="m")), alpha=0.6, learn_alpha=True)
    node = net[0]
    replica = node._replicate_for_data_parallel()
    replica._modules = dict(node._modules)
    replica.w = node.w * 1.0
    assert replica._spikede.log is not node._spikede.log
    x = drive(4, 2, 3)
    assert torch.equal(replica(x), node(x))
    replica(x)
    assert replica._memories is not node._memories
    assert node.history.shape[0] == 3
    assert replica.history.shape[0] == 7
