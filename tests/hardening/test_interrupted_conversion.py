"""A conversion that is broken off leaves a model that is all native or all fractional, and works as that."""

from __future__ import annotations

import _thread
import gc
import os
import random
import signal
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import scale
import torch
from small_nets import each_framework
from torch import nn

import spikede_plugins
from spikede_plugins import conversion_report, convert_to_fractional, restore_native
from spikede_plugins.uninterrupted import Uninterrupted

ADAPTERS = ("spikede_spikingjelly", "spikede_snntorch")
BLOCKS = 6
PACKAGES = (
    str(Path(spikede_plugins.__file__).parent),
    *(spec.submodule_search_locations[0] for spec in map(find_spec, ADAPTERS) if spec is not None),
)


class Deep(nn.Module):
    """Many neurons: as children, as a child of two modules, and in a plain list."""

    def __init__(self, framework):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), framework.neuron()) for _ in range(BLOCKS))
        self.twice = self.blocks[1][1]
        self.last_two = [self.blocks[-2][1], self.blocks[-1][1]]

    def forward(self, x):
        spikes = [block(x) for block in self.blocks[:-1]]
        return torch.cat([*spikes, self.last_two[1](self.blocks[-1][0](x))], 1)


class Conversions:
    """Conversions of one model in place, to and fro, and what it has to be after each."""

    def __init__(self, framework):
        self.framework = framework
        self.net = Deep(framework)
        self.x = 4 * torch.rand(4, 2, 4, generator=torch.Generator().manual_seed(1))
        native = framework.run(self.net, self.x)
        fractional = framework.run(convert_to_fractional(self.net, alpha=0.6), self.x)
        assert native.sum() > 0 and not torch.equal(native, fractional)
        self.expected = {False: native, True: fractional}

    def go(self):
        if conversion_report(self.net):
            restore_native(self.net, inplace=True)
        else:
            convert_to_fractional(self.net, alpha=0.6, inplace=True)

    def check(self):
        """Nothing is half: neurons, references to them, spikes, and what the framework knows of them."""
        report = conversion_report(self.net)
        assert len(report.converted) in (0, BLOCKS)
        assert self.net.twice is self.net.blocks[1][1]
        assert self.net.last_two == [self.net.blocks[-2][1], self.net.blocks[-1][1]]
        spikes = self.framework.run(self.net, self.x)
        assert torch.equal(spikes, self.expected[bool(report)])
        if self.framework.name == "snntorch":
            from snntorch import SpikingNeuron

            known = [id(neuron) for neuron in SpikingNeuron.instances]
            assert all(known.count(id(block[1])) == 1 for block in self.net.blocks)


class CtrlC:
    """A signal handler that raises while a conversion runs, as that of Ctrl-C does; twice at most."""

    left = 2

    def __call__(self, _, frame):
        while frame is not None and self.left:
            if frame.f_code is Conversions.go.__code__:
                self.left -= 1
                raise KeyboardInterrupt
            frame = frame.f_back


@each_framework
def test_a_signal_at_any_instant(framework, monkeypatch):
    """Python lets the handler raise between any two operations of the main thread."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # one raised in a finalizer goes nowhere
    work = Conversions(framework)
    start = time.perf_counter()
    for _ in range(4):
        work.go()
    seconds = (time.perf_counter() - start) / 4
    chance = random.Random(0)
    before = signal.getsignal(signal.SIGALRM)
    interrupted, threads = 0, _thread._count()
    try:
        for _ in range(scale.scale(30, 1_000)):
            signal.signal(signal.SIGALRM, CtrlC())
            # And once more soon after: what is being undone is not broken off either.
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, 1.05 * seconds), 5e-5)
            try:
                work.go()
            except KeyboardInterrupt:
                interrupted += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            while _thread._count() > threads:  # a change that has begun comes to its end
                time.sleep(1e-4)
            work.check()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 5
    scale.record("faults injected and survived", interrupted, "faults")


def test_what_has_begun_comes_to_its_end():
    """Two signals while it is being done: neither breaks it off, and Ctrl-C is not lost."""
    done = []

    def change():
        for part in range(4):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.02)  # the main thread has its handler run now
            done.append(part)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            Uninterrupted(change).run()
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == [0, 1, 2, 3]


def test_an_error_of_the_change_itself_is_raised():
    with pytest.raises(ZeroDivisionError):
        Uninterrupted(lambda: 1 / 0).run()


class Failure:
    """Raises at the n-th line of the package that is run, in whatever thread."""

    def __init__(self, error, at):
        self.error, self.at, self.lines, self.change = error, at, 0, 0

    def _trace(self, frame, event, _):
        name = frame.f_code.co_filename
        if not name.startswith(PACKAGES) or name.endswith("uninterrupted.py"):  # what waits for the thread
            return None
        if event == "line":
            self.lines += 1
            if frame.f_code.co_name == "_change" and not self.change:
                self.change = self.lines  # from here on neurons are exchanged
            if self.lines == self.at:
                raise self.error
        return self._trace

    def __enter__(self):
        gc.disable()  # finalizers run at instants of their own
        self.before = sys.gettrace()
        threading.settrace(self._trace)
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)
        threading.settrace(self.before)
        gc.enable()


def spread(first, last, count):
    assert last - first > 20
    return sorted({round(first + (last - first) * i / count) for i in range(count)})


@each_framework
@pytest.mark.parametrize("error", [MemoryError("no more"), KeyboardInterrupt()], ids=["memory", "interrupt"])
def test_an_error_at_any_line(framework, error):
    """The n-th line that a conversion runs fails, for n from the first to the last."""
    work = Conversions(framework)
    with Failure(error, 0) as count:
        work.go()
    with Failure(error, 0) as back:
        work.go()
    places = []
    for run in (count, back):
        places += [
            *spread(1, run.change, scale.scale(3, 300)),
            *spread(run.change, run.lines, scale.scale(9, 300)),
        ]
    failed = 0
    for at in places:
        try:
            with Failure(error, at):
                work.go()
        except BaseException as caught:
            if not isinstance(caught, (type(error), spikede_plugins.SpikedeError)):
                raise
            failed += 1
        work.check()
    assert failed > 10
    scale.record("faults injected and survived", failed, "faults")
