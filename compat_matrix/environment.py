"""One cell, from nothing to its result: a fresh environment, the wheel with its extras, the suite."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree import ElementTree

import psutil
from covering import Cell, Matrix
from results import HERE, ROOT, Result

#: Whose releases are written down.
_PACKAGES = (
    "torch", "torchvision", "torchaudio", "spikingjelly", "snntorch", "numpy", "numba", "triton",
    "torchdiffeq", "matplotlib", "scikit-learn", "rich",
)  # fmt: skip

#: What every extra brings: the package that has to be there with it.
_BROUGHT = {
    "plot": "matplotlib",
    "fast": "numba",
    "ode": "torchdiffeq",
    "gpu": "triton",
    "demo": "scikit-learn",
}

_PROBE = """
import importlib.metadata, json, platform, sys
import spikede_plugins
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps({"versions": found, "package": spikede_plugins.__file__}))
"""

_INSTALL_SECONDS, _SUITE_SECONDS = 3600, 1800
_REASON_LENGTH = 300
_PREFIX = "spikede-compat-"


class StepFailed(RuntimeError):
    """A step towards the environment of a cell that did not succeed; the message is its reason."""


class NoInterpreter(StepFailed):
    """This machine has no Python of the cell's release."""


def build_wheel(folder: Path) -> Path:
    """The package's wheel, built through its source distribution: nothing stale gets in."""
    _run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], folder, _INSTALL_SECONDS)
    (wheel,) = folder.glob("*.whl")
    return wheel


def remove_left_over(parent: Path | None = None) -> list[Path]:
    """Remove the environments of runs that were killed, gigabytes each; returns what was removed."""
    removed = []
    for folder in (parent or Path(tempfile.gettempdir())).glob(f"{_PREFIX}*-*"):
        owner = folder.name.removeprefix(_PREFIX).split("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)
            removed += [] if folder.exists() else [folder]
    return removed


def run_cell(
    matrix: Matrix, cell: Cell, wheel: Path, interpreters: Sequence[str], say: Callable[[str], None]
) -> Result:
    """Make the cell's environment, test in it, and remove it whatever happens.

    Args:
        matrix: where the cell is from.
        cell: the cell.
        wheel: the package.
        interpreters: Pythons to look at before those on the path.
        say: is told what is going on.

    Raises:
        NoInterpreter: if there is no such Python here; then nothing was tried.
    """
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
    result = Result("not installed")
    try:
        python = _create(cell, folder, interpreters, say)
        _install(matrix, cell, folder, python, wheel, say)
        result.versions = _probe(cell, folder, python)
        say("testing")
        _test(folder, python, result)
    except NoInterpreter:
        raise
    except StepFailed as failure:
        result.failures.append({"test": "installation", "reason": _tidy(str(failure), folder)})
    finally:
        say("removing")
        shutil.rmtree(folder, ignore_errors=True)
    result.seconds = round(time.monotonic() - began, 1)
    result.date = datetime.date.today().isoformat()
    return result


def _run(command: list[str], cwd: Path, seconds: float) -> str:
    """What a command prints; its errors are its reason."""
    # Nothing of the caller's Python may reach into the environment.
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise StepFailed(f"{Path(command[0]).name} took more than {seconds:.0f} s") from error
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise StepFailed("\n".join([line for line in lines if "ERROR" in line] or lines[-5:]))
    return done.stdout


def _create(cell: Cell, folder: Path, interpreters: Sequence[str], say: Callable[[str], None]) -> Path:
    say("creating")
    first = [word for path in interpreters for word in ("--try-first-with", path)]
    environment = folder / "env"
    command = [sys.executable, "-m", "virtualenv", *first, "--python", cell["python"], str(environment)]
    try:
        _run(command, folder, _INSTALL_SECONDS)
    except StepFailed as failure:
        raise NoInterpreter(
            f"Python {cell['python']} was not found; name one with --interpreter PATH ({failure})"
        ) from failure
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    found = _run([str(python), "-c", "import platform; print(platform.python_version())"], folder, 60)
    if not found.startswith(cell["python"] + "."):
        raise NoInterpreter(f"asked for Python {cell['python']}, found {found.strip()}")
    return python


def _install(
    matrix: Matrix, cell: Cell, folder: Path, python: Path, wheel: Path, say: Callable[[str], None]
) -> None:
    say("installing")
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(matrix.constraints(cell)) + "\n", encoding="utf-8")
    extras = [name for name in ("spikingjelly", "snntorch") if cell[name] != "none"] + cell.extras
    package = f"{wheel}[{','.join(extras)}]" if extras else str(wheel)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(constraints)]
    _run([*pip, package, "numpy", "pytest"], folder, _INSTALL_SECONDS)
    if "fast" not in cell.extras:
        # The extras of the frameworks bring it too; a cell without it is of a user who has none.
        _run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "numba"], folder, _INSTALL_SECONDS)


