"""SpikingJelly neurons with drawn options against the definition written out in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("spikingjelly")

import torch
from fuzz_reference import F64, Reference, Rule, Trajectory, compare, nudged
from fuzz_strategies import (
    LAYOUTS,
    LENGTHS,
    SHAPES,
    Count,
    Operator,
    attempt,
    drive,
    fuzz,
    lay_out,
    operators,
    ours,
    pieces,
)
from hypothesis import given, note
from hypothesis import strategies as st
from spikingjelly.activation_based import neuron, surrogate
from torch import Tensor, nn

from spikede_plugins import convert_to_fractional

EXPLICIT_STATES = not hasattr(neuron.BaseNode, "neuronal_charge")

#: What each neuron may be given; all of them take a threshold and ``detach_reset`` where the table has no {}.
RESETS = st.sampled_from([0.0, None, -0.25, 0.25])
TAUS = st.sampled_from([1.5, 2.0, 10.0, 100.0])
KINDS: dict[str, dict[str, Any]] = {
    "IFNode": {"v_reset": RESETS},
    "LIFNode": {"v_reset": RESETS, "tau": TAUS, "decay_input": st.booleans()},
    "ParametricLIFNode": {
        "v_reset": RESETS, "init_tau": st.sampled_from([1.1, 2.0, 10.0]), "decay_input": st.booleans()
    },
    "QIFNode": {"v_reset": st.sampled_from([0.0, -0.1, None]), "tau": TAUS},
    "EIFNode": {"v_reset": st.sampled_from([0.0, -0.1, None]), "tau": TAUS},
    "IzhikevichNode": {
        "v_reset": st.sampled_from([0.0, -0.1, None]), "tau": TAUS, "a": st.sampled_from([0.0, 0.3]),
        "b": st.sampled_from([0.0, 0.2]), "w_rest": st.sampled_from([0.0, 0.1]),
        "tau_w": st.sampled_from([2.0, 100.0]),
    },
    "KLIFNode": {
        "v_reset": RESETS if EXPLICIT_STATES else st.sampled_from([0.0, -0.25]), "tau": TAUS,
        "decay_input": st.booleans(), "scale_reset": st.booleans(),
    },
    "LIAFNode": {
        "v_reset": RESETS, "tau": TAUS, "decay_input": st.booleans(), "threshold_related": st.booleans(),
        "act": st.sampled_from([torch.relu, torch.tanh]),
    },
    "SimpleIFNode": {"v_reset": RESETS},
    "SimpleLIFNode": {"v_reset": RESETS, "tau": TAUS, "decay_input": st.booleans()},
    "CUBALIFNode": {"v_reset": RESETS},
    "ILIFNode": {"tau": st.sampled_from([1.5, 2.0, 10.0])},
    "HalfThresholdIFNode": {},
    "TernaryIFNode": {"v_reset": RESETS},
    "TernaryLIFNode": {"v_reset": RESETS, "tau": TAUS, "decay_input": st.booleans()},
    "ComplementaryLIFNode": {"tau": TAUS},
}  # fmt: skip
AVAILABLE = [name for name in KINDS if hasattr(neuron, name) and (EXPLICIT_STATES or name != "LIAFNode")]
AFFINE = {
    "IFNode", "LIFNode", "ParametricLIFNode", "SimpleIFNode", "SimpleLIFNode", "CUBALIFNode", "ILIFNode",
    "HalfThresholdIFNode", "TernaryIFNode", "TernaryLIFNode", "ComplementaryLIFNode", "LIAFNode",
}  # fmt: skip
SURROGATES = [
    surrogate.Sigmoid, surrogate.ATan, surrogate.PiecewiseQuadratic, surrogate.Erf, surrogate.SoftSign,
    surrogate.PiecewiseLeakyReLU,
]  # fmt: skip


@st.composite
def neurons(draw: Any) -> tuple[str, dict[str, Any]]:
    name = draw(st.sampled_from(AVAILABLE))
    arguments = {key: draw(values) for key, values in KINDS[name].items()}
    if name not in ("ILIFNode",):
        arguments["surrogate_function"] = draw(st.sampled_from(SURROGATES))()
    if name not in ("ComplementaryLIFNode",):
        arguments["v_threshold"] = draw(st.sampled_from([1.0, 0.5]))
    if name not in ("CUBALIFNode", "ComplementaryLIFNode"):
        arguments["detach_reset"] = draw(st.booleans())
    return name, arguments


def native(name: str, arguments: dict[str, Any], step_mode: str = "m") -> nn.Module:
    made = getattr(neuron, name)(**arguments)
    made.step_mode = step_mode
    return made


# -- the definition of each kind ------------------------------------------------------------------


def start_of(name: str, node: Any) -> float:
    return float(node.v)  # as the framework constructs it


def charge_of(name: str, node: Any, x: Tensor, others: dict[str, Tensor]) -> Any:
    """``v -> v'`` of one integer step."""
    rest = 0.0 if node.v_reset is None else node.v_reset
    if name in ("IFNode", "SimpleIFNode", "TernaryIFNode", "HalfThresholdIFNode"):
        return lambda v: v + x
    if name in ("LIFNode", "SimpleLIFNode", "TernaryLIFNode", "LIAFNode"):
        if node.decay_input:
            return lambda v: v + (x - (v - rest)) / node.tau
        return lambda v: v - (v - rest) / node.tau + x
    if name == "ParametricLIFNode":
        f = 1 / (1 + torch.exp(-node.w))
        return lambda v: v - f * (v - rest) + (f * x if node.decay_input else x)
    if name == "QIFNode":
        return lambda v: v + (x + node.a0 * (v - node.v_rest) * (v - node.v_c)) / node.tau
    if name == "IzhikevichNode":
        w = others["w"]
        return lambda v: v + (x + node.a0 * (v - node.v_rest) * (v - node.v_c) - w) / node.tau
    if name == "EIFNode":
        return lambda v: (
            v
            + (x + node.v_rest - v + node.delta_T * torch.exp((v - node.theta_rh) / node.delta_T)) / node.tau
        )
    if name == "KLIFNode":
        if node.decay_input:
            return lambda v: torch.relu(node.k * (v + (x - (v - rest)) / node.tau))
        return lambda v: torch.relu(node.k * (v - (v - rest) / node.tau + x))
    if name == "CUBALIFNode":
        others["c"] = others["c"] * node.c_decay + x
        return lambda v: v * node.v_decay + others["c"]
    if name == "ILIFNode":
        return lambda v: (1 - 1 / node.tau) * v + x
    if name == "ComplementaryLIFNode":
        return lambda v: v - v / node.tau + x
    raise NotImplementedError(name)


