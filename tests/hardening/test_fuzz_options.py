"""Nonsense in every option: only a SpikedeError may come of it, and nothing may change."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from fuzz_strategies import Count, attempt, fuzz, ours
from hypothesis import given
from hypothesis import strategies as st
from small_nets import FRAMEWORKS, Framework, frames
from torch import Tensor, nn

from spikede_plugins import (
    FractionalLIFDynamics,
    HardResetLIFNeuron,
    IFNeuron,
    LIFNeuron,
    MultiTerm,
    NoisyLIFNeuron,
    ODEIFDynamics,
    ODELIFDynamics,
    PerChannel,
    SNNWrapper,
    SpikingODELayer,
    SumOfExponentials,
    WindowMemory,
    alphas,
    conversion_report,
    convert_to_fractional,
    fdeint,
    fdeint_adjoint,
    get_solver,
    mittag_leffler,
    parameter_groups,
    plan_conversion,
    restore_native,
)
from spikede_plugins.surrogate import Surrogate

#: Made anew for every use: some are mutable, or used up.
GARBAGE: list[Callable[[], Any]] = [
    *(
        (lambda value=value: value)
        for value in (
            None, True, False, math.nan, math.inf, -math.inf, -1, 0, 1, 2, 7, -0.0, 0.5, 1.0, 1.5, 1e-320,
            1e308,
            10**30, 10**400, -(10**400), 2**63, "", "0.5", "gl", "full", "soe", "spike", "never", "nope", "*",
            "atan", "x\0y", "[", "gl ", b"gl", (), (0.5,), (0.5, 0.7), complex(0.5, 0.0), Fraction(1, 2),
            Decimal("0.5"), Decimal("NaN"), Decimal("sNaN"), range(3), frozenset({0.5}), int, float, len,
            Ellipsis,
            NotImplemented, np.float32(0.5), np.float16(0.5), np.float64(0.5), np.float64("nan"), np.int64(3),
            np.uint8(1), np.bool_(True), np.str_("gl"), np.datetime64("2020-01-01"), torch.float32,
            torch.device("cpu"), torch.Size([2]),
        )
    ),
    lambda: [], lambda: [0.5], lambda: [0.5, 0.7], lambda: [0.5, math.nan], lambda: [[0.5, 0.7], 0.3],
    lambda: ["gl", "l1"], lambda: [None, None], lambda: {}, lambda: {"*": 0.5}, lambda: {"*": "gl"},
    lambda: {"*": None}, lambda: {1: 0.5}, lambda: {"*": 3}, lambda: {"*": math.nan}, lambda: {"nope": 0.5},
    lambda: {"*": []}, lambda: {None: None}, lambda: {"lif": 0.5, "*": {}}, lambda: {0.5},
    lambda: bytearray(2),
    lambda: iter([0.5, 0.7]), lambda: (x for x in [0.5]), object, lambda: object,
    lambda: np.array(0.5), lambda: np.array([0.5, 0.7]), lambda: np.array([]), lambda: np.array("gl"),
    lambda: np.array([None, 0.5]), lambda: np.array([[0.5, 0.7]]), lambda: np.array(True),
    lambda: torch.tensor(0.5), lambda: torch.tensor([0.5]), lambda: torch.tensor([0.5, 0.7]),
    lambda: torch.tensor([]), lambda: torch.tensor(math.nan), lambda: torch.tensor([[0.5, 0.7]]),
    lambda: torch.tensor(True), lambda: torch.tensor(3), lambda: torch.tensor(0.5 + 1j),
    lambda: torch.tensor([0.5, 0.7], requires_grad=True), lambda: torch.tensor(0.5, device="meta"),
    lambda: torch.empty(2, device="meta"), lambda: torch.tensor(0.5, dtype=torch.float16),
    lambda: torch.tensor([0.5]).to_sparse(), lambda: {"rtol": "x"}, lambda: {"step_size": None},
    lambda: {"max_num_steps": 0.5}, lambda: {"first_step": "x"}, lambda: {"memory": {}},
    lambda: {"rtol": torch.tensor([1.0, 2.0])}, lambda: {"step_size": -1.0},
    lambda: {"max_num_steps": None}, lambda: {"perturb": "x"}, lambda: {"interp": "x"},
    lambda: torch.linspace(0, 1, 5), lambda: torch.linspace(0, 1, 6), lambda: torch.ones(5, 2, 4,
    dtype=torch.int8),
    lambda: torch.ones(5, 2, 4, dtype=torch.float64), lambda: torch.ones(5, 2, 3), lambda: torch.ones(5),
    lambda: torch.ones(3, 2, 2) * 1e30, lambda: torch.full((5, 2, 4), math.nan), lambda: torch.ones(5, 0,
    4), lambda: nn.Parameter(torch.tensor(0.5)), lambda: nn.Linear(2, 2),
    lambda: nn.Parameter(torch.tensor([0.5, 0.7])), lambda: nn.Parameter(torch.tensor(0.5).half()),
    lambda: nn.Parameter(torch.tensor(math.nan)), lambda: nn.UninitializedParameter(),
    lambda: [nn.Parameter(torch.tensor(0.5)), 0.7], lambda: {"*": nn.Parameter(torch.tensor(0.5))},
    lambda: PerChannel(0.6), lambda: PerChannel(0.6, dim=-1), lambda: PerChannel(0.6, dim=5),
    lambda: PerChannel(nn.Parameter(torch.tensor([0.5, 0.7]))),
    lambda: MultiTerm(nn.Parameter(torch.tensor([0.5, 0.9])), nn.Parameter(torch.tensor([1.0, 2.0]))),
    lambda: PerChannel([0.5]), lambda: PerChannel([0.5, 0.7], dim=10**30), lambda: PerChannel([0.5], dim=-7),
    lambda: MultiTerm([0.5, 0.9], [1.0, 2.0]), lambda: MultiTerm([0.5], [1e308], True),
    lambda: MultiTerm([0.5, 0.5], [1e-308, 1e-320]), lambda: SumOfExponentials(0.5, 1),
    lambda: SumOfExponentials(1e-15, 50), lambda: get_solver("trap"), lambda: Surrogate("gaussian", 1e-30),
    lambda: Surrogate, lambda: PerChannel, lambda: LIFNeuron(),
]  # fmt: skip
VALUES = st.integers(0, len(GARBAGE) - 1)

CONVERSION = (
    "alpha", "method", "memory", "step_size", "learn_alpha", "memory_reset", "checkpoint", "surrogate",
    "include",
    "exclude", "strict", "inplace",
)  # fmt: skip


def snapshot(net: nn.Module) -> tuple[Any, ...]:
    """What a failure must leave alone: values, objects, classes, attributes, the frameworks' lists."""
    listed: Any = ()
    for module in net.modules():
        if isinstance(getattr(type(module), "instances", None), list):
            listed = [id(n) for n in type(module).instances if any(n is m for m in net.modules())]
    return (
        {key: value.clone() for key, value in net.state_dict().items()},
        [(name, id(m), type(m), sorted(vars(m)), m.training) for name, m in net.named_modules()],
        [(name, id(p), p.requires_grad) for name, p in net.named_parameters()],
        listed,
    )


