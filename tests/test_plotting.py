"""The figures show the numbers they are given."""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("matplotlib")

from spikede_plugins import plotting
from spikede_plugins.errors import MissingExtraError, OptionError, UnknownNameError
from spikede_plugins.solvers.l1 import L1


def test_kernel_shows_the_weights_of_the_solver() -> None:
    ax = plotting.plot_memory_kernel((1.0, 0.6), lags=50)
    integer, fractional = ax.get_lines()
    assert list(integer.get_xdata()) == [1]
    expected = torch.cumprod(1.0 - 1.6 / torch.arange(1, 51, dtype=torch.float64), 0).abs()
    assert torch.allclose(torch.tensor(fractional.get_ydata(), dtype=torch.float64), expected)
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert ax.get_xlabel() and ax.get_ylabel()


def test_kernel_takes_a_solver_and_an_axes() -> None:
    ax = plotting.new_figure().subplots()
    assert plotting.plot_memory_kernel((0.5,), method=L1(), lags=10, ax=ax) is ax
    assert len(ax.get_lines()) == 1


def test_traces_do_not_overlap() -> None:
    traces = {"a": [0.0, 0.5, 1.0], "b": torch.tensor([0.0, -0.5, 0.5])}
    ax = plotting.plot_membrane_traces(traces, spikes={"a": torch.tensor([0.0, 0.0, 1.0])})
    first, second = (line.get_ydata() for line in ax.get_lines() if len(line.get_xdata()) == 3)
    assert min(first) > max(second)
    assert [t.get_text() for t in ax.texts] == ["a\n1 spikes", "b"]


def test_accuracy_bars() -> None:
    results = {
        "integer": {"clean": (0.8, 0.01), "noisy": (0.5, 0.02)},
        "fractional": {"clean": (0.9, 0.01), "noisy": (0.6, 0.02)},
    }
    ax = plotting.plot_accuracy(results)
    heights = [bar.get_height() for bar in ax.patches]
    assert heights == pytest.approx([80.0, 50.0, 90.0, 60.0])
    assert [t.get_text() for t in ax.get_xticklabels()] == ["clean", "noisy"]
    assert ax.get_ylim()[1] > 91.0


def test_bad_input() -> None:
    with pytest.raises(OptionError, match="lags must be at least 1"):
        plotting.plot_memory_kernel(lags=0)
    with pytest.raises(OptionError, match="alphas is empty"):
        plotting.plot_memory_kernel(())
    with pytest.raises(UnknownNameError):
        plotting.plot_memory_kernel(method="no such solver")
    with pytest.raises(OptionError, match="traces is empty"):
        plotting.plot_membrane_traces({})
    with pytest.raises(OptionError, match="results is empty"):
        plotting.plot_accuracy({})


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r'pip install "spikede-plugins\[plot\]"'):
        plotting.plot_memory_kernel()
