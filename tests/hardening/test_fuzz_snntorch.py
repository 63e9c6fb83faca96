"""snnTorch neurons with drawn options against the definition written out in float64."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("snntorch")

import snntorch as snn
import torch
from fuzz_reference import F64, Reference, Rule, Trajectory, compare, nudged
from fuzz_strategies import LAYOUTS, Count, Operator, attempt, drive, fuzz, lay_out, operators, ours
from hypothesis import given, note
from hypothesis import strategies as st
from snntorch import surrogate
from torch import Tensor, nn

from spikede_plugins import convert_to_fractional

WIDTH = 5
SPIKES = [
    None, surrogate.atan(alpha=3.0), surrogate.fast_sigmoid(slope=10), surrogate.sigmoid(),
    surrogate.triangular(),
    surrogate.straight_through_estimator(), surrogate.heaviside(), surrogate.spike_rate_escape(),
]  # fmt: skip
#: One number, or one a neuron of the last dimension; the framework clamps what lies outside [0, 1].
DECAYS = st.one_of(st.sampled_from([0.0, 0.5, 0.9, 1.0, 1.2, -0.1]), st.just("several"))
SHAPES = st.sampled_from(
    [(), (WIDTH,), (0, WIDTH), (1, WIDTH), (3, WIDTH), (2, 4, WIDTH), (2, 3, 4, WIDTH), (3, 1400, WIDTH)]
)


@st.composite
def neurons(draw: Any, shape: tuple[int, ...]) -> tuple[str, dict[str, Any]]:
    """A class and its arguments."""
    wide = len(shape) > 0
    name = draw(
        st.sampled_from(["Leaky", "Leaky", "Leaky", "Lapicque", "Synaptic", "Alpha", "RLeaky", "RSynaptic"])
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def decay() -> Any:
        found = draw(DECAYS)
        if found == "several":
            return torch.rand(WIDTH, generator=generator) * 0.9 if wide else 0.7
        return found

    arguments: dict[str, Any] = {
        "threshold": draw(st.sampled_from([1.0, 0.5, 0.5])),
        "spike_grad": draw(st.sampled_from(SPIKES)),
        "reset_mechanism": draw(st.sampled_from(["subtract", "zero", "none"])),
        "init_hidden": draw(st.booleans()),
        "output": draw(st.booleans()),
        "learn_beta": draw(st.booleans()),
        "learn_threshold": draw(st.booleans()),
        "inhibition": len(shape) == 2 and draw(st.integers(0, 9)) == 0,
    }
    if wide and draw(st.integers(0, 3)) == 0:
        arguments["threshold"] = torch.rand(WIDTH, generator=generator) + 0.4
    if name == "Lapicque":
        if draw(st.booleans()):
            arguments["beta"] = draw(st.sampled_from([0.5, 0.9]))
        else:
            arguments |= {"R": draw(st.sampled_from([1.0, 1.5])), "C": draw(st.sampled_from([1.1, 5.0]))}
            arguments["learn_beta"] = False
    elif name == "Alpha":
        arguments |= {"alpha": 0.9, "beta": 0.8}
    else:
        arguments["beta"] = decay()
    if name in ("Synaptic", "RSynaptic"):
        arguments |= {"alpha": decay(), "learn_alpha": draw(st.booleans())}
    if name in ("RLeaky", "RSynaptic"):
        if draw(st.booleans()) and wide:
            arguments |= {"linear_features": WIDTH, "learn_recurrent": draw(st.booleans())}
        else:
            arguments |= {"all_to_all": False, "V": draw(st.sampled_from([0.4, -0.7]))}
    if name in ("Leaky", "Synaptic", "RLeaky"):
        arguments["reset_delay"] = draw(st.booleans())
    if name == "Leaky":
        arguments["graded_spikes_factor"] = draw(st.sampled_from([1.0, 1.0, 0.7]))
        arguments["learn_graded_spikes_factor"] = draw(st.booleans())
    return name, arguments


def native(name: str, arguments: dict[str, Any]) -> nn.Module:
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(snn, name)(**arguments)


# -- edits ----------------------------------------------------------------------------------------

EDITS = st.sampled_from(["none", "none", "clamp", "noise", "mask", "round", "clone", "in place", "rows"])


def edited(kind: str, mem: Tensor, k: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What a user makes of the membrane after step k; how far it was from falling out otherwise; the samples
    ``[B]`` that begin anew."""
    made, margin, rows = mem, None, None
    generator = torch.Generator().manual_seed(k)
    if kind == "clamp":
        made = mem.clamp(-0.25, 0.75)
    elif kind in ("noise", "in place"):
        made = mem + (torch.randint(-8, 9, mem.shape, generator=generator) / 64).to(mem)
    elif kind == "mask" and mem.dim() > 1:
        kept = torch.rand(mem.shape, generator=generator) > 0.3
        made = mem * (kept | (torch.arange(mem.shape[-1]) == 0)).to(mem)
    elif kind == "round":
        made = (torch.floor(4.0 * mem) + 0.5) / 4.0
        margin = (4.0 * mem - torch.round(4.0 * mem)).abs() / 4.0
    elif kind == "clone":
        made = mem.clone()
    elif kind == "rows" and mem.dim() > 1 and mem.shape[0] > 1 and k % 3 == 2:
        rows = torch.rand(mem.shape[0], generator=generator) < 0.5
        rows[0] = False
    return made, margin, rows if rows is not None and bool(rows.any()) else None


