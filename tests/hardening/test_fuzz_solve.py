"""``fdeint`` against the schemes written out, ``SNNWrapper`` against the equations of its neurons."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from fuzz_reference import F64, Rule, Trajectory
from fuzz_strategies import ORDERS, Count, attempt, fuzz, ours
from hypothesis import given, note
from hypothesis import strategies as st
from torch import Tensor, nn

from spikede_plugins import (
    IFNeuron,
    LIFNeuron,
    MultiTerm,
    PerChannel,
    SNNWrapper,
    fdeint,
    fdeint_adjoint,
)

SOLVES = Count("fuzzed fdeint problems")


def right_hand_side(kind: str, size: int) -> Any:
    matrix = -torch.eye(size, dtype=F64) + 0.3 * torch.randn(
        size, size, generator=torch.Generator().manual_seed(size), dtype=F64
    )
    return {
        "decay": lambda t, y: -y,
        "forced": lambda t, y: torch.sin(3.0 * t) - 0.5 * y,
        "coupled": lambda t, y: y @ matrix + torch.cos(t),
        "bent": lambda t, y: torch.tanh(y @ matrix) - 0.2 * y**3 / (1.0 + y**2),
        "constant": lambda t, y: torch.ones_like(y),
    }[kind]


def by_scheme(f: Any, y0: Tensor, t0: float, h: float, steps: int, rule: Rule) -> Tensor:
    """Each scheme as it is written, over the whole history."""
    numbers = Trajectory(rule, steps, y0)
    gain = rule.spread(numbers.gain, y0.shape)
    ys, us = [y0], []
    times = [torch.tensor(t0 + k * h, dtype=F64) for k in range(steps + 1)]

    def past(weights: list[Tensor]) -> Tensor:
        kept = len(us) if not rule.window else min(len(us), rule.window)
        return sum(
            (rule.spread(weights[m - 1], y0.shape) * us[-m] for m in range(1, kept + 1)),
            torch.zeros_like(y0),
        )

    first = f(times[0], y0)
    for k in range(1, steps + 1):
        y = y0 + gain * f(times[k - 1], ys[-1]) - past(numbers.weights)
        if numbers.corrector_gain is not None:
            c = rule.spread(numbers.corrector_gain, y0.shape)
            known = y0 - past(numbers.corrector_weights)
            if not rule.window or k - 1 <= rule.window:
                known = known + c * rule.spread(numbers.start_weights[k - 1], y0.shape) * first
            if rule.method == "abm":
                y = known + c * f(times[k], y)
            else:
                for _ in range(400):
                    before, y = y, known + c * f(times[k], y)
                    change, size = ((t.detach().abs().max()) for t in (y - before, y))
                    if float(change) < 1e-15 * (1.0 + float(size)):
                        break
        ys.append(y)
        us.append(y - y0)
    return torch.stack(ys)


@given(st.data())
@fuzz(20, 2000)
def _solve(data: Any) -> None:
    shape = data.draw(st.sampled_from([(1,), (3,), (2, 3), (4, 1, 3), (1, 33)]))
    kind = data.draw(st.sampled_from(["decay", "forced", "coupled", "bent", "constant"]))
    method = data.draw(st.sampled_from(["gl", "l1", "pred", "abm", "trap", "glmulti"]))
    steps = data.draw(st.one_of(st.integers(1, 20), st.sampled_from([0, 16, 17, 33, 129, 150])))
    h, t0 = data.draw(st.sampled_from([0.02, 0.1, 0.3])), data.draw(st.sampled_from([0.0, -1.0, 5.0]))
    memory = data.draw(st.one_of(st.sampled_from(["full", None, -1, "auto", "soe"]), st.integers(1, 30)))
    how = data.draw(st.sampled_from(["one", "one", "channel", "tensor", "terms"]))
    y0 = torch.randn(
        shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999))), dtype=F64
    )
    coefficients = dim = None
    if how in ("channel", "tensor"):
        orders = data.draw(st.lists(ORDERS, min_size=shape[-1], max_size=shape[-1]))
        alpha: Any = PerChannel(orders, dim=-1) if how == "channel" else torch.tensor(orders, dtype=F64)
        numbers, dim = torch.tensor(orders, dtype=F64), len(shape) - 1
    elif how == "terms" and method in ("gl", "glmulti"):
        orders = data.draw(st.lists(ORDERS, min_size=1, max_size=3))
        coefficients = torch.linspace(0.5, 2.0, len(orders), dtype=F64)
        alpha, numbers = MultiTerm(orders, coefficients), torch.tensor(orders, dtype=F64)
        method = data.draw(st.sampled_from(["gl", "glmulti"]))
    else:
        alpha = data.draw(ORDERS)
        numbers = torch.tensor(alpha, dtype=F64)
    run = fdeint_adjoint if data.draw(st.booleans()) else fdeint
    grad = data.draw(st.booleans())
    note(str((shape, kind, method, steps, h, t0, memory, how, alpha, run.__name__, grad)))
    rule = Rule("glmulti" if coefficients is not None else method, numbers, coefficients, dim, h)
    window = memory if isinstance(memory, int) and memory > 0 else 0
    rule = Rule(rule.method, numbers, coefficients, dim, h, window)
    f = right_hand_side(kind, shape[-1])
    t = t0 + h * torch.arange(steps + 1, dtype=F64)
    start = y0.clone().requires_grad_(grad)
    found, error = attempt(lambda: run(f, start, t, alpha=alpha, method=method, memory=memory))
    if memory == "soe" and method in ("abm", "trap"):
        assert ours(error), "a compressed memory was taken"
        SOLVES.add("expected errors")
        return
    if error is not None and ours(error) and ("exponentials" in str(error) or "fixed-point" in str(error)):
        SOLVES.add("expected errors")
        return
    assert error is None, repr(error)
    other = y0.clone().requires_grad_(grad)
    expected = by_scheme(f, other, t0, h, steps, rule)
    folds = {"soe": 32, "auto": 128}.get(str(memory), math.inf)
    tolerance = 1e-9 if steps <= folds or method in ("abm", "trap") else 1e-4
    size = 1.0 + expected.detach().abs().max()
    assert float((found.detach() - expected.detach()).abs().max()) <= tolerance * size
    if grad:
        _, error = attempt(lambda: found.sum().backward())
        if ours(error) and "fixed-point" in str(error):
            SOLVES.add("expected errors")
            return
        assert error is None, repr(error)
        expected.sum().backward()
        size = 1.0 + other.grad.abs().max()
        assert float((start.grad - other.grad).abs().max()) <= 10 * tolerance * size
    SOLVES.add("cases")


def test_solve():
    """Solutions and gradients of drawn problems, methods, orders, memories and grids."""
    _solve()
    SOLVES.record()


WRAPS = Count("fuzzed SNNWrapper runs")


class Skip(nn.Module):
    """A skip connection round a neuron, and one neuron layer of a width of its own.

    What the first neuron gets may depend on the other samples, or on what came before.
    """

    def __init__(self, first: nn.Module, second: nn.Module, mixing: str) -> None:
        super().__init__()
        self.mixing, self.h = mixing, 0.0
        self.a, self.first = nn.Linear(3, 4), first
        self.b, self.second = nn.Linear(4, 4), second

    def current(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.mixing == "samples":
            return x - x.flip(0)
        if self.mixing == "times":
            x = self.h = 0.5 * self.h + x
        return x

    def forward(self, x: Tensor) -> Tensor:
        s = self.first(self.current(x))
        return self.second(self.b(s) + s) + s


def layer(neuron: Any, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rate and spike of a derivative-style neuron, and how far it is from its threshold."""
    drive = x - v if isinstance(neuron, LIFNeuron) else x
    h = v + drive / neuron.initial_tau
    s = (h >= neuron.threshold).to(F64)
    return (drive - s * neuron.threshold) / neuron.initial_tau, s, (h - neuron.threshold).abs()


