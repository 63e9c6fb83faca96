"""Run the hardening tests at full scale and write what was counted into the README.

    python tests/hardening/full_run.py [arguments of pytest]        (or: tox -e hardening)

PYTEST_ADDOPTS="-n 2 --dist worksteal" shares the tests among two processes.
The figures are written only by a run of all tests, so that the table never mixes two states of the code.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RESULTS = HERE / "RESULTS.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- hardening: written by tests/hardening/full_run.py -->", "<!-- /hardening -->"

Figures = dict[str, dict[str, float]]


def read_figures(path: Path) -> Figures:
    """The counts of every row: ``{what: {unit: count}}``, rows in the order of their first line."""
    figures: dict[str, Counter[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        one = json.loads(line)
        figures.setdefault(one["what"], Counter())[one["unit"]] += one["count"]
    return {what: dict(counts) for what, counts in sorted(figures.items())}


def read_outcomes(path: Path) -> dict[str, int | list[str]]:
    """How many tests passed, failed, were skipped, and the names of those that failed."""
    cases = list(ElementTree.parse(path).iter("testcase"))
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "passed": len(cases) - len(failed) - skipped,
        "failed": len(failed),
        "skipped": skipped,
        "failures": failed,
    }


def shown(count: float) -> str:
    """A count as people read it: thin groups of three, no needless decimals."""
    whole = f"{count:,.0f}" if count == int(count) else f"{count:,.2g}"
    return whole.replace(",", " ")


def render(results: dict) -> str:
    """The table of the README."""
    outcomes = results["outcomes"]
    lines = [
        f"{outcomes['passed']} tests passed, {outcomes['failed']} failed, {outcomes['skipped']} were skipped"
        f" in {results['minutes']:.0f} minutes ({results['date']}, "
        + ", ".join(f"{name} {release}" for name, release in results["versions"].items())
        + ").",
        "",
        "| what | how much |",
        "|---|---|",
    ]
    for what, counts in results["figures"].items():
        lines.append(f"| {what} | {', '.join(f'{shown(n)} {unit}' for unit, n in counts.items())} |")
    lines += [f"* failed: `{name}`" for name in outcomes["failures"]]
    return "\n".join(lines) + "\n"


def write_readme(results: dict, readme: Path = README) -> None:
    """Put the table between its two comments."""
    page = readme.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    readme.write_text(pattern.sub(lambda _: f"{BEGIN}\n{render(results)}{END}", page), encoding="utf-8")


def versions() -> dict[str, str]:
    """The releases that the run used."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"Python": sys.version.split()[0]}
    for name in ("torch", "spikingjelly", "snntorch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main(arguments: list[str]) -> int:
    """Run pytest over this folder, and write the results if nothing was left out."""
    with tempfile.TemporaryDirectory() as folder:
        figures, junit = Path(folder, "figures.jsonl"), Path(folder, "junit.xml")
        figures.touch()
        environment = {
            **os.environ,
            "SPIKEDE_HARDENING": "full",
            "SPIKEDE_HARDENING_FIGURES": str(figures),
        }
        start = time.monotonic()
        command = [sys.executable, "-m", "pytest", str(HERE), f"--junit-xml={junit}", *arguments]
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        if code not in (0, 1):  # nothing ran, or the run was broken off
            return code
        results = {
            "date": time.strftime("%Y-%m-%d"),
            "minutes": round((time.monotonic() - start) / 60, 1),
            "versions": versions(),
            "outcomes": read_outcomes(junit),
            "figures": read_figures(figures),
        }
    print(render(results))
    if arguments:
        print("Not written: a part of the tests is not the figure of all of them.")
        return code
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_readme(results)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
