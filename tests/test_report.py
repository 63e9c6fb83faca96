"""The report: a table that fits a terminal, HTML for notebooks, numbers; and neurons that are seen only."""

from __future__ import annotations

import importlib.util
import sys
import types
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from small_nets import each_framework, frames
from torch import nn

from spikede_plugins import (
    ConversionError,
    LIFNeuron,
    MultiTerm,
    PerChannel,
    SNNWrapper,
    SpikedeWarning,
    alphas,
    conversion_report,
    convert_to_fractional,
    plan_conversion,
    restore_native,
)
from spikede_plugins.report_table import shortened


class Block(nn.Module):
    def __init__(self, framework: Any) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), framework.neuron()
        self.conv2, self.bn2, self.act2 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), framework.neuron()


def resnet(framework: Any) -> nn.Sequential:
    """As many names and levels as a residual network has."""
    net = nn.Sequential()
    net.add_module("stem", nn.Sequential(nn.Conv2d(3, 4, 3), framework.neuron()))
    for stage in range(1, 4):
        net.add_module(f"layer{stage}", nn.Sequential(Block(framework), Block(framework)))
    return net


class Deep(nn.Module):
    """Long paths, and neurons with several."""

    def __init__(self, framework: Any) -> None:
        super().__init__()
        stage = nn.ModuleDict({"intermediate_representation_stage": resnet(framework)})
        self.spiking_feature_extraction_backbone = nn.Sequential(stage)
        self.shared = stage["intermediate_representation_stage"].layer2


MIXED = {
    "*stem": 1.0,
    "*layer1": PerChannel([0.3, 0.4, 0.5, 0.6]),
    "*layer2": MultiTerm([1.0, 0.4], [0.8, 0.2]),
    "*": 0.5,
}


# -- the table ------------------------------------------------------------------------------------