@given(st.data())
@fuzz(25, 1500)
def _wrap(data: Any) -> None:
    torch.manual_seed(data.draw(st.integers(0, 50)))
    neurons = [
        data.draw(st.sampled_from([LIFNeuron, IFNeuron]))(
            tau=data.draw(st.sampled_from([0.5, 1.0, 2.0])),
            threshold=data.draw(st.sampled_from([0.3, 1.0])),
        )
        for _ in range(2)
    ]
    mixing = data.draw(st.sampled_from(["nothing", "samples", "times"]))
    time = data.draw(st.sampled_from(["auto", "step", *["fold"] * (mixing == "nothing")]))
    base = Skip(*neurons, mixing).double()
    steps, batch = data.draw(st.sampled_from([1, 2, 5, 17, 40])), data.draw(st.sampled_from([0, 1, 2, 3]))
    h = data.draw(st.sampled_from([1.0, 0.25, 0.05]))
    method = data.draw(st.sampled_from(["gl", "l1", "pred", "abm", "trap", "euler"]))
    adjoint = data.draw(st.booleans())
    orders = [data.draw(ORDERS), data.draw(ORDERS)] if method != "euler" else [1.0, 1.0]
    memory = data.draw(st.one_of(st.sampled_from(["full", "auto"]), st.integers(1, 20)))
    chosen = (
        sorted(data.draw(st.sets(st.integers(0, steps - 1), min_size=1)))
        if data.draw(st.booleans())
        else None
    )
    begins = data.draw(st.sampled_from([None, 0.4, -1.0, {"second": 0.7}]))
    cut = data.draw(st.integers(1, steps - 1)) if steps > 1 else 0
    drawn = (mixing, time, neurons, steps, batch, h, method, adjoint, orders, memory, chosen, begins, cut)
    note(str(drawn))
    integrator = "odeint" if method == "euler" else "fdeint_adjoint" if adjoint else "fdeint"
    net = SNNWrapper(
        base, integrator, alpha=orders, alpha_mode="per_layer", method=method, memory=memory, time=time
    )
    x = torch.randn(steps, batch, 3, dtype=F64) * 3
    times = 1.0 + h * torch.arange(steps, dtype=F64)
    if steps == 1:
        h = 1.0
    found, error = attempt(lambda: net(x, times, None if chosen is None else times[chosen], v0=begins))
    if integrator == "fdeint_adjoint" and method in ("abm", "trap"):
        assert ours(error)
        WRAPS.add("expected errors")
        return
    assert error is None, repr(error)
    paths = [
        Trajectory(
            Rule(
                "gl" if method == "euler" else method, torch.tensor(a, dtype=F64), step_size=h,
                window=memory if isinstance(memory, int) else 0,
            ),
            steps, torch.full((batch, 4), start, dtype=F64),
        )
        for a, start in zip(orders, starts_of(begins), strict=True)
    ]  # fmt: skip
    expected, margins = [], []
    base.h = 0.0
    with torch.no_grad():
        for xk in x:
            currents, margin = [base.current(xk)], torch.full((batch,), math.inf, dtype=F64)
            s = []
            for path, neuron in zip(paths, neurons, strict=True):
                _, fired, m = layer(neuron, path.v, currents[-1])
                s.append(fired)
                margin = torch.minimum(margin, m.amin(-1)) if batch else margin
                currents.append(base.b(s[0]) + s[0])
            expected.append(s[1] + s[0])
            margins.append(margin)
            for path, neuron, current in zip(paths, neurons, currents, strict=False):
                if method in ("abm", "trap"):
                    step = corrected(path, neuron, current)
                    path.carry(step[0])
                    margins[-1] = torch.minimum(margins[-1], step[1].amin(-1)) if batch else margins[-1]
                else:
                    path.carry(path.charged(lambda v, n=neuron, c=current: v + layer(n, v, c)[0]))
    fine = torch.cumprod((torch.stack(margins) > 1e-9).long(), 0).bool()
    rows = list(range(steps)) if chosen is None else chosen
    wrong = (found - torch.stack(expected)[rows]).abs().amax(-1) if batch else torch.zeros(len(rows), 0)
    assert not bool((fine[rows] & (wrong > 1e-9)).any()), "the wrapper's output differs"
    assert found.shape == (len(rows), batch, 4)
    if cut and integrator != "fdeint_adjoint":
        run = partial(in_chunks, net, x, times[0], h, begins=begins)
        whole, parts = (attempt(partial(run, cut=first))[0] for first in (steps, cut))
        assert torch.equal(parts, whole), "chunks differ from one run"
        WRAPS.add("runs in chunks")
    WRAPS.add("cases")


