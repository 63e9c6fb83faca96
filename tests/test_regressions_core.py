"""Corners of everyday use: layers kept in lists, nets converted in parts, hooks, orders at their bound."""

from __future__ import annotations

import weakref
from collections import deque, namedtuple

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("spikingjelly.activation_based")
from spikingjelly.activation_based import functional, layer, neuron

from spikede_plugins import (
    PerChannel,
    UnsupportedNeuronError,
    convert_to_fractional,
    restore_native,
)
from spikede_plugins.cli import main
from spikede_plugins.errors import OptionTypeError

INPUT = 5 * torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(0))


def run(net: nn.Module) -> Tensor:
    """The output of every time step, starting from a reset net."""
    functional.reset_net(net)
    return torch.stack([net(x) for x in INPUT])


# -- layers that a model also keeps elsewhere -----------------------------------------------------

Pair = namedtuple("Pair", "fc lif")


class LayersInLists(nn.Module):
    """Walks over lists of its own instead of its children."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.lif = nn.Linear(4, 8), neuron.LIFNode()
        self.stages = [[self.fc, self.lif]]
        self.by_name = {"first": (self.lif,)}
        self.pair = Pair(self.fc, self.lif)
        self.queue = deque([self.lif])
        self.act = self.lif.forward

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            for module in stage:
                x = module(x)
        return x


@pytest.mark.parametrize("inplace", [False, True])
def test_layers_in_nested_containers_become_fractional_too(inplace):
    native = LayersInLists()
    net = convert_to_fractional(native, alpha=0.5, inplace=inplace)
    assert net.stages[0][1] is net.lif
    assert net.by_name["first"][0] is net.lif
    assert net.pair.lif is net.lif and isinstance(net.pair, Pair)
    assert net.queue[0] is net.lif
    assert net.act.__self__ is net.lif
    assert restore_native(net).stages[0][1].__class__ is neuron.LIFNode


# -- a net that is converted part by part ---------------------------------------------------------


def test_reset_net_reaches_a_part_that_was_converted_on_its_own():
    net = nn.Sequential(nn.Linear(4, 8), nn.Sequential(neuron.LIFNode()), nn.Linear(8, 3))
    run(net)  # some releases remember from here on which modules to reset
    still_used = net[1][0]
    convert_to_fractional(net[1], alpha=0.6, inplace=True)
    assert torch.equal(run(net), run(net))
    net[1] = restore_native(net[1])
    assert torch.equal(run(net), run(net))
    assert isinstance(still_used, neuron.LIFNode)


def test_replaced_neurons_are_freed_at_once():
    """Their state may be large, and what refers to them weakly should not find them any more."""
    net = nn.Sequential(nn.Linear(4, 8), neuron.LIFNode())
    run(net)
    old = weakref.ref(net[1])
    convert_to_fractional(net, alpha=0.6, inplace=True)
    assert old() is None


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("root", [False, True])
def test_hooks_before_loading_a_checkpoint_get_the_fractional_neuron(inplace, root):
    lif = neuron.LIFNode()
    native = lif if root else nn.Sequential(nn.Linear(4, 8), lif)
    seen = []
    handle = lif.register_load_state_dict_pre_hook(lambda module, *rest: seen.append(module))
    checkpoint = native.state_dict()
    net = convert_to_fractional(native, alpha=0.5, inplace=inplace)
    del native, lif
    net.load_state_dict(checkpoint)
    assert seen == [net if root else net[1]]
    if inplace:
        handle.remove()
        net.load_state_dict(checkpoint)
        assert len(seen) == 1


# -- messages -------------------------------------------------------------------------------------


def test_unsupported_neurons_are_told_before_orders_are_counted():
    class Doubled(neuron.LIFNode):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    net = nn.Sequential(neuron.LIFNode(), Doubled(), neuron.IFNode())
    with pytest.raises(UnsupportedNeuronError, match="Doubled"):
        convert_to_fractional(net, alpha=[0.5, 0.6, 0.7])


@pytest.mark.parametrize("alpha", ["high", None, True])
def test_an_order_of_a_wrong_type_is_named(alpha):
    with pytest.raises(OptionTypeError, match=f"got {alpha!r} .{type(alpha).__name__}"):
        convert_to_fractional(neuron.LIFNode(), alpha=alpha)


def test_a_memory_that_only_looks_like_a_number_is_an_error_of_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "lif_net.py").write_text("from spikingjelly.activation_based.neuron import LIFNode as make\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["plan", "lif_net:make", "--memory=+-5"]) == 2
    assert 'memory must be "full"' in capsys.readouterr().err


# -- learned orders -------------------------------------------------------------------------------


def test_a_learned_order_does_not_drift_away_beyond_its_bound():
    """Pushed outwards for long, the parameter stays at the edge, where the next run puts it back."""
    node = convert_to_fractional(neuron.LIFNode(v_threshold=1e9, v_reset=None), alpha=0.9, learn_alpha=True)
    node.step_mode, node.store_v_seq = "m", True
    alpha = node.fractional.order.alpha
    optimizer = torch.optim.Adam([alpha], lr=0.05)

    def train(sign: float) -> None:
        node.reset()
        optimizer.zero_grad()
        node(torch.ones(20, 3))
        (sign * node.v_seq.sum()).backward()
        optimizer.step()

    for _ in range(40):
        train(-1.0)
        assert alpha.item() <= 1.06  # one step of the optimiser, until it is read again
    node.reset()
    node(torch.ones(20, 3))
    assert alpha.item() <= 1.0


@pytest.mark.parametrize("method", ["gl", "pred", "abm", "trap"])
@pytest.mark.parametrize("learn_alpha", [False, True])
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_training_after_a_first_run_in_inference_mode(method, learn_alpha, step_mode):
    node = convert_to_fractional(neuron.LIFNode(), alpha=0.6, method=method, learn_alpha=learn_alpha)
    x = INPUT.clone().requires_grad_()

    def spikes() -> Tensor:
        node.step_mode = step_mode
        node.reset()
        return node(x) if step_mode == "m" else torch.stack([node(frame) for frame in x])

    with torch.inference_mode():
        first = spikes()
    again = spikes()
    again.sum().backward()
    assert torch.equal(first, again) and x.grad is not None


# -- shapes and memory ----------------------------------------------------------------------------


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_an_empty_batch_trains_with_orders_per_channel(step_mode):
    node = convert_to_fractional(
        neuron.LIFNode(step_mode=step_mode), alpha=PerChannel([0.5, 0.6, 0.7]), learn_alpha=True
    )
    x = torch.zeros(4, 0, 3, requires_grad=True)
    spikes = node(x) if step_mode == "m" else torch.stack([node(frame) for frame in x])
    spikes.sum().backward()
    assert torch.equal(node.fractional.order.alpha.grad, torch.zeros(3))


@pytest.mark.parametrize("method", ["gl", "abm"])
def test_a_memory_format_can_be_set_right_after_a_forward_pass(method):
    net = nn.Sequential(layer.Conv2d(1, 2, 3), neuron.LIFNode())
    net = convert_to_fractional(net, alpha=0.6, method=method)
    x = 3 * torch.rand(5, 2, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    whole = torch.stack([net(frame) for frame in x])
    functional.reset_net(net)
    first = [net(frame) for frame in x[:3]]
    net.to(memory_format=torch.channels_last)
    torch.testing.assert_close(torch.stack([*first, *[net(frame) for frame in x[3:]]]), whole)


def test_forgetting_at_spikes_trains_without_keeping_a_history_for_every_step():
    """The graph of T steps holds a few numbers a neuron and step, not T."""
    node = convert_to_fractional(neuron.LIFNode(step_mode="m"), alpha=0.6, memory_reset="spike")
    steps, neurons = 60, 50
    x = 3 * torch.rand(steps, neurons, generator=torch.Generator().manual_seed(0))
    spikes = node(x.requires_grad_())
    kept, seen, pending = 0, set(), [spikes.grad_fn]
    while pending:
        graph_node = pending.pop()
        if graph_node is None or graph_node in seen:
            continue
        seen.add(graph_node)
        pending += [following for following, _ in graph_node.next_functions]
        rows = getattr(graph_node, "rows", None)
        kept += rows.numel() if isinstance(rows, Tensor) else 0
    assert len(seen) > steps
    assert kept <= steps * neurons
