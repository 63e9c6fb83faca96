"""Sequences, single steps, detached states and rows that begin anew, in any order on one state.

The definition is a loop over all deviations, written out here; autograd differentiates it.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spikede_plugins import PerChannel, SumOfExponentials, get_solver
from spikede_plugins.engine import (
    FRESH,
    ElementwiseNeuron,
    FractionalOperator,
    HistoryLog,
    affine_neuron,
    charge_step,
    scan,
)
from spikede_plugins.engine.affine import AffineCode
from spikede_plugins.engine.rows import restart_rows, restarted_rows
from spikede_plugins.memory import as_memory
from spikede_plugins.orders import FractionalOrder
from spikede_plugins.surrogate import Surrogate

SHAPE = (3, 4)
ORDERS = {"one": 0.6, "channels": PerChannel([0.3, 0.5, 0.7, 0.9], dim=-1)}
MEMORIES = {"full": "full", "window": 11, "soe": SumOfExponentials(tolerance=1e-8, horizon=300)}

#: What is done to one state: n steps at once, n single steps, a detached state, one row put back.
PLANS = {
    "steps behind a sequence": [("scan", 3), ("steps", 3)],
    "across blocks": [("scan", 5), ("steps", 30), ("scan", 2), ("steps", 4), ("scan", 20)],
    "steps in between": [("steps", 2), ("scan", 3), ("steps", 2), ("scan", 3), ("steps", 9)],
    "detached": [("scan", 6), ("detach", 0), ("steps", 4), ("detach", 0), ("scan", 5), ("steps", 2)],
    "a row put back": [("scan", 6), ("restart", 1), ("steps", 7), ("restart", 2), ("scan", 9)],
}


def quadratic(v: Tensor, x: Tensor) -> Tensor:
    return v + (x + 0.2 * (v + 0.5) * (v - 0.4)) / 2.0


def neuron(kind: str) -> ElementwiseNeuron:
    surrogate = Surrogate("atan", 2.0)
    if kind == "affine":
        code = AffineCode(
            leak="divide", tau=2.0, decay_input=True, rest=0.0, short_decay=False, threshold=1.0, reset=None,
            detach_reset=False, surrogate="atan", surrogate_alpha=2.0,
        )  # fmt: skip
        return affine_neuron(code, (), surrogate)

    def fire(h: Tensor) -> tuple[Tensor, Tensor]:
        s = surrogate(h - 1.0)
        return s, (1.0 - s) * h

    return ElementwiseNeuron(quadratic, fire)


def operator(alpha="one", memory="full", method="gl", learn=True) -> FractionalOperator:
    order = FractionalOrder(ORDERS.get(alpha, alpha), learn)
    return FractionalOperator(order, get_solver(method), as_memory(MEMORIES.get(memory, memory))).double()


def play(operator, neuron, plan, x, v):
    """Spikes and potentials of the engine."""
    history, log, outs, first = FRESH, HistoryLog(), [], 0
    for what, n in plan:
        piece = x[first : first + n]
        if what == "scan":
            spikes, v, history, v_seq = scan(operator, neuron, piece, v, history, log, keep_v=True)
            outs += [spikes, v_seq]
        elif what == "steps":
            for one in piece:
                charged, history = charge_step(
                    operator, lambda u, one=one: neuron.charge(u, one), v, history, log
                )
                spike, v = neuron.fire(charged)
                outs += [spike.unsqueeze(0), v.unsqueeze(0)]
        elif what == "detach":
            v, history = v.detach(), history.each(Tensor.detach)
        else:
            rows = torch.arange(SHAPE[0]) == n
            v = torch.where(rows.unsqueeze(1), 0.0, v)
            history = restart_rows(operator, history, v, rows)
        if what in ("scan", "steps"):
            first += n
    return torch.cat(outs[0::2]), torch.cat(outs[1::2])


def by_definition(operator, neuron, plan, x, v, window=None):
    """The same by the equation: every deviation at every step."""
    h = operator.step_size
    gain, weights = (
        operator.solver.gain(operator.order.alpha, h),
        operator.solver.weights(operator.order.alpha, 99),
    )
    weights = weights if weights.dim() > 1 else weights.unsqueeze(-1)
    start, us, outs, first = v, [], [], 0
    for what, n in plan:
        if what == "detach":
            v, us, start = v.detach(), [u.detach() for u in us], start.detach()
        elif what == "restart":
            rows = (torch.arange(SHAPE[0]) == n).unsqueeze(1)
            v = torch.where(rows, 0.0, v)
            us, start = [torch.where(rows, 0.0, u) for u in us], torch.where(rows, v, start)
            us = [*us[:-1], v - start]
        else:
            for one in x[first : first + n]:
                charged = neuron.charge(v, one)
                remembered = us if window is None else us[-window:]
                u = gain * (charged - v) - sum(
                    (weights[m] * past for m, past in enumerate(reversed(remembered))), torch.zeros_like(v)
                )
                spike, v = neuron.fire(start + u)
                us.append(v - start)
                outs += [spike, v]
            first += n
    return torch.stack(outs[0::2]), torch.stack(outs[1::2])


def compare(operator, neuron, plan, window=None, tolerance=1e-9):
    generator = torch.Generator().manual_seed(0)
    steps = sum(n for what, n in plan if what in ("scan", "steps"))
    x = 2 * torch.rand(steps, *SHAPE, generator=generator, dtype=torch.float64)
    factor = torch.randn(2, steps, *SHAPE, generator=generator, dtype=torch.float64)
    found = []
    for run in (play, by_definition):
        leaf, v = x.clone().requires_grad_(), (0.1 + 0.0 * x[0]).requires_grad_()
        more = () if run is play else (window,)
        spikes, potentials = run(operator, neuron, plan, leaf, v, *more)
        loss = (spikes * factor[0]).sum() + (potentials * factor[1]).sum()
        leaves = [leaf, v, *operator.order.parameters()]
        found.append([spikes, potentials, *torch.autograd.grad(loss, leaves)])
    for mine, theirs in zip(*found, strict=True):
        size = max(1.0, float(theirs.detach().abs().max()))
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance * size)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", ["affine", "quadratic"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_any_order_of_calls_is_the_definition(plan, kind, memory):
    """Values, and the gradients to the input, the start and the order."""
    window = MEMORIES[memory] if memory == "window" else None
    compare(operator("one", memory), neuron(kind), PLANS[plan], window, 1e-9 if memory != "soe" else 1e-6)


@pytest.mark.parametrize("method", ["l1", "pred"])
@pytest.mark.parametrize("alpha", ORDERS)
def test_other_solvers_and_orders_a_channel(method, alpha):
    for plan in ("across blocks", "a row put back"):
        compare(operator(alpha, "full", method), neuron("quadratic"), PLANS[plan])


@pytest.mark.parametrize("method", ["gl", "l1", "pred", "abm", "trap"])
@pytest.mark.parametrize("reset", ["never", "spike"])
@pytest.mark.parametrize("memory", ["full", "window", "soe"])
def test_a_row_that_begins_anew_is_a_fresh_one(method, reset, memory):
    """The row put back runs on as a new neuron would; the others as if nothing had been."""
    if memory == "soe" and method in ("abm", "trap"):
        memory = "full"  # correctors keep every state
    given = FractionalOperator(
        FractionalOrder(0.6, False), get_solver(method), as_memory(MEMORIES[memory]), 1.0, reset
    ).double()
    x = 2 * torch.rand(60, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kind = neuron("affine")

    def run(x, restart=None):
        v, history, log, out = torch.zeros_like(x[0]), FRESH, HistoryLog(), []
        for k, one in enumerate(x):
            if k == restart:
                rows = torch.tensor([False, True, False])
                v = torch.where(rows.unsqueeze(1), 0.0, v)
                history = restart_rows(given, history, v, rows)
            charged, history = charge_step(
                given, lambda u, one=one: kind.charge(u, one), v, history, log, affine=True
            )
            spike, v = kind.fire(charged)
            if reset == "spike":
                from spikede_plugins.engine import forget_fired

                history = forget_fired(history, v, spike)
            out.append(v)
        return torch.stack(out)

    found, on, fresh = run(x, 37), run(x), run(x[37:])
    close = 1e-12 if memory != "soe" else 1e-7
    torch.testing.assert_close(found[:, [0, 2]], on[:, [0, 2]], rtol=close, atol=close)
    torch.testing.assert_close(found[37:, 1], fresh[:, 1], rtol=close, atol=close)


def test_rows_put_back_are_told_from_other_edits():
    before = torch.tensor([[0.5, -0.2], [0.3, 0.4], [0.0, 0.0], [-0.1, -0.3], [-0.4, 0.1]])
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]).unsqueeze(1)
    assert restarted_rows([before * mask], [before], [0.0]).tolist() == [False, True, False, False, False]
    assert restarted_rows([before], [before], [0.0]) is None  # row 2 is at its start, and was before
    assert restarted_rows([before.clamp(min=0)], [before], [0.0]) is None  # row 3 is zeros, but clamped
    assert restarted_rows([before + 0.1], [before], [0.0]) is None
    found = restarted_rows([torch.zeros_like(before)], [before], [0.0])
    assert found.tolist() == [True, True, False, True, True]
    # The whole state counts: a row whose current goes on does not begin anew.
    current = torch.ones(5, 2)
    assert restarted_rows([before * mask, current], [before, current], [0.0, 0.0]) is None
    found = restarted_rows([before * mask, current * mask], [before, current], [0.0, 0.0])
    assert found.tolist() == [False, True, False, False, False]
