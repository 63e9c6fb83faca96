"""The main job: plan, convert, report, restore.

A conversion plans first and changes nothing if the plan fails. Then it builds all fractional neurons, and
only when the last one exists puts them in place; whatever fails leaves the model as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spikede_plugins.adapter import Adapter
from spikede_plugins.channels import settle_channels
from spikede_plugins.engine import FractionalOperator
from spikede_plugins.engine.choice import say_if_slow
from spikede_plugins.errors import (
    ConversionError,
    OptionError,
    OptionTypeError,
    SpikedeError,
    SpikedeWarning,
    UnsupportedNeuronError,
)
from spikede_plugins.hidden import Hidden, by_itself, find_hidden, own_hint, refuse_own
from spikede_plugins.loading import watch_loading
from spikede_plugins.memory import Memory
from spikede_plugins.orders import MultiTerm, PerChannel
from spikede_plugins.registry import adapters_in_use, available_adapters
from spikede_plugins.report import ConversionReport, ReportRow, Status, operator_columns
from spikede_plugins.selection import (
    OperatorSettings,
    Setting,
    as_patterns,
    check_surrogate,
    count,
    matches,
    require_matches,
    show,
    show_all,
)
from spikede_plugins.solvers.base import Solver
from spikede_plugins.surrogate import Surrogate
from spikede_plugins.tree import (
    KIND_MARK,
    NATIVE_MARK,
    Neuron,
    Trade,
    check_model,
    copy_model,
    find_neurons,
)
from spikede_plugins.uninterrupted import Uninterrupted

AlphaOption = (
    float | PerChannel | MultiTerm | Tensor
    | Sequence[float | PerChannel | MultiTerm | nn.Parameter]
    | Mapping[str, float | PerChannel | MultiTerm | nn.Parameter]
)
MethodOption = str | Solver | Mapping[str, str | Solver]
MemoryOption = str | int | Memory | Mapping[str, str | int | Memory]
PatternOption = str | Sequence[str] | None
SurrogateOption = str | Surrogate | Mapping[str, str | Surrogate | None] | None


def convert_to_fractional(
    model: nn.Module,
    *,
    alpha: AlphaOption = 0.7,
    method: MethodOption = "gl",
    memory: MemoryOption = "auto",
    step_size: float | Mapping[str, float] = 1.0,
    learn_alpha: bool | Mapping[str, bool] = False,
    memory_reset: str | Mapping[str, str] = "never",
    checkpoint: int | Mapping[str, int | None] | None = None,
    surrogate: SurrogateOption = None,
    include: PatternOption = None,
    exclude: PatternOption = None,
    strict: bool = True,
    inplace: bool = False,
) -> nn.Module:
    """The model with fractional neurons, ``D^alpha v = rate``, in place of its integer ones.

    Patterns (``include``, ``exclude`` and the keys of mappings) are dotted paths with the wildcards of
    ``fnmatch``; ``*`` crosses dots, and a pattern selects what lies below it too: ``"block1"`` selects
    ``block1.lif``. Of a mapping the first pattern that fits a neuron counts; every neuron must be covered
    (``"*"`` last covers the rest) and every pattern must fit some neuron.

    Args:
        model: a model with spiking neurons of a framework that an adapter knows.
        alpha: the Caputo order: a number in (0, 1]; a sequence, one for each spiking layer to be converted in
            the order of ``model.named_modules()``; a mapping {pattern: order}. An order may also be
            :class:`PerChannel` or :class:`MultiTerm`, or an ``nn.Parameter`` of one number, which is then
            trained: that very object, shared by all layers that it is given to.
            A fixed 1 (at ``step_size`` 1) leaves the native neuron as it is.
        method: the solver: a name from :func:`available_solvers`, a solver object, or a mapping.
        memory: ``"auto"`` (every step, and from 128 steps on a compressed memory of constant size, where the
            solver allows it), ``"full"`` (every step), ``"soe"`` or :class:`SumOfExponentials` (compressed),
            the length of a window in steps, or a mapping.
        step_size: h in native steps, or a mapping.
        learn_alpha: make the order a trainable parameter that stays in (0, 1]; or a mapping.
        memory_reset: ``"never"``, or ``"spike"`` to forget a neuron's history when it fires; or a mapping.
        checkpoint: in multi-step mode, keep the state at every so many steps and recompute the steps between
            in backward: less memory for one more forward pass; or a mapping. None keeps every step.
        surrogate: another surrogate gradient for the converted neurons, by name (``"atan"``, ``"sigmoid"``,
            ``"gaussian"``, ``"piecewise_linear"``, ...; see ``spikede_plugins.surrogate``), a
            :class:`Surrogate` with its scale, or a mapping. None leaves each its own.
        include: convert only the neurons selected by one of these patterns.
        exclude: leave the neurons selected by one of these patterns as they are.
        strict: if False, neurons without a fractional form are left as they are, with one
            :class:`SpikedeWarning`, instead of raising.
        inplace: change ``model`` itself; its parameters stay the same objects. Otherwise a copy is converted,
            whose neurons start from their reset state.

    Returns:
        The converted model: a copy, or ``model`` itself if ``inplace``.

    Raises:
        OptionTypeError: for a model that is no ``nn.Module``, or an option of a wrong type.
        OrderError: for an order outside (0, 1], or the wrong count of orders.
        OptionError: for another option value that cannot be used.
        UnknownNameError, PluginError: for a method that does not exist, or is broken.
        UnsupportedNeuronError: for neurons without a fractional form, all of them listed.
        ConversionError: if there is nothing to convert, a pattern selects nothing, neurons are
            fractional already, or building the new neurons fails. The model is left as it was.
    """
    _check_flags(strict=strict, inplace=inplace)
    settings = OperatorSettings.read(
        alpha, method, memory, step_size, learn_alpha, memory_reset, checkpoint
    )
    surrogates = Setting.read(surrogate, "surrogate", check_surrogate)
    plan = _plan(check_model(model), settings, include, exclude, surrogates, refuse=strict)
    unsupported = plan.report.unsupported
    if unsupported and not plan.report:
        raise UnsupportedNeuronError(_unsupported_text(unsupported, strict))
    if unsupported:
        left = ", ".join(show(row.path) for row in unsupported)
        warnings.warn(
            f"left as they are, without a fractional form: {count(len(unsupported))} ({left}). "
            "plan_conversion(model) tells why.",
            SpikedeWarning,
            stacklevel=2,
        )
    seen = plan.report.seen
    if seen:
        shown = "; ".join(f"{show(row.path)} ({row.kind}): {row.note}" for row in seen[:5])
        more = f"; and {len(seen) - 5} more" if len(seen) > 5 else ""
        warnings.warn(
            f"seen, not converted: {count(len(seen))}: {shown}{more}.", SpikedeWarning, stacklevel=2
        )
    given = [parameter for operator in plan.operators if operator for parameter in operator.order.given]
    work = _Workpiece.of(model, plan.neurons, inplace, given)
    steps = []
    for neuron, operator, chosen in zip(work.neurons, plan.operators, plan.surrogates, strict=True):
        if operator is None:
            continue
        if operator.is_native:
            work.marks.append((neuron.module, operator_columns(operator)))
        else:
            _place(operator, neuron.module, work.model)
            steps.append((neuron, partial(_to_fractional, neuron, operator, chosen)))
    converted = work.carry_out(steps)
    say_if_slow(o for o in plan.operators if o is not None and not o.is_native)
    return converted


def _to_fractional(neuron: Neuron, operator: FractionalOperator, surrogate: Surrogate | None) -> nn.Module:
    made = neuron.adapter.to_fractional(neuron.module, operator)
    if surrogate is not None:
        neuron.adapter.use_surrogate(made, surrogate)
    return made


def plan_conversion(
    model: nn.Module,
    *,
    alpha: AlphaOption = 0.7,
    method: MethodOption = "gl",
    memory: MemoryOption = "auto",
    step_size: float | Mapping[str, float] = 1.0,
    learn_alpha: bool | Mapping[str, bool] = False,
    memory_reset: str | Mapping[str, str] = "never",
    checkpoint: int | Mapping[str, int | None] | None = None,
    surrogate: SurrogateOption = None,
    include: PatternOption = None,
    exclude: PatternOption = None,
    strict: bool = True,
    inplace: bool = False,
) -> ConversionReport:
    """What :func:`convert_to_fractional` would do with the same arguments; the model is not touched.

    Neurons without a fractional form are rows of the report, whatever ``strict`` says: telling of them
    is what a plan is for.

    Raises:
        Whatever :func:`convert_to_fractional` raises for the same arguments, but UnsupportedNeuronError.
    """
    _check_flags(strict=strict, inplace=inplace)
    settings = OperatorSettings.read(
        alpha, method, memory, step_size, learn_alpha, memory_reset, checkpoint
    )
    surrogates = Setting.read(surrogate, "surrogate", check_surrogate)
    return _plan(check_model(model), settings, include, exclude, surrogates).report


def conversion_report(model: nn.Module) -> ConversionReport:
    """The state of a converted model, with the orders as they are now; prints as a table.

    Of a model that was not converted it says so, and what to call.

    Raises:
        OptionTypeError: if ``model`` is no ``nn.Module``.
    """
    rows = []
    others = by_itself(check_model(model))
    everywhere = find_neurons(model, adapters_in_use(), to_change=False)
    neurons = [neuron for neuron in everywhere if id(neuron.module) not in others]
    for neuron in neurons:
        paths = tuple(neuron.paths)
        support = None if neuron.fractional else neuron.adapter.support(neuron.module)
        if support is None:
            operator = neuron.adapter.operator(neuron.module)
            engine = neuron.adapter.engine(neuron.module, operator)
            columns = operator_columns(operator)
            rows.append(ReportRow(paths, neuron.kind, "converted", **columns, engine=engine))
        elif neuron.mark is not None:
            rows.append(ReportRow(paths, support.kind, "native", **neuron.mark))
        elif support.supported:
            rows.append(ReportRow(paths, support.kind, "excluded"))
        else:
            rows.append(ReportRow(paths, support.kind, "unsupported", note=support.reason))
    unseen = find_hidden(model, adapters_in_use())
    rows += [ReportRow((seen.path,), seen.kind, "seen", note=seen.reason) for seen in unseen]
    hint = own_hint(model) and f"{own_hint(model)}."
    if not hint and rows and not any(neuron.done for neuron in neurons):
        hint = (
            "nothing here is fractional: convert_to_fractional(model) makes it so, and "
            "plan_conversion(model) shows what that would do."
        )
    return ConversionReport(tuple(rows), hint)


def restore_native(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The model with native neurons again: the inverse of :func:`convert_to_fractional`.

    Args:
        model: a converted model.
        inplace: change ``model`` itself; its parameters stay the same objects. Otherwise a copy is restored.

    Returns:
        The restored model: a copy, or ``model`` itself if ``inplace``.

    Raises:
        OptionTypeError: if ``model`` is no ``nn.Module``.
        ConversionError: if nothing in it was converted, or building a native neuron fails. The model is
            left as it was.
    """
    _check_flags(inplace=inplace)
    neurons = _convertible(check_model(model), adapters_in_use())
    if not any(neuron.done for neuron in neurons):
        refuse_own(model, "there is nothing to restore")
        raise ConversionError(
            f"there is nothing to restore: {type(model).__name__} has {count(len(neurons))}, none of them "
            "fractional; convert_to_fractional(model) makes them so."
        )
    work = _Workpiece.of(model, neurons, inplace)
    work.marks = [(n.module, None) for n in work.neurons if n.mark is not None]
    return work.carry_out(
        [(n, partial(n.adapter.to_native, n.module)) for n in work.neurons if n.fractional]
    )