def in_chunks(net: SNNWrapper, x: Tensor, t0: Tensor, h: float, cut: int, begins: Any) -> Tensor:
    """The output of the first ``cut`` steps and of the rest, as one."""
    times = t0 + h * torch.arange(len(x) + 1, dtype=F64)
    net.base.h = 0.0  # what a recurrent base keeps
    out, state = net(x[:cut], times[: cut + 1], v0=begins, return_state=True)
    return out if cut == len(x) else torch.cat([out, net(x[cut:], times[cut:], initial_state=state)])


def starts_of(begins: Any) -> list[float]:
    """Where the two neurons begin."""
    if isinstance(begins, dict):
        return [begins.get(name, 0.0) for name in ("first", "second")]
    return [begins or 0.0] * 2


def corrected(path: Trajectory, neuron: Any, current: Tensor) -> tuple[Tensor, Tensor]:
    """A step of a corrector, and how far from its threshold the neuron was at the predicted potential."""
    seen: list[Tensor] = []

    def charge(v: Tensor) -> Tensor:
        rate, _, margin = layer(neuron, v, current)
        seen.append(margin)
        return v + rate

    return path.charged(charge), torch.stack(seen).amin(0)


def test_wrap():
    """The wrapper layer by layer gives what the network gives step by step."""
    _wrap()
    WRAPS.record()
