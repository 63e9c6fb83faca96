"""Orders as parameters: of the caller's own, sized by their layer, in groups for an optimiser, as numbers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from small_nets import each_framework, frames
from torch import nn

from spikede_plugins import (
    ConversionError,
    FractionalLIFDynamics,
    LIFNeuron,
    LoadError,
    MultiTerm,
    OptionError,
    OptionTypeError,
    OrderError,
    PerChannel,
    SNNWrapper,
    SpikingODELayer,
    alphas,
    convert_to_fractional,
    parameter_groups,
)
from spikede_plugins.orders import FractionalOrder


def has(net, parameter):
    return sum(parameter is p for p in net.parameters()) == 1


def step(net, framework, groups, count=1):
    optimizer = torch.optim.AdamW(groups)
    for _ in range(count):
        optimizer.zero_grad()
        framework.run(net, frames()).mean().backward()
        optimizer.step()


# -- alpha=nn.Parameter ---------------------------------------------------------------------------


@each_framework
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_parameter_becomes_the_order_of_every_layer(framework, inplace, shape):
    alpha = nn.Parameter(torch.full(shape, 0.6))
    net = convert_to_fractional(framework.net(), alpha=alpha, inplace=inplace)
    assert has(net, alpha) and net.lif.fractional.order.alpha is net.block[1].fractional.order.alpha is alpha
    same = convert_to_fractional(framework.net(), alpha=0.6)
    assert torch.equal(framework.run(net, frames()), framework.run(same, frames()))
    step(net, framework, net.parameters())
    assert alpha.grad is not None and alpha.item() != pytest.approx(0.6)
    assert alphas(net)["lif"].item() == alphas(net)["block.1"].item() == pytest.approx(alpha.item())
    again = convert_to_fractional(framework.net(), alpha=nn.Parameter(torch.tensor(0.2)))
    again.load_state_dict(net.state_dict())
    assert again.lif.fractional.order.alpha.item() == pytest.approx(alpha.item())


@each_framework
def test_parameters_by_layer_by_pattern_and_in_several_channels_or_terms(framework):
    a, b = nn.Parameter(torch.tensor(0.4)), nn.Parameter(torch.tensor(0.9))
    for alpha in ([a, b], {"lif": a, "*": b}):
        net = convert_to_fractional(framework.net(), alpha=alpha)
        assert net.lif.fractional.order.alpha is a and net.block[1].fractional.order.alpha is b
    channels = nn.Parameter(torch.linspace(0.3, 0.9, 16))
    orders, factors = nn.Parameter(torch.tensor([0.9, 0.4])), nn.Parameter(torch.tensor([0.8, 0.2]))
    net = convert_to_fractional(framework.net(), alpha=[PerChannel(channels), MultiTerm(orders, factors)])
    assert all(has(net, p) for p in (channels, orders, factors))
    framework.run(net, frames()).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in (channels, orders, factors))


@each_framework
def test_a_parameter_that_the_model_holds_already_stays_one(framework):
    net = framework.net()
    net.alpha = nn.Parameter(torch.tensor(0.6))
    for inplace in (False, True):
        made = convert_to_fractional(net, alpha=net.alpha, inplace=inplace)
        assert made.alpha is net.alpha is made.lif.fractional.order.alpha
        assert has(made, net.alpha)
    (own,) = [group["params"] for group in parameter_groups(net, lr=0.1) if group["name"] == "orders"]
    assert len(own) == 1 and own[0] is net.alpha
    twin = copy.deepcopy(net)
    assert twin.alpha is twin.lif.fractional.order.alpha is twin.block[1].fractional.order.alpha
    assert twin.alpha is not net.alpha


@each_framework
def test_a_parameter_stays_as_and_where_it_is(framework):
    alpha = nn.Parameter(torch.tensor(0.6, dtype=torch.float64))
    net = convert_to_fractional(framework.net(), alpha=alpha)
    assert alpha.dtype == torch.float64 and has(net, alpha)
    frozen = nn.Parameter(torch.tensor(0.6), requires_grad=False)
    net = convert_to_fractional(framework.net(), alpha=frozen)
    framework.run(net, frames()).sum().backward()
    assert frozen.grad is None and has(net, frozen)


@pytest.mark.parametrize(
    ("alpha", "error", "message"),
    [
        (nn.Parameter(torch.tensor(1.2)), OrderError, r"alpha is a parameter that must lie in \(0, 1\]"),
        (nn.Parameter(torch.tensor(math.nan)), OrderError, r"must lie in \(0, 1\].* got nan"),
        (
            nn.Parameter(torch.full((3,), 0.5)),
            OrderError,
            r"shape \(3,\).* a list of parameters, .* PerChannel",
        ),
        (nn.Parameter(torch.tensor(0.5).half()), OptionTypeError, r"parameter of torch.float16.*float\(\)"),
        (nn.Parameter(torch.tensor(0.5, device="meta")), OptionTypeError, "without numbers"),
        (nn.UninitializedParameter(), OptionTypeError, "without numbers"),
        (torch.tensor(0.5, requires_grad=True), OptionTypeError, r"pass nn.Parameter\(alpha.detach\(\)\)"),
        (torch.full((2,), 0.5, requires_grad=True), OptionTypeError, r"requires a gradient"),
        ([torch.tensor(0.5, requires_grad=True), 0.5], OptionTypeError, r"alpha\[0\] is a tensor"),
    ],
    ids=[
        "too large",
        "nan",
        "three of them",
        "half",
        "meta",
        "uninitialized",
        "a tensor",
        "two tensors",
        "in a list",
    ],
)
@each_framework
def test_parameters_that_cannot_be_an_order_say_what_is_needed(framework, alpha, error, message):
    with pytest.raises(error, match=message):
        convert_to_fractional(framework.net(), alpha=alpha)


@pytest.mark.parametrize("direction", [1.0, -1.0])
@each_framework
def test_a_parameter_cannot_be_trained_out_of_its_interval(framework, direction):
    alpha = nn.Parameter(torch.tensor(0.6))
    net = convert_to_fractional(framework.net(), alpha=alpha)
    optimizer = torch.optim.SGD([alpha], lr=1.0)
    for _ in range(3):
        alpha.grad = torch.full_like(alpha, direction)
        optimizer.step()
        framework.run(net, frames())
        assert 0 < alpha.item() <= 1


# -- an order that became nan ---------------------------------------------------------------------


@each_framework
@pytest.mark.parametrize("method", ["gl", "abm"])
@pytest.mark.parametrize(
    "alpha", [0.7, PerChannel([0.5] * 8), MultiTerm([0.9, 0.4], [1.0, 1.0], learn_coefficients=True)], ids=str
)
def test_an_order_that_became_nan_is_an_error_that_names_its_layer(framework, method, alpha):
    if isinstance(alpha, MultiTerm) and method != "gl":
        pytest.skip("several terms are integrated by gl")
    net = convert_to_fractional(
        framework.net(), alpha={"block.1": alpha, "*": 0.7}, method=method, learn_alpha=True
    )
    framework.run(net, frames())
    with torch.no_grad():
        for p in net.block[1].fractional.parameters():
            p.view(-1)[-1] = math.nan
    with pytest.raises(OrderError, match=r"block.1: the learned order has become nan.*last good checkpoint"):
        framework.run(net, frames())
    net.load_state_dict(convert_to_fractional(
        framework.net(), alpha={"block.1": alpha, "*": 0.7}, method=method, learn_alpha=True
    ).state_dict())  # fmt: skip
    assert framework.run(net, frames()).isfinite().all()


# -- the meta device ------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.7, PerChannel(0.6), MultiTerm([0.9, 0.4], [1.0, 1.0])], ids=str)
@pytest.mark.parametrize("steps", [6, 300])
def test_a_learned_order_on_the_meta_device_gives_shapes(alpha, steps):
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    node = convert_to_fractional(neuron.LIFNode(step_mode="m"), alpha=alpha, learn_alpha=True).to("meta")
    spikes = node(torch.rand(steps, 2, 3, device="meta"))
    assert spikes.shape == (steps, 2, 3) and spikes.is_meta
    assert "alpha" in str(node)


# -- PerChannel(0.8) ------------------------------------------------------------------------------


@each_framework
@pytest.mark.parametrize("learn", [True, False])
def test_one_number_for_every_channel_sizes_itself_at_the_first_call(framework, learn):
    """Of a model that says in its forward method what follows what."""
    net = convert_to_fractional(framework.net(), alpha=PerChannel(0.6), learn_alpha=learn)
    order = net.lif.fractional.order
    assert not order.sized and order.describe().startswith("0.6 for every channel")
    assert net.block[1].fractional.order.count == 8  # in a Sequential, behind a layer that tells
    same = convert_to_fractional(framework.net(), alpha=0.6)
    assert torch.equal(framework.run(net, frames()), framework.run(same, frames()))
    assert order.count == 16 and alphas(net)["lif"].tolist() == pytest.approx([0.6] * 16)
    if learn:
        assert order.alpha.shape == (16,)
        framework.run(net, frames()).sum().backward()
        assert order.alpha.grad.shape == (16,)
    with pytest.raises(OptionError, match=r"lif: PerChannel has 16 orders .* shape \(3, 5\)"):
        framework.reset(net)
        net.lif(torch.rand(3, 5))


@each_framework
def test_an_unsized_order_is_copied_saved_and_loaded(framework):
    def make():
        return convert_to_fractional(framework.net(), alpha=PerChannel(0.6), learn_alpha=True)

    unsized, sized = make(), make()
    framework.run(sized, frames())
    with torch.no_grad():
        sized.lif.fractional.order.alpha.uniform_(0.3, 0.9)
    twin = copy.deepcopy(unsized)
    twin.load_state_dict(sized.state_dict())  # takes the number from the checkpoint
    assert torch.equal(framework.run(twin, frames()), framework.run(sized, frames()))
    make().load_state_dict(unsized.state_dict())
    with pytest.raises(LoadError, match=r"lif: alpha is 0.6 in the checkpoint and learned \(now \["):
        sized.load_state_dict(unsized.state_dict())
    with torch.inference_mode():
        framework.run(unsized, frames())
    framework.run(unsized, frames()).sum().backward()  # sized in inference mode, and trained all the same
    assert unsized.lif.fractional.order.alpha.grad is not None


def known(framework, *before):
    return nn.Sequential(*before, framework.neuron())


@each_framework
@pytest.mark.parametrize(
    ("before", "channels"),
    [
        (lambda: [nn.Linear(3, 6)], 6),
        (lambda: [nn.Conv2d(1, 4, 3)], 4),
        (lambda: [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.Dropout()], 4),
        (lambda: [nn.Sequential(nn.Conv1d(1, 5, 3), nn.Identity())], 5),
        (lambda: [nn.Conv2d(1, 4, 3), nn.Flatten()], None),
        (lambda: [nn.LayerNorm(3)], None),
        (lambda: [], None),
    ],
    ids=["linear", "conv", "conv, norm, pool", "nested", "flatten", "layer norm", "nothing"],
)
def test_the_number_of_channels_is_known_from_the_layer_before(framework, before, channels):
    net = convert_to_fractional(known(framework, *before()), alpha=PerChannel(0.7), learn_alpha=True)
    order = net[-1].fractional.order
    assert order.sized == (channels is not None)
    if channels is not None:
        assert order.alpha.shape == (channels,)
        path = str(len(net) - 1)
        message = rf"{path}: PerChannel has 3 orders, but the layer before it, .*, gives {channels} channels"
        with pytest.raises(OptionError, match=message):
            convert_to_fractional(known(framework, *before()), alpha=PerChannel([0.5, 0.6, 0.7]))
        with pytest.raises(OptionError, match=f"0.{message}"):
            convert_to_fractional(
                nn.Sequential(known(framework, *before())), alpha=PerChannel([0.5, 0.6, 0.7]), inplace=True
            )
    else:
        assert convert_to_fractional(known(framework, *before()), alpha=PerChannel([0.5, 0.6, 0.7]))


def test_the_neuron_behind_a_neuron_has_its_channels():
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    net = nn.Sequential(nn.Linear(2, 7), neuron.IFNode(), nn.Sequential(neuron.LIFNode()))
    made = convert_to_fractional(net, alpha=PerChannel(0.5))
    assert [m.fractional.order.count for m in (made[1], made[2][0])] == [7, 7]


def test_fdeint_sizes_itself_for_every_start():
    """Operators of equal orders are kept from call to call; one that sizes itself must not be."""
    from spikede_plugins import fdeint

    times = torch.linspace(0, 1, 5)
    for channels in (3, 4):
        y = fdeint(lambda t, y: -y, torch.ones(2, channels), times, alpha=PerChannel(0.5))
        assert torch.equal(y, fdeint(lambda t, y: -y, torch.ones(2, channels), times, alpha=0.5))
    alpha = nn.Parameter(torch.tensor([0.5, 0.6, 0.7]))
    fdeint(lambda t, y: -y, torch.ones(2, 3), times, alpha=PerChannel(alpha.detach().clone()))
    fdeint(lambda t, y: -y, torch.ones(2, 3), times, alpha=PerChannel(alpha)).sum().backward()
    assert alpha.grad.abs().min() > 0


# -- alphas ---------------------------------------------------------------------------------------


@each_framework
def test_alphas_are_numbers_by_path(framework):
    options = {"lif": PerChannel([0.25] * 8 + [0.5] * 8), "*": MultiTerm([1.0, 0.5], [0.8, 0.2])}
    for learn in (True, False):
        found = alphas(convert_to_fractional(framework.net(), alpha=options, learn_alpha=learn))
        assert list(found) == ["lif", "block.1"]
        assert found["lif"].tolist() == [0.25] * 8 + [0.5] * 8 and found["block.1"].tolist() == [1.0, 0.5]
        assert not any(t.requires_grad or t.dtype != torch.float64 for t in found.values())
    found = alphas(convert_to_fractional(framework.net(), alpha={"lif": 1.0, "*": 0.5}))
    assert {path: t.item() for path, t in found.items()} == {"lif": 1.0, "block.1": 0.5}
    found["lif"].zero_()  # a copy


def test_alphas_of_a_wrapper_and_of_an_event_driven_layer():
    base = nn.Sequential(nn.Linear(2, 3), LIFNeuron(), nn.Linear(3, 2), LIFNeuron())
    wrapper = SNNWrapper(base, integrator="fdeint", alpha=[0.25, 0.75], alpha_mode="per_layer")
    assert {path: a.item() for path, a in alphas(wrapper).items()} == {"base.1": 0.25, "base.3": 0.75}
    layer = SpikingODELayer(2, 3, FractionalLIFDynamics(0.5))
    assert alphas(nn.Sequential(layer))["0.dynamics"].item() == 0.5


def test_alphas_of_a_wrapper_around_neurons_of_a_framework():
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    wrapper = SNNWrapper(nn.Sequential(nn.Linear(2, 3), neuron.LIFNode()), integrator="fdeint", alpha=0.25)
    assert {path: a.item() for path, a in alphas(wrapper).items()} == {"base.1": 0.25}


@each_framework
def test_models_without_orders_say_what_to_call(framework):
    with pytest.raises(ConversionError, match=r"Net has no orders: .*2 .*convert_to_fractional\(model\)"):
        alphas(framework.net())
    with pytest.raises(ConversionError, match=r"0 \(LIFNeuron\) is a neuron .*SNNWrapper\(model, alpha"):
        alphas(nn.Sequential(LIFNeuron()))
    with pytest.raises(OptionTypeError, match=r"torch.nn.Module"):
        alphas("net")


# -- parameter_groups -----------------------------------------------------------------------------


def everything(groups):
    return [p for group in groups for p in group["params"]]


@each_framework
def test_orders_and_coefficients_are_a_group_of_their_own_without_decay(framework):
    terms = MultiTerm([0.9, 0.4], [1.0, 1.0], learn_coefficients=True)
    net = convert_to_fractional(framework.net(), alpha={"lif": 0.7, "*": terms}, learn_alpha=True)
    weights, orders = parameter_groups(net, lr=0.1, alpha_lr=0.01, weight_decay=0.3)
    assert (weights["lr"], weights["weight_decay"]) == (0.1, 0.3)
    assert (orders["lr"], orders["weight_decay"]) == (0.01, 0.0)
    own = [p for m in net.modules() if isinstance(m, FractionalOrder) for p in m.parameters()]
    assert sorted(map(id, orders["params"])) == sorted(map(id, own)) and len(own) == 3
    assert sorted(map(id, everything([weights, orders]))) == sorted(map(id, net.parameters()))
    assert parameter_groups(net, lr=0.1)[1]["lr"] == 0.1


@each_framework
def test_weight_decay_leaves_an_order_where_it_is(framework):
    """Without a gradient decay alone moves a parameter: by lr times decay a step, of what it is."""
    net = convert_to_fractional(framework.net(), alpha=0.7, learn_alpha=True)
    weight = net.fc.weight.detach().clone()
    optimizer = torch.optim.AdamW(parameter_groups(net, lr=0.01, weight_decay=0.5))
    for _ in range(10):
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert alphas(net)["lif"].item() == pytest.approx(0.7)
    assert torch.allclose(net.fc.weight, weight * (1 - 0.01 * 0.5) ** 10)


def test_groups_of_a_wrapper_an_event_driven_layer_and_a_model_without_learned_orders():
    wrapper = SNNWrapper(
        nn.Sequential(nn.Linear(2, 3), LIFNeuron(tau_learnable=True)), integrator="fdeint", learn_alpha=True
    )
    layer = SpikingODELayer(2, 3, FractionalLIFDynamics(0.5, learn=["alpha"]))
    for net in (wrapper, layer):
        _, orders = groups = parameter_groups(net, lr=0.1, weight_decay=0.1)
        assert len(orders["params"]) == 1 and orders["weight_decay"] == 0.0
        assert sorted(map(id, everything(groups))) == sorted(map(id, net.parameters()))
    (weights,) = parameter_groups(nn.Linear(2, 3), lr=0.1, weight_decay=0.1)
    assert len(weights["params"]) == 2


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"lr": "x"}, OptionTypeError),
        ({"lr": -1.0}, OptionError),
        ({"lr": 0.1, "alpha_lr": math.nan}, OptionError),
        ({"lr": 0.1, "weight_decay": True}, OptionTypeError),
    ],
    ids=str,
)
def test_groups_refuse_numbers_that_are_none(options, error):
    with pytest.raises(error, match=list(options)[-1]):
        parameter_groups(nn.Linear(2, 3), **options)
    with pytest.raises(OptionTypeError, match=r"torch.nn.Module"):
        parameter_groups(None, lr=0.1)
    with pytest.raises(OptionError, match="no parameters"):
        parameter_groups(nn.ReLU(), lr=0.1)
