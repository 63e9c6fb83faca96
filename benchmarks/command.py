"""The command line that every benchmark has: which groups, how often, where to; a JSON file and tables.

    [--out DIR] [--repeat N] [--only GROUP,GROUP] [--smoke] [--threads 2]

``--only`` measures some groups anew and keeps the others as the JSON file has them.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import Row, Setting
from tables import Table, document, said

from spikede_plugins.engine import cpu

HERE = Path(__file__).parent


def facts(given: Setting) -> dict[str, Any]:
    """On what the numbers of a group depend, besides the group."""
    return {
        "smoke": given.smoke,
        "repeat": given.repeat,
        "threads": given.threads,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "engine": cpu.missing() or "fused CPU",
    }


def known_groups(path: Path, tables: dict[str, Table]) -> dict[str, Any]:
    """The groups of an earlier run, if there was one of this form."""
    if not path.is_file():
        return {}
    groups: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")).get("groups", {})
    return {name: found for name, found in groups.items() if name in tables}


def write(out: Path, name: str, groups: dict[str, Any], tables: dict[str, Table]) -> None:
    """``name.json`` and ``name.md``."""
    ordered = {group: groups[group] for group in tables if group in groups}
    text = json.dumps({"groups": ordered}, indent=1) + "\n"
    (out / f"{name}.json").write_text(text, encoding="utf-8")
    (out / f"{name}.md").write_text(document(ordered, tables), encoding="utf-8")


def run(
    name: str, doc: str | None, tables: dict[str, Table], *, more: dict[str, Any] | None = None,
    jobs: dict[str, Callable[..., Any]] | None = None,
    figures: dict[str, Callable[[Path, list[Row]], None]] | None = None,
) -> None:  # fmt: skip
    """Measure the groups that are asked for, and write each as soon as it is there.

    Args:
        name: of the files.
        doc: what ``--help`` says.
        tables: the groups.
        more: further facts, such as releases of what is compared with.
        jobs: what ``measure.in_own_process`` may ask this script for.
        figures: for a group, what draws its rows into the folder.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=raw)
    parser.add_argument(
        "--out", type=Path, help="default: where this script is; with --smoke a temporary folder"
    )
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--only", default=",".join(tables), help="groups, separated by commas")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    chosen = asked.only.split(",")
    if unknown := [group for group in chosen if group not in tables]:
        parser.error(f"unknown groups: {', '.join(unknown)}; there are {', '.join(tables)}")
    if asked.repeat < 1 or asked.threads < 1:
        parser.error("--repeat and --threads must be at least 1")
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    gc.freeze()  # what is imported stays: collecting between cases need not look at it
    if asked.job:
        job, given = json.loads(asked.job)
        print(json.dumps((jobs or {})[job](**given)))
        return
    setting = Setting(asked.repeat, asked.smoke, asked.threads)
    # Tiny sizes must not take the place of measurements.
    out = asked.out or Path(tempfile.mkdtemp() if asked.smoke else HERE)
    out.mkdir(parents=True, exist_ok=True)
    groups = known_groups(out / f"{name}.json", tables)
    for group, table in tables.items():
        if group not in chosen:
            continue
        rows = []
        for row in table.rows(setting):
            rows.append(row)
            print(f"{group}: {said(row, table.columns)}", flush=True)
        groups[group] = {**facts(setting), **(more or {}), "rows": rows}
        write(out, name, groups, tables)
        if group in (figures or {}):
            (figures or {})[group](out, rows)
    print(f"written to {out}")