def _probe(cell: Cell, folder: Path, python: Path) -> dict[str, str]:
    """The releases that were installed, which have to be those of the cell."""
    told = json.loads(_run([str(python), "-c", _PROBE, *_PACKAGES], folder, 600))
    versions: dict[str, str] = told["versions"]
    if not Path(told["package"]).is_relative_to(folder):
        raise StepFailed(f"the package under test is not the installed one but {told['package']}")
    for name in ("torch", "spikingjelly", "snntorch", "numpy"):
        wanted, found = cell[name].removesuffix("*"), versions.get(name, "none").partition("+")[0]
        if not (found.startswith(wanted) if cell[name].endswith("*") else found == wanted):
            raise StepFailed(f"asked for {name} {cell[name]}, found {found}")
    for extra in cell.extras:
        if _BROUGHT[extra] not in versions:
            raise StepFailed(f"the extra {extra} brought no {_BROUGHT[extra]}")
    if "fast" not in cell.extras and "numba" in versions:
        raise StepFailed("asked for no numba, found one")
    return versions


def _test(folder: Path, python: Path, result: Result) -> None:
    report = folder / "report.xml"
    # "pytest" beside the interpreter: "python -m pytest" would put the working directory on the path.
    pytest = [str(python.parent / "pytest"), "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command = [*pytest, "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), str(HERE / "suite")]
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    # The commands that the package installs, and nothing compiled left beside the sources.
    clean |= {"PYTHONDONTWRITEBYTECODE": "1", "PATH": f"{python.parent}{os.pathsep}{clean.get('PATH', '')}"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=clean, capture_output=True, text=True, timeout=_SUITE_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise StepFailed(f"the suite took more than {_SUITE_SECONDS} s") from error
    if not report.exists():
        raise StepFailed(f"pytest wrote no report: {done.stdout[-500:]}{done.stderr[-500:]}")
    count(report, result, folder)
    if done.returncode and not result.failed:
        raise StepFailed(f"pytest ended with {done.returncode}: {done.stdout[-500:]}")
    if not result.passed:
        raise StepFailed("no test ran")


def count(report: Path, result: Result, folder: Path) -> None:
    """Read pytest's report into a result."""
    skips: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        broken = [child for child in case if child.tag in ("failure", "error")]
        skipped = case.find("skipped")
        if broken:
            name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
            result.failures.append({"test": name, "reason": _tidy(broken[0].get("message") or "", folder)})
        elif skipped is not None:
            skips[skipped.get("message") or "no reason given"] += 1
        else:
            result.passed += 1
    result.failed, result.skipped = len(result.failures), sum(skips.values())
    result.skips = dict(sorted(skips.items()))
    result.outcome = "failed" if result.failed else "passed"


def _tidy(reason: str, folder: Path) -> str:
    """A reason in one line, without the places of this machine."""
    for path, name in ((folder, "(env)"), (ROOT, ".")):
        reason = reason.replace(str(path), name)
    return " ".join(reason.split())[:_REASON_LENGTH]
