"""Converting models of both frameworks: one line in, the same model with fractional neurons out."""

from __future__ import annotations

import copy
import pickle
import re
import warnings

import pytest
import torch
from small_nets import each_framework, frames
from torch import nn

from spikede_plugins import (
    ConversionReport,
    MultiTerm,
    PerChannel,
    SpikedeWarning,
    WindowMemory,
    conversion_report,
    convert_to_fractional,
    plan_conversion,
    restore_native,
)
from spikede_plugins.registry import get_adapter
from spikede_plugins.solvers.gl import GrunwaldLetnikov
from spikede_plugins.testing import check_adapter


def alphas(model: nn.Module) -> list[str]:
    """What the report says of alpha, neuron by neuron."""
    return [row.alpha for row in conversion_report(model).rows]


def parameters(model: nn.Module) -> dict[str, int]:
    return {name: id(p) for name, p in model.named_parameters()}


# -- the one line ---------------------------------------------------------------------------------


@each_framework
def test_one_line_makes_a_network_fractional_and_it_trains(framework):
    net = framework.net()
    fractional = convert_to_fractional(net, alpha=0.7)
    spikes = framework.run(fractional, frames())
    spikes.sum().backward()
    assert fractional.fc.weight.grad.abs().sum() > 0
    assert not torch.equal(spikes, framework.run(net, frames()))
    assert type(fractional.lif) is not type(net.lif)
    assert net.fc.weight.grad is None  # a copy was converted


@each_framework
def test_alpha_one_is_the_native_network_bit_for_bit(framework):
    net = framework.net()
    same = convert_to_fractional(net, alpha=1.0)
    assert torch.equal(framework.run(same, frames()), framework.run(net, frames()))
    assert type(same.lif) is type(net.lif)
    report = conversion_report(same)
    assert [row.status for row in report.rows] == ["native", "native"]
    assert report and "native (alpha = 1)" in str(report)
    # Its being converted is remembered by copies and pickles, and by no checkpoint.
    framework.reset(same)  # natively, neither framework copies a neuron that holds a graph
    assert len(conversion_report(copy.deepcopy(same)).native) == 2
    if framework.name == "spikingjelly":  # snnTorch's surrogates are closures, which pickle refuses
        assert conversion_report(pickle.loads(pickle.dumps(same.lif))).native
    assert list(same.state_dict()) == list(net.state_dict())
    assert not conversion_report(restore_native(same)).native


@each_framework
def test_other_steps_at_alpha_one_are_not_native(framework):
    report = plan_conversion(framework.net(), alpha=1.0, step_size=0.5)
    assert len(report.converted) == 2
    assert len(plan_conversion(framework.net(), alpha=1.0, learn_alpha=True).converted) == 2


@each_framework
def test_restoring_gives_the_native_network_back(framework):
    net = framework.net()
    restored = restore_native(convert_to_fractional(net, alpha=0.5))
    assert torch.equal(framework.run(restored, frames()), framework.run(net, frames()))
    assert [type(m) for m in restored.modules()] == [type(m) for m in net.modules()]
    assert list(restored.state_dict()) == list(net.state_dict())


@each_framework
def test_in_place_keeps_every_parameter_object(framework):
    net = framework.net()
    before = parameters(net)
    expected = framework.run(net, frames())
    assert convert_to_fractional(net, alpha=0.5, learn_alpha=True, inplace=True) is net
    after = parameters(net)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 2  # the two orders
    assert restore_native(net, inplace=True) is net
    assert parameters(net) == before
    assert torch.equal(framework.run(net, frames()), expected)


@each_framework
def test_original_checkpoints_load_before_and_after(framework):
    net = framework.net()
    checkpoint = copy.deepcopy(net.state_dict())
    for options in ({}, {"learn_alpha": True}):
        fractional = convert_to_fractional(net, **options)
        fractional.load_state_dict(checkpoint)
        assert set(checkpoint) <= set(fractional.state_dict())
    learned = convert_to_fractional(net, alpha=0.4, learn_alpha=True)
    again = convert_to_fractional(net, alpha=0.9, learn_alpha=True)
    again.load_state_dict(learned.state_dict())
    assert alphas(again) == alphas(learned)


