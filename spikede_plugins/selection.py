"""Which neurons an option means: patterns over dotted paths, and one value a neuron.

A pattern is a dotted path as ``model.named_modules()`` gives it, with the wildcards of :mod:`fnmatch`
(``*``, ``?``, ``[...]``; ``*`` crosses dots). It selects the module of that path and everything below it:
``"block1"`` selects ``block1.lif``, ``"*.lif"`` selects ``block1.lif``, ``"*"`` selects all. The path of a
model that is itself a neuron is ``""``, which ``"*"`` selects as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from spikede_plugins.checks import flag, is_readable, items_of
from spikede_plugins.engine import FractionalOperator
from spikede_plugins.errors import (
    ConversionError,
    OptionError,
    OptionTypeError,
    OrderError,
    PluginError,
    nearest,
)
from spikede_plugins.memory import as_memory
from spikede_plugins.orders import (
    FractionalOrder,
    MultiTerm,
    PerChannel,
    check_alpha,
    check_parameter,
    check_untrained,
)
from spikede_plugins.registry import check_solver_basics, get_solver, origin_of
from spikede_plugins.solvers.base import Solver
from spikede_plugins.surrogate import Surrogate

T = TypeVar("T")
Paths = Sequence[str]


def show(path: str) -> str:
    """A path for messages; the root has none."""
    return path or "(the model itself)"


def count(neurons: int) -> str:
    return f"{neurons} spiking neuron{'' if neurons == 1 else 's'}"


def show_all(neurons: Iterable[Paths]) -> str:
    """The first path of each neuron, for messages."""
    return ", ".join(show(paths[0]) for paths in neurons)


def matches(pattern: str, paths: Paths) -> bool:
    """Whether a pattern selects a neuron, by any of its paths."""
    return any(fnmatchcase(path, pattern) or fnmatchcase(path, pattern + ".*") for path in paths)


def as_patterns(value: Any, what: str) -> tuple[str, ...] | None:
    """``None``, a string or several strings as a tuple of patterns.

    Raises:
        OptionTypeError: for anything else.
        OptionError: if there is no pattern in it.
    """
    if value is None:
        return None
    patterns = [value] if isinstance(value, str) else value
    items = None if isinstance(patterns, (Mapping, Tensor)) else items_of(patterns)
    if items is None:
        raise OptionTypeError(
            f"{what} must be a pattern or a list of patterns over dotted paths, got "
            f"{type(value).__name__}; e.g. {what}=\"features.*\"."
        )
    result = tuple(items)
    wrong = [p for p in result if not isinstance(p, str)]
    if wrong:
        raise OptionTypeError(f"{what} must hold strings (dotted paths or patterns), got {wrong[0]!r}.")
    if not result:
        raise OptionError(f"{what} is empty; leave it out to {what} nothing in particular.")
    return result


def require_matches(patterns: Iterable[str], neurons: Sequence[Paths], what: str) -> None:
    """Every pattern selects a neuron.

    Raises:
        ConversionError: naming the patterns that select none, and the paths there are.
    """
    idle = [p for p in patterns if not any(matches(p, paths) for paths in neurons)]
    if idle:
        known = [path for paths in neurons for path in paths if path]
        raise ConversionError(
            f"{what}: {', '.join(map(repr, idle))} matches no spiking neuron of the model; "
            f"{nearest(idle[0], known)}"
        )


@dataclass(frozen=True)
class Setting(Generic[T]):
    """The checked value(s) of one option: one for all, one a neuron in order, or one a pattern.

    Exactly one of the fields is set.
    """

    what: str
    single: T | None = None
    ordered: tuple[T, ...] | None = None
    by_pattern: tuple[tuple[str, T], ...] | None = None

    @classmethod
    def read(cls, value: Any, what: str, check: Callable[[Any, str], T]) -> Setting[T]:
        """Check a value, or each value of a mapping {pattern: value}.

        Raises:
            OptionTypeError: for a pattern that is not a string.
            OptionError: for an empty mapping; and whatever ``check`` raises.
        """
        if not isinstance(value, Mapping):
            return cls(what, single=check(value, what))
        for pattern in value:
            if not isinstance(pattern, str):
                raise OptionTypeError(f"{what}: the keys of a mapping are patterns, got {pattern!r}.")
        if not value:
            raise OptionError(f"{what}: the mapping is empty; give {{pattern: value}}.")
        return cls(what, by_pattern=tuple((p, check(v, f"{what}[{p!r}]")) for p, v in value.items()))

    def check_patterns(self, neurons: Sequence[Paths]) -> None:
        """The patterns of a mapping all select something (see :func:`require_matches`)."""
        if self.by_pattern is not None:
            require_matches((p for p, _ in self.by_pattern), neurons, f"{self.what} mapping")

    def assign(self, neurons: Sequence[Paths]) -> list[T]:
        """One value for each neuron; of a mapping the first pattern that selects it, in its order.

        Raises:
            OrderError: if a sequence has not one value a neuron.
            OptionError, OrderError: if a mapping leaves neurons without a value.
        """
        if self.ordered is not None:
            if len(self.ordered) != len(neurons):
                raise OrderError(
                    f"{self.what} needs one value for each of {count(len(neurons))} to be converted, in this "
                    f"order: {show_all(neurons)}; got {len(self.ordered)}."
                )
            return list(self.ordered)
        if self.by_pattern is None:
            return [self.single] * len(neurons)  # type: ignore[list-item]
        values: list[T] = []
        uncovered: list[Paths] = []
        for paths in neurons:
            fitting = [value for pattern, value in self.by_pattern if matches(pattern, paths)]
            if fitting:
                values.append(fitting[0])
            else:
                uncovered.append(paths)
        if uncovered:
            kind = OrderError if self.what == "alpha" else OptionError
            raise kind(
                f"the {self.what} mapping has no value for {show_all(uncovered)}; add patterns for them, or "
                f'"*" as the last entry for all others, or exclude them.'
            )
        return values


# -- the options of a conversion ------------------------------------------------------------------

Alpha = float | PerChannel | MultiTerm | nn.Parameter


def check_one_alpha(value: Any, what: str = "alpha") -> Alpha:
    """The order of one layer: a number, ``PerChannel``, ``MultiTerm`` or a parameter as it is.

    Raises:
        OrderError, OptionTypeError: for values that cannot be used.
    """
    if isinstance(value, (PerChannel, MultiTerm)):
        return value
    if isinstance(value, nn.Parameter):
        check_parameter(value, what)
        return value
    check_untrained(value, what)
    return check_alpha(value, what)


def read_alpha(value: Any) -> Setting[Alpha]:
    """The ``alpha`` option: one order, a sequence (one a spiking layer) or a mapping.

    Raises:
        OrderError, OptionTypeError, OptionError: for values that cannot be used.
    """
    if isinstance(value, nn.Parameter):
        return Setting("alpha", single=check_one_alpha(value))
    check_untrained(value, "alpha")
    listed = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    if listed or getattr(value, "ndim", None):  # lists and tuples; tensors and arrays with a dimension
        if not is_readable(value):
            raise OptionTypeError("alpha must hold numbers, got a tensor without any (meta or sparse).")
        items = value.detach().tolist() if isinstance(value, Tensor) else list(value)
        checked = tuple(check_one_alpha(v, f"alpha[{i}]") for i, v in enumerate(items))
        return Setting("alpha", ordered=checked)
    return Setting.read(value, "alpha", check_one_alpha)


def _check_method(value: Any, what: str) -> Solver:
    if isinstance(value, Solver):
        return check_solver_basics(value)
    if not isinstance(value, str):
        raise OptionTypeError(
            f'{what} must be the name of a solver, e.g. "gl", or a Solver, got {type(value).__name__}.'
        )
    return get_solver(value)


def check_surrogate(value: Any, what: str) -> Surrogate | None:
    """A surrogate by name or as it is; None to leave the neuron its own."""
    if value is None or isinstance(value, Surrogate):
        return value
    if not isinstance(value, str):
        raise OptionTypeError(
            f'{what} must be a name, e.g. "gaussian", or a Surrogate, got {type(value).__name__}.'
        )
    return Surrogate(value)


def _unchecked(value: Any, what: str) -> Any:
    return value  # FractionalOperator checks it


@dataclass(frozen=True)
class OperatorSettings:
    """The options that say what each neuron's fractional operator is."""

    alpha: Setting[Alpha]
    method: Setting[Solver]
    memory: Setting[Any]
    step_size: Setting[Any]
    learn_alpha: Setting[bool]
    memory_reset: Setting[Any]
    checkpoint: Setting[Any]

    @classmethod
    def read(
        cls, alpha: Any, method: Any, memory: Any, step_size: Any, learn_alpha: Any, memory_reset: Any,
        checkpoint: Any,
    ) -> OperatorSettings:  # fmt: skip
        """Check every value before any model is looked at.

        Raises:
            OrderError, OptionError, OptionTypeError, UnknownNameError, PluginError: see the option.
        """
        settings = cls(
            read_alpha(alpha),
            Setting.read(method, "method", _check_method),
            Setting.read(memory, "memory", lambda value, what: as_memory(value)),
            Setting.read(step_size, "step_size", _unchecked),
            Setting.read(learn_alpha, "learn_alpha", flag),
            Setting.read(memory_reset, "memory_reset", _unchecked),
            Setting.read(checkpoint, "checkpoint", _unchecked),
        )
        probe = FractionalOrder(1.0)
        for steps in _values(settings.step_size):
            FractionalOperator(probe, get_solver("gl"), step_size=steps)
        for reset in _values(settings.memory_reset):
            FractionalOperator(probe, get_solver("gl"), memory_reset=reset)
        for every in _values(settings.checkpoint):
            FractionalOperator(probe, get_solver("gl"), checkpoint=every)
        return settings

    def check_patterns(self, neurons: Sequence[Paths]) -> None:
        """See :func:`require_matches`."""
        for setting in vars(self).values():
            setting.check_patterns(neurons)

    def operators(self, neurons: Sequence[Paths]) -> list[FractionalOperator]:
        """One new operator for each neuron to be converted.

        Raises:
            OrderError, OptionError, OptionTypeError: naming the neuron's path.
        """
        columns = [setting.assign(neurons) for setting in vars(self).values()]  # in the order of _build
        return [_build(paths, *values) for paths, *values in zip(neurons, *columns, strict=True)]


def _values(setting: Setting[T]) -> list[T]:
    if setting.by_pattern is not None:
        return [value for _, value in setting.by_pattern]
    return list(setting.ordered) if setting.ordered is not None else [setting.single]  # type: ignore[list-item]


def _build(
    paths: Paths, alpha: Alpha, solver: Solver, memory: Any, step_size: Any, learn: bool, memory_reset: Any,
    checkpoint: Any,
) -> FractionalOperator:  # fmt: skip
    # Several terms are the gl scheme summed up: "gl" means the solver that does that.
    if isinstance(alpha, MultiTerm) and solver.name == "gl":
        solver = get_solver("glmulti")
    try:
        order = FractionalOrder(alpha, learn)
        operator = FractionalOperator(order, solver, memory, step_size, memory_reset, checkpoint)
        operator.check_solver()
        operator.path = paths[0]
        return operator
    except PluginError as error:
        raise PluginError(f"{show(paths[0])}: {error} It is {origin_of(solver)}.") from error
    except (OptionError, OptionTypeError, OrderError) as error:
        raise type(error)(f"{show(paths[0])}: {error}") from error
