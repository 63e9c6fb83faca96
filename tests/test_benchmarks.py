"""The benchmarks run: every group gives rows of numbers, and a table. No time is checked."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for needed in ("spikingjelly", "snntorch", "matplotlib"):
    pytest.importorskip(needed)
if not Path("/proc/self/clear_refs").exists():
    pytest.skip("memory is measured by what Linux tells", allow_module_level=True)

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "layers.py"
GROUPS = ("layer", "soe", "cnn", "wrapper", "loop", "steps", "spikes", "growth", "limits", "gpu")
#: Numbers that may be 0 or below: nothing differs, no time was spent that tiny runs could show.
ANY_SIGN = {"voltage_off", "slope"}


def run(*options: str) -> subprocess.CompletedProcess[str]:
    # One thread: tests share the cores, and a second one would mostly wait.
    command = [sys.executable, str(SCRIPT), "--smoke", "--repeat", "1", "--threads", "1", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parent.parent, timeout=300)


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every measured number below a row, with the name of the entry it stands in."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key != "demands":
                yield from numbers(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from numbers(inner, name)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, value


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("benchmarks")
    done = run("--out", str(path))
    assert done.returncode == 0, done.stderr
    return path


def test_every_group_measures(out: Path) -> None:
    groups = json.loads((out / "layers.json").read_text(encoding="utf-8"))["groups"]
    assert tuple(groups) == GROUPS
    for name, group in groups.items():
        assert group["smoke"] and group["threads"] == 1
        for row in group["rows"]:
            found = list(numbers(row))
            assert found or "not run" in row["case"], (name, row)
            for key, value in found:
                good = math.isfinite(value) and (value > 0 or key in ANY_SIGN)
                assert good, (name, row["case"], key, value)
            assert set(row.get("demands", {})) <= set(row), (name, row)
        assert group["rows"], name


def test_every_group_has_a_table(out: Path) -> None:
    text = (out / "layers.md").read_text(encoding="utf-8")
    for name in GROUPS:
        table = text[text.index(f"**{name}**") :].split("\n\n")[1]
        lines = table.splitlines()
        assert "must reach" in lines[0] and len(lines) > 2, name
        assert len({line.count("|") for line in lines}) == 1, name
    assert (out / "growth.png").stat().st_size > 1_000


def test_one_group_anew_keeps_the_others(out: Path) -> None:
    before = json.loads((out / "layers.json").read_text(encoding="utf-8"))["groups"]
    tables = (out / "layers.md").read_text(encoding="utf-8")
    done = run("--out", str(out), "--only", "gpu,loop")
    assert done.returncode == 0, done.stderr
    after = json.loads((out / "layers.json").read_text(encoding="utf-8"))["groups"]
    assert tuple(after) == GROUPS
    assert all(after[name] == before[name] for name in GROUPS if name not in ("gpu", "loop"))
    assert after["loop"] != before["loop"]
    assert (out / "layers.md").read_text(encoding="utf-8").count("\n") == tables.count("\n")


def test_unknown_groups_are_refused(out: Path) -> None:
    done = run("--only", "layer,nothing", "--out", str(out))
    assert done.returncode == 2 and "nothing" in done.stderr