# -- planning -------------------------------------------------------------------------------------


@dataclass
class _Plan:
    """All spiking neurons of a model, what each gets (None: as it is), and the report."""

    neurons: list[Neuron]
    operators: list[FractionalOperator | None]
    surrogates: list[Surrogate | None]
    report: ConversionReport


def _check_flags(**flags: Any) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise OptionTypeError(f"{name} must be True or False, got {value!r}.")


def _plan(
    model: nn.Module, settings: OperatorSettings, include: Any, exclude: Any,
    surrogates: Setting[Surrogate | None], refuse: bool = False,
) -> _Plan:  # fmt: skip
    """The plan; with ``refuse``, neurons without a fractional form are an error before orders are counted."""
    chosen, left_out = as_patterns(include, "include"), as_patterns(exclude, "exclude")
    neurons, unseen = _convertible(model, adapters_in_use()), find_hidden(model, adapters_in_use())
    if not neurons:
        refuse_own(model, "nothing to convert")
        raise ConversionError(_nothing_found_text(model, unseen))
    everywhere = [neuron.paths for neuron in neurons]
    require_matches(chosen or (), everywhere, "include")
    require_matches(left_out or (), everywhere, "exclude")
    settings.check_patterns(everywhere)
    surrogates.check_patterns(everywhere)

    def selected(neuron: Neuron) -> bool:
        included = chosen is None or any(matches(p, neuron.paths) for p in chosen)
        return included and not any(matches(p, neuron.paths) for p in left_out or ())

    wanted = [neuron for neuron in neurons if selected(neuron)]
    if not wanted:
        raise ConversionError(
            f"nothing to convert: {count(len(neurons))} found, all excluded ({show_all(everywhere)}); "
            f"narrow exclude={exclude!r} or widen include={include!r}."
        )
    _require_untouched(wanted, neurons)
    support = {id(n): n.adapter.support(n.module) for n in neurons if not n.fractional}
    able = [n for n in wanted if support[id(n)].supported]
    if refuse and len(able) < len(wanted):
        rows = [
            ReportRow(tuple(n.paths), said.kind, "unsupported", note=said.reason)
            for n in wanted
            if not (said := support[id(n)]).supported
        ]
        raise UnsupportedNeuronError(_unsupported_text(rows, strict=True))
    made = settings.operators([n.paths for n in able]) if able else []
    operators = {id(n): operator for n, operator in zip(able, made, strict=True)}
    spiking = {id(n.module) for n in neurons}
    for n, own in zip(able, made, strict=True):
        settle_channels(own, model, n.paths, spiking)
    slopes = dict(zip(map(id, able), surrogates.assign([n.paths for n in able]), strict=True)) if able else {}
    for n in able:
        if slopes[id(n)] is not None and operators[id(n)].is_native:
            raise OptionError(
                f"{show(n.paths[0])}: a fixed order of 1 leaves the neuron as it is, with its own surrogate; "
                "set another on the neuron itself."
            )
    asked = {id(n) for n in wanted}
    rows = []
    for neuron in neurons:
        paths, operator = tuple(neuron.paths), operators.get(id(neuron))
        if neuron.fractional:
            rows.append(ReportRow(paths, neuron.kind, "excluded", note="fractional already"))
            continue
        said = support[id(neuron)]
        if operator is not None:
            status: Status = "native" if operator.is_native else "converted"
            note = "" if operator.is_native else said.note
            engine = "" if operator.is_native else neuron.adapter.engine(neuron.module, operator)
            columns = operator_columns(operator)
            rows.append(ReportRow(paths, said.kind, status, **columns, engine=engine, note=note))
        elif id(neuron) in asked:
            rows.append(ReportRow(paths, said.kind, "unsupported", note=said.reason))
        else:
            rows.append(ReportRow(paths, said.kind, "excluded"))
    rows += [ReportRow((seen.path,), seen.kind, "seen", note=seen.reason) for seen in unseen]
    return _Plan(
        neurons, [operators.get(id(n)) for n in neurons], [slopes.get(id(n)) for n in neurons],
        ConversionReport(tuple(rows)),
    )  # fmt: skip