@each_framework
@pytest.mark.parametrize("make", [resnet, Deep], ids=["resnet", "long paths"])
@pytest.mark.parametrize("alpha", [0.7, MIXED], ids=["one alpha", "mixed"])
@pytest.mark.parametrize("columns", [80, 100])
def test_a_report_is_a_table_that_fits_the_terminal(framework, monkeypatch, make, alpha, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    report = plan_conversion(make(framework), alpha=alpha, memory={"*layer3": 4, "*": "auto"})
    header, rule, *rows = str(report).splitlines()
    assert max(map(len, [header, rule, *rows])) <= columns
    assert header.split()[:4] == ["layer", "neuron", "status", "alpha"] and set(rule) == {"-", " "}
    # Every cell begins where its header does, and every neuron has a row that ends as its path does.
    starts = [i for i in range(len(rule)) if rule[i] == "-" and (i == 0 or rule[i - 1] == " ")]
    kinds = [row for row in rows if row[starts[1] :].startswith(framework.native)]
    assert len(kinds) == 13
    for row, told in zip(kinds, report.rows, strict=True):
        assert row.split()[0][-6:] == told.path[-6:]
    assert rows[-1].startswith("1") and "converted" in str(report)


@each_framework
def test_what_all_neurons_share_is_said_once(framework, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = str(plan_conversion(resnet(framework), alpha=0.7, method="l1"))
    assert text.count("l1") == 1 and "\nall: method l1; memory auto (" in text
    assert len(text.splitlines()) <= 2 + 13 + 4


@pytest.mark.parametrize("width", [20, 30, 60])
def test_a_long_path_is_shortened_in_its_middle(width):
    path = "backbone.stages.3.blocks.12.attention.projection.lif"
    short = shortened(path, width)
    assert len(short) == min(width, len(path)) and short.endswith("lif") and path.startswith(short[:4])
    assert width >= len(path) or "..." in short


@each_framework
def test_a_notebook_shows_html(framework):
    net = nn.Sequential(framework.neuron(), framework.unsupported())
    net[0].seen = ["<b>"]
    text = plan_conversion(net, alpha=[0.5])._repr_html_()
    assert text.count("<tr>") == 3 and f"<td>{framework.native}</td><td>converted</td><td>0.5</td>" in text
    assert "<p>1 converted, 1 unsupported</p>" in text
    holder = nn.ModuleDict({"a<b>&": framework.neuron()})
    assert "a&lt;b&gt;&amp;" in plan_conversion(holder)._repr_html_()
    assert "call" not in conversion_report(nn.Linear(1, 1))._repr_html_()


# -- numbers --------------------------------------------------------------------------------------


@each_framework
def test_rows_have_numbers(framework):
    net = convert_to_fractional(
        framework.net(),
        alpha={"lif": PerChannel([0.25] * 8 + [0.5] * 8), "*": MultiTerm([1.0, 0.5], [2.0, 4.0])},
        memory={"lif": 7, "*": "full"}, step_size={"lif": 0.5, "*": 1.0},
        learn_alpha={"lif": True, "*": False},
    )  # fmt: skip
    first, second = conversion_report(net).rows
    assert first.orders == (0.25,) * 8 + (0.5,) * 8 and first.learned and not first.coefficients
    assert (first.window, first.step_size, first.traces) == (7, 0.5, 0)
    assert second.orders == (1.0, 0.5) and second.coefficients == (2.0, 4.0) and not second.learned
    assert (second.window, second.step_size) == (0, 1.0)
    with torch.no_grad():
        net.lif.fractional.order.alpha.fill_(0.75)
    assert conversion_report(net).rows[0].orders == (0.75,) * 16
    soe = plan_conversion(framework.net(), memory="soe").rows[0]
    assert soe.orders == (0.7,) and 10 < soe.traces < 64
    ones = conversion_report(convert_to_fractional(framework.net(), alpha=1.0))
    assert [row.orders for row in ones.native] == [(1.0,), (1.0,)]


@each_framework
def test_records_are_plain(framework):
    records = plan_conversion(framework.net(), alpha=[0.5, 1.0]).records()
    assert [r["path"] for r in records] == ["lif", "block.1"]
    assert [r["orders"] for r in records] == [(0.5,), (1.0,)]
    assert records[0]["status"] == "converted" and records[1]["learned"] is False


# -- neurons that a conversion cannot reach -------------------------------------------------------


@dataclass
class Held:
    neuron: Any


class Holder:
    def __init__(self, neuron: Any) -> None:
        self.neuron = neuron


def in_a_class(net: Any, framework: Any) -> None:
    type(net).at_class = framework.neuron()


#: How a neuron can be kept from nn.Module, where it is then, and what is said of it.
PLACES = {
    "list": (lambda net, f: setattr(net, "kept", [f.neuron()]), "kept[0]", "in a plain list.*ModuleList"),
    "dict": (lambda net, f: setattr(net, "kept", {"a": f.neuron()}), "kept['a']", "plain dict.*ModuleDict"),
    "tuple": (lambda net, f: setattr(net, "kept", (1, f.neuron())), "kept[1]", "plain tuple.*ModuleList"),
    "nested": (
        lambda net, f: setattr(net, "kept", {"a": [None, f.neuron()]}), "kept['a'][1]", "plain list",
    ),
    "inside a module": (
        lambda net, f: setattr(net, "kept", [nn.Sequential(nn.ReLU(), f.neuron())]),
        "kept[0].1", "plain list",
    ),
    "dataclass": (
        lambda net, f: setattr(net, "kept", Held(f.neuron())), "kept.neuron", "held by a dataclass",
    ),
    "object": (lambda net, f: setattr(net, "kept", Holder(f.neuron())), "kept.neuron", "held by a Holder"),
    "attribute": (
        lambda net, f: object.__setattr__(net, "kept", f.neuron()), "kept", r"past the registration",
    ),
    "class": (in_a_class, "at_class", "attribute of the class"),
    "below": (lambda net, f: setattr(net.block, "kept", [f.neuron()]), "block.kept[0]", "plain list"),
}  # fmt: skip


@each_framework
@pytest.mark.parametrize("place", PLACES)
def test_a_neuron_that_is_no_submodule_is_seen_and_said(framework, place):
    hide, path, message = PLACES[place]
    net = framework.net()
    net.__class__ = type("Own", (type(net),), {})  # so that attributes of the class are of this test alone
    hide(net, framework)
    plan = plan_conversion(net)
    assert [row.path for row in plan.converted] == ["lif", "block.1"]
    (row,) = plan.seen
    assert row.path == path and row.kind == framework.native
    with pytest.warns(SpikedeWarning, match=f"seen, not converted: 1 spiking neuron: .*{message}"):
        made = convert_to_fractional(net)
    assert [row.path for row in conversion_report(made).seen] == [path]
    assert "1 seen, not converted" in str(conversion_report(made))
    assert framework.run(made, frames()).isfinite().all()


@each_framework
def test_references_to_neurons_that_are_converted_are_nothing_to_tell(framework):
    net = framework.net()
    net.lookup = {"first": net.lif, "all": [net.lif, net.block[1]]}
    net.held, net.holder = Held(net.lif), Holder((net.lif, Holder(net.block[1])))
    made = convert_to_fractional(net)  # no warning
    assert not plan_conversion(net).seen and not conversion_report(made).seen
    for model in (made, restore_native(made)):  # they are followed
        assert model.held.neuron is model.lookup["first"] is model.holder.neuron[0] is model.lif
        assert model.holder.neuron[1].neuron is model.lookup["all"][1] is model.block[1]
    assert net.held.neuron is net.holder.neuron[0] is net.lif
    made.other = [framework.net().lif, convert_to_fractional(framework.neuron())]
    assert [row.path for row in conversion_report(made).seen] == ["other[0]"]


@each_framework
def test_a_model_of_hidden_neurons_only_tells_where_they_are(framework):
    net = nn.Linear(1, 1)
    net.layers = [framework.neuron()]
    with pytest.raises(ConversionError, match=rf"layers\[0\] \({framework.native}\): seen, .* plain list"):
        convert_to_fractional(net)


@each_framework
def test_objects_that_hold_each_other_and_large_ones_are_looked_through(framework):
    net = framework.net()
    net.loop = Holder(None)
    net.loop.neuron = [net.loop, {"net": net}]
    net.many = [Holder(i) for i in range(60_000)]
    net.chain = None
    for _ in range(5_000):
        net.chain = Holder(net.chain)
    assert len(plan_conversion(net).converted) == 2


@each_framework
def test_neurons_of_a_superseded_package_are_seen(framework):
    """clock_driven is gone from SpikingJelly 2.0.0: a class whose module has its name stands for it there."""
    if framework.name == "spikingjelly" and importlib.util.find_spec("spikingjelly.clock_driven"):
        from spikingjelly.clock_driven import neuron as old

        legacy = old.LIFNode()
    else:
        legacy = type("LIFNode", (nn.Module,), {"__module__": "spikingjelly.clock_driven.neuron"})()
    net = framework.net()
    net.old = legacy
    (row,) = plan_conversion(net).seen
    assert row.path == "old" and "spikingjelly.activation_based.neuron" in row.note
    with pytest.warns(SpikedeWarning, match="clock_driven"):
        convert_to_fractional(net)
    with pytest.raises(ConversionError, match=r"0 \(LIFNode\): seen, not converted: .*clock_driven"):
        convert_to_fractional(nn.Sequential(legacy))


# -- what no conversion is for --------------------------------------------------------------------


def wrapped() -> SNNWrapper:
    return SNNWrapper(nn.Sequential(nn.Linear(2, 3), LIFNeuron()), integrator="fdeint", alpha=0.5)


@pytest.mark.parametrize("call", [convert_to_fractional, plan_conversion, restore_native])
def test_a_wrapper_says_what_to_call_instead(call):
    for net in (wrapped(), nn.Sequential(wrapped())):
        with pytest.raises(ConversionError, match=r"\(SNNWrapper\) is fractional by itself: pass alpha="):
            call(net)
    text = str(conversion_report(wrapped())).replace("\n", " ")
    assert "alphas(wrapper)" in text and "no spiking neurons" not in text
    assert list(alphas(wrapped())) == ["base.1"]


@each_framework
def test_neurons_beside_a_wrapper_are_converted_and_the_wrappers_own_are_not(framework):
    inner = SNNWrapper(nn.Sequential(nn.Linear(2, 3), framework.neuron()), integrator="fdeint", alpha=0.25)
    net = nn.ModuleDict({"wrapper": inner, "lif": framework.neuron()})
    made = convert_to_fractional(net, alpha=0.5)
    assert [row.path for row in conversion_report(made).rows] == ["lif"]
    assert {path: a.item() for path, a in alphas(made).items()} == {"lif": 0.5, "wrapper.base.1": 0.25}
    assert [row.path for row in plan_conversion(net).rows] == ["lif"]


@each_framework
def test_the_report_of_a_native_model_says_what_to_call(framework):
    report = conversion_report(framework.net())
    assert not report and report.counts == {"excluded": 2}
    assert "convert_to_fractional(model)" in str(report).replace("\n", " ")
    assert "convert_to_fractional" not in str(conversion_report(convert_to_fractional(framework.net())))


def test_looking_for_hidden_neurons_runs_no_code_of_the_model():
    class Shy(nn.Module):
        @property
        def loud(self):
            raise AssertionError("asked")

        def __getattr__(self, name):
            if name == "missing":
                raise AssertionError("asked")
            return super().__getattr__(name)

    net = Shy()
    net.namespace = types.SimpleNamespace(module=sys, text="x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert str(conversion_report(net)) == "no spiking neurons"