def put_back(state: Tensor, rows: Tensor) -> Tensor:
    return state * (~rows).reshape(-1, *([1] * (state.dim() - 1))).to(state)


# -- the definition -------------------------------------------------------------------------------


def reference(
    name: str, node: Any, arguments: dict[str, Any], rule: Rule, x: Tensor, edit: str = "none"
) -> tuple[Reference, dict[str, Tensor]]:
    """One sequence ``x [T, *shape]`` from zeros, edited after every step, and the states it ends in."""
    mem = torch.zeros(x.shape[1:], dtype=F64)
    path = Trajectory(rule, len(x), mem)
    syn = exc = inh = spk = torch.zeros_like(mem)
    mechanism, delay = arguments["reset_mechanism"], arguments.get("reset_delay", True)
    threshold, graded = node.threshold, node.graded_spikes_factor
    outputs, vs, margins = [], [], []
    for k, xk in enumerate(x):
        old = node.spike_grad(mem - threshold).detach().to(F64)
        margin = (mem - threshold).abs()
        base = None
        if name == "Leaky":
            base = (1 - old) * mem if mechanism == "zero" else None

            def charge(v: Tensor, xk: Tensor = xk) -> Tensor:
                return node.beta.clamp(0, 1) * v + xk
        elif name == "Lapicque":

            def charge(v: Tensor, xk: Tensor = xk) -> Tensor:
                return (1 - node.time_step / (node.R * node.C)) * v + xk / node.C * node.time_step
        elif name == "Alpha":
            inh_before = inh
            exc, inh = node.alpha.clamp(0, 1) * exc + xk, node.beta.clamp(0, 1) * inh - xk
            ln_a, ln_b = torch.log(node.alpha), torch.log(node.beta)
            tau = ln_a / (ln_b - ln_a) + 1

            def charge(v: Tensor, exc: Tensor = exc, inh: Tensor = inh, tau: Tensor = tau) -> Tensor:
                return tau * (exc + inh) + torch.zeros_like(v)
        elif name == "RLeaky":
            into = xk + node.recurrent(spk)

            def charge(v: Tensor, into: Tensor = into) -> Tensor:
                return node.beta.clamp(0, 1) * v + into
        else:
            into = xk + (node.recurrent(spk) if name == "RSynaptic" else 0.0)
            syn = node.alpha.clamp(0, 1) * syn + into

            def charge(v: Tensor, syn: Tensor = syn) -> Tensor:
                return node.beta.clamp(0, 1) * v + syn

        h = path.charged(charge, base)
        if name == "Alpha" and mechanism == "subtract":  # the framework's own: the currents are reset
            h, exc, inh = h + inh_before * old, exc - threshold * old, inh - inh * old
        elif name == "Alpha" and mechanism == "zero":
            h, exc, inh = h - h * old, exc - exc * old, inh - inh * old
        elif mechanism == "subtract":
            h = h - old * threshold
        elif mechanism == "zero" and name != "Leaky":
            h = h - old * h
        margin = torch.minimum(margin, (h - threshold).abs())
        s = node.spike_grad(h - threshold)
        own = s.dtype  # some surrogates give float32, in which the framework then divides
        s = s.to(F64)
        if arguments["inhibition"]:
            shifted = (h - threshold).detach()
            best = shifted.argmax(1)
            s = s * torch.zeros_like(s).scatter(1, best.unsqueeze(1), 1.0)
            if shifted.numel():
                first, second = shifted.topk(2, 1).values.unbind(1)
                margin = torch.minimum(margin, (first - second).unsqueeze(1))
        spk = s * graded if not arguments["inhibition"] else s
        mem = h
        if not delay:
            due = (spk.to(own) / graded.to(own)).to(F64) - old
            if mechanism == "subtract":
                mem = mem - due * threshold
            elif mechanism == "zero":
                mem = mem - due * mem
            margin = torch.minimum(margin, (mem - threshold).abs())
        outputs.append(spk)
        vs.append(mem)
        mem, close, rows = edited(edit, mem, k)
        margin = margin if close is None else torch.minimum(margin, close)
        if rows is not None:
            mem, syn, exc, inh, spk = (put_back(state, rows) for state in (mem, syn, exc, inh, spk))
        path.carry(mem, old if delay else outputs[-1])
        if rows is not None:
            path.restart(rows)
        margins.append(margin.broadcast_to(mem.shape))
    shape = x.shape[1:]
    stacked = [
        torch.stack(each) if each else torch.zeros(0, *shape, dtype=F64) for each in (outputs, vs, margins)
    ]
    if name in ("RLeaky", "RSynaptic") and "linear_features" in arguments and len(shape):
        stacked[2] = stacked[2].amin(-1, keepdim=True).expand_as(stacked[2])  # neurons that hear each other
    if arguments["inhibition"] and len(shape) == 2:
        stacked[2] = stacked[2].amin(-1, keepdim=True).expand_as(stacked[2])
    return Reference(*stacked), {"syn": syn, "exc": exc, "inh": inh}


