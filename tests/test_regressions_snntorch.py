"""Where a snnTorch user could be misled in silence: exports, checks that check nothing."""

from __future__ import annotations

import copy
import sys
import types

import pytest
import torch
from torch import nn

snn = pytest.importorskip("snntorch")

from snntorch_cases import inputs
from spikede_snntorch import SnnTorchAdapter

from spikede_plugins.cli import main
from spikede_plugins.conversion import convert_to_fractional, restore_native
from spikede_plugins.engine import FractionalOperator
from spikede_plugins.errors import ExportError
from spikede_plugins.registry import register_adapter, registered_adapter, unregister_adapter
from spikede_plugins.testing import ContractError, check_adapter


def network():
    # NIR wants a value for each neuron.
    lif = snn.Leaky(torch.full((3,), 0.9), threshold=torch.ones(3), init_hidden=True)
    return nn.Sequential(nn.Linear(4, 3), lif)


def trained_network():
    """Every neuron has a native parameter, so that outputs have a gradient."""
    return nn.Sequential(
        nn.Linear(4, 5), snn.Leaky(0.9, init_hidden=True), nn.Linear(5, 3),
        snn.Leaky(0.8, init_hidden=True, output=True),
    )  # fmt: skip


def frames():
    return torch.rand(10, 2, 4) * 3


# -- exports --------------------------------------------------------------------------------------


def test_nir_export_refuses_a_fractional_neuron():
    pytest.importorskip("nirtorch")
    from snntorch.export_nir import export_to_nir

    made = convert_to_fractional(network(), alpha=0.6)
    with pytest.raises(ExportError, match=r"FractionalLeaky cannot be exported.*restore_native\(model\)"):
        export_to_nir(made, torch.zeros(1, 4), ignore_dims=[0])
    made(torch.zeros(1, 4))  # goes on as before
    graph = export_to_nir(restore_native(made), torch.zeros(1, 4), ignore_dims=[0])
    assert "LIF" in {type(node).__name__ for node in graph.nodes.values()}


def test_a_traced_call_by_nirtorch_is_refused_without_nirtorch_too(monkeypatch):
    """nirtorch puts a function of its own in the place of ``nn.Module.__call__`` while it traces."""
    call = nn.Module.__call__

    def my_forward(module, *args, **kwargs):
        return call(module, *args, **kwargs)

    my_forward.__module__ = "nirtorch.graph"
    made, left_native = convert_to_fractional(network(), alpha=0.6), convert_to_fractional(network(), alpha=1)
    monkeypatch.setattr(nn.Module, "__call__", my_forward)
    left_native(torch.zeros(1, 4))
    with pytest.raises(ExportError):
        made(torch.zeros(1, 4))


# -- the contract suite ---------------------------------------------------------------------------


class ConstantOperator(FractionalOperator):
    def kernel(self, past, like, folded=False, rows=0):
        with torch.no_grad():
            return super().kernel(past, like, folded, rows)


def test_the_contract_suite_finds_a_neuron_without_history():
    class Forgetful(SnnTorchAdapter):
        def to_fractional(self, module, operator):
            made = super().to_fractional(module, operator)
            made._pasts.find = lambda mem, owner=None: None
            return made

    with pytest.raises(ContractError, match="keep its history"):
        check_adapter(Forgetful(), trained_network, frames)


def test_the_contract_suite_finds_an_order_that_cannot_learn():
    class Frozen(SnnTorchAdapter):
        def to_fractional(self, module, operator):
            operator.__class__ = ConstantOperator
            return super().to_fractional(module, operator)

    with pytest.raises(ContractError, match="no gradient reaches the learned order of 1"):
        check_adapter(Frozen(), trained_network, frames)


def test_the_contract_suite_leaves_a_registered_adapter_in_its_place():
    mine = register_adapter(SnnTorchAdapter(), replace=True)
    try:
        check_adapter(SnnTorchAdapter(), trained_network, frames)
        assert registered_adapter("snntorch") is mine
    finally:
        unregister_adapter("snntorch")


# -- the command line -----------------------------------------------------------------------------


@pytest.fixture
def models(monkeypatch):
    module = types.ModuleType("reviewed_models")
    module.make_net = trained_network

    def fails():
        raise RuntimeError("no weights\nat all")

    module.fails = fails
    monkeypatch.setitem(sys.modules, "reviewed_models", module)


def test_plan_offers_the_nearest_factory(models, capsys):
    assert main(["plan", "reviewed_models:make_nt"]) == 2
    assert "did you mean 'make_net'?" in capsys.readouterr().err


def test_a_factory_that_fails_at_length_is_one_line_too(models, capsys):
    assert main(["plan", "reviewed_models:fails"]) == 2
    assert capsys.readouterr().err == (
        "spikede: reviewed_models:fails gave no model: RuntimeError: no weights at all\n"
    )


def test_usage_puts_the_target_before_the_options_that_take_many_values(models, capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--alpha", "0.5", "reviewed_models:make_net"])
    assert "usage: spikede plan MODULE:FACTORY [--alpha" in capsys.readouterr().err


# -- idioms that hold -----------------------------------------------------------------------------


def test_checkpointed_steps_give_the_same_gradients():
    """Activation checkpointing runs each step twice; the second run finds the same history."""
    from torch.utils.checkpoint import checkpoint

    neuron = convert_to_fractional(snn.Leaky(0.9, learn_beta=True), alpha=0.6, learn_alpha=True)
    x = inputs()
    found = []
    for step in (neuron, lambda *given: checkpoint(neuron, *given, use_reentrant=False)):
        mem, out = torch.zeros(2, 4), []
        for xk in x:
            spike, mem = step(xk, mem)
            out += [spike, mem]
        found.append(torch.autograd.grad(torch.stack(out).pow(2).sum(), [x, *neuron.parameters()]))
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_conversions_in_place_leave_nothing_behind():
    before = len(snn.SpikingNeuron.instances)
    net = trained_network()
    for _ in range(20):
        convert_to_fractional(net, alpha=0.6, inplace=True)
        net(frames()[0])
        restore_native(net, inplace=True)
    assert len(snn.SpikingNeuron.instances) == before + 2
    assert type(copy.deepcopy(net)[1]) is snn.Leaky
