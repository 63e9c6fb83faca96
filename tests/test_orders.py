"""Fractional orders: what is accepted, what is refused, and what training can do to them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from spikede_plugins import MultiTerm, OptionError, OptionTypeError, OrderError, PerChannel
from spikede_plugins.orders import ALPHA_MIN, FractionalOrder, bounded, check_alpha


@pytest.mark.parametrize("value", [0.3, 1, 1.0, torch.tensor(0.3), torch.tensor([0.3])])
def test_orders_in_the_half_open_interval_are_accepted(value):
    assert 0 < check_alpha(value) <= 1


@pytest.mark.parametrize("value", [0, -0.1, 1.0001, float("nan"), float("inf"), torch.tensor(2.0)])
def test_orders_outside_are_refused_and_the_interval_named(value):
    with pytest.raises(OrderError, match=r"alpha must lie in \(0, 1\]"):
        check_alpha(value)


@pytest.mark.parametrize("value", ["0.5", True, None, object()])
def test_what_is_no_number_is_a_type_error(value):
    with pytest.raises(OptionTypeError, match=r"alpha must be a number in \(0, 1\]"):
        check_alpha(value)


def test_per_channel_and_multi_term_check_each_value():
    with pytest.raises(OrderError, match=r"PerChannel alphas\[1\]"):
        PerChannel([0.5, 1.5])
    with pytest.raises(OrderError, match="empty"):
        PerChannel([])
    with pytest.raises(OptionError, match="dim must be an int"):
        PerChannel([0.5], dim=1.0)
    with pytest.raises(OrderError, match="2 orders but 1 coefficient;"):
        MultiTerm([0.5, 0.9], [1.0])
    with pytest.raises(OptionError, match=r"coefficients\[0\] must be finite and positive"):
        MultiTerm([0.5], [0.0])
    with pytest.raises(OptionTypeError, match="learn_coefficients"):
        MultiTerm([0.5], [1.0], learn_coefficients="yes")


def test_a_fixed_order_adds_nothing_to_a_checkpoint():
    for alpha in (0.7, PerChannel([0.5, 0.6]), MultiTerm([0.5, 1.0], [1.0, 2.0])):
        order = FractionalOrder(alpha)
        assert order.fixed and not list(order.parameters()) and not order.state_dict()


def test_a_learned_order_is_one_parameter_named_alpha():
    order = FractionalOrder(PerChannel([0.5, 0.6]), learn_alpha=True)
    assert list(order.state_dict()) == ["alpha"]
    assert order.alphas().tolist() == pytest.approx([0.5, 0.6])
    multi = FractionalOrder(MultiTerm([0.5], [2.0], learn_coefficients=True), learn_alpha=True)
    assert list(multi.state_dict()) == ["alpha", "coefficients"]


def test_only_the_fixed_order_one_is_the_integer_neuron():
    assert FractionalOrder(1.0).is_one
    assert FractionalOrder(PerChannel([1.0, 1.0])).is_one
    assert not FractionalOrder(1.0, learn_alpha=True).is_one
    assert not FractionalOrder(0.99).is_one
    assert not FractionalOrder(MultiTerm([1.0], [1.0])).is_one


@pytest.mark.parametrize(("direction", "limit"), [(-1.0, 1.0), (1.0, ALPHA_MIN)])
def test_training_cannot_push_an_order_out_of_its_interval_and_can_lead_it_back(direction, limit):
    order = FractionalOrder(0.5, learn_alpha=True)
    optimiser = torch.optim.SGD(order.parameters(), lr=0.3)
    for _ in range(5):
        optimiser.zero_grad()
        (direction * order.alphas()).sum().backward()
        optimiser.step()
    assert order.alphas().item() == pytest.approx(limit)
    for _ in range(5):  # the opposite pull takes effect, however far the raw value went
        optimiser.zero_grad()
        (-direction * order.alphas()).sum().backward()
        optimiser.step()
    assert ALPHA_MIN <= order.alphas().item() <= 1
    assert order.alphas().item() != pytest.approx(limit)


def test_the_bound_passes_gradients_inside():
    raw = torch.tensor([0.2, 0.8], requires_grad=True)
    bounded(raw, 0.0, 1.0).sum().backward()
    assert raw.grad.tolist() == [1.0, 1.0]


def test_an_integer_checkpoint_loads_and_leaves_the_order_alone():
    order = FractionalOrder(0.5, learn_alpha=True)
    order.load_state_dict({})
    assert order.alphas().item() == pytest.approx(0.5)


def test_orders_survive_copies_and_pickles():
    for alpha in (0.7, PerChannel([0.5, 0.6]), MultiTerm([0.5, 1.0], [1.0, 2.0])):
        order = FractionalOrder(alpha, learn_alpha=True)
        for twin in (copy.deepcopy(order), pickle.loads(pickle.dumps(order))):
            assert twin.describe() == order.describe()
            assert torch.equal(twin.alphas(), order.alphas())


def test_descriptions_say_what_is_learned():
    assert FractionalOrder(0.7).describe() == "0.7"
    assert FractionalOrder(0.7, learn_alpha=True).describe() == "0.7 (learned)"
    assert FractionalOrder(PerChannel([0.5, 0.6])).describe() == "2 channels [0.5, 0.6]"
    assert FractionalOrder(MultiTerm([0.5, 1.0], [1.0, 2.0])).describe() == "1 D^0.5 + 2 D^1"
