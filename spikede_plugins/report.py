"""What a conversion does, or did, to each spiking neuron of a model."""

from __future__ import annotations

import shutil
import textwrap
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from spikede_plugins.engine import FractionalOperator

Status = Literal["converted", "native", "unsupported", "excluded"]

_COLUMNS = ("layer", "neuron", "status", "alpha", "method", "memory", "engine")


@dataclass(frozen=True)
class ReportRow:
    """One spiking neuron.

    Attributes:
        paths: its dotted paths, more than one if it is shared; ``""`` is the model itself.
        kind: the native neuron's class, e.g. ``"LIFNode"``.
        status: ``"converted"``; ``"native"`` (alpha = 1: the native neuron is the fractional one);
            ``"unsupported"``; or ``"excluded"`` (left as it is by choice).
        alpha, method, memory: how it is converted; empty if it is not.
        engine: what runs it on the CPU in multi-step mode, or at each step where there is no other.
        note: a reason or a remark.
    """

    paths: tuple[str, ...]
    kind: str
    status: Status
    alpha: str = ""
    method: str = ""
    memory: str = ""
    engine: str = ""
    note: str = ""

    @property
    def path(self) -> str:
        return self.paths[0]


def operator_columns(operator: FractionalOperator) -> dict[str, str]:
    """``alpha``, ``method`` and ``memory`` of a row, with what else the operator has that is not usual."""
    method = operator.solver.name
    if operator.step_size != 1.0:
        method += f", h={operator.step_size:g}"
    memory = operator.memory_text()
    if operator.memory_reset != "never":
        memory += f", reset at {operator.memory_reset}"
    if operator.checkpoint is not None:
        memory += f", checkpoint {operator.checkpoint}"
    return {"alpha": operator.order.describe(), "method": method, "memory": memory}


@dataclass(frozen=True)
class ConversionReport:
    """The rows of a plan or of a converted model; ``print`` shows a table.

    True if at least one neuron is (to be) converted or is native by alpha = 1.
    """

    rows: tuple[ReportRow, ...]

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
    def counts(self) -> dict[str, int]:
        """How many neurons have each status, statuses that occur only."""
        return dict(Counter(row.status for row in self.rows))

    def __bool__(self) -> bool:
        return bool(self.converted or self.native)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        """A table as wide as the terminal allows; one short paragraph a neuron where it is too narrow."""
        if not self.rows:
            return "no spiking neurons"
        width = max(shutil.get_terminal_size().columns, 20)
        body = _table(self.rows, width) or _paragraphs(self.rows, width)
        total = ", ".join(f"{count} {status}" for status, count in self.counts.items())
        return "\n".join([*body, total])


def _cells(row: ReportRow) -> list[str]:
    paths = " = ".join(path or "(model)" for path in row.paths)
    status = "native (alpha = 1)" if row.status == "native" else row.status
    return [paths, row.kind, status, row.alpha, row.method, row.memory, row.engine]


def _remark(row: ReportRow, width: int) -> list[str]:
    return textwrap.wrap(row.note, width, initial_indent="    ", subsequent_indent="    ") if row.note else []


def _table(rows: tuple[ReportRow, ...], width: int) -> list[str]:
    """The aligned table, or nothing if it is wider than ``width``."""
    cells = [list(_COLUMNS), *map(_cells, rows)]
    used = [i for i in range(len(_COLUMNS)) if any(line[i] for line in cells[1:])]
    widths = {i: max(len(line[i]) for line in cells) for i in used}
    if sum(widths.values()) + 2 * (len(used) - 1) > width:
        return []
    lines = ["  ".join(line[i].ljust(widths[i]) for i in used).rstrip() for line in cells]
    out = [lines[0], "  ".join("-" * widths[i] for i in used)]
    for row, line in zip(rows, lines[1:], strict=True):
        out += [line, *_remark(row, width)]
    return out


def _paragraphs(rows: tuple[ReportRow, ...], width: int) -> list[str]:
    out = []
    for row in rows:
        paths, kind, status, *settings = _cells(row)
        named = [f"{name} {value}" for name, value in zip(_COLUMNS[3:], settings, strict=True) if value]
        text = f"{paths} ({kind}): {', '.join([status, *named])}"
        out += textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False)
        out += _remark(row, width)
    return out