def assert_same(before: Any, after: Any) -> None:
    assert before[0].keys() == after[0].keys()
    for key in before[0]:
        assert torch.equal(before[0][key], after[0][key]), key
    assert before[1:] == after[1:]


def shown(value: Any) -> str:
    try:
        return repr(value)[:60]
    except Exception as error:  # values that refuse even that
        return type(error).__name__


def only_ours(call: Callable[[], Any], what: str) -> tuple[Any, bool]:
    """What a call gives, and whether it gave something; any other error than ours fails the test."""
    found, error = attempt(call)
    if error is not None and "mat1 and mat2" in str(error):
        return None, False  # what torch's Linear says of an input of another dtype or width
    assert error is None or ours(error), f"{what} -> {type(error).__name__}: {error}"
    if error is not None:
        assert len(str(error)) > 15, f"{what} -> says nothing: {error!r}"
    return found, error is None


CONVERSIONS = Count("fuzzed options of a conversion")


@given(st.data())
@fuzz(60, 5000)
def _conversions(data: Any) -> None:
    framework: Framework = data.draw(
        st.sampled_from([p.values[0] for p in FRAMEWORKS if not p.marks[0].args[0]])
    )
    names = data.draw(st.lists(st.sampled_from(CONVERSION), min_size=1, max_size=2, unique=True))
    options = {name: GARBAGE[data.draw(VALUES)]() for name in names}
    if data.draw(st.booleans()):
        options.setdefault("inplace", True)
    told = {k: shown(v) for k, v in options.items()}
    net = framework.net()
    before = snapshot(net)
    what = f"{framework.name} {told}"
    made, fine = only_ours(lambda: convert_to_fractional(net, **options), what)
    CONVERSIONS.add("cases")
    if not fine:
        assert_same(before, snapshot(net))
        CONVERSIONS.add("refused")
        again = {k: v for k, v in options.items() if not hasattr(v, "__next__")}
        if len(again) == len(options) and options.get("strict", True) is not False:
            only_ours(lambda: plan_conversion(net, **again), what)
        return
    # What was accepted has to work: report, run, train, restore.
    str(conversion_report(made))
    x = frames().requires_grad_()
    out, ran = only_ours(lambda: framework.run(made, x), f"{what}, run")
    if ran:
        only_ours(lambda: out.sum().backward(), f"{what}, backward")
        assert out.shape[:2] == x.shape[:2]
    only_ours(lambda: restore_native(made), f"{what}, restore")
    if options.get("inplace") is not True:
        assert_same(before, snapshot(net))


