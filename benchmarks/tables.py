"""The tables of a benchmark in Markdown: its numbers, what they must reach, and whether they did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from measure import Group, Row, reached


def time_text(value: float) -> str:
    """Three digits, in ms below a second."""
    scaled, unit = (value, "s") if value >= 1.0 else (1e3 * value, "ms")
    return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f} {unit}"


class Column(NamedTuple):
    """One column of a table: its header, the number it shows (``a:b``: entry b of entry a), and how."""

    header: str
    key: str
    text: Callable[[Any], str] = str


class Table(NamedTuple):
    """A group: what is measured, by what, the columns of its table, and the header of its first one."""

    title: str
    rows: Group
    columns: tuple[Column, ...]
    first: str = "what"


def value_of(row: Row, key: str) -> Any:
    """A number of a row; ``a:b`` is entry b of its entry a."""
    outer, _, inner = key.partition(":")
    return row.get(outer, {}).get(inner) if inner else row.get(key)


def cells_of(row: Row, columns: tuple[Column, ...]) -> list[str]:
    """The cells of a line, the last of them what must be reached and whether it was."""
    cells, asked = [row["case"]], []
    for column in columns:
        value = value_of(row, column.key)
        text = "" if value is None else column.text(value) + "/s" * bool(row.get("per_second"))
        fine = reached(row, column.key)
        if fine is not None:
            low, high = (None if b is None else column.text(b) for b in row["demands"][column.key])
            bound = f"≤ {high}" if low is None else f"≥ {low}" if high is None else f"{low} – {high}"
            asked.append(f"{bound}: {'yes' if fine else '**no**'}")
            text = f"**{text}**"
        cells.append(text)
    return [*cells, ", ".join(asked)]


def said(row: Row, columns: tuple[Column, ...]) -> str:
    """A row in one line, on the way."""
    parts = []
    for column in columns:
        value = value_of(row, column.key)
        if value is not None:
            short = " (not reached)" if reached(row, column.key) is False else ""
            parts.append(f"{column.header} {column.text(value)}{short}")
    return f"{row['case']}: {', '.join(parts)}"


def document(groups: dict[str, Any], tables: dict[str, Table]) -> str:
    """All tables of the groups that were measured."""
    parts = []
    for name, found in groups.items():
        table = tables[name]
        lines = [[table.first, *(c.header for c in table.columns), "must reach"]]
        lines += [["---"] * len(lines[0]), *(cells_of(row, table.columns) for row in found["rows"])]
        smoke = " (tiny sizes: no measurement)" if found["smoke"] else ""
        parts.append(f"**{name}**: {table.title}{smoke}\n")
        parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n")
    return "\n".join(parts)
