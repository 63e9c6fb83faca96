"""The results as a Markdown table: RESULTS.md, and between two comments in the README."""

from __future__ import annotations

import re
from pathlib import Path

from covering import Matrix
from results import HERE, ROOT, Result, write_whole

MARKDOWN = HERE / "RESULTS.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- compatibility: written by compat_matrix/table.py -->", "<!-- /compatibility -->"

_SHOWN = {
    "python": "Python",
    "torch": "torch",
    "spikingjelly": "SpikingJelly",
    "snntorch": "snnTorch",
    "numpy": "NumPy",
}


def render(matrix: Matrix, results: dict[str, Result]) -> str:
    """What ran, one row a cell; then every failure, and what cannot exist.

    An extra that a pair of :attr:`Matrix.impossible` names is always asked for: without it all is possible.
    """
    ran = [cell for cell in matrix.cells if cell.name in results]
    lines = [
        f"{len(ran)} of {len(matrix.cells)} cells ran. Skipped are the tests of what a cell does not hold.",
        "",
        f"| {' | '.join(_SHOWN.values())} | extras | passed | failed | skipped |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    failures: list[str] = []
    for cell in ran:
        result = results[cell.name]
        versions = [result.versions.get(name, "–" if cell[name] == "none" else cell[name]) for name in _SHOWN]
        counts = [str(result.passed), str(result.failed), str(result.skipped)]
        if result.outcome == "not installed":
            counts = ["not installed", "", ""]
        extras = (", ".join(cell.extras) or "–") + " (lowest releases)" * (cell["bounds"] == "lowest")
        lines.append(f"| {' | '.join([*versions, extras, *counts])} |")
        failures += [f"* `{cell.name}`, {one['test']}: {one['reason']}" for one in result.failures]
    if failures:
        lines += ["", "Failures:", "", *failures]
    lines += ["", "Cannot exist:", ""]
    for pair, reason in matrix.impossible.items():
        lines.append(f"* {' with '.join(_said(*level) for level in pair)}: {reason}.")
    return "\n".join(lines) + "\n"


def _said(factor: str, level: str) -> str:
    if factor == "bounds":
        return f"the {level} releases of what the extras bring"
    return f"{_SHOWN[factor]} {level}" if factor in _SHOWN else f"the extra {factor}"


def write(
    matrix: Matrix, results: dict[str, Result], markdown: Path = MARKDOWN, readme: Path = README
) -> None:
    """Write both places anew."""
    text = render(matrix, results)
    write_whole(markdown, text)
    page = readme.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    write_whole(readme, pattern.sub(lambda _: f"{BEGIN}\n{text}{END}", page))