def test_conversions():
    """Options of a conversion: an error of ours and an untouched model, or a model that works."""
    _conversions()
    CONVERSIONS.record()


# -- everything else that takes options -----------------------------------------------------------


#: How a run of SNNWrapper begins and what it returns.
BEGINS = ("v0", "initial_state", "return_state", "return_potentials")


def _base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), LIFNeuron(tau=2.0), nn.Linear(6, 2), IFNeuron())


def _wrapper(**options: Any) -> Any:
    call = {
        k: options.pop(k)
        for k in ("x_time", "output_time", "call_method", "call_options", "x", *BEGINS)
        if k in options
    }
    net = SNNWrapper(
        options.pop("base") if "base" in options else _base(), **{"integrator": "fdeint", **options}
    )
    x = call.get("x", torch.ones(5, 2, 4))
    given = {"method": call.get("call_method"), "options": call.get("call_options")}
    given |= {name: call[name] for name in BEGINS if name in call}
    out = net(x, call.get("x_time", torch.linspace(0, 1, 5)), call.get("output_time"), **given)
    out = out[0] if isinstance(out, tuple) else out
    assert isinstance(out, Tensor)
    return out


def _solve(**given: Any) -> Any:
    run = fdeint_adjoint if given.pop("adjoint", False) else fdeint
    options = {
        "func": lambda t, y: -y,
        "y0": torch.ones(2),
        "t": torch.linspace(0, 1, 5),
        "alpha": 0.5,
        **given,
    }
    return run(options.pop("func"), options.pop("y0"), options.pop("t"), **options)


def _layer(**given: Any) -> Any:
    rest = {k: v for k, v in given.items() if k in ("interval", "x")}
    made = {k: v for k, v in given.items() if k not in rest}
    options = {"dynamics": ODELIFDynamics(tau_mem=5.0), **made}
    layer = SpikingODELayer(
        options.pop("n_inputs", 2), options.pop("n_neurons", 3), options.pop("dynamics"), **options
    )
    return layer(rest.get("x", torch.ones(3, 2, 2)), interval=rest.get("interval", 1.0))


