"""Streams that never end: constant memory, and at the last step still what the formula says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import scale

pytest.importorskip("psutil")
pytest.importorskip("numba", reason="a stream of this length wants the fused engine")

WORKER = Path(__file__).with_name("soak_worker.py")


def soak(what: str, steps: int) -> dict[str, dict[str, float]]:
    """What ``soak_worker.py`` measured, in a process of its own."""
    run = subprocess.run([sys.executable, str(WORKER), what, str(steps)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    for name, one in found.items():
        print(name, one)  # shown by pytest -s, and where a test fails
    return found


def assert_memory_is_flat(one: dict[str, float]) -> None:
    """Within 1 % of what it was after the first tenth of the run."""
    assert one["samples"] >= 4
    assert one["largest resident"] <= 1.01 * one["resident at first"]


@pytest.mark.parametrize("framework", ["spikingjelly", "snntorch"])
def test_a_compressed_memory_streams_on_and_on(framework):
    pytest.importorskip(framework)
    steps = scale.scale(4_000, 1_000_000)
    for one in soak(framework, steps).values():
        assert one["steps"] == steps
        assert_memory_is_flat(one)
        assert one["finite"] and one["spikes a step"] > 0.1
        assert one["late spikes a step"] == pytest.approx(one["spikes a step"], rel=0.05)  # never silent
        # 32 rows, their start, 40 traces at most, the membrane; 8 neurons.
        assert one["largest state"] <= 8 * (32 + 1 + 40 + 1)
        assert one["error"] < 2e-5
        scale.record("streamed with a compressed memory", steps, "steps")


def test_an_event_driven_layer_streams_on_and_on():
    calls = scale.scale(600, 100_000)
    (one,) = soak("events", calls).values()
    assert_memory_is_flat(one)
    assert one["spikes"] > calls / 10 and one["different counts"] == 0
    scale.record("streamed through SpikingODELayer", calls, "intervals")