def fire_of(name: str, node: Any, h: Tensor, others: dict[str, Tensor], plain: bool) -> Any:
    """Output, potential after firing, which neurons fired, and the distance from every threshold."""
    threshold, reset = node.v_threshold, node.v_reset
    margin = (h - threshold).abs()

    def after(h: Tensor, s: Tensor, threshold: Any = threshold) -> Tensor:
        s = s.detach() if node.detach_reset else s
        return h - s * threshold if reset is None else (1 - s) * h + s * reset

    if name == "ILIFNode":
        s = node.surrogate_function(h / threshold)
        q = (h / threshold).detach()
        margin = ((q - 0.5) - (q - 0.5).round()).abs() * threshold  # counts change between whole numbers
        return s, h - (s.detach() if node.detach_reset else s) * threshold, s, margin
    s = node.surrogate_function(h - threshold)
    if name in ("TernaryIFNode", "TernaryLIFNode"):
        minus = node.surrogate_function(-h - threshold)
        margin = torch.minimum(margin, (h + threshold).abs())
        return s - minus, after(h, s - minus if reset is None else s + minus), s - minus, margin
    if name == "ComplementaryLIFNode":
        others["m"] = others["m"] * torch.sigmoid(h / node.tau) + s
        return s, h - s * (threshold + torch.sigmoid(others["m"])), s, margin
    if name == "IzhikevichNode":
        others["w"] = others["w"] + (node.a * (h - node.v_rest) - others["w"]) / node.tau_w + node.b * s
        v = after(h, s)
        if not EXPLICIT_STATES and reset is not None and node.detach_reset:
            v = v + (s - s.detach()) * reset  # 0.0.0.0.14 detaches one of the two spikes of a hard reset
        return s, v, s, margin
    if name == "KLIFNode" and node.scale_reset:
        return s, after(h / node.k, s, threshold / node.k), s, margin
    if name == "LIAFNode" and not plain:
        return node.act(h - threshold if node.threshold_related else h), after(h, s), s, margin
    return s, after(h, s), s, margin


def reference(
    name: str, node: Any, operator: Operator, x: Tensor, rule: Any = None, plain: bool = False
) -> Reference:
    """The neuron over ``x [T, *shape]``, in float64."""
    shape = x.shape[1:]
    path = Trajectory(
        rule or operator.rule(shape), len(x), torch.full(shape, float(start_of(name, node)), dtype=F64)
    )
    others = {"w": torch.zeros(shape, dtype=F64), "c": torch.zeros(shape, dtype=F64)}
    others["m"] = torch.zeros(shape, dtype=F64)
    if name == "IzhikevichNode":
        others["w"] = torch.full(shape, node.w_rest, dtype=F64)
    outputs, vs, margins = [], [], []
    for xk in x:
        h = path.charged(charge_of(name, node, xk, others))
        out, v, fired, margin = fire_of(name, node, h, others, plain)
        path.carry(v, fired)
        outputs.append(out)
        vs.append(v)
        margins.append(margin)
    return Reference(*(torch.stack(each) for each in (outputs, vs, margins)), others)


def plain_sequences(name: str) -> bool:
    """2.0.0's LIAFNode gives plain spikes in multi-step mode, natively."""
    return name == "LIAFNode"


# -- values ---------------------------------------------------------------------------------------