#: What is called with one or two options of nonsense: the call, and the options it takes.
TAKERS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "PerChannel": (lambda alphas=(0.5,), dim=1: PerChannel(alphas, dim), ("alphas", "dim")),
    "MultiTerm": (
        lambda orders=(0.5, 0.7), coefficients=(1.0, 2.0), learn_coefficients=False: MultiTerm(
            orders, coefficients, learn_coefficients
        ),
        ("orders", "coefficients", "learn_coefficients"),
    ),
    "SumOfExponentials": (
        lambda **o: convert_to_fractional(_framework_net(), memory=SumOfExponentials(**o)),
        ("tolerance", "horizon"),
    ),
    "Surrogate": (lambda name="atan", **o: Surrogate(name, **o), ("name", "alpha")),
    "SNNWrapper": (
        _wrapper,
        (
            "base", "integrator", "interpolation_method", "alpha", "multi_coefficient", "learn_alpha",
            "learn_coefficient", "alpha_mode", "method", "options", "memory", "dropout", "time", "x_time",
            "output_time", "call_method", "call_options", "x", *BEGINS,
        ),
    ),
    "fdeint": (_solve, ("y0", "t", "alpha", "method", "memory", "options")),
    "fdeint_adjoint": (partial(_solve, adjoint=True), ("y0", "t", "alpha", "method", "memory", "options")),
    "SpikingODELayer": (
        _layer,
        (
            "n_inputs", "n_neurons", "dynamics", "refractory", "interval", "x", "dt_init", "dt_min",
            "interpolation", "bias", "surrogate", "slope_floor", "solver", "rtol", "atol", "max_steps",
            "adjoint", "max_spikes", "dtype",
        ),
    ),
    "FractionalLIFDynamics": (
        lambda **o: SpikingODELayer(2, 3, FractionalLIFDynamics(**{"alpha": 0.5, **o}), dt_init=0.5)(
            torch.ones(3, 2, 2), interval=1.0
        ),
        ("alpha", "tau_mem", "v_threshold", "v_reset", "v_rest", "method", "memory"),
    ),
    "WindowMemory": (lambda length=1: WindowMemory(length), ("length",)),
    "HardResetLIFNeuron": (
        lambda **o: SNNWrapper(nn.Sequential(HardResetLIFNeuron(**o)), integrator="fdeint")(
            torch.ones(4, 2, 3), torch.arange(4.0)
        ),
        ("tau", "threshold", "surrogate_grad_scale", "reset_strength"),
    ),
    "NoisyLIFNeuron": (
        lambda **o: SNNWrapper(nn.Sequential(NoisyLIFNeuron(**o)), integrator="fdeint")(
            torch.ones(4, 2, 3), torch.arange(4.0)
        ),
        ("tau", "threshold", "gamma", "train_spike_mode", "concrete_temp", "z_clip", "hard_eval",
        "detach_reset"),
    ),
    "SNNWrapper rk4": (
        partial(_wrapper, integrator="odeint", method="rk4"),
        ("options", "x_time", "output_time", "call_options", "x", "interpolation_method", "alpha"),
    ),
    "SNNWrapper dopri5": (
        partial(_wrapper, integrator="odeint_adjoint", method="dopri5"),
        ("options", "x_time", "output_time", "call_options", "x", "interpolation_method"),
    ),
    "ODELIFDynamics": (
        lambda **o: SpikingODELayer(2, 3, ODELIFDynamics(**o))(torch.ones(3, 2, 2), interval=1.0),
        ("tau_mem", "v_threshold", "v_reset", "v_rest", "learn"),
    ),
    "ODEIFDynamics": (
        lambda **o: SpikingODELayer(2, 3, ODEIFDynamics(**o))(torch.ones(3, 2, 2), interval=1.0),
        ("v_threshold", "v_reset", "learn"),
    ),
    "LIFNeuron": (
        lambda **o: SNNWrapper(nn.Sequential(LIFNeuron(**o)), integrator="fdeint")(
            torch.ones(4, 2, 3), torch.arange(4.0)
        ),
        ("tau", "threshold", "surrogate_grad_scale", "surrogate_opt", "tau_learnable"),
    ),
    "mittag_leffler": (
        lambda z=0.5, alpha=0.5, beta=1.0: mittag_leffler(z, alpha, beta), ("z", "alpha", "beta")
    ),
    "convert": (lambda model=None: convert_to_fractional(model), ("model",)),
    "plan": (lambda model=None: plan_conversion(model), ("model",)),
    "report": (lambda model=None: conversion_report(model), ("model",)),
    "restore": (lambda model=None: restore_native(model), ("model",)),
    "alphas": (lambda model=None: alphas(model), ("model",)),
    "parameter_groups": (
        lambda model=None, **o: torch.optim.AdamW(
            parameter_groups(
                convert_to_fractional(_framework_net(), learn_alpha=True) if model is None else model,
                **{"lr": 0.1, **o},
            )
        ),
        ("model", "lr", "alpha_lr", "weight_decay"),
    ),
    "get_solver": (lambda name=None: get_solver(name), ("name",)),
}  # fmt: skip


def _framework_net() -> nn.Module:
    return next(p.values[0] for p in FRAMEWORKS if not p.marks[0].args[0]).net()


OPTIONS = Count("fuzzed options of other calls")


@given(st.data())
@fuzz(120, 10_000)
def _options(data: Any) -> None:
    name = data.draw(st.sampled_from(sorted(TAKERS)))
    call, known = TAKERS[name]
    names = data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=2, unique=True))
    picked = {option: data.draw(VALUES) for option in names}
    told = {option: shown(GARBAGE[at]()) for option, at in picked.items()}
    _, fine = only_ours(lambda: call(**{o: GARBAGE[at]() for o, at in picked.items()}), f"{name} {told}")
    OPTIONS.add("cases")
    OPTIONS.add("refused", not fine)


def test_options():
    """Options of everything else: an error of ours that says something, or a result."""
    _options()
    OPTIONS.record()


def test_unknown_keywords():
    """A keyword that does not exist is a TypeError, as of any function."""
    net = _framework_net()
    before = snapshot(net)
    for call in (convert_to_fractional, plan_conversion):
        with pytest.raises(TypeError, match="alhpa"):
            call(net, alhpa=0.5)
    assert_same(before, snapshot(net))
    assert copy.deepcopy(before[1])
