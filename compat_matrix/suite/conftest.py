"""What the regression suite of the matrix shares with the tests: their settings, neurons and small nets."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[2]
# Folders of helper modules. Not the root: the suite tests the installed package.
for folder in (ROOT / "compat_matrix", ROOT / "tests", ROOT / "tests" / "sj"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


@pytest.fixture(autouse=True)
def _snntorch_forgets_the_neurons_of_a_test() -> Iterator[None]:
    """snnTorch keeps every neuron ever made in one list; see tests/conftest.py."""
    snntorch = sys.modules.get("snntorch")
    before = [] if snntorch is None else list(snntorch.SpikingNeuron.instances)
    yield
    snntorch = sys.modules.get("snntorch")
    if snntorch is not None:
        snntorch.SpikingNeuron.instances[:] = before
