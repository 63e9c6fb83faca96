"""The table of a report: as wide as it wants, squeezed into a terminal, as paragraphs, or as HTML."""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Sequence

HEADER = ("layer", "neuron", "status", "alpha", "method", "memory", "engine")
_MEMORY = HEADER.index("memory")
#: Columns that are said once below the table where all neurons agree, as the room asks for.
_SHARED = (4, 5, 6)
#: How narrow each column may get.
_LEAST = (14, 7, 9, 10, 6, 10, 8)
#: A terminal that is narrower gets paragraphs.
_NARROW = 60

#: The paths of a neuron, the cells of its row from the second column on, and a remark.
Line = tuple[tuple[str, ...], list[str], str]


def as_text(lines: Sequence[Line], total: str, hint: str, width: int) -> str:
    """A table of at most ``width`` columns; one short paragraph a neuron where that is very narrow."""
    body = (_wide(lines, width) or _squeezed(lines, width)) if lines else []
    if not lines and not hint:
        body = ["no spiking neurons"]
    below = [total] if total else []
    return "\n".join([*body, *below, *textwrap.wrap(hint, width)])


def as_html(lines: Sequence[Line], total: str, hint: str) -> str:
    """The same as an HTML table, for notebooks."""

    def row(tag: str, cells: Sequence[str]) -> str:
        return f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"

    head = row("th", [*HEADER, "note"])
    body = "".join(
        row("td", ["<br>".join(map(html.escape, _names(paths))), *map(html.escape, [*cells, note])])
        for paths, cells, note in lines
    )
    below = "".join(f"<p>{html.escape(text)}</p>" for text in (total, hint) if text)
    return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>{below}"


def _names(paths: Sequence[str]) -> list[str]:
    return [("= " if i else "") + (path or "(model)") for i, path in enumerate(paths)]


def _remark(note: str, width: int) -> list[str]:
    return textwrap.wrap(note, width, initial_indent="    ", subsequent_indent="    ") if note else []


def shortened(path: str, width: int) -> str:
    """A path of at most ``width`` characters: the beginning and, as that tells more, most of the end."""
    if len(path) <= width:
        return path
    head = max((width - 3) // 3, 1)
    return f"{path[:head]}...{path[len(path) - (width - 3 - head) :]}"


def _wide(lines: Sequence[Line], width: int) -> list[str]:
    """The table with everything in one line a neuron, or nothing if it is wider than ``width``."""
    cells = [list(HEADER), *([" ".join(_names(paths)), *texts] for paths, texts, _ in lines)]
    used = [i for i in range(len(HEADER)) if any(line[i] for line in cells[1:])]
    widths = {i: max(len(line[i]) for line in cells) for i in used}
    if sum(widths.values()) + 2 * (len(used) - 1) > width:
        return []
    shown = ["  ".join(line[i].ljust(widths[i]) for i in used).rstrip() for line in cells]
    out = [shown[0], "  ".join("-" * widths[i] for i in used)]
    for (_, _, note), line in zip(lines, shown[1:], strict=True):
        out += [line, *_remark(note, width)]
    return out


def _squeezed(lines: Sequence[Line], width: int) -> list[str]:
    """A table in which paths are shortened, cells are wrapped, and what all neurons share is said once."""
    if width < _NARROW:
        return _paragraphs(lines, width)
    columns = [[" ".join(_names(paths)) for paths, _, _ in lines]]
    columns += [[texts[i] for _, texts, _ in lines] for i in range(len(HEADER) - 1)]
    full = [text for text in dict.fromkeys(columns[_MEMORY]) if " (" in text]
    if len(set(columns[_MEMORY]) - {""}) > 1:  # what is said of a memory in brackets goes below the table
        columns[_MEMORY] = [re.sub(r" \(.*?\)", "", text) for text in columns[_MEMORY]]
    else:
        full = []
    said = {i: {text for text in columns[i] if text} for i in _SHARED}
    shared = [i for i in _SHARED if len(said[i]) == 1]
    used = [i for i in range(len(HEADER)) if i not in shared and any(columns[i])]
    widths = {i: max(len(HEADER[i]), *map(len, columns[i])) for i in used}
    widths[0] = max(len(HEADER[0]), *(len(name) for paths, _, _ in lines for name in _names(paths)))
    while sum(widths.values()) + 2 * (len(used) - 1) > width:
        room = [i for i in used if widths[i] > _LEAST[i]]
        if not room:
            return _paragraphs(lines, width)
        widths[max(room, key=lambda i: widths[i] - _LEAST[i])] -= 1
    out = [
        "  ".join(HEADER[i].ljust(widths[i]) for i in used).rstrip(),
        "  ".join("-" * widths[i] for i in used),
    ]
    for row, (paths, _, note) in enumerate(lines):
        cells = {i: textwrap.wrap(columns[i][row], widths[i], break_on_hyphens=False) for i in used}
        cells[0] = [shortened(name, widths[0]) for name in _names(paths)]
        for k in range(max(map(len, cells.values()))):
            texts = ((cells[i][k] if k < len(cells[i]) else "").ljust(widths[i]) for i in used)
            out.append("  ".join(texts).rstrip())
        out += _remark(note, width)
    if shared:
        text = "; ".join(f"{HEADER[i]} {next(iter(said[i]))}" for i in shared)
        out += textwrap.wrap(f"all: {text}", width, subsequent_indent="     ", break_on_hyphens=False)
    for text in full:
        out += textwrap.wrap(f"memory {text}", width, subsequent_indent="     ", break_on_hyphens=False)
    return out


def _paragraphs(lines: Sequence[Line], width: int) -> list[str]:
    out = []
    for paths, (kind, status, *settings), note in lines:
        named = [f"{name} {value}" for name, value in zip(HEADER[3:], settings, strict=True) if value]
        text = f"{' '.join(_names(paths))} ({kind}): {', '.join([status, *named])}"
        out += textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False)
        out += _remark(note, width)
    return out
