"""What is shipped: a wheel and an sdist that hold everything, and a wheel that works once installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("build")

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("spikede_plugins", "spikede_spikingjelly", "spikede_snntorch")
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".tox", ".venv*", ".hypothesis", ".*_cache", "__pycache__", "build", "dist", "*.egg-info"
)

if not (ROOT / "pyproject.toml").exists():
    pytest.skip("the tests were taken out of their source tree", allow_module_level=True)


def run(command: list[str], cwd: Path) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel built from that sdist: if the sdist lacks something, the wheel fails."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT)
    # setuptools is among the test requirements, so nothing is downloaded.
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), "source"], folder)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    return sdist, wheel


def sources() -> set[str]:
    """Every file that the three import packages are made of, by its path in the wheel."""
    found = set()
    for package in PACKAGES:
        folder = ROOT / package if package == "spikede_plugins" else ROOT / "adapters" / package
        for path in folder.rglob("*"):
            if path.suffix == ".py" or path.name == "py.typed":
                found.add(f"{package}/{path.relative_to(folder).as_posix()}")
    return found


@pytest.mark.slow
def test_the_wheel_holds_every_module(built: tuple[Path, Path]) -> None:
    names = set(zipfile.ZipFile(built[1]).namelist())
    assert sources() <= names, sorted(sources() - names)
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    stray = {n.split("/")[0] for n in names} - set(PACKAGES)
    assert all(n.endswith(".dist-info") for n in stray), stray


@pytest.mark.slow
def test_the_wheel_declares_its_plugins(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        (entry,) = (n for n in wheel.namelist() if n.endswith("entry_points.txt"))
        declared = wheel.read(entry).decode()
        assert any(n.endswith("/LICENSE") for n in wheel.namelist())
    wanted = ("spikingjelly = spikede_spikingjelly:", "snntorch = spikede_snntorch:", "spikede = ", "gl = ")
    assert all(line in declared for line in wanted), declared


@pytest.mark.slow
def test_the_sdist_can_be_tested(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as sdist:
        names = {n.partition("/")[2] for n in sdist.getnames()}
    wanted = {
        "LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "tox.ini", ".ci/run", "pyproject.toml",
        "constraints/newest.txt", "constraints/oldest.txt", "tests/conftest.py", "docs/demo.png",
        "adapters/spikede_snntorch/py.typed",
    }
    wanted |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "tests").rglob("*.py")}
    wanted |= {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "compat_matrix").rglob("*")
        if p.suffix in (".py", ".toml", ".npz", ".json", ".md") and not p.name.startswith(".")
    }
    assert wanted <= names, sorted(wanted - names)
    assert not any("__pycache__" in n for n in names)


CONVERT = """
import sys
import spikede_plugins
from spikede_plugins import convert_to_fractional, conversion_report
import torch
from torch import nn

assert spikede_plugins.__file__.startswith(sys.prefix), spikede_plugins.__file__
if {framework!r} == "spikingjelly":
    from spikingjelly.activation_based import neuron
    import spikede_spikingjelly as adapter
    net = nn.Sequential(nn.Linear(3, 4), neuron.LIFNode(tau=2.0, step_mode="m"))
else:
    import snntorch
    import spikede_snntorch as adapter
    net = nn.Sequential(nn.Linear(3, 4), snntorch.Leaky(beta=0.5, init_hidden=True))
assert adapter.__file__.startswith(sys.prefix), adapter.__file__
converted = convert_to_fractional(net, alpha=0.6)
assert converted(torch.ones(2, 3)).shape == (2, 4)
assert "0.6" in str(conversion_report(converted))
print("converted")
"""


@pytest.fixture(scope="session")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment that has the wheel, and sees this one's torch and frameworks."""
    fresh = tmp_path_factory.mktemp("fresh") / "env"
    run([sys.executable, "-m", "venv", "--without-pip", str(fresh)], fresh.parent)
    python = fresh / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index",
         "--disable-pip-version-check", str(built[1])],
        fresh.parent,
    )
    # Behind the fresh environment's own packages, so what is installed there wins.
    paths = {"base": str(fresh), "platbase": str(fresh)}
    purelib = Path(sysconfig.get_path("purelib", scheme="venv", vars=paths))
    behind = dict.fromkeys(sysconfig.get_path(p) for p in ("purelib", "platlib"))
    (purelib / "dependencies.pth").write_text("\n".join(behind) + "\n")
    return python


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["spikingjelly", "snntorch"])
def test_the_installed_wheel_converts_a_model(framework: str, installed: Path, tmp_path: Path) -> None:
    pytest.importorskip(framework)
    assert "converted" in run([str(installed), "-c", CONVERT.format(framework=framework)], tmp_path)


@pytest.mark.slow
def test_the_installed_command_runs(installed: Path, tmp_path: Path) -> None:
    told = run([str(installed.parent / "spikede"), "doctor"], tmp_path)
    assert "torch" in told and "gl" in told