def _convertible(model: nn.Module, adapters: Iterable[Adapter]) -> list[Neuron]:
    """The neurons of a model that a conversion is for; those inside of an SNNWrapper are that one's."""
    others = by_itself(model)
    return [neuron for neuron in find_neurons(model, adapters) if id(neuron.module) not in others]


def _require_untouched(wanted: Sequence[Neuron], neurons: Sequence[Neuron]) -> None:
    done = [n for n in wanted if n.done]
    if not done:
        return
    if all(n.done for n in neurons):
        raise ConversionError(
            f"the model is already fractional: {count(len(neurons))}, all converted before; "
            "call restore_native(model) first, then convert with the new settings."
        )
    raise ConversionError(
        f"these spiking neurons are already fractional and would be converted twice: "
        f"{show_all(n.paths for n in done)}; exclude them, or call restore_native(model) first."
    )


def _nothing_found_text(model: nn.Module, unseen: Sequence[Hidden]) -> str:
    adapters = available_adapters()
    in_use = [name for name, status in adapters.items() if status.state == "ready"]
    idle = [f"{name} ({status})" for name, status in adapters.items() if status.state != "ready"]
    known = ", ".join(in_use) or "no framework"
    text = f"no spiking neuron found in {type(model).__name__}; neurons of {known} are recognised"
    if idle:
        text += f", not those of {'; '.join(idle)}"
    text += ". Neurons must be submodules: layers kept in a plain list belong into an nn.ModuleList."
    return text + "".join(f"\n  {show(h.path)} ({h.kind}): seen, not converted: {h.reason}" for h in unseen)


