"""Train, reset, convert, restore, over and over: nothing is kept that the model does not need."""

from __future__ import annotations

import gc
import sys
import warnings
import weakref
from functools import _lru_cache_wrapper

import pytest
import scale
import torch
from small_nets import INPUTS, each_framework

from spikede_plugins import (
    LIFNeuron,
    MultiTerm,
    PerChannel,
    SNNWrapper,
    convert_to_fractional,
    fdeint,
    restore_native,
)
from spikede_plugins.engine import buffers

ALPHAS = (0.3, 0.7, PerChannel([0.4] * 8 + [0.9] * 8), MultiTerm([0.5, 0.9], [1.0, 0.5]), 1.0)
#: Cycles before the first count: everything has been made once.
WARM = 15
MEMORIES = ("auto", "full", "soe", 7)

#: Functions that remember without a bound: what they say is the same for the whole process.
ONE_ANSWER = {
    f"spikede_plugins.engine.{name}"
    for name in (
        "buffers._default_limit", "cpu._failure", "cpu._kernels", "events._kernels", "gpu._kernels",
        "gpu.missing", "threads._openmp",
    )
}  # fmt: skip


def caches():
    """Every function of the package that remembers its answers, by name."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.startswith(("spikede_plugins", "spikede_spikingjelly", "spikede_snntorch")):
            for attribute, value in vars(module).items():
                if isinstance(value, _lru_cache_wrapper):
                    found[f"{name}.{attribute}"] = value
    return found


def containers():
    """The size of every dictionary, list and set at the top of a module or a class of the package."""
    sizes = {}
    for name, module in list(sys.modules.items()):
        if name.startswith(("spikede_plugins", "spikede_spikingjelly", "spikede_snntorch")):
            owners = [(name, vars(module))]
            owners += [(f"{name}.{k}", vars(v)) for k, v in vars(module).items() if isinstance(v, type)]
            for owner, attributes in owners:
                for attribute, value in attributes.items():
                    if isinstance(value, (dict, list, set)) and not attribute.startswith("__"):
                        sizes[f"{owner}.{attribute}"] = len(value)
    return sizes


def census():
    """What is alive: tensors and neurons in Python's reach, neurons in snnTorch's lists."""
    for cache in caches().values():
        if cache.cache_info().maxsize is not None:  # those that are bounded fill up
            cache.cache_clear()
    gc.collect()
    alive = [type(thing) for thing in gc.get_objects()]
    snntorch = sys.modules.get("snntorch")
    return {
        "tensors": sum(issubclass(kind, torch.Tensor) for kind in alive),
        "modules": sum(issubclass(kind, torch.nn.Module) for kind in alive),
        "objects": len(alive),
        "listed by snnTorch": 0 if snntorch is None else len(snntorch.SpikingNeuron.instances),
    }


def assert_no_growth(after, before, cycles):
    for what, count in after.items():
        slack = cycles // 2 if what == "objects" else 0  # less than one object in two cycles
        assert count <= before[what] + slack, f"{what}: {before[what]} before, {count} after {cycles} cycles"


@each_framework
def test_training_and_reset(framework):
    """One model, batches of changing size, a new optimiser now and then."""
    cycles = scale.scale(20, 1_000)
    nets = [
        convert_to_fractional(framework.net(), alpha=0.6, memory=memory, learn_alpha=learned)
        for memory, learned in (("soe", True), ("full", False), ("auto", True))
    ]

    def train(cycle):
        net = nets[cycle % len(nets)]
        optimizer = torch.optim.Adam(net.parameters())
        x = 4 * torch.rand(4 + cycle % 7, 1 + cycle % 5, INPUTS)
        framework.run(net, x).mean().backward()
        optimizer.step()
        with torch.no_grad():
            framework.run(net, x)

    for cycle in range(WARM):
        train(cycle)
    before, sizes = census(), containers()
    for cycle in range(WARM, WARM + cycles):
        train(cycle)
    for cycle in range(WARM - 3, WARM):  # what the newest steps left is of the same size
        train(cycle)
    assert_no_growth(census(), before, cycles)
    assert containers() == sizes
    scale.record("train / reset cycles", cycles, "cycles")


@each_framework
def test_conversion_and_restoration(framework):
    """In place, to and fro, with other orders, solvers and memories each time."""
    cycles = scale.scale(20, 1_000)
    net = framework.net()
    x = 4 * torch.rand(3, 2, INPUTS)
    native = framework.run(net, x)

    def convert(cycle):
        alpha, memory = ALPHAS[cycle % len(ALPHAS)], MEMORIES[cycle % len(MEMORIES)]
        method = "gl" if isinstance(alpha, MultiTerm) or cycle % 2 else "l1"
        if isinstance(alpha, MultiTerm):
            method = "gl"
        orders = {"lif": alpha, "*": 0.1 + cycle % 13 / 20}
        convert_to_fractional(net, alpha=orders, method=method, memory=memory, inplace=True)
        framework.run(net, x).sum().backward()
        restore_native(net, inplace=True)

    for cycle in range(WARM):
        convert(cycle)
    framework.run(net, x)
    before, sizes = census(), containers()
    for cycle in range(cycles):
        convert(cycle)
    assert torch.equal(framework.run(net, x), native)
    assert_no_growth(census(), before, cycles)
    assert containers() == sizes
    scale.record("conversions to and fro", cycles, "cycles")


@each_framework
def test_copies_that_are_dropped_are_freed(framework):
    """snnTorch keeps every neuron ever made in a list; a user who drops copies clears that."""
    cycles = scale.scale(20, 1_000)
    net, x = framework.net(), 4 * torch.rand(3, 2, INPUTS)
    dropped = []

    def copies():
        listed = [] if framework.name == "spikingjelly" else __import__("snntorch").SpikingNeuron.instances
        known = list(listed)
        made = convert_to_fractional(net, alpha=0.6, learn_alpha=True)
        framework.run(made, x).mean().backward()
        restored = restore_native(made)
        listed[:] = known
        dropped.extend(weakref.ref(module) for model in (made, restored) for module in model.modules())

    for _ in range(5):
        copies()
    before = census()
    for _ in range(cycles):
        copies()
    after = census()
    assert_no_growth(after, {**before, "objects": before["objects"] + 2 * len(dropped)}, cycles)
    assert not [module for module in dropped if module() is not None]
    scale.record("conversions to and fro", cycles, "cycles")


def test_sequences_that_are_given_up_leave_no_history():
    """snnTorch with explicit membranes: a new one each time, the old ones dropped by the user."""
    snntorch = pytest.importorskip("snntorch")
    neuron = convert_to_fractional(snntorch.Leaky(beta=0.6), alpha=0.6)
    sequences = scale.scale(200, 5_000)

    def sequence(shape):
        mem = neuron.reset_mem()
        for _ in range(3):
            _, mem = neuron(torch.rand(shape, 4, requires_grad=True), mem)

    for shape in range(1, 40):
        sequence(shape)
    before = census()
    for k in range(sequences):
        sequence(1 + k % 40)
    assert len(neuron._pasts._entries) <= 2 * 16
    after = census()
    after["tensors"] -= 2 * 16 * 8  # entries that are pruned by and by: some tensors each, of bounded number
    assert_no_growth(after, before, sequences)


def test_caches_are_bounded_and_buffers_keep_to_their_limit(monkeypatch):
    """A thousand different orders, lengths and sizes: nothing remembers more than it says."""
    pytest.importorskip("numba")
    spikingjelly = pytest.importorskip("spikingjelly.activation_based")
    monkeypatch.setenv("SPIKEDE_BUFFER_MB", "32")
    buffers.release()
    unbounded = {name for name, cache in caches().items() if cache.cache_info().maxsize is None}
    assert unbounded <= ONE_ANSWER and len(caches()) > len(unbounded)
    sizes = containers()
    rounds = scale.scale(9, 300)
    for k in range(rounds):
        alpha = (k + 1) / (rounds + 1)
        node = convert_to_fractional(
            spikingjelly.neuron.LIFNode(step_mode="m"), alpha=alpha, memory=("full", "soe", 3 + k)[k % 3]
        )
        x = torch.rand(8 + k % 5, 1 + k % 3, 60_000 + 20_000 * (k % 4), requires_grad=True)
        node(x).sum().backward()
        fdeint(lambda t, y: -y, torch.ones(2), torch.linspace(0, 1, 9 + k % 7), alpha=alpha)
        del x, node
        assert buffers.kept_bytes() <= 32 << 20
    assert all(caches()[name].cache_info().currsize <= 2 for name in unbounded)
    grown = {name: size for name, size in containers().items() if size != sizes.get(name, size)}
    assert set(grown) <= {"spikede_plugins.engine.buffers._unused"}, grown
    buffers.release()


def test_wrapper_trains_without_growth():
    cycles = scale.scale(15, 500)
    net = SNNWrapper(
        torch.nn.Sequential(torch.nn.Linear(4, 8), LIFNeuron(tau=2.0)),
        alpha=0.6,
        learn_alpha=True,
        method="gl",
    )
    optimizer = torch.optim.Adam(net.parameters())

    def train(cycle):
        steps = 5 + cycle % 6
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net(torch.rand(steps, 2, 4), torch.linspace(0, 1, steps)).mean().backward()
        optimizer.step()

    for cycle in range(12):
        train(cycle)
    before = census()
    for cycle in range(cycles):
        train(cycle)
    assert_no_growth(census(), before, cycles)
    scale.record("train / reset cycles", cycles, "cycles")
