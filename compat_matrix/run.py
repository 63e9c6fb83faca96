"""Run the compatibility matrix.

    tox -e compat                         every cell; goes on where an interrupted run stopped
    tox -e compat -- 'py3.12*' NAME       the cells of these names (patterns with *)
    tox -e compat -- --changed            what has no result for the present sources, levels and suite
    tox -e compat -- --list               the cells, and how each stands

Every cell gets a fresh environment, which is removed when it has been tested. A CUDA build of torch takes
5 GB there, and as much in pip's cache (PIP_NO_CACHE_DIR=1 keeps none).
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import covering
import results
import table
from covering import Cell, Matrix
from environment import NoInterpreter, build_wheel, remove_left_over, run_cell
from results import Result, inputs
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

#: Which cells of an unfinished run are done, and what they were run on.
UNFINISHED = results.HERE / ".unfinished.json"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="tox -e compat --", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("names", nargs="*", metavar="NAME", help="names of cells, or patterns with *")
    made.add_argument(
        "--changed", action="store_true", help="only cells without a result for what is here now"
    )
    made.add_argument("--fresh", action="store_true", help="do not go on with an interrupted run")
    made.add_argument("--jobs", type=int, default=1, metavar="N", help="how many cells at a time (default 1)")
    made.add_argument(
        "--interpreter",
        action="append",
        default=[],
        metavar="PATH",
        help="a Python to look at first (repeatable)",
    )
    made.add_argument("--list", action="store_true", help="show the cells and run none")
    return made


def is_current(matrix: Matrix, cell: Cell, known: dict[str, Result]) -> bool:
    """Whether a cell has a result that what is here now would give again."""
    return cell.name in known and known[cell.name].inputs == inputs(matrix, cell)


def select(matrix: Matrix, names: Sequence[str], changed: bool, known: dict[str, Result]) -> list[Cell]:
    """The cells that were asked for, in the order of the matrix.

    Raises:
        SystemExit: if a name fits no cell.
    """
    for name in names:
        if not fnmatch.filter([cell.name for cell in matrix.cells], name):
            raise SystemExit(f"no cell is called {name!r}; tox -e compat -- --list shows all")
    cells = [
        cell for cell in matrix.cells if not names or any(fnmatch.fnmatchcase(cell.name, n) for n in names)
    ]
    return [cell for cell in cells if not (changed and is_current(matrix, cell, known))]


class Journal:
    """The cells of this run that are done, for the next run if this one is interrupted."""

    def __init__(self, matrix: Matrix, cells: Sequence[Cell], fresh: bool, path: Path = UNFINISHED) -> None:
        self.path = path
        self.run = {cell.name: inputs(matrix, cell) for cell in cells}
        self.done: list[str] = []
        if path.exists() and not fresh:
            written = json.loads(path.read_text(encoding="utf-8"))
            if written["run"] == self.run:  # the same cells, on the same sources
                self.done = written["done"]

    def add(self, cell: Cell) -> None:
        self.done.append(cell.name)
        results.write_whole(self.path, json.dumps({"run": self.run, "done": self.done}))

    def close(self) -> None:
        self.path.unlink(missing_ok=True)


def run(
    matrix: Matrix,
    cells: Sequence[Cell],
    jobs: int,
    interpreters: Sequence[str],
    journal: Journal,
    console: Console,
) -> dict[str, Result]:
    """Run cells, and write every result as soon as it is there; returns those of this run."""
    came_out: dict[str, Result] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=console) as progress:
        total = progress.add_task("cells", total=len(cells))
        for left in remove_left_over():
            console.print(f"removed {left}, left by a run that was killed", highlight=False, soft_wrap=True)
        console.print("building the wheel")
        wheel = build_wheel(Path(folder))

        def one(cell: Cell) -> Result:
            task = progress.add_task(cell.name, total=None)

            def say(what: str) -> None:
                progress.update(task, description=f"{cell.name}: {what}")
                console.print(f"{cell.name}: {what}", highlight=False, soft_wrap=True)

            try:
                return run_cell(matrix, cell, wheel, interpreters, say)
            finally:
                progress.remove_task(task)

        pool = ThreadPoolExecutor(jobs)
        running = {pool.submit(one, cell): cell for cell in cells}
        try:
            for future in as_completed(running):
                cell = running[future]
                progress.advance(total)
                try:
                    result = future.result()
                except NoInterpreter as missing:
                    console.print(f"{cell.name}: not run. {missing}", highlight=False, soft_wrap=True)
                    continue
                # As the sources were when the wheel was built, not as they may be by now.
                result.inputs = journal.run[cell.name]
                came_out[cell.name] = result
                # Read again: another run may have written other cells meanwhile.
                results.write({**results.read(), cell.name: result}, matrix)
                table.write(matrix, results.read())
                journal.add(cell)
                console.print(f"{cell.name}: {summary(result)}", highlight=False, soft_wrap=True)
        finally:
            pool.shutdown(cancel_futures=True)
    return came_out


def summary(result: Result) -> str:
    counts = f"{result.passed} passed, {result.failed} failed, {result.skipped} skipped"
    lines = [f"{result.outcome} ({counts}; {result.seconds:.0f} s)"]
    return "\n  ".join([*lines, *(f"{one['test']}: {one['reason']}" for one in result.failures)])


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    if options.jobs < 1:
        parser().error("--jobs takes 1 or more")
    console, matrix, known = Console(), covering.read(), results.read()
    cells = select(matrix, options.names, options.changed, known)
    if options.list:
        for cell in cells:
            state = known[cell.name].outcome if cell.name in known else "not run yet"
            stale = cell.name in known and not is_current(matrix, cell, known)
            console.print(
                f"{cell.name}: {state}{', on other sources' * stale}", highlight=False, soft_wrap=True
            )
        return 0
    journal = Journal(matrix, cells, options.fresh)
    left = [cell for cell in cells if cell.name not in journal.done]
    if len(left) < len(cells):
        console.print(f"going on: {len(cells) - len(left)} of {len(cells)} cells are done")
    if left:
        run(matrix, left, options.jobs, options.interpreter, journal, console)
    journal.close()
    outcomes = [result for name, result in results.read().items() if name in {cell.name for cell in cells}]
    return 1 if any(result.outcome != "passed" for result in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
