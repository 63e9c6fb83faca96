"""Install the package with every extra alone, and with none, into empty environments, and use it there.

    python tests/install/full_run.py [EXTRA ...]            (or: tox -e install)

Each environment is new: nothing but ``python -m venv`` and what a user types,

    pip install -c constraints/newest.txt ".[EXTRA]"

Then exercise.py runs in it, and the installed command ``spikede doctor``. "none" is the package without an
extra. The exit code is 0 if all succeeded; what failed is printed as it was said.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

from only_declared import extras_of_the_package

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CONSTRAINTS = ROOT / "constraints" / "newest.txt"
_SECONDS = 3600


class StepFailed(Exception):
    """A command that failed, with all that it said."""


def run(command: list[str], folder: Path, **environment: str) -> str:
    """What a command prints, without anything of this process's Python."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    done = subprocess.run(
        command, cwd=folder, env=clean | environment, capture_output=True, text=True, timeout=_SECONDS
    )
    if done.returncode:
        raise StepFailed(f"$ {' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def install(extra: str, python: Path, folder: Path) -> None:
    """What the README tells a user to type, from a checkout."""
    what = str(ROOT) if extra == "none" else f"{ROOT}[{extra}]"
    run([str(python), "-m", "pip", "install", "--quiet", "-c", str(CONSTRAINTS), what], folder)


def use(extra: str, python: Path, folder: Path) -> str:
    """What the exercise says that it did."""
    # The environments lie in the same place one after the other, so what one has compiled serves the next.
    own = {"NUMBA_CACHE_DIR": str(folder / "kernels"), "MPLBACKEND": "Agg"}
    run([str(python.with_name("spikede")), "doctor"], folder, **own)
    return run([str(python), str(HERE / "exercise.py"), extra], folder, **own).strip()


def main(extras: list[str]) -> int:
    """Every extra in turn; how many failed."""
    known = ["none", *extras_of_the_package()]
    if unknown := set(extras) - set(known):
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    failed = []
    with tempfile.TemporaryDirectory(prefix="spikede-install-") as temporary:
        folder = Path(temporary)
        python = folder / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        for extra in extras or known:
            began = time.monotonic()
            try:
                venv.create(folder / "env", clear=True, with_pip=True)
                install(extra, python, folder)
                installed = time.monotonic()
                told = use(extra, python, folder)
                seconds = f"{installed - began:.0f} s to install, {time.monotonic() - installed:.0f} s to use"
                print(f"{extra}: passed ({seconds})\n    {told}", flush=True)
            except (StepFailed, subprocess.TimeoutExpired) as error:
                failed.append(extra)
                print(f"{extra}: FAILED\n{error}", flush=True)
    print(f"{len(extras or known) - len(failed)} passed, {len(failed)} failed")
    return len(failed)


if __name__ == "__main__":
    raise SystemExit(min(main(sys.argv[1:]), 1))
