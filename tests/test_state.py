"""The state of a model: rows put back, rows picked, saved and set again, in both frameworks."""

from __future__ import annotations

import io

import pytest
import torch
from small_nets import FRAMEWORKS, INPUTS, each_framework
from torch import nn

from spikede_plugins import (
    OptionError,
    OptionTypeError,
    StateError,
    convert_to_fractional,
    get_state,
    reset_rows,
    select_rows,
    set_state,
)

OPTIONS = {
    "gl": {"method": "gl", "memory": "full"},
    "window": {"method": "l1", "memory": 5},
    "soe": {"method": "gl", "memory": "soe"},
    "abm": {"method": "abm", "memory": "full"},
    "forgetful": {"method": "gl", "memory_reset": "spike"},
    "integer": {"alpha": 1.0},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def frames(steps=40, batch=4, start=0):
    return 6 * torch.randn(steps, batch, INPUTS, generator=torch.Generator().manual_seed(start))


def model(framework, options):
    torch.manual_seed(0)
    return convert_to_fractional(framework.net(), **options)


def play(net, x):
    """Spikes and the potentials of the first layer, step by step from where the net is."""
    spikes, potentials = [], []
    for one in x:
        spikes.append(net(one))
        potentials.append(net.lif.v if hasattr(net.lif, "v") else net.lif.mem)
    return torch.stack(spikes), torch.stack(potentials)


def assert_same(found, expected, close=1e-5):
    assert torch.equal(found[0], expected[0]), f"{int((found[0] != expected[0]).sum())} spikes differ"
    torch.testing.assert_close(found[1], expected[1], rtol=close, atol=close)


@each_framework
@each_option
def test_a_branch(framework, options):
    """What ran after the state was taken leaves no trace in it, and it can be set as often as one likes."""
    x, net = frames(), model(framework, options)
    whole = play(model(framework, options), x)
    play(net, x[:25])
    state = get_state(net)
    for _ in range(2):
        play(net, frames(9, start=1))
        set_state(net, state)
        found = play(net, x[25:])
        assert_same(found, [part[25:] for part in whole])


@each_framework
@each_option
def test_saved_and_set_in_another_model(framework, options):
    x, net, file = frames(), model(framework, options), io.BytesIO()
    whole = play(model(framework, options), x)
    play(net, x[:25])
    torch.save(get_state(net), file)
    file.seek(0)
    other = model(framework, options)
    set_state(other, torch.load(file, weights_only=True))
    assert_same(play(other, x[25:]), [part[25:] for part in whole])


@each_framework
@each_option
def test_picked_rows_take_their_history_along(framework, options):
    x, net, index = frames(), model(framework, options), [2, 0, 2, 1, 1]
    whole = play(model(framework, options), x)
    play(net, x[:25])
    select_rows(net, index)
    assert_same(play(net, x[25:, index]), [part[25:, index] for part in whole])


@each_framework
def test_rows_may_be_a_mask_or_a_slice(framework):
    x, net = frames(9), model(framework, {})
    whole = play(model(framework, {}), x)
    play(net, x[:3])
    select_rows(net, torch.tensor([True, False, True, True]))
    play(net, x[3:6, [0, 2, 3]])
    select_rows(net, slice(1, 3))
    assert_same(play(net, x[6:, [2, 3]]), [part[6:, [2, 3]] for part in whole])


@each_framework
@each_option
def test_a_row_put_back_begins_anew(framework, options):
    x, net = frames(), model(framework, options)
    on, fresh = play(model(framework, options), x), play(model(framework, options), x[25:])
    play(net, x[:25])
    # The same, said in four ways.
    for rows in (1, [1], torch.tensor([False, True, False, False]), slice(1, 2)):
        reset_rows(net, rows)
    found = play(net, x[25:])
    others = [0, 2, 3]
    assert_same([part[:, others] for part in found], [part[25:, others] for part in on])
    assert_same([part[:, 1] for part in found], [part[:, 1] for part in fresh])


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_gradients_go_through_picked_rows_and_end_at_rows_put_back(framework):
    """A batch whose row 1 ends and whose row 0 is doubled, against each stream run alone."""

    def gradient(streams):
        torch.manual_seed(0)
        net = model(framework, {"learn_alpha": True})
        leaf, loss = frames(20, 2).requires_grad_(), 0.0
        for rows in streams:
            net = model(framework, {"learn_alpha": True})
            out, _ = play(net, leaf[:8, rows])
            if len(rows) == 2:
                reset_rows(net, [1])
                more, _ = play(net, leaf[8:14])
                select_rows(net, [0, 1, 0])
                last, _ = play(net, leaf[14:, [0, 1, 0]])
                loss = loss + (out.sum() + more.sum() + last.sum())
            else:
                if rows == [1]:
                    framework.reset(net)
                more, _ = play(net, leaf[8:14, rows])
                last, _ = play(net, leaf[14:, rows])
                loss = loss + out.sum() + more.sum() + last.sum() * (2 if rows == [0] else 1)
        return torch.autograd.grad(loss, leaf)[0]

    together, alone = gradient([[0, 1]]), gradient([[0], [1]])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5 * float(alone.abs().max()))


@each_framework
def test_an_integer_model_has_a_state_too(framework):
    x, net = frames(), framework.net()
    whole = play(framework.net(), x)
    play(net, x[:25])
    state = get_state(net)
    play(net, x[:3])
    set_state(net, state)
    assert_same(play(net, x[25:]), [part[25:] for part in whole])


@each_framework
@pytest.mark.parametrize("call", [reset_rows, select_rows])
def test_rows_that_do_not_fit_change_nothing(framework, call):
    x, net = frames(), model(framework, {})
    whole = play(model(framework, {}), x)
    play(net, x[:25])
    for rows, error in ((4, OptionError), ([0, 7], OptionError), (torch.tensor([True, False]), OptionError),
                        ([0.5], OptionTypeError), ("all", OptionTypeError)):  # fmt: skip
        with pytest.raises(error, match="lif"):
            call(net, rows)
    assert_same(play(net, x[25:]), [part[25:] for part in whole])


@each_framework
def test_a_state_of_another_model_changes_nothing(framework):
    x, net = frames(), model(framework, {})
    whole = play(model(framework, {}), x)
    play(net, x[:25])
    state = get_state(net)
    broken = {path: {**values, "histories": [{"rows": 1}]} for path, values in state.items()}
    for given, error in (({}, StateError), (3, OptionTypeError), ({"lif": state["lif"]}, StateError),
                         (broken, OptionTypeError), ({**state, "lif": {}}, OptionTypeError)):  # fmt: skip
        with pytest.raises(error):
            set_state(net, given)
    assert_same(play(net, x[25:]), [part[25:] for part in whole])


def test_a_model_without_neurons_is_told_what_to_do():
    for call in (get_state, lambda net: set_state(net, {}), lambda net: reset_rows(net, [0])):
        with pytest.raises(StateError, match="convert_to_fractional"):
            call(nn.Linear(2, 2))