def _unsupported_text(rows: Sequence[ReportRow], strict: bool) -> str:
    listed = "\n".join(f"  {' = '.join(map(show, row.paths))} ({row.kind}): {row.note}" for row in rows)
    if not strict:
        return f"nothing to convert: none of the selected spiking neurons has a fractional form:\n{listed}"
    return (
        f"no fractional form for {count(len(rows))}:\n{listed}\n"
        "Exclude them (exclude=[...]), or pass strict=False to leave them as they are."
    )


# -- carrying out ---------------------------------------------------------------------------------


def _place(operator: FractionalOperator, neuron: nn.Module, model: nn.Module) -> None:
    """Learnable orders live where the neuron does; float32 unless the model is float64, never half.

    A parameter that the caller gave stays as and where it is.
    """
    for owner in (neuron, model):
        tensors = [t for t in (*owner.parameters(), *owner.buffers()) if t.is_floating_point()]
        if tensors:
            double = tensors[0].dtype == torch.float64
            dtype = torch.float64 if double else torch.float32
            if not operator.order.given:
                operator.to(device=tensors[0].device, dtype=dtype)
            for name, own in list(operator.order.named_parameters()) if operator.order.given else []:
                if not any(own is parameter for parameter in operator.order.given):
                    setattr(operator.order, name, nn.Parameter(own.detach().to(tensors[0].device, dtype)))
            return


