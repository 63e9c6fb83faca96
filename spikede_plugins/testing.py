"""Contract tests for plugin authors: run your solver or adapter through what everything else relies on.

    from spikede_plugins.testing import check_adapter, check_solver

    def test_my_solver():
        check_solver(MySolver())

    def test_my_adapter():
        check_adapter(MyAdapter(), make_model=lambda: Net(), make_input=lambda: torch.randn(8, 2, 4))

Each check raises :class:`ContractError` that says what is expected and what came out.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spikede_plugins.adapter import Adapter
from spikede_plugins.conversion import convert_to_fractional, restore_native
from spikede_plugins.engine import FractionalOperator
from spikede_plugins.engine.reference import integrate
from spikede_plugins.errors import PluginError, SpikedeError
from spikede_plugins.orders import FractionalOrder
from spikede_plugins.registry import (
    check_solver_basics,
    get_solver,
    register_adapter,
    registered_adapter,
    unregister_adapter,
)
from spikede_plugins.settings import EXTRA_STATE
from spikede_plugins.solvers.base import CorrectorSolver, ExplicitSolver, Solver
from spikede_plugins.tree import Neuron, copy_model, find_neurons, replace_modules

ALPHAS = (0.3, 0.5, 0.7, 0.9)
TOLERANCE = 0.15


class ContractError(SpikedeError, AssertionError):
    """A plugin that does not keep the contract."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ContractError(message)


# -- solvers --------------------------------------------------------------------------------------


def check_solver(solver: Solver, *, alphas: Sequence[float] = ALPHAS) -> None:
    """The whole solver contract: numbers, limits, shapes, gradients and declared accuracy.

    Args:
        solver: an explicit solver or one with a corrector.
        alphas: the orders at which the accuracy is measured.

    Raises:
        ContractError: naming the solver and the part of the contract it breaks.
    """
    name = getattr(solver, "name", type(solver).__name__)
    try:
        check_solver_basics(solver)
    except PluginError as error:
        raise ContractError(f"solver {name!r}: {error}") from error
    check_integer_limit(solver)
    check_series(solver)
    check_solver_gradients(solver)
    for alpha in alphas:
        for rough in (False, True):
            check_accuracy(solver, alpha, rough=rough)


def _series(solver: Solver) -> dict[str, Callable[[Tensor, int], Tensor]]:
    series: dict[str, Callable[[Tensor, int], Tensor]] = {"weights": solver.weights}
    if isinstance(solver, CorrectorSolver):
        series["start_weights"] = solver.start_weights
    return series


def check_integer_limit(solver: Solver) -> None:
    """At alpha = 1 an explicit solver (or a corrector's predictor) is the integer step, exactly."""
    explicit = solver.predictor if isinstance(solver, CorrectorSolver) else solver
    if not isinstance(explicit, ExplicitSolver):
        return
    one = torch.tensor(1.0, dtype=torch.float64)
    for h in (1.0, 0.25):
        gain = explicit.gain(one, h).item()
        _require(gain == h, f"solver {explicit.name!r}: gain(1, {h}) must be exactly {h}, got {gain!r}")
    weights = explicit.weights(one, 8).tolist()
    _require(
        weights == [-1.0] + [0.0] * 7,
        f"solver {explicit.name!r}: weights at alpha = 1 must be exactly -1, 0, 0, ..., got {weights}",
    )


