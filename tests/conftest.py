"""What every test shares."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Workers of pytest-xdist share the cores; threads on top of them only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

_FRAMEWORKS = ("spikingjelly", "snntorch", "framework")


def _names_no_framework(path: Path) -> bool:
    text = path.read_text(encoding="utf-8").lower()
    return not any(name in text for name in _FRAMEWORKS)


#: Hardening tests that use a framework's neurons and ask about something else: processes, threads, plugins,
#: long streams, solvers. At full scale they run with either pair (tox -e hardening, hardening-oldest).
_NOT_OF_A_RELEASE = (
    "test_bad_plugins.py", "test_concurrency.py", "test_fuzz_solve.py", "test_interrupted_conversion.py",
    "test_lightning.py", "test_resume.py", "test_scale_out.py", "test_security.py", "test_soak.py",
)  # fmt: skip


def _left_out(path: Path) -> bool:
    return _names_no_framework(path) or (
        path.name in _NOT_OF_A_RELEASE and os.environ.get("SPIKEDE_HARDENING") != "full"
    )


#: SPIKEDE_TESTS=frameworks leaves out the files that name no framework, and those hardening tests: what they
#: test is the same with every release of SpikingJelly and snnTorch, and has run with the newest.
collect_ignore = (
    [str(path) for path in Path(__file__).parent.rglob("test_*.py") if _left_out(path)]
    if os.environ.get("SPIKEDE_TESTS") == "frameworks"
    else []
)

# The same examples in every run, and no deadline: first calls import frameworks.
settings.register_profile("spikede", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("spikede")


def _snntorch_instances() -> list[object] | None:
    snntorch = sys.modules.get("snntorch")
    return None if snntorch is None else snntorch.SpikingNeuron.instances


@pytest.fixture(autouse=True)
def _snntorch_forgets_the_neurons_of_a_test() -> Iterator[None]:
    """snnTorch keeps every neuron ever made in one list, through which its class methods reset and detach
    all of them. What one test leaves behind would be touched, and can fail, in another."""
    before = list(_snntorch_instances() or ())
    yield
    instances = _snntorch_instances()
    if instances is not None:
        instances[:] = before