DTYPES = st.sampled_from(
    [torch.float32, torch.float32, torch.float32, torch.float64, torch.float64, torch.bfloat16, torch.float16,
     torch.int64, torch.bool]
)  # fmt: skip
VALUES = Count("fuzzed SpikingJelly neurons, values")


@given(st.data())
@fuzz(60, 3000)
def _values(data: Any) -> None:
    name, arguments = data.draw(neurons())
    shape, steps = data.draw(SHAPES), data.draw(LENGTHS)
    if len(shape) and max(shape) > 200 and steps > 70:
        steps = steps - 70 if name in AFFINE else 20
    if name not in AFFINE:
        steps = min(steps, 40)
    dim = min(1, max(len(shape) - 1, 0))
    operator = data.draw(operators(shape[dim] if shape else 3, dim))
    dtype, cut = data.draw(DTYPES), data.draw(pieces(steps))
    store, keep_grad = data.draw(st.booleans()), data.draw(st.booleans())
    size = data.draw(st.sampled_from([0.0, 0.5, 1.5]) if name in AFFINE else st.sampled_from([0.3, 0.8, 3.0]))
    x = drive(steps, shape, data.draw(st.integers(0, 10**6)), size, data.draw(st.sampled_from([0.0, 0.4])))
    x = lay_out(x.to(dtype), data.draw(st.sampled_from(LAYOUTS)))

    note(str((name, arguments, shape, steps, operator, dtype, cut, store, keep_grad, size)))
    node = native(name, arguments)
    store = store and hasattr(node, "store_v_seq")  # simple neurons record nothing, natively
    converted, error = attempt(lambda: convert_to_fractional(node, **operator.options))
    if operator.impossible():
        assert ours(error), f"{operator.options} were taken"
        VALUES.add("expected errors")
        return
    if ours(error) and "exponentials" in str(error):
        VALUES.add("expected errors")
        return
    assert error is None, repr(error)
    if converted_is_native(converted):
        return
    # Half precision and whole numbers are for the input; the neuron's own numbers are exact.
    converted = converted.double() if dtype == torch.float64 else converted
    converted.train(data.draw(st.booleans()))
    if store:
        converted.store_v_seq = True

    def run() -> tuple[Tensor, Tensor, list[Tensor]]:
        outs, lasts, seqs, first = [], [], [], 0
        with torch.set_grad_enabled(keep_grad):
            for length in cut:
                piece = x[first : first + length]
                if length == 1 and data_single:
                    converted.step_mode = "s"
                    outs.append(converted(piece[0]).unsqueeze(0))
                else:
                    converted.step_mode = "m"
                    outs.append(converted(piece))
                    if store:
                        seqs.append((first, converted.v_seq))
                lasts.append((first + length, converted.v))
                first += length
        return torch.cat(outs), lasts, seqs

    data_single = data.draw(st.booleans())
    found, error = attempt(run)
    if not operator.fits(torch.Size(shape)):
        assert ours(error), f"orders that do not fit were taken: {operator.alpha} on {shape}: {error!r}"
        VALUES.add("expected errors")
        return
    if error is not None:
        # Ours for a sequence without steps; else the very error of the native neuron on the same call.
        _, theirs = attempt(lambda: native(name, arguments)(x))
        assert (ours(error) and steps == 0) or type(theirs) is type(error), f"{error!r}, natively {theirs!r}"
        VALUES.add("expected errors")
        return
    outputs, lasts, seqs = found
    exact = native(name, arguments).double()
    rule = rule_of(converted, operator, shape)
    expected = reference(name, exact, operator, x.to(F64), rule)
    tolerance = max(1e-9 if dtype == torch.float64 else 1e-4, operator.error(steps))
    if dtype in (torch.float16, torch.bfloat16):
        assert outputs.dtype == dtype
    # The potentials that are known: the last of each call, and those that were stored.
    vs = expected.vs.detach().clone()
    for first, v_seq in seqs:
        vs[first : first + len(v_seq)] = v_seq.detach().to(F64)
    for end, v in lasts:
        vs[end - 1] = v.detach().to(F64)
    compare(
        expected,
        tolerance,
        outputs=None if name == "LIAFNode" else outputs,  # which depends on how it is called
        vs=vs,
        until=operator.until(steps),
        what=name,
        again=lambda draw: reference(name, exact, operator, nudged(x.to(F64), dtype, draw), rule),
    )
    VALUES.add("cases")


def rule_of(converted: Any, operator: Operator, shape: tuple[int, ...]) -> Rule:
    """The rule with the orders as a parameter holds them, which may be rounded to float32."""
    rule, order = operator.rule(torch.Size(shape)), converted.fractional.order
    return rule if not order.learned else replace(rule, alpha=order.alphas().detach())


def converted_is_native(node: Any) -> bool:
    """At a fixed order of 1 and the native step it is the native neuron, which other tests compare."""
    return not hasattr(node, "fractional")


def test_values():
    """Outputs, states and stored potentials, for any call pattern, are those of the definition."""
    _values()
    VALUES.record()
