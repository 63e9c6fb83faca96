"""Each extra, with and without: what it brings works, and without it the package says what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from torch import nn

from spikede_plugins import LIFNeuron, MissingExtraError, SNNWrapper, UnknownNameError
from spikede_plugins.engine.choice import engines
from spikede_plugins.plotting import plot_memory_kernel


def installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in packages)


def engine(name: str) -> tuple[bool, str]:
    """Whether an engine is active, and what it serves or why it is off."""
    (found,) = ((active, why) for label, active, why in engines() if name in label)
    return found


def test_fast() -> None:
    active, why = engine("numba")
    assert active == installed("numba"), why
    assert active or "numba" in why


def test_gpu() -> None:
    fits = installed("triton") and Version(importlib.metadata.version("triton")) >= Version("3.3")
    active, why = engine("Triton")
    if not fits:
        assert not active and "triton" in why
    elif torch.cuda.is_available():
        assert active, why
    else:
        assert not active and "CUDA" in why


def test_plot() -> None:
    if installed("matplotlib"):
        assert len(plot_memory_kernel((1.0, 0.6), lags=20).get_lines()) == 2
    else:
        with pytest.raises(MissingExtraError, match=r"spikede-plugins\[plot\]"):
            plot_memory_kernel((1.0, 0.6), lags=20)


def wrapped() -> torch.Tensor:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 8), LIFNeuron(tau=2.0))
    net = SNNWrapper(base, integrator="odeint", method="rk4")
    return net(3.0 * torch.rand(8, 4, 5), torch.linspace(0, 1, 8))


def test_ode() -> None:
    if installed("torchdiffeq"):
        out = wrapped()
        assert torch.isfinite(out).all() and out.any()
    else:
        with pytest.raises(UnknownNameError, match=r"torchdiffeq, which is not.*spikede-plugins\[ode\]"):
            wrapped()


def test_demo(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "spikede_plugins",
        "demo",
        "--quick",
        "--seeds",
        "1",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    frameworks = [name for name in ("spikingjelly", "snntorch") if installed(name)]
    if installed("sklearn", "matplotlib", "rich") and frameworks:
        assert done.returncode == 0, done.stdout + done.stderr
        (written,) = tmp_path.glob("*.json")
        assert sorted(json.loads(written.read_text(encoding="utf-8"))["summary"]) == sorted(frameworks)
    else:
        assert done.returncode != 0
        assert "pip install" in done.stdout + done.stderr