# -- values ---------------------------------------------------------------------------------------

DTYPES = st.sampled_from(
    [torch.float32, torch.float32, torch.float32, torch.float64, torch.float64, torch.bfloat16, torch.float16,
     torch.int64]
)  # fmt: skip
VALUES = Count("fuzzed snnTorch neurons, values")
STATES = {"Leaky": 1, "Lapicque": 1, "Synaptic": 2, "Alpha": 3, "RLeaky": 2, "RSynaptic": 3}


def rule_of(converted: Any, operator: Operator, shape: tuple[int, ...]) -> Rule:
    rule, order = operator.rule(torch.Size(shape)), converted.fractional.order
    return rule if not order.learned else replace(rule, alpha=order.alphas().detach())


def tolerance_of(name: str, dtype: torch.dtype) -> float:
    """The native neurons but Leaky and RLeaky scale their input, and keep currents, in its own precision."""
    if dtype in (torch.bfloat16, torch.float16) and name not in ("Leaky", "RLeaky"):
        return math.inf
    return 1e-9 if dtype == torch.float64 else 1e-4


def play(
    node: Any, name: str, x: Tensor, states: tuple[Tensor, ...] | None, edit: str = "none", first: int = 0
) -> tuple[list[Tensor], list[Tensor], tuple[Tensor, ...] | None]:
    """Spikes and membranes of every step, and the states to go on with."""
    spikes, mems = [], []
    recurrent = name.startswith("R")
    for k, xk in enumerate(x, first):
        if node.init_hidden:
            out = node(xk)
        else:
            given = states or tuple(torch.zeros_like(xk) for _ in range(STATES[name]))
            out = node(xk, *given)
            states = tuple(out) if recurrent else tuple(out[1:])
        spikes.append(out[0] if isinstance(out, tuple) else out)
        mems.append(node.mem.clone() if edit == "in place" else node.mem)
        mem, _, rows = edited(edit, node.mem, k)
        if edit == "in place":
            node.mem.copy_(mem)
            mem = node.mem
        if node.init_hidden and mem is not node.mem:
            node.mem = mem
        elif states is not None:
            states = (*states[:-1], mem)
        if rows is not None and node.init_hidden:
            for state in ("spk", "syn", "syn_exc", "syn_inh", "mem"):
                if state in node._buffers:
                    setattr(node, state, put_back(getattr(node, state), rows))
        elif rows is not None and states is not None:
            states = tuple(put_back(state, rows) for state in states)
    return spikes, mems, states


