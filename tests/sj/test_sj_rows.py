"""Rows of a batch that begin anew: by the state put back to its start, and by the functions for it."""

from __future__ import annotations

import io
import warnings

import pytest

pytest.importorskip("spikingjelly.activation_based")

import torch
from sj_cases import build, drive, fractional
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from spikede_plugins import (
    SpikedeWarning,
    convert_to_fractional,
    get_state,
    reset_rows,
    select_rows,
    set_state,
)

DONE = 7


def by_hand(x: torch.Tensor, tau: float, alpha: float) -> torch.Tensor:
    """Grünwald-Letnikov LIF in a float64 loop: potentials after each step (threshold 1, reset to 0)."""
    weights, u, out = [1.0], [torch.zeros_like(x[0])], []
    for m in range(1, len(x) + 1):
        weights.append(weights[-1] * (1.0 - (1.0 + alpha) / m))
    for one in x:
        h = (one - u[-1]) / tau - sum(weights[k] * u[-k] for k in range(1, len(u) + 1))
        u.append(torch.where(h >= 1.0, torch.zeros_like(h), h))
        out.append(u[-1])
    return torch.stack(out)


def put_back(node: nn.Module, how: str) -> None:
    """Row 1 of every state variable to its start."""
    for name in ("v", "w", "c"):
        if name in node._memories:
            start, value = node._memories_rv[name], getattr(node, name)
            if how == "in place":
                getattr(node, name)[1] = start
            else:
                mask = torch.tensor([False, True, False]).unsqueeze(1)
                setattr(node, name, torch.where(mask, torch.as_tensor(start, dtype=value.dtype), value))


def potentials(x: torch.Tensor, how: str, name: str = "LIFNode", mode: str = "s", **settings) -> torch.Tensor:
    node, out = fractional(build(name, "s"), **settings), []
    for k, one in enumerate(x):
        if k == DONE and how == "api":
            reset_rows(node, [1])
        elif k == DONE and how:
            put_back(node, how)
        if k == DONE and mode == "m":
            node.step_mode, node.store_v_seq = "m", True
            node(x[k:])
            return torch.stack([*out, *node.v_seq])
        node(one)
        out.append(node.v.detach().clone())
    return torch.stack(out)


@pytest.mark.parametrize("how", ["in place", "mask", "api"])
def test_an_episode_that_ends_alone_by_hand(how):
    x = torch.rand(20, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1.2
    node, out = fractional(neuron.LIFNode(tau=4.0), alpha=0.7).double(), []
    for k, one in enumerate(x):
        if k == DONE:
            reset_rows(node, [1]) if how == "api" else put_back(node, how)
        node(one)
        out.append(node.v.clone())
    found, on = torch.stack(out), by_hand(x, 4.0, 0.7)
    torch.testing.assert_close(found[:, [0, 2]], on[:, [0, 2]])
    torch.testing.assert_close(found[DONE:, 1], by_hand(x[DONE:], 4.0, 0.7)[:, 1])


OPTIONS = [
    {"method": "gl", "memory": "soe"},
    {"method": "l1", "memory": 6},
    {"method": "pred", "memory": "full"},
    {"method": "abm"},
    {"method": "trap"},
    {"method": "gl", "memory_reset": "spike"},
    {"method": "abm", "memory_reset": "spike"},
]


@pytest.mark.parametrize("mode", ["s", "m"])
@pytest.mark.parametrize("settings", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["LIFNode", "IzhikevichNode"])
def test_only_that_row_begins_anew(name, settings, mode):
    """Its potentials are those of a fresh run, the others' those of a run that nobody touched."""
    x = drive(20, 3, 4, seed=2).clamp(max=2.0) * 0.4
    found = potentials(x, "mask", name, mode, **settings)
    on, fresh = potentials(x, "", name, **settings), potentials(x[DONE:], "", name, **settings)
    torch.testing.assert_close(found[:, [0, 2]], on[:, [0, 2]])
    torch.testing.assert_close(found[DONE:, 1], fresh[:, 1])


def test_a_part_of_the_state_put_back_is_an_edit():
    """The adaptation goes on, so the history does: an impulse on v, in the row alone."""
    x = drive(16, 3, 4, seed=2) * 0.4
    node = fractional(build("IzhikevichNode", "s"))
    for one in x[:DONE]:
        node(one)
    rows = node.history.clone()
    node.v[1] = node._memories_rv["v"]
    node(x[DONE])
    assert torch.equal(node.history[: len(rows)], rows)


def test_a_clamp_is_an_edit_and_goes_on():
    """Rows that a clamp left at zero have not begun anew."""
    node, x = fractional(neuron.LIFNode(tau=4.0), alpha=0.7), drive(12, 2, 1) - 2.0
    for one in x:
        node.v = node.v.clamp(min=0.0) if isinstance(node.v, torch.Tensor) else node.v
        node(one)
    assert node.history.shape[0] == 11
    assert node.history.abs().sum() == 0.0


def test_nothing_happens_where_nothing_was_edited():
    """Detached, copied, moved: the history goes on to the last bit."""
    x = drive(30, 3, 4)
    plain, moved = fractional(build("LIFNode", "s")), fractional(build("LIFNode", "s"))
    for k, one in enumerate(x):
        expected = plain(one)
        if k % 4 == 1:
            functional.detach_net(moved)
        if k % 4 == 2:
            moved.v = moved.v.clone()
        if k % 4 == 3:
            moved.to(torch.float32)
        assert torch.equal(moved(one), expected)


def test_potentials_picked_by_hand_are_said():
    node, x = fractional(build("LIFNode", "s")), drive(8, 4, 3)
    for one in x[:6]:
        node(one)
    node.v = node.v[[0, 2]]
    with pytest.warns(SpikedeWarning, match=r"LIFNode was given \(2, 3\).*\(4, 3\).*select_rows"):
        node(x[6][[0, 2]])
    node.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        node(x[7][[0, 2]])  # a reset before another batch size is the normal way


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(layer.Linear(4, 6), neuron.LIFNode(), layer.SynapseFilter(), neuron.IFNode())
    with torch.no_grad():
        net[0].weight.abs_()
    return convert_to_fractional(net, alpha=0.6)


def test_states_of_a_network_are_saved_picked_and_put_back():
    net, x = network(), drive(30, 4, 4).abs() * 2
    for one in x[:20]:
        net(one)
    buffer = io.BytesIO()
    torch.save(get_state(net), buffer)
    buffer.seek(0)
    expected = torch.stack([net(one) for one in x[20:]])
    state = torch.load(buffer, weights_only=True)
    set_state(net, state)
    assert torch.equal(torch.stack([net(one) for one in x[20:]]), expected)
    set_state(net, state)
    select_rows(net, [3, 0, 0])
    picked = torch.stack([net(one[[3, 0, 0]]) for one in x[20:]])
    assert torch.equal(picked, expected[:, [3, 0, 0]])
    set_state(net, state)
    reset_rows(net, torch.tensor([True, False, False, False]))
    restarted = torch.stack([net(one) for one in x[20:]])
    functional.reset_net(net)
    fresh = torch.stack([net(one) for one in x[20:]])
    assert torch.equal(restarted[:, 0], fresh[:, 0])
    assert torch.equal(restarted[:, 1:], expected[:, 1:])
    assert not torch.equal(fresh[:, 1:], expected[:, 1:])