def check_series(solver: Solver, n: int = 200) -> None:
    """Weights are finite, shaped ``[n, *alpha.shape]``, and do not depend on how many are asked for."""
    many = torch.tensor([0.05, *ALPHAS, 1.0], dtype=torch.float64)
    for what, series in _series(solver).items():
        together = series(many, n)
        where = f"solver {solver.name!r}: {what}"
        _require(
            together.shape == (n, len(many)),
            f"{where} of {len(many)} orders must have shape {(n, len(many))}, got {tuple(together.shape)}",
        )
        _require(bool(torch.isfinite(together).all()), f"{where} must be finite for orders in (0, 1]")
        for i, alpha in enumerate(many):
            alone = series(alpha, n)
            _require(alone.shape == (n,), f"{where} of one order must have shape {(n,)}, got {alone.shape}")
            _require(
                torch.allclose(alone, together[:, i], rtol=1e-9, atol=1e-12),
                f"{where} at alpha = {alpha:g} differ between one order and several",
            )
            _require(
                torch.allclose(series(alpha, n // 3), alone[: n // 3], rtol=1e-9, atol=1e-12),
                f"{where}: the first {n // 3} at alpha = {alpha:g} change if {n} are asked for",
            )


def check_solver_gradients(solver: Solver, n: int = 12) -> None:
    """Gain and weights are differentiable in alpha, with the right derivative (float64)."""
    for alpha in (torch.tensor(0.6), torch.tensor([0.35, 0.8])):
        point = alpha.double().requires_grad_()
        parts: dict[str, Callable[[Tensor], Tensor]] = {"gain": lambda a: solver.gain(a, 0.5)}
        for what, series in _series(solver).items():
            parts[what] = lambda a, series=series: series(a, n)  # type: ignore[misc]
        for what, part in parts.items():
            try:
                right = torch.autograd.gradcheck(part, (point,), raise_exception=True)
            except Exception as error:
                raise ContractError(f"solver {solver.name!r}: the gradient of {what}: {error}") from error
            _require(right, f"solver {solver.name!r}: the gradient of {what} is wrong")


def _problem(alpha: float, rough: bool) -> tuple[Callable[[float, Tensor], Tensor], float]:
    """``D^a y = g(t) + cos(t) (Y(t) - y)`` and ``Y(1)``, for a known Y that no solver hits by chance.

    Smooth: ``Y = t^2 + t^3``. Rough: ``Y = t^a + t^(2a)``, how solutions of such equations usually begin.
    """
    powers = (alpha, 2.0 * alpha) if rough else (2.0, 3.0)

    def solution(t: float) -> float:
        return sum(t**p for p in powers)

    def derivative(t: float) -> float:
        return sum(math.gamma(1 + p) / math.gamma(1 + p - alpha) * t ** (p - alpha) for p in powers)

    return lambda t, y: derivative(t) + math.cos(t) * (solution(t) - y), solution(1.0)


def measure_accuracy(
    solver: Solver, alpha: float, *, rough: bool = False, steps: tuple[int, int] = (128, 256)
) -> float:
    """The order p of the global error O(h^p) at t = 1, from two step sizes, in float64.

    Args:
        solver: any solver.
        alpha: the Caputo order.
        rough: on a solution that begins like ``t^alpha`` instead of a smooth one.
        steps: how many steps the two runs take.
    """
    f, exact = _problem(alpha, rough)
    start = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        errors = [abs(float(integrate(f, start, 1.0, n, alpha, solver)[-1]) - exact) for n in steps]
    if not all(math.isfinite(e) and e > 0 for e in errors):
        return math.nan
    return math.log(errors[0] / errors[1]) / math.log(steps[1] / steps[0])


def check_accuracy(solver: Solver, alpha: float, *, rough: bool = False) -> None:
    """The measured accuracy is the declared one, neither less nor more, to within 0.15."""
    declared = solver.accuracy_rough(alpha) if rough else solver.accuracy(alpha)
    measured = measure_accuracy(solver, alpha, rough=rough)
    _require(
        abs(measured - declared) < TOLERANCE,
        f"solver {solver.name!r} at alpha = {alpha:g} declares accuracy {declared:.2f} on "
        f"{'t^alpha' if rough else 'smooth'} solutions, but {measured:.2f} was measured",
    )


# -- adapters -------------------------------------------------------------------------------------

_DRAWS = 10

Run = Callable[[nn.Module, Any], Any]


def check_adapter(
    adapter: Adapter,
    make_model: Callable[[], nn.Module],
    make_input: Callable[[], Any],
    run: Run | None = None,
) -> None:
    """The whole adapter contract, on a model of the author's choice.

    Model and input are drawn with fixed seeds, the first ones for which the fractional model answers
    differently from the native one; the random state of the caller is left alone.

    Args:
        adapter: the adapter; it need not be installed.
        make_model: gives a new model in which every spiking neuron has a fractional form.
        make_input: gives an input that makes neurons fire; by default a sequence ``[T, ...]``.
        run: how the model is run over the input from freshly reset neurons, returning tensors (nested in
            lists or tuples as you like). By default the model is called once for each step of the input.

    Raises:
        ContractError: naming the part of the contract that is broken.
    """
    silent = True
    with _registered(adapter), torch.random.fork_rng(devices=[]):
        for seed in range(_DRAWS):
            torch.manual_seed(seed)
            check = _AdapterCheck(adapter, make_model(), make_input(), run or _step_by_step)
            check.recognition()
            silent = silent and not check.fires()
            if check.fires() and check.alpha_counts():
                check.everything()
                return
    _require(not silent, f"adapter {adapter.name!r}: make_input never makes the last neurons fire")
    raise ContractError(
        f"adapter {adapter.name!r}: alpha = 0.5 gives the output of the integer model; "
        "does the neuron use its operator, and keep its history?"
    )


@contextmanager
def _registered(adapter: Adapter) -> Iterator[None]:
    before = registered_adapter(adapter.name)
    register_adapter(adapter, replace=True)
    try:
        yield
    finally:
        unregister_adapter(adapter.name)
        if before is not None:
            register_adapter(before)


def _step_by_step(model: nn.Module, sequence: Any) -> list[Any]:
    return [model(x) for x in sequence]


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [t for item in output for t in _tensors(item)] if isinstance(output, (list, tuple)) else []


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True)
    )


