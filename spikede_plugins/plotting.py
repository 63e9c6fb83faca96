"""Figures: the memory kernel, membrane traces, accuracy bars.

Each function draws on the ``Axes`` it is given, or makes its own. Matplotlib is imported when a figure is
asked for, not before (``pip install "spikede-plugins[plot]"``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spikede_plugins.errors import MissingExtraError, OptionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from spikede_plugins.solvers import Solver

#: Okabe & Ito's palette: told apart by colour-blind readers, also in print.
PALETTE = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")


def new_figure(width: float = 6.4, height: float = 4.4) -> Figure:
    """An empty figure that needs no window system: it is saved with ``figure.savefig(path)``.

    Args:
        width, height: inches.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            'figures need matplotlib, which is not installed: pip install "spikede-plugins[plot]".'
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def _axes(ax: Axes | None) -> Axes:
    return new_figure().subplots() if ax is None else ax


def _tidy(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)


def plot_memory_kernel(
    alphas: Sequence[float] = (0.3, 0.5, 0.7, 0.9),
    *,
    method: str | Solver = "gl",
    lags: int = 1000,
    ax: Axes | None = None,
) -> Axes:
    """The memory weights ``|w_m|`` of a solver over the lag m, both axes logarithmic.

    A straight line is a power law, ``|w_m| ~ m^-(1+alpha)``: no time scale after which the past is
    forgotten. The integer neuron (alpha = 1) is a single point, ``w_1 = -1``.

    Args:
        alphas: orders in (0, 1].
        method: a solver or its name.
        lags: how many weights.
        ax: where to draw; a new figure if None.

    Raises:
        MissingExtraError: if matplotlib is not installed.
        OptionError: if ``lags`` < 1 or there is no order.
        UnknownNameError: for an unknown solver.
    """
    from spikede_plugins.registry import get_solver

    if lags < 1:
        raise OptionError(f"lags must be at least 1, got {lags}.")
    if not alphas:
        raise OptionError("alphas is empty; give at least one order, e.g. alphas=(0.7,).")
    solver = get_solver(method) if isinstance(method, str) else method
    ax = _axes(ax)
    m = range(1, lags + 1)
    for i, alpha in enumerate(alphas):
        weights = solver.weights(torch.tensor(float(alpha), dtype=torch.float64), lags).abs()
        colour = PALETTE[i % len(PALETTE)]
        if alpha == 1.0:
            ax.plot([1], weights[:1].tolist(), "o", color=colour, label="α = 1 (integer): lag 1 only")
        else:
            ax.plot(m, weights.tolist(), color=colour, linewidth=1.8, label=f"α = {alpha:g}")
    ax.set(xscale="log", yscale="log", xlabel="lag m (time steps)", ylabel="memory weight |w$_m$|")
    ax.grid(True, which="major", alpha=0.25)
    ax.legend(frameon=False)
    _tidy(ax)
    return ax


def plot_membrane_traces(
    traces: Mapping[str, Tensor | Sequence[float]],
    *,
    spikes: Mapping[str, Tensor | Sequence[float]] | None = None,
    threshold: float = 1.0,
    ax: Axes | None = None,
) -> Axes:
    """Membrane potentials over time, one row a trace, so that spikes do not hide each other.

    Args:
        traces: label -> potential ``[T]``.
        spikes: label -> spikes ``[T]`` (nonzero = fired), drawn as ticks above the trace.
        threshold: the dotted line of each row; it is also the unit of the vertical axis.
        ax: where to draw; a new figure if None.

    Raises:
        MissingExtraError: if matplotlib is not installed.
        OptionError: if there is no trace.
    """
    if not traces:
        raise OptionError("traces is empty; give at least one potential, e.g. {'LIF': v}.")
    ax = _axes(ax)
    values = {label: torch.as_tensor(v).detach().reshape(-1).tolist() for label, v in traces.items()}
    low = min(0.0, *(min(v) for v in values.values()))
    row = 1.55 * threshold - low
    ticks: list[float] = []
    for i, (label, v) in enumerate(values.items()):
        base = -i * row
        ticks += [base, base + threshold]
        time = range(1, len(v) + 1)
        colour = PALETTE[i % len(PALETTE)]
        ax.axhline(base + threshold, color="0.6", linewidth=0.8, linestyle=":")
        ax.plot(time, [base + x for x in v], color=colour, linewidth=1.4)
        fired = torch.as_tensor((spikes or {}).get(label, [])).detach().reshape(-1)
        at = [t + 1 for t in torch.nonzero(fired).reshape(-1).tolist()]
        ax.vlines(at, base + 1.1 * threshold, base + 1.35 * threshold, color=colour, linewidth=1.4)
        count = f"\n{len(at)} spikes" if spikes and label in spikes else ""
        # Outside the axes: no trace can run through its own label.
        ax.annotate(
            label + count, (1.01, base + 0.5 * threshold), xycoords=("axes fraction", "data"),
            color=colour, va="center", fontsize="small", annotation_clip=False,
        )
    ax.set_yticks(ticks, [f"{x:g}" for x in (0.0, threshold)] * len(values))
    ax.set(xlabel="time (steps)", ylabel="membrane potential (threshold = dotted)")
    ax.margins(x=0.01)
    _tidy(ax)
    return ax


def plot_accuracy(
    results: Mapping[str, Mapping[str, tuple[float, float]]],
    *,
    ax: Axes | None = None,
) -> Axes:
    """Grouped bars with error bars.

    Args:
        results: variant -> {condition -> (mean, standard deviation)}, both as fractions of 1.
        ax: where to draw; a new figure if None.

    Raises:
        MissingExtraError: if matplotlib is not installed.
        OptionError: if there is nothing to draw.
    """
    if not results:
        raise OptionError("results is empty; give e.g. {'integer': {'clean': (0.9, 0.01)}}.")
    ax = _axes(ax)
    conditions = list(dict.fromkeys(c for r in results.values() for c in r))
    width = 0.84 / len(results)
    style: dict[str, Any] = {"edgecolor": "white", "error_kw": {"elinewidth": 1.0, "capsize": 2.5}}
    top = 0.0
    for i, (variant, measured) in enumerate(results.items()):
        places = [c + (i - (len(results) - 1) / 2) * width for c in range(len(conditions))]
        mean = [100.0 * measured.get(c, (float("nan"), 0.0))[0] for c in conditions]
        std = [100.0 * measured.get(c, (0.0, float("nan")))[1] for c in conditions]
        bars = ax.bar(
            places, mean, width, yerr=std, color=PALETTE[i % len(PALETTE)], label=variant,
            hatch=_HATCHES[i % len(_HATCHES)], **style,
        )
        ax.bar_label(bars, fmt="%.0f", padding=2, fontsize="small")
        top = max([top, *(m + s for m, s in zip(mean, std, strict=True) if m + s == m + s)])
    ax.set_xticks(range(len(conditions)), conditions)
    ax.set_ylabel("test accuracy (%)")
    ax.set_ylim(0.0, 1.12 * top if top else 1.0)
    _tidy(ax)
    return ax
