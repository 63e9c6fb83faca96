"""A training run that is killed and goes on from its last checkpoint ends where an undisturbed one ends."""

from __future__ import annotations

import multiprocessing
import random
import signal
import sys
import time

import pytest
import scale
import torch
from small_nets import each_framework
from train_worker import train

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL and no fork there")

STEPS = scale.scale(6, 30)
#: Fresh interpreters, as after a crash; the default run spares itself their start.
PROCESSES = multiprocessing.get_context("spawn" if scale.FULL else "fork")


class Run:
    """A training process."""

    def __init__(self, framework, folder):
        self.here, there = PROCESSES.Pipe(duplex=False)
        arguments = (framework.name, folder, STEPS, there.send)
        self.process = PROCESSES.Process(target=train, args=arguments)
        self.process.start()
        there.close()

    def hears(self):
        return self.here.recv()

    def rest(self):
        """What it still tells, until its end."""
        told = []
        while True:
            try:
                told.append(self.hears())
            except EOFError:
                self.process.join()
                return told


@each_framework
def test_kill_and_resume_to_the_same_bits(framework, tmp_path):
    chance, kills = random.Random(0), scale.scale(2, 10)
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    folder.mkdir(), whole.mkdir()
    undisturbed = []
    train(framework.name, whole, STEPS, undisturbed.append)  # here, so that forks have everything loaded
    assert undisturbed[0] == ("begins at", 0) and len(undisturbed) == STEPS + 2
    begun = 0
    for kill in range(kills):
        run = Run(framework, folder)
        assert run.hears() == ("begins at", begun)
        wanted = begun + 1 + kill % 2
        while begun < wanted:
            begun = run.hears()[1]
        time.sleep(chance.uniform(0.0, 0.02))  # somewhere in the next step, or while it is saved
        run.process.kill()
        told = run.rest()
        assert run.process.exitcode == -signal.SIGKILL
        saved = torch.load(folder / "checkpoint.pt", weights_only=True)["done"]
        assert saved - max([begun, *(step for _, step in told)]) in (0, 1)  # saved, and not told of any more
        begun = saved
    resumed = Run(framework, folder).rest()
    assert resumed[0] == ("begins at", begun) and 0 < begun < STEPS
    assert resumed[-1][0] == "result" and resumed[-1] == undisturbed[-1]
    scale.record("faults injected and survived", kills, "faults")
