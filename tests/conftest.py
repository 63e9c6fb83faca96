"""What every test shares."""

from __future__ import annotations

import os

# Workers of pytest-xdist share the cores; threads on top of them only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import torch
from hypothesis import settings

torch.set_num_threads(1)

# The same examples in every run, and no deadline: first calls import frameworks.
settings.register_profile("spikede", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("spikede")
