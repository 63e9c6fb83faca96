"""The fractional LIF neuron of Teka, Marinov & Santamaria (2014), from the project's own parts.

    tau D^a V = -(V - V_rest) + R I,   tau = 20 ms, R I = 120 mV (3 nA), V_rest = V_reset = -70 mV,
    V_th = -50 mV, V_peak = +30 mV, dt = 0.1 ms, refractory 8 ms.

The peak and the plateau at the reset potential enter the history: memory of spikes is what makes the
neuron adapt. Expected values: PLoS Computational Biology 10(3): e1003526, and the exact first spike as
the root of 120 (1 - E_a(-t^a / 20)) = 20.
"""

from __future__ import annotations

import pytest
import torch

from spikede_plugins.engine import FRESH, FractionalOperator, HistoryLog, charge_step
from spikede_plugins.orders import FractionalOrder, PerChannel
from spikede_plugins.solvers.l1 import L1

ALPHAS = (1.0, 0.8, 0.6, 0.4, 0.2)
DT, TAU, REST, THRESHOLD, PEAK = 0.1, 20.0, -70.0, -50.0, 30.0
REFRACTORY = 79  # 8 ms are 80 steps, the step of the peak included


def simulate(drive_mv: float, milliseconds: float) -> tuple[torch.Tensor, list[list[float]]]:
    """Potentials [steps, len(ALPHAS)] and the spike times (ms) of one neuron an order."""
    operator = FractionalOperator(
        FractionalOrder(PerChannel(ALPHAS, dim=0)), L1(), step_size=DT
    )
    v = torch.full((len(ALPHAS),), REST, dtype=torch.float64)
    held = torch.zeros(len(ALPHAS), dtype=torch.int64)
    history, log = FRESH, HistoryLog()
    trace, spikes = [], [[] for _ in ALPHAS]
    for k in range(1, round(milliseconds / DT) + 1):
        charged, history = charge_step(
            operator, lambda v: v + (-(v - REST) + drive_mv) / TAU, v, history, log
        )
        fires = (charged >= THRESHOLD) & (held == 0)
        v = torch.where(held > 0, torch.full_like(v, REST), charged)
        v = torch.where(fires, torch.full_like(v, PEAK), v)
        held = torch.where(fires, torch.full_like(held, REFRACTORY), (held - 1).clamp_min(0))
        for i in fires.nonzero().flatten().tolist():
            spikes[i].append(round(k * DT, 6))
        trace.append(v)
    return torch.stack(trace), spikes


@pytest.fixture(scope="module")
def driven() -> list[list[float]]:
    with torch.no_grad():
        return simulate(120.0, 1000.0)[1]


@pytest.mark.parametrize(
    ("alpha", "first", "exact", "count"),
    [
        (1.0, 3.7, 3.6464, 86),
        (0.8, 4.8, 4.728, 80),
        (0.6, 7.8, 7.6846, 71),
        (0.4, 22.3, 22.1426, 53),
        (0.2, 640.0, 639.888, 5),
    ],
)
def test_spikes_of_the_published_table(driven, alpha, first, exact, count):
    times = driven[ALPHAS.index(alpha)]
    assert times[0] == pytest.approx(first, abs=DT + 1e-9)
    assert times[0] == pytest.approx(exact, abs=2 * DT)
    assert len(times) == count


def test_every_spike_at_alpha_02(driven):
    assert driven[ALPHAS.index(0.2)] == pytest.approx([640.0, 741.9, 827.6, 905.0, 977.0], abs=DT + 1e-9)


def test_intervals_lengthen_only_with_memory(driven):
    """Spike-frequency adaptation: the integer neuron is regular, the fractional one changes its pace."""
    integer = torch.tensor(driven[0]).diff()
    fractional = torch.tensor(driven[ALPHAS.index(0.4)]).diff()
    assert integer.max() - integer.min() <= DT + 1e-4
    assert (fractional.max() - fractional.min()) > 10 * DT


def test_potential_below_threshold_follows_the_mittag_leffler_solution():
    with torch.no_grad():
        trace, spikes = simulate(12.0, 1000.0)
    v = trace[:, ALPHAS.index(0.4)]
    assert not spikes[ALPHAS.index(0.4)]
    found = [v[round(t / DT) - 1].item() for t in (50.0, 200.0, 1000.0)]
    assert found == pytest.approx([-67.3774, -66.0105, -64.0478], abs=5e-3)
