"""What a conversion does, or did, to each spiking neuron of a model."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass, fields
from typing import Any, Literal

from spikede_plugins.engine import FractionalOperator
from spikede_plugins.report_table import as_html, as_text

Status = Literal["converted", "native", "unsupported", "excluded", "seen"]


@dataclass(frozen=True)
class ReportRow:
    """One spiking neuron.

    Attributes:
        paths: its dotted paths, more than one if it is shared; ``""`` is the model itself.
        kind: the native neuron's class, e.g. ``"LIFNode"``.
        status: ``"converted"``; ``"native"`` (alpha = 1: the native neuron is the fractional one);
            ``"unsupported"``; ``"excluded"`` (left as it is by choice); or ``"seen"`` (it is no submodule of
            the model, or of a superseded package, and is not converted).
        alpha, method, memory: how it is converted, as texts; empty if it is not.
        engine: what runs it on the CPU in multi-step mode, or at each step where there is no other.
        note: a reason or a remark.
        orders: the orders as numbers: one, one a channel, or one a term; empty where none can be read.
        coefficients: the factors of a sum of terms as numbers.
        learned: whether orders or coefficients are trained.
        step_size: h in native steps.
        window: how many steps a window keeps; 0 for all.
        traces: how many traces a compressed memory has; 0 for none.
    """

    paths: tuple[str, ...]
    kind: str
    status: Status
    alpha: str = ""
    method: str = ""
    memory: str = ""
    engine: str = ""
    note: str = ""
    orders: tuple[float, ...] = ()
    coefficients: tuple[float, ...] = ()
    learned: bool = False
    step_size: float = 1.0
    window: int = 0
    traces: int = 0

    @property
    def path(self) -> str:
        return self.paths[0]

    def cells(self) -> list[str]:
        """The texts of the row, but for its paths and its note."""
        long = {"native": "native (alpha = 1)", "seen": "seen, not converted"}
        status = long.get(self.status, self.status)
        return [self.kind, status, self.alpha, self.method, self.memory, self.engine]


def operator_columns(operator: FractionalOperator) -> dict[str, Any]:
    """What a row tells of an operator: texts, with what else it has that is not usual, and numbers."""
    method = operator.solver.name
    if operator.step_size != 1.0:
        method += f", h={operator.step_size:g}"
    memory = operator.memory_text()
    if operator.memory_reset != "never":
        memory += f", reset at {operator.memory_reset}"
    if operator.checkpoint is not None:
        memory += f", checkpoint {operator.checkpoint}"
    order = operator.order
    return {
        "alpha": order.describe(),
        "method": method,
        "memory": memory,
        **{name: tuple(values) for name, values in order.values().items()},
        "learned": not order.fixed,
        "step_size": operator.step_size,
        "window": operator.memory.limit,
        "traces": operator.traces,
    }


@dataclass(frozen=True)
class ConversionReport:
    """The rows of a plan or of a converted model; ``print`` shows a table, as does a notebook.

    True if at least one neuron is (to be) converted or is native by alpha = 1.

    Example::

        report = conversion_report(fnet)
        report.counts                                     # {"converted": 3}
        [row.orders for row in report.converted]          # [(0.7,), (0.7,), (0.7,)]
        pandas.DataFrame(report.records())

    Attributes:
        rows: one for each spiking neuron.
        hint: what to call instead, of a model that this report is not for.
    """

    rows: tuple[ReportRow, ...]
    hint: str = ""

    def with_status(self, status: Status) -> list[ReportRow]:
        return [row for row in self.rows if row.status == status]

    @property
    def converted(self) -> list[ReportRow]:
        """Neurons that are (to be) fractional."""
        return self.with_status("converted")

    @property
    def native(self) -> list[ReportRow]:
        """Neurons whose fractional form at alpha = 1 is the native neuron itself."""
        return self.with_status("native")

    @property
    def unsupported(self) -> list[ReportRow]:
        """Neurons without a fractional form; ``note`` says why."""
        return self.with_status("unsupported")

    @property
    def excluded(self) -> list[ReportRow]:
        """Neurons left as they are by choice."""
        return self.with_status("excluded")

    @property
    def seen(self) -> list[ReportRow]:
        """Neurons that a conversion cannot reach: not registered with ``nn.Module``; ``note`` says why."""
        return self.with_status("seen")

    @property
    def counts(self) -> dict[str, int]:
        """How many neurons have each status, statuses that occur only."""
        return dict(Counter(row.status for row in self.rows))

    def records(self) -> list[dict[str, Any]]:
        """The rows as plain dictionaries, with the first path as ``path``."""
        return [
            {"path": row.path, **{field.name: getattr(row, field.name) for field in fields(row)}}
            for row in self.rows
        ]

    def __bool__(self) -> bool:
        return bool(self.converted or self.native)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        """A table as wide as the terminal at most; one short paragraph a neuron where that is very narrow."""
        width = max(shutil.get_terminal_size().columns, 20)
        return as_text(self._lines(), self._total(), self.hint, width)

    def _repr_html_(self) -> str:
        return as_html(self._lines(), self._total(), self.hint)

    def _lines(self) -> list[tuple[tuple[str, ...], list[str], str]]:
        return [(row.paths, row.cells(), row.note) for row in self.rows]

    def _total(self) -> str:
        names = {"seen": "seen, not converted"}
        return ", ".join(f"{count} {names.get(status, status)}" for status, count in self.counts.items())