@each_framework
def test_training_flags_and_hooks_are_kept(framework):
    net = framework.net()
    net.lif.eval()
    seen = []
    net.lif.register_forward_hook(lambda module, args, out: seen.append(out))
    fractional = convert_to_fractional(net)
    assert fractional.training and not fractional.lif.training and fractional.block[1].training
    fractional(frames()[0])
    assert len(seen) == 1


@each_framework
def test_the_adapter_keeps_the_contract(framework):
    """The suite that third parties run on their adapters, run on ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the frameworks' own
        check_adapter(get_adapter(framework.name), make_model=framework.net, make_input=frames)


# -- copies ---------------------------------------------------------------------------------------


@each_framework
def test_a_copy_can_be_made_while_the_neurons_hold_a_graph(framework):
    """deepcopy refuses such states in both frameworks; here the copy starts afresh."""
    net = framework.net()
    for step in frames():
        out = net(step)
    fractional = convert_to_fractional(net)
    out.sum().backward()  # the original's graph is as it was
    assert net.fc.weight.grad.abs().sum() > 0
    fresh = framework.run(convert_to_fractional(framework.net()), frames())
    assert torch.equal(torch.stack([fractional(step) for step in frames()]), fresh)


@each_framework
def test_the_original_is_not_touched_by_converting_a_copy(framework):
    net = framework.net()
    names = [(name, type(module), id(module)) for name, module in net.named_modules()]
    expected = framework.run(net, frames())
    convert_to_fractional(net, learn_alpha=True)
    plan_conversion(net)
    assert [(name, type(module), id(module)) for name, module in net.named_modules()] == names
    assert torch.equal(framework.run(net, frames()), expected)


@each_framework
def test_eval_mode_and_no_grad_give_the_same_spikes(framework):
    fractional = convert_to_fractional(framework.net())
    expected = framework.run(fractional, frames())
    with torch.no_grad():
        assert torch.equal(framework.run(fractional.eval(), frames()), expected)


@each_framework
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_learned_orders_are_double_in_double_models_and_never_half(framework, dtype):
    net = convert_to_fractional(framework.net().to(dtype), learn_alpha=True)
    orders = [p for name, p in net.named_parameters() if name.endswith("alpha")]
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert [p.dtype for p in orders] == [expected] * 2


# -- the shapes models come in --------------------------------------------------------------------


@each_framework
def test_a_shared_neuron_stays_shared_under_all_its_names(framework):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = framework.neuron()
            self.b = self.a
            self.list = nn.ModuleList([self.a, framework.neuron()])
            self.dict = nn.ModuleDict({"x": self.a})
            self.loose = [self.a]  # a plain list beside the children

    net = Shared()
    assert plan_conversion(net).rows[0].paths == ("a", "b", "list.0", "dict.x")
    for converted in (convert_to_fractional(net), convert_to_fractional(net, inplace=True)):
        for place in (converted.b, converted.list[0], converted.dict["x"], converted.loose[0]):
            assert place is converted.a
        assert converted.list[1] is not converted.a
        assert len(conversion_report(converted).converted) == 2
        restored = restore_native(converted)
        assert restored.loose[0] is restored.dict["x"] is restored.b is restored.a
        assert type(restored.a) is type(framework.neuron())


@each_framework
def test_the_same_block_used_twice_has_paths_through_both_names(framework):
    block = nn.Sequential(nn.Linear(2, 2), framework.neuron())
    net = nn.Sequential(block, nn.Identity(), block)
    report = plan_conversion(net, alpha={"2": 0.3})
    assert report.rows[0].paths == ("0.1", "2.1") and report.rows[0].alpha == "0.3"


@each_framework
def test_a_model_that_is_a_neuron(framework):
    neuron = framework.neuron()
    x = frames()
    expected = framework.run(neuron, x)
    fractional = convert_to_fractional(neuron, alpha=0.5)
    assert fractional is not neuron and type(neuron) is type(framework.neuron())
    spikes = framework.run(fractional, x)
    assert conversion_report(fractional).rows[0].paths == ("",)
    # In place the caller's own reference becomes the fractional neuron, and native again.
    assert convert_to_fractional(neuron, alpha=0.5, inplace=True) is neuron
    assert type(neuron) is type(fractional)
    assert torch.equal(framework.run(neuron, x), spikes)
    restore_native(neuron, inplace=True)
    assert type(neuron) is type(framework.neuron())
    assert torch.equal(framework.run(neuron, x), expected)


@each_framework
def test_models_of_two_frameworks_convert_at_once(framework):
    pytest.importorskip("spikingjelly")
    snntorch = pytest.importorskip("snntorch")
    from spikingjelly.activation_based import neuron

    net = nn.Sequential(neuron.IFNode(), snntorch.Leaky(beta=0.5, init_hidden=True))
    report = conversion_report(convert_to_fractional(net))
    assert [row.kind for row in report.converted] == ["IFNode", "Leaky"]


# -- alpha, method and memory, neuron by neuron ---------------------------------------------------


@each_framework
def test_a_sequence_gives_one_alpha_a_layer_in_the_models_order(framework):
    net = framework.net()
    assert alphas(convert_to_fractional(net, alpha=[0.3, 0.8])) == ["0.3", "0.8"]
    assert alphas(convert_to_fractional(net, alpha=torch.tensor([0.25, 1.0]))) == ["0.25", "1"]
    assert alphas(convert_to_fractional(net, alpha=[0.3], exclude="lif")) == ["", "0.3"]


@each_framework
def test_a_mapping_gives_alpha_by_pattern_the_first_that_fits(framework):
    net = framework.net()
    assert alphas(convert_to_fractional(net, alpha={"block.1": 0.3, "*": 0.8})) == ["0.8", "0.3"]
    assert alphas(convert_to_fractional(net, alpha={"*": 0.8, "block.1": 0.3})) == ["0.8", "0.8"]
    # A pattern selects what lies below it, and wildcards cross dots.
    assert alphas(convert_to_fractional(net, alpha={"block": 0.3, "l?f": 0.6})) == ["0.6", "0.3"]
    assert alphas(convert_to_fractional(net, alpha={"*1": 0.3, "lif": 0.6})) == ["0.6", "0.3"]


@each_framework
def test_orders_per_channel_and_of_several_terms(framework):
    orders = PerChannel([0.5 + 0.02 * i for i in range(16)])
    terms = MultiTerm([1.0, 0.4], [0.8, 0.2])
    net = convert_to_fractional(framework.net(), alpha=[orders, terms], learn_alpha=True)
    report = conversion_report(net)
    assert report.rows[0].alpha.startswith("16 channels [0.5, 0.52")
    assert report.rows[1].alpha == "0.8 D^1 + 0.2 D^0.4 (learned)"
    assert [row.method for row in report.rows] == ["gl", "glmulti"]  # "gl" of several terms
    framework.run(net, frames()).sum().backward()
    learned = [p for name, p in net.named_parameters() if name.endswith("alpha")]
    assert [tuple(p.shape) for p in learned] == [(16,), (2,)]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in learned)


@each_framework
def test_every_other_option_can_differ_by_pattern_too(framework):
    net = convert_to_fractional(
        framework.net(),
        method={"lif": "l1", "*": GrunwaldLetnikov()},
        memory={"lif": 4, "*": WindowMemory(7)},
        step_size={"lif": 0.5, "*": 1.0},
        learn_alpha={"lif": True, "*": False},
        memory_reset={"lif": "spike", "*": "never"},
    )
    first, second = conversion_report(net).rows
    assert (first.alpha, first.method) == ("0.7 (learned)", "l1, h=0.5")
    assert first.memory == "window 4, reset at spike"
    assert (second.alpha, second.method, second.memory) == ("0.7", "gl", "window 7")


@each_framework
@pytest.mark.parametrize("method", ["gl", "l1", "pred", "abm", "trap"])
@pytest.mark.parametrize("memory", ["full", 2])
def test_every_method_and_memory_trains(framework, method, memory):
    net = convert_to_fractional(framework.net(), method=method, memory=memory, learn_alpha=True)
    framework.run(net, frames()).sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name


@each_framework
def test_include_and_exclude_choose_neurons(framework):
    net = framework.net()

    def converted(**options):
        return [row.path for row in conversion_report(convert_to_fractional(net, **options)).converted]

    assert converted(include="block") == ["block.1"]
    assert converted(include=["lif", "block.*"]) == ["lif", "block.1"]
    assert converted(exclude=["b*"]) == ["lif"]
    assert converted(include="*", exclude="lif") == ["block.1"]


@each_framework
def test_the_rest_of_a_model_can_be_converted_later(framework):
    """What is fractional already must be excluded the second time."""
    half = convert_to_fractional(framework.net(), include="lif", alpha=0.4)
    whole = convert_to_fractional(half, exclude="lif", alpha=0.9)
    assert alphas(whole) == ["0.4", "0.9"]


# -- reports --------------------------------------------------------------------------------------


@each_framework
def test_a_plan_shows_everything_and_changes_nothing(framework):
    net = nn.Sequential(framework.neuron(), framework.unsupported(), framework.neuron(), nn.ReLU())
    report = plan_conversion(net, alpha=[0.5], exclude="2")
    assert isinstance(report, ConversionReport) and report
    assert [row.status for row in report.rows] == ["converted", "unsupported", "excluded"]
    assert report.counts == {"converted": 1, "unsupported": 1, "excluded": 1}
    assert report.unsupported[0].note
    assert len(report) == 3
    assert not any(conversion_report(net).converted)


@each_framework
def test_a_report_prints_as_a_table_or_where_that_is_too_wide_as_text(framework, monkeypatch):
    report = plan_conversion(framework.net(), alpha={"lif": 1.0, "*": 0.5})
    monkeypatch.setenv("COLUMNS", "150")
    kind = framework.native
    header, _, first, second, total = str(report).splitlines()
    assert header.split() == ["layer", "neuron", "status", "alpha", "method", "memory", "engine"]
    memory = r"auto \(\d+ traces, error \de-\d+\)"  # the error that was measured when it was fitted
    assert re.fullmatch(rf"lif +{kind} +native \(alpha = 1\) +1 +gl +auto", first)
    assert re.fullmatch(rf"block\.1 +{kind} +converted +0\.5 +gl +{memory} +(torch|fused).*", second)
    assert header.index("status") == second.index("converted")
    assert total == "1 native, 1 converted"
    monkeypatch.setenv("COLUMNS", "40")
    assert max(map(len, str(report).splitlines())) <= 40
    assert f"block.1 ({kind}): converted, alpha 0.5," in str(report).replace("\n  ", " ")


@each_framework
def test_a_report_follows_training(framework):
    net = convert_to_fractional(framework.net(), alpha=0.5, learn_alpha=True)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("alpha"):
                p.fill_(0.25)
    assert alphas(net) == ["0.25 (learned)"] * 2
    assert "nothing" not in str(conversion_report(nn.Linear(1, 1)))
    assert str(conversion_report(nn.Linear(1, 1))) == "no spiking neurons"


@each_framework
def test_strict_false_leaves_what_it_cannot_convert_and_says_so_once(framework):
    net = nn.Sequential(framework.neuron(), framework.unsupported())
    with pytest.warns(SpikedeWarning, match=r"without a fractional form: 1 spiking neuron \(1\)") as caught:
        converted = convert_to_fractional(net, strict=False)
    assert len([w for w in caught if issubclass(w.category, SpikedeWarning)]) == 1
    assert [row.status for row in conversion_report(converted).rows] == ["converted", "unsupported"]