def _by_adapter(
    neurons: Sequence[Neuron], modules: Sequence[nn.Module]
) -> list[tuple[Adapter, list[nn.Module]]]:
    groups: dict[int, tuple[Adapter, list[nn.Module]]] = {}
    for neuron, module in zip(neurons, modules, strict=True):
        groups.setdefault(id(neuron.adapter), (neuron.adapter, []))[1].append(module)
    return list(groups.values())


@dataclass
class _Workpiece:
    """The model being changed: the caller's own, or a copy, and what has to be undone if that fails.

    Attributes:
        model: the model.
        neurons: its spiking neurons, in the order of the plan.
        inplace: whether it is the caller's own.
        marks: native neurons and the mark each is to carry (None: to lose).
    """

    model: nn.Module
    neurons: list[Neuron]
    inplace: bool
    marks: list[tuple[nn.Module, dict[str, Any] | None]]

    @classmethod
    def of(
        cls, model: nn.Module, neurons: list[Neuron], inplace: bool, shared: Sequence[nn.Parameter] = ()
    ) -> _Workpiece:
        if inplace:
            return cls(model, neurons, True, [])
        copied = copy_model(model, shared)
        adapters = {id(n.adapter): n.adapter for n in neurons}
        found = _convertible(copied, adapters.values())
        if [n.paths for n in found] != [n.paths for n in neurons]:
            raise ConversionError(
                f"a copy of {type(model).__name__} does not have the model's own neurons; pass inplace=True."
            )
        return cls(copied, found, False, [])

    def carry_out(self, steps: Sequence[tuple[Neuron, Callable[[], nn.Module]]]) -> nn.Module:
        """Build a new neuron for each step, then put all in place; undo everything if anything fails."""
        old = [neuron for neuron, _ in steps]
        made: list[nn.Module] = []
        change: Uninterrupted[nn.Module] | None = None
        try:
            if not self.inplace:
                for adapter, copied in _by_adapter(self.neurons, [n.module for n in self.neurons]):
                    adapter.adopt(copied)
                    for module in copied:
                        adapter.reset_state(module)
            for neuron, build in steps:
                made.append(_build(neuron, build))
            change = Uninterrupted(partial(self._change, self._trade(old, made), old, made))
            return change.run()
        except BaseException:
            if change is None or change.give_up():  # what has begun is brought to its end in any case
                self._abandon(old, made)
            raise

    def _change(self, trade: Trade, old: list[Neuron], made: list[nn.Module]) -> nn.Module:
        """Put the new neurons and the marks in place, all of them or none; the root that results."""
        marks_before = [vars(module).get(NATIVE_MARK) for module, _ in self.marks]
        finishing = False
        try:
            for module, mark in self.marks:
                _set_mark(module, mark)
            trade.carry_out()
            root = made[0] if self._root_is_neuron(old) and not self.inplace else self.model
            finishing = True
            self._finish(root, old, made)
            watch_loading(root, any(mark is not None for _, mark in self.marks))
            return root
        except BaseException:
            for (module, _), mark in zip(self.marks, marks_before, strict=True):
                _set_mark(module, mark)
            trade.undo()
            if finishing:
                with suppress(Exception):  # the error that led here is the one to tell
                    self._finish(self.model, old, made, back=True)
            self._abandon(old, made)
            raise

    def _root_is_neuron(self, old: Sequence[Neuron]) -> bool:
        return bool(old) and old[0].module is self.model

    def _trade(self, old: Sequence[Neuron], made: Sequence[nn.Module]) -> Trade:
        if not self._root_is_neuron(old):
            return Trade.replacing(self.model, [(n.module, new) for n, new in zip(old, made, strict=True)])
        if self.inplace:
            return Trade.exchanging(self.model, made[0])
        return Trade([], [(self.model, made[0])])

    def _finish(
        self, root: nn.Module, old: Sequence[Neuron], made: Sequence[nn.Module], back: bool = False
    ) -> None:
        gone, come = [n.module for n in old], list(made)
        # A root changed in place has traded contents: what is in the model now is the old object.
        if back != (self.inplace and self._root_is_neuron(old)):
            gone, come = come, gone
        for (adapter, out), (_, new) in zip(_by_adapter(old, gone), _by_adapter(old, come), strict=True):
            adapter.finish(root, out, new)

    def _abandon(self, old: list[Neuron], made: list[nn.Module]) -> None:
        groups = _by_adapter(old[: len(made)], made)
        if not self.inplace:
            groups += _by_adapter(self.neurons, [n.module for n in self.neurons])
        for adapter, modules in groups:
            with suppress(Exception):
                adapter.abandon(modules)


def _build(neuron: Neuron, build: Callable[[], nn.Module]) -> nn.Module:
    try:
        new = build()
    except SpikedeError:
        raise
    except Exception as error:
        raise ConversionError(
            f"{show(neuron.paths[0])} ({type(neuron.module).__name__}) could not be rebuilt by the adapter "
            f"{neuron.adapter.name!r}: {type(error).__name__}: {error}; exclude it to convert the others."
        ) from error
    if not isinstance(new, nn.Module) or new is neuron.module:
        raise ConversionError(
            f"the adapter {neuron.adapter.name!r} returned no new module for {show(neuron.paths[0])}."
        )
    vars(new).pop(KIND_MARK, None)
    if not neuron.fractional:
        vars(new)[KIND_MARK] = neuron.adapter.support(neuron.module).kind
    return new


def _set_mark(module: nn.Module, mark: dict[str, Any] | None) -> None:
    if mark is None:
        vars(module).pop(NATIVE_MARK, None)
    else:
        vars(module)[NATIVE_MARK] = mark
