"""Every import is of something that was declared: each framework's extra alone works, and so does none.

Here everything that an extra does not declare is hidden from a process of its own; ``tox -e install``
installs every extra into an empty environment, and uses it there in the same way (``tests/install/``).
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent / "install"
ROOT = HERE.parent.parent

if not (ROOT / "pyproject.toml").exists():
    pytest.skip("the tests were taken out of their source tree", allow_module_level=True)

sys.path.append(str(HERE))

import exercise
import only_declared


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["none", "spikingjelly", "snntorch"])
def test_with_what_the_extra_declares_and_nothing_else(extra: str) -> None:
    if extra != "none":
        pytest.importorskip(extra)
        pytest.importorskip("numba")
    command = [sys.executable, str(HERE / "only_declared.py"), extra, str(HERE / "exercise.py"), extra]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    hidden = {"none": "spikingjelly, snntorch", "spikingjelly": "snntorch", "snntorch": "spikingjelly"}[extra]
    assert f"refused by name: {hidden}" in done.stdout
    assert f"fused CPU (numba) {'off' if extra == 'none' else 'active'}" in " ".join(done.stdout.split())


def test_what_is_not_declared_is_hidden_in_every_way(tmp_path: Path) -> None:
    """So that the test above can fail: as for a module that is imported and was never required."""
    script = tmp_path / "probe.py"
    script.write_text(
        "import importlib.metadata, importlib.util, torch\n"
        "assert importlib.util.find_spec('pytest') is None\n"
        "try:\n    importlib.metadata.version('pytest')\n"
        "except importlib.metadata.PackageNotFoundError:\n    import pytest\n"
    )
    command = [sys.executable, str(HERE / "only_declared.py"), "none", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "No module named 'pytest'" in done.stderr


def test_the_declared_dependencies_are_followed_with_their_extras() -> None:
    assert {"torch", "numpy", "packaging", "sympy"} <= only_declared.declared([])
    assert not {"numba", "matplotlib", "snntorch", "pytest"} & only_declared.declared([])
    assert {"snntorch", "numba", "llvmlite"} <= only_declared.declared(["snntorch"]) or not (
        importlib.util.find_spec("numba")
    )
    together = only_declared.declared(["all"])
    for extra in exercise.CONTAINED["all"]:
        assert only_declared.declared([extra]) <= together, extra


def test_the_readme_names_extras_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r'pip install [^`]*?"(?:\.|spikede-plugins)\[([a-z,]+)\]"', text))
    extras = {extra for several in named for extra in several.split(",")}
    assert {"all", "spikingjelly", "snntorch"} <= extras <= set(only_declared.extras_of_the_package())
