"""RESULTS.json: what ran, with which releases and on which sources, and how it came out."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from covering import Cell, Matrix

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "RESULTS.json"

#: What the package is made of, and what it is tested with.
_PACKAGE = ("pyproject.toml", "spikede_plugins/**/*.py", "adapters/**/*.py")
_SUITE = (
    "compat_matrix/suite/*.py",
    "compat_matrix/golden_cases.py",
    "compat_matrix/golden/*.npz",
    "tests/small_nets.py",
    "tests/snntorch_cases.py",
    "tests/sj/sj_cases.py",
)


def _digest(patterns: Iterable[str], root: Path) -> str:
    total = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in root.glob(pattern)}):
        total.update(path.relative_to(root).as_posix().encode() + b"\0")
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:16]


def inputs(matrix: Matrix, cell: Cell, root: Path = ROOT) -> dict[str, str]:
    """What the result of a cell depends on: a cell has changed when one of these has."""
    asked = " ".join([cell.name, *matrix.constraints(cell)])
    return {
        "levels": hashlib.sha256(asked.encode()).hexdigest()[:16],
        "package": _digest(_PACKAGE, root),
        "suite": _digest(_SUITE, root),
    }


@dataclass
class Result:
    """How a cell came out.

    Attributes:
        outcome: ``"passed"``, ``"failed"`` (tests), or ``"not installed"`` (no environment could be made).
        versions: the releases that were installed, by package.
        passed, failed, skipped: how many tests.
        failures: of each failure the test (or the step of the installation) and the reason.
        skips: how many tests were skipped for each reason.
        seconds: how long it took, the installation included.
        date: when it ran, ``YYYY-MM-DD``.
        inputs: see :func:`inputs`.
    """

    outcome: str
    versions: dict[str, str] = field(default_factory=dict)
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    failures: list[dict[str, str]] = field(default_factory=list)
    skips: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    date: str = ""
    inputs: dict[str, str] = field(default_factory=dict)


def read(path: Path = RESULTS) -> dict[str, Result]:
    """The results by the name of the cell; none if nothing ran yet."""
    if not path.exists():
        return {}
    written: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {name: Result(**entry) for name, entry in written["cells"].items()}


def write(results: dict[str, Result], matrix: Matrix, path: Path = RESULTS) -> None:
    """All results at once or not at all, in the order of the matrix; cells it has no more are left out."""
    cells = {cell.name: asdict(results[cell.name]) for cell in matrix.cells if cell.name in results}
    write_whole(path, json.dumps({"cells": cells}, indent=1, ensure_ascii=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """A file that is either the old one or the new one, also if the machine stops here."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