@given(st.data())
@fuzz(40, 2000)
def _values(data: Any) -> None:
    snn.SpikingNeuron.instances.clear()  # snnTorch keeps all neurons, and what their states hang on
    shape = data.draw(SHAPES)
    name, arguments = data.draw(neurons(shape))
    channels, dim = (
        (shape[-1], -1) if data.draw(st.booleans()) and len(shape) else (shape[1] if len(shape) > 1 else 2, 1)
    )
    operator = data.draw(operators(channels, dim=dim))
    dtype, layout = data.draw(DTYPES), data.draw(st.sampled_from(LAYOUTS))
    # Sequences, and what lies between them.
    small = 12 if max(shape, default=0) > 200 else 40
    count = data.draw(st.integers(1, 3))
    lengths = [
        data.draw(st.one_of(st.integers(1, small), st.sampled_from([16, 17, 33, 130]))) for _ in range(count)
    ]
    if max(shape, default=0) > 200:
        lengths = [min(length, 40) for length in lengths]
    between = [
        data.draw(st.sampled_from(["reset", "detach", "nothing", "train", "no_grad"])) for _ in lengths
    ]
    edit = data.draw(EDITS)
    seed, size = data.draw(st.integers(0, 10**6)), data.draw(st.sampled_from([0.5, 1.5]))
    note(str((name, arguments, shape, operator, dtype, layout, lengths, between, edit)))

    converted, error = attempt(lambda: convert_to_fractional(native(name, arguments), **operator.options))
    if operator.impossible() or (ours(error) and "exponentials" in str(error)):
        assert ours(error), f"{operator.options} were taken"
        VALUES.add("expected errors")
        return
    assert error is None, repr(error)
    if not hasattr(converted, "fractional"):
        return  # order 1 at the native step: the native neuron
    if dtype == torch.float64:
        converted = converted.double()
    exact = native(name, arguments).double()
    x = lay_out(drive(sum(lengths), shape, seed, size, 0.4).to(dtype), layout)
    runs: list[list[Any]] = []  # x, spikes, mems of every sequence since a reset
    states, grad, first = None, True, 0
    for length, what in zip(lengths, between, strict=True):
        piece = x[first : first + length]
        first += length

        def call(piece: Tensor = piece, states: Any = states, grad: bool = grad) -> Any:
            with torch.set_grad_enabled(grad):
                return play(converted, name, piece, states, edit, len(runs[-1][0]) if runs else 0)

        found, error = attempt(call)
        if not operator.fits(torch.Size(shape)):
            assert ours(error), f"orders that do not fit were taken: {operator.alpha} on {shape}: {error!r}"
            VALUES.add("expected errors")
            return
        if error is not None:
            _, theirs = attempt(lambda piece=piece: play(native(name, arguments), name, piece, None))
            assert type(theirs) is type(error), f"{error!r}, natively {theirs!r}"
            VALUES.add("expected errors")
            return
        spikes, mems, states = found
        if not runs:
            runs.append([[], [], []])
        for kept, new in zip(runs[-1], (list(piece), spikes, mems), strict=True):
            kept += new
        if what == "reset":
            with torch.no_grad():
                converted.reset_mem()
            if not converted.init_hidden:
                states = None
            runs.append([[], [], []])
        elif what == "detach" and not converted.init_hidden:
            states = tuple(state.detach() for state in states)
        elif what == "detach":
            type(converted).detach_hidden()
        elif what == "train":
            converted.train(not converted.training)
        elif what == "no_grad":
            grad = not grad
    for xs, spikes, mems in runs:
        if not xs:
            continue
        rule = rule_of(converted, operator, shape)
        expected, _ = reference(name, exact, arguments, rule, torch.stack(xs).to(F64), edit)
        tolerance = max(tolerance_of(name, dtype), operator.error(len(xs)))
        whole = arguments.get("graded_spikes_factor", 1.0) == 1.0
        outputs = torch.stack([s.to(F64) for s in spikes]) if whole else None
        compare(
            expected, tolerance, outputs=outputs, vs=torch.stack([m.to(F64) for m in mems]),
            until=operator.until(len(xs)), what=name,
            again=lambda draw, xs=xs, rule=rule: reference(
                name, exact, arguments, rule, nudged(torch.stack(xs).to(F64), dtype, draw), edit
            )[0],
        )  # fmt: skip
    VALUES.add("cases")


def test_values():
    """Spikes and membranes over several sequences, however they are cut, are those of the definition."""
    _values()
    VALUES.record()