class _AdapterCheck:
    """One model, one input, and the native output that everything is compared with."""

    def __init__(self, adapter: Adapter, model: nn.Module, data: Any, run: Run) -> None:
        self.adapter, self.model, self.data, self._run = adapter, model, data, run
        self.native_output = self.run(model)

    def fires(self) -> bool:
        return any(bool((t != 0).any()) for t in self.native_output)

    def alpha_counts(self) -> bool:
        return not _same(self.run(self.fractional()), self.native_output)

    def everything(self) -> None:
        self.round_trip()
        self.in_place()
        self.integer_order()
        self.state()
        self.learning()
        self.checkpoints()
        self.sharing()
        self.hooks_and_mode()

    def fail_unless(self, condition: bool, message: str) -> None:
        _require(condition, f"adapter {self.adapter.name!r}: {message}")

    def neurons(self, model: nn.Module) -> list[Neuron]:
        return find_neurons(model, [self.adapter])

    def run(self, model: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return self.run_with_graph(model)

    def run_with_graph(self, model: nn.Module) -> list[Tensor]:
        for neuron in self.neurons(model):
            self.adapter.reset_state(neuron.module)
        return _tensors(self._run(model, self.data))

    def fractional(self, **options: Any) -> nn.Module:
        return convert_to_fractional(self.model, **{"alpha": 0.5, **options})

    def recognition(self) -> None:
        neurons = self.neurons(self.model)
        self.fail_unless(bool(neurons), "is_neuron recognises no neuron of the model")
        for neuron in neurons:
            support = self.adapter.support(neuron.module)
            self.fail_unless(not neuron.fractional, "is_fractional must be False for a native neuron")
            self.fail_unless(support.supported, f"choose a model without {support.kind}: {support.reason}")
        for neuron in self.neurons(self.fractional()):
            self.fail_unless(neuron.fractional, "is_fractional must be True for what to_fractional returns")
            self.fail_unless(
                not self.adapter.is_neuron(neuron.module), "is_neuron must be False for a fractional neuron"
            )
            operator = self.adapter.operator(neuron.module)
            self.fail_unless(
                isinstance(operator, FractionalOperator), "operator must return the FractionalOperator"
            )

    def round_trip(self) -> None:
        restored = restore_native(self.fractional())
        kinds = [type(n.module) for n in self.neurons(restored)]
        self.fail_unless(
            kinds == [type(n.module) for n in self.neurons(self.model)],
            f"to_native must give the native classes back, got {kinds}",
        )
        self.fail_unless(
            _same(self.run(restored), self.native_output), "the restored model differs from the native one"
        )
        self.fail_unless(
            _same(self.run(self.model), self.native_output), "the conversion of a copy changed the original"
        )

    def in_place(self) -> None:
        model = copy_model(self.model)
        before = {name: id(p) for name, p in model.named_parameters()}
        model = convert_to_fractional(model, alpha=0.5, learn_alpha=True, inplace=True)
        after = {name: id(p) for name, p in model.named_parameters()}
        lost = [name for name, p in before.items() if after.get(name) != p]
        self.fail_unless(not lost, f"to_fractional must keep the Parameter objects, lost {lost}")
        model = restore_native(model, inplace=True)
        after = {name: id(p) for name, p in model.named_parameters()}
        self.fail_unless(after == before, "to_native must keep the Parameter objects, and add none")
        self.fail_unless(_same(self.run(model), self.native_output), "restoring in place changed the output")

    def integer_order(self) -> None:
        # A conversion leaves alpha = 1 native; here the fractional neuron itself must be the integer one.
        model = copy_model(self.model)
        pairs = []
        for neuron in self.neurons(model):
            operator = FractionalOperator(FractionalOrder(1.0), get_solver("gl"))
            pairs.append((neuron.module, self.adapter.to_fractional(neuron.module, operator)))
        if pairs[0][0] is model:
            model = pairs[0][1]
        replace_modules(model, pairs)
        self.adapter.finish(model, [old for old, _ in pairs], [new for _, new in pairs])
        self.fail_unless(
            _same(self.run(model), self.native_output),
            "a fractional neuron at alpha = 1 must give the native output bit for bit",
        )

    def state(self) -> None:
        model = self.fractional()
        output = self.run(model)
        self.fail_unless(_same(self.run(model), output), "reset_state must forget potential and history")
        self.fail_unless(_same(self.run(copy.deepcopy(model)), output), "a deep copy gives another output")
        for neuron in self.neurons(model):
            try:
                pickle.loads(pickle.dumps(neuron.module))
            except Exception as error:
                raise ContractError(
                    f"adapter {self.adapter.name!r}: a fractional neuron must pickle after a run: {error}"
                ) from error

    def learning(self) -> None:
        model = self.fractional(learn_alpha=True)
        outputs = [t for t in self.run_with_graph(model) if t.requires_grad]
        for neuron in self.neurons(model):
            parameters = list(self.adapter.operator(neuron.module).parameters())
            found = torch.autograd.grad(
                sum((t.sum() for t in outputs), torch.zeros((), requires_grad=True)),
                parameters, allow_unused=True, retain_graph=True,
            )  # fmt: skip
            self.fail_unless(
                all(g is not None for g in found),
                f"no gradient reaches the learned order of {neuron.paths[0] or 'the neuron'}",
            )

    def checkpoints(self) -> None:
        native = self.model.state_dict()
        fixed = self.fractional()
        self.fail_unless(
            [key for key in fixed.state_dict() if not key.endswith(EXTRA_STATE)] == list(native),
            "a fixed order must add no state_dict key beside those of its settings",
        )
        learned = self.fractional(learn_alpha=True)
        missing = [key for key in native if key not in learned.state_dict()]
        self.fail_unless(not missing, f"a learned order must keep the native state_dict keys, lost {missing}")
        for model in (fixed, learned):
            try:
                model.load_state_dict(native)
            except RuntimeError as error:
                raise ContractError(
                    f"adapter {self.adapter.name!r}: a native checkpoint must load into the converted "
                    f"model: {error}"
                ) from error

    def sharing(self) -> None:
        neuron = self.neurons(copy_model(self.model))[0].module
        holder = convert_to_fractional(nn.ModuleList([neuron, neuron]), alpha=0.5)
        slots = {id(module) for module in holder._modules.values()}
        self.fail_unless(len(slots) == 1, "a neuron used twice must stay one neuron")

    def hooks_and_mode(self) -> None:
        model = copy_model(self.model).eval()
        called: list[nn.Module] = []
        for neuron in self.neurons(model):
            neuron.module.register_forward_hook(lambda module, *_: called.append(module))
        for convert in (lambda m: convert_to_fractional(m, alpha=0.5, inplace=True), _restore_in_place):
            model = convert(model)
            training = [n.paths[0] for n in self.neurons(model) if n.module.training]
            self.fail_unless(not training, f"the training flag must be kept, lost at {training}")
            called.clear()
            self.run(model)
            silent = [n.paths[0] for n in self.neurons(model) if not any(n.module is m for m in called)]
            self.fail_unless(not silent, f"forward hooks must be kept, lost at {silent}")


def _restore_in_place(model: nn.Module) -> nn.Module:
    return restore_native(model, inplace=True)
