"""What the package does not do: no pickle, no eval, no network, no processes of its own.

Read off the sources, and watched while each framework's network is converted, trained, saved and loaded.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from scale import record
from small_nets import Framework, each_framework

import spikede_plugins
from spikede_plugins import cli

ROOT = Path(spikede_plugins.__file__).resolve().parent

#: Modules that load code from data, reach the network, or start programs.
FORBIDDEN = {
    "pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "socket", "ssl", "urllib", "http",
    "ftplib", "smtplib", "telnetlib", "xmlrpc", "requests", "httpx", "aiohttp", "subprocess",
    "multiprocessing", "pty", "code", "codeop", "runpy",
}  # fmt: skip
CALLS = {"eval", "exec", "compile", "__import__", "input", "breakpoint"}
METHODS = {"system", "popen", "spawnv", "execv", "fork", "load_state_dict_from_url", "load_url"}

#: Where a module is imported by a name that is data, and why it may be.
IMPORTS_BY_NAME = {
    "spikede_plugins/cli.py": "`spikede plan` runs the factory that its user names; `doctor` the frameworks",
    "spikede_plugins/registry.py": "entry points of installed packages",
    "spikede_snntorch/closures.py": "snnTorch's own module, of whose functions a copy is made",
}
#: The contract suite makes sure that a plugin's neurons pickle; it reads only what it has just written.
PICKLES = {"spikede_plugins/testing.py"}


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Every module of the package and of the adapters, by its path."""
    packages = [ROOT]
    for entry in entry_points(group="spikede_plugins.adapters"):
        folder = entry.module.split(".")[0]
        for place in (ROOT.parent / folder, ROOT.parent / "adapters" / folder):
            if place.is_dir():
                packages.append(place)
    for package in dict.fromkeys(packages):
        for path in sorted(package.rglob("*.py")):
            name = f"{package.name}/{path.relative_to(package).as_posix()}"
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def faults(name: str, tree: ast.Module) -> Iterator[str]:
    """What a module does that none should."""
    for node in ast.walk(tree):
        imported: list[str] = []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = [node.module or ""]
        for module in imported:
            root = module.split(".")[0]
            if root in FORBIDDEN and not (root == "pickle" and name in PICKLES):
                yield f"{name}:{node.lineno} imports {module}"
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name) and called.id in CALLS:
                yield f"{name}:{node.lineno} calls {called.id}"
            if isinstance(called, ast.Attribute) and called.attr in METHODS:
                yield f"{name}:{node.lineno} calls {called.attr}"
            if isinstance(called, ast.Attribute) and called.attr == "import_module":
                constant = node.args and isinstance(node.args[0], ast.Constant)
                if not constant and name not in IMPORTS_BY_NAME:
                    yield f"{name}:{node.lineno} imports a module by a name that is data"
            if isinstance(called, ast.Attribute) and called.attr == "load":
                of = called.value
                if isinstance(of, ast.Name) and of.id in {"torch", "np", "numpy"}:
                    yield f"{name}:{node.lineno} loads a file"


def test_the_sources_load_no_code_from_data_and_reach_no_network() -> None:
    trees = dict(sources())
    packages = {name.split("/")[0] for name in trees}
    assert packages >= {"spikede_plugins", "spikede_snntorch", "spikede_spikingjelly"}
    found = [fault for name, tree in trees.items() for fault in faults(name, tree)]
    assert not found, "\n".join(found)
    assert set(trees) >= set(IMPORTS_BY_NAME) | PICKLES  # no exception outlives its reason
    record("sources read for pickle, eval, network and processes", len(trees), "modules")


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from urllib.request import urlopen",
        "import os\nos.system('x')",
        "eval('1')",
        "exec(text)",
        "import importlib\nimportlib.import_module(name)",
        "import torch\ntorch.load(path)",
    ],
)
def test_the_reader_sees_what_it_looks_for(code: str) -> None:
    assert list(faults("spikede_plugins/some.py", ast.parse(code)))


_WATCHED = """
import sys
import torch
from small_nets import Framework, frames
from spikede_plugins import convert_to_fractional, conversion_report, restore_native

framework = Framework(*sys.argv[1:3])
net, x = framework.net(), frames()

def work(net):
    fnet = convert_to_fractional(net, alpha=0.6, learn_alpha=True)
    str(conversion_report(fnet))
    optimiser = torch.optim.SGD(fnet.parameters(), lr=0.1)
    framework.run(fnet, x).sum().backward()
    optimiser.step()
    torch.save(fnet.state_dict(), sys.argv[3])
    fnet.load_state_dict(torch.load(sys.argv[3], weights_only=True))
    restore_native(fnet)

# Once unwatched: the framework imports what it imports, and numba reads the machine code of the kernels,
# which it keeps on disk by pickle (as Python keeps .pyc files).
work(net)

seen = []
WATCHED = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "pickle.find_class",
           "urllib.", "http.", "ftplib.", "smtplib.")

def watch(event, arguments):
    if event.startswith(WATCHED):
        seen.append((event, str(arguments)[:200]))

sys.addaudithook(watch)
work(net)
quiet = list(seen)
import subprocess
subprocess.run([sys.executable, "-c", ""])  # the watch is awake
assert len(seen) > len(quiet)
print(quiet)
"""


@each_framework
def test_training_and_saving_a_converted_network_is_quiet(framework: Framework, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _WATCHED, framework.name, framework.native, str(tmp_path / "net.pt")]
    paths = [str(Path(__file__).resolve().parent.parent), *sys.path]

    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]", done.stdout


def test_plan_says_that_it_runs_the_code_it_is_given(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plan", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "runs" in shown and "code" in shown
