"""The golden spikes: which neurons they are of, and their definition written out in float64.

    u_k = gain rate_k - sum_{m=1..k-1} w_m u_{k-m} + impulse_k

over the whole history, with the gain and weights of the solver and nothing of a framework or a fused kernel.
``make_golden.py`` runs this once and writes arrays; the suite compares every cell with the arrays, so a
release (of a framework, of torch, of ours) that changes what a neuron means is found out.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spikede_plugins import get_solver

FOLDER = Path(__file__).resolve().parent / "golden"

THRESHOLD = 1.0
STEPS, NEURONS = 40, 6
ALPHAS = (0.4, 0.7, 1.0)

#: The leak of Leaky: exact in float32 as well, which is what snnTorch keeps it in.
BETA = 0.875
TAU = 1.7
WINDOW = 5


@dataclass(frozen=True)
class Case:
    """One neuron with one set of options.

    Attributes:
        neuron: ``"IF"``, ``"LIF"``, ``"PLIF"`` (SpikingJelly) or ``"Leaky"`` (snnTorch).
        reset: ``"hard"`` or ``"soft"`` (SpikingJelly), ``"zero"`` or ``"subtract"`` (snnTorch).
        alpha: the order.
        method: the solver.
        memory: ``"full"``, ``"window"`` or ``"soe"``.
        decay_input: whether the leak scales the input too (LIF and PLIF).
        v_reset: where a hard reset goes to.
        delay: whether the reset takes place at the next step (Leaky).
    """

    neuron: str
    reset: str
    alpha: float
    method: str = "gl"
    memory: str = "full"
    decay_input: bool = True
    v_reset: float = 0.0
    delay: bool = True

    @property
    def framework(self) -> str:
        return "snntorch" if self.neuron == "Leaky" else "spikingjelly"

    @property
    def name(self) -> str:
        parts = [self.neuron, self.reset, self.method, f"alpha{self.alpha}"]
        parts += [self.memory] * (self.memory != "full")
        parts += ["input_kept"] * (not self.decay_input)
        parts += [f"to{self.v_reset}"] * (self.v_reset != 0.0)
        parts += ["at_once"] * (not self.delay)
        return "-".join(parts)

    @property
    def file(self) -> Path:
        return FOLDER / f"{self.name}.npz"


def _cases() -> list[Case]:
    cases = []
    for alpha in ALPHAS:
        cases += [Case("IF", reset, alpha) for reset in ("hard", "soft")]
        cases += [Case("LIF", "hard", alpha), Case("LIF", "soft", alpha, decay_input=False)]
        cases += [Case("PLIF", "hard", alpha), Case("PLIF", "soft", alpha, decay_input=False)]
        cases += [
            Case("Leaky", reset, alpha, delay=delay)
            for reset, delay in itertools.product(("subtract", "zero"), (True, False))
        ]
    for neuron, reset in (("LIF", "hard"), ("Leaky", "subtract")):
        cases += [
            Case(neuron, reset, alpha, method)
            for method, alpha in itertools.product(("l1", "pred"), (0.4, 0.7))
        ]
        cases += [Case(neuron, reset, 0.4, memory=memory) for memory in ("window", "soe")]
    cases.append(Case("LIF", "hard", 0.7, v_reset=-0.25))
    return cases


CASES = _cases()


@dataclass(frozen=True)
class Golden:
    """What a case gives.

    Attributes:
        x: the input ``[T, N]``, exact in float32.
        spikes: ``[T, N]``.
        v: the potential carried on after the last step, ``[N]``.
        margin: how far every potential that is compared with the threshold keeps from it.
    """

    x: Tensor
    spikes: Tensor
    v: Tensor
    margin: float

    def write(self, file: Path) -> None:
        x, spikes, v = self.x.numpy(), self.spikes.numpy(), self.v.numpy()
        np.savez_compressed(file, x=x, spikes=spikes, v=v, margin=np.float64(self.margin))


def read(file: Path) -> Golden:
    """What :meth:`Golden.write` wrote."""
    with np.load(file) as stored:
        x, spikes, v = (torch.from_numpy(stored[name]) for name in ("x", "spikes", "v"))
        return Golden(x, spikes, v, float(stored["margin"]))


def reference(case: Case, x: Tensor) -> Golden:
    """The case run over an input ``[T, N]`` in float64, the whole history summed up at every step."""
    solver, alpha = get_solver(case.method), torch.tensor(case.alpha, dtype=torch.float64)
    gain, weights = solver.gain(alpha, 1.0), solver.weights(alpha, len(x))
    if case.memory == "window":
        weights = torch.where(torch.arange(1, len(x) + 1) <= WINDOW, weights, 0.0)
    start = torch.full_like(x[0], case.v_reset)
    v, margin = start, float("inf")
    deviations: list[Tensor] = []
    spikes: list[Tensor] = []
    for x_k in x:
        # A delayed reset belongs to the spike of the step before.
        due = (v > THRESHOLD).double() if case.neuron == "Leaky" else torch.zeros_like(v)
        base = v * (1.0 - due) if case.reset == "zero" else v
        u = gain * _rate(case, base, x_k) + (base - v)
        for m, past in enumerate(reversed(deviations)):
            u = u - weights[m] * past
        v = start + u
        if case.reset == "subtract":
            v = v - due * THRESHOLD
        margin = min(margin, float((v - THRESHOLD).abs().min()))
        spike = (v >= THRESHOLD).double()
        v = _reset(case, v, spike, due)
        if case.neuron == "Leaky":  # compared once more, for the delayed reset of the next step
            margin = min(margin, float((v - THRESHOLD).abs().min()))
        deviations.append(v - start)
        spikes.append(spike.bool())
    return Golden(x, torch.stack(spikes), v, margin)


def _rate(case: Case, v: Tensor, x: Tensor) -> Tensor:
    """How the native neuron's charge changes the potential in one step."""
    if case.neuron == "IF":
        return x
    if case.neuron == "Leaky":
        return (BETA - 1.0) * v + x
    rest = case.v_reset if case.reset == "hard" else 0.0
    return (x - (v - rest)) / TAU if case.decay_input else x - (v - rest) / TAU


def _reset(case: Case, v: Tensor, spike: Tensor, due: Tensor) -> Tensor:
    """The potential that is carried on."""
    if case.reset == "hard":
        return torch.where(spike.bool(), case.v_reset, v)
    if case.reset == "soft":
        return v - spike * THRESHOLD
    if case.delay:
        return v
    # snnTorch takes back now what the delayed reset would take back at the next step.
    left = spike - due
    return v - left * THRESHOLD if case.reset == "subtract" else v - left * v
