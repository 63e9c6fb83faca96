"""The README is true: its code runs, its commands are those that the tools use, its tables match the code."""

from __future__ import annotations

import json
import re
import shlex
import sys
import tomllib
import types
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FRAMEWORKS = ("spikingjelly", "snntorch")


def blocks(language: str) -> list[tuple[str, str]]:
    """Fenced blocks with the heading they stand under."""
    found, heading = [], ""
    for match in re.finditer(r"^#+ ([^\n]+)$|^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        if match[1]:
            heading = match[1]
        elif match[2] == language:
            found.append((heading, match[3]))
    return found


PYTHON = blocks("python")
COMMANDS = [text.strip() for _, text in blocks("bash")]


def test_there_is_code_to_run() -> None:
    together = "\n".join(code for _, code in PYTHON)
    for needed in (*FRAMEWORKS, "register_solver", "learn_alpha", "check_solver", "check_adapter"):
        assert needed in together, needed


@pytest.mark.parametrize("code", [pytest.param(c, id=f"{i}: {h}") for i, (h, c) in enumerate(PYTHON)])
def test_python_blocks_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spikede_plugins import registry

    for framework in FRAMEWORKS:
        if re.search(rf"^\s*(import|from) {framework}\b", code, re.MULTILINE):
            pytest.importorskip(framework)
    if "plotting" in code:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    registered = dict(registry._caches.registered)
    # A real module: code that pickles or looks up its own classes finds them.
    module = types.ModuleType("readme_block")
    monkeypatch.setitem(sys.modules, "readme_block", module)
    try:
        exec(compile(code, "README.md", "exec"), module.__dict__)
    finally:
        registry._caches.registered.clear()
        registry._caches.registered.update(registered)


# -- commands --------------------------------------------------------------------------------------


def test_exactly_two_commands_start_everything() -> None:
    start = README[README.index("## Two commands") :]
    start = start[: start.index("\n## ", 1)]
    found = re.findall(r"^```bash\n(.*?)\n```$", start, re.MULTILINE | re.DOTALL)
    assert len(found) == 2 and all("\n" not in command for command in found)
    assert found[0].endswith("spikede demo") and found[1].endswith("/tox")


def test_ci_runs_the_test_command() -> None:
    command = next(c for c in COMMANDS if c.endswith("/tox"))
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert command in script.splitlines()
    assert "set -euo pipefail" in script


def test_tox_runs_both_release_pairs_and_the_linters() -> None:
    config = ConfigParser(interpolation=None)
    config.read(ROOT / "tox.ini", encoding="utf-8")
    assert config["tox"]["env_list"].replace(" ", "").split(",") == ["newest", "oldest"]
    assert {"newest: ruff check .", "newest: mypy"} < set(config["testenv"]["commands"].splitlines())
    for name in ("newest", "oldest"):
        assert f"constraints/{name}.txt" in config["testenv"]["install_command"]
        text = (ROOT / "constraints" / f"{name}.txt").read_text(encoding="utf-8")
        pins = dict(re.findall(r"^(\w+)==(.+)$", text, re.MULTILINE))
        assert {"torch", "torchvision", "torchaudio", *FRAMEWORKS} == set(pins)
        intro = README[: README.index("## Two commands")]
        for framework in FRAMEWORKS:
            assert pins[framework] in intro, f"{framework} {pins[framework]} of constraints/{name}.txt"


def test_the_demo_command_can_be_typed() -> None:
    """Its constraints exist, its extras are declared, and so is the command it ends with."""
    command = next(c for c in COMMANDS if c.endswith("spikede demo"))
    words = shlex.split(command)
    assert (ROOT / words[words.index("-c") + 1]).is_file()
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    (extras,) = (re.findall(r"\.\[(.+)\]", word)[0] for word in words if word.startswith(".["))
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    assert "spikede" in project["scripts"]


def test_files_named_in_the_readme_exist() -> None:
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", README, flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        assert "://" in target or (ROOT / target).is_file(), target
    assert (ROOT / "docs" / "demo.png").stat().st_size < 200_000


def test_demo_results_are_those_that_came_out() -> None:
    """The table is docs/demo.json, which a full run of the demo wrote."""
    written = json.loads((ROOT / "docs" / "demo.json").read_text(encoding="utf-8"))
    assert not written["quick"] and written["settings"]["seeds"] >= 3
    expected = []
    for framework, variants in written["summary"].items():
        for variant, entry in variants.items():
            cells = [f"{100 * mean:.1f} ± {100 * std:.1f}" for mean, std in (entry["clean"], entry["noisy"])]
            alphas = ", ".join(f"{alpha:.2f}" for alpha, _ in entry["alphas"])
            expected.append([framework, written["variants"][variant], *cells, alphas])
    assert [[row[0].lower(), *row[1:]] for row in table("demo results")] == expected


@pytest.mark.parametrize("name", ["layers", "spiking_ode"])
def test_benchmark_tables_are_those_that_were_written(name: str) -> None:
    """Of a full run: nothing of it is a smoke test."""
    assert (ROOT / "benchmarks" / f"{name}.md").read_text(encoding="utf-8").strip() in README
    written = json.loads((ROOT / "benchmarks" / f"{name}.json").read_text(encoding="utf-8"))
    assert not any(group.get("smoke") for group in written["groups"].values())


# -- tables ----------------------------------------------------------------------------------------


def table(title: str) -> list[list[str]]:
    """The cells below the header of the table that follows an HTML comment ``<!-- title -->``."""
    after = README[README.index(f"<!-- {title} -->") :]
    lines = re.search(r"(?:^\|.*\n)+", after, re.MULTILINE)
    assert lines is not None
    return [[c.strip() for c in line.strip()[1:-1].split("|")] for line in lines[0].splitlines()[2:]]


def names(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


#: What a constructor needs beyond its defaults.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "LIAFNode": {"act": nn.ReLU(), "threshold_related": False},
    "SimpleLIFNode": {"tau": 2.0, "decay_input": True},
    "Leaky": {"beta": 0.5},
    "Lapicque": {"beta": 0.5},
    "Synaptic": {"alpha": 0.6, "beta": 0.5},
    "Alpha": {"alpha": 0.6, "beta": 0.5},
    "RLeaky": {"beta": 0.5, "all_to_all": False},
    "RSynaptic": {"alpha": 0.6, "beta": 0.5, "all_to_all": False},
}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_neuron_table_is_what_the_adapter_says(framework: str) -> None:
    library = pytest.importorskip(framework)
    if framework == "spikingjelly":
        from spikingjelly.activation_based import neuron as library
    from spikede_plugins.registry import get_adapter

    adapter, seen = get_adapter(framework), set()
    for row in table("neurons"):
        if not row[0].lower().startswith(framework):
            continue
        supported = names(row[1].partition(", and your own")[0])
        for name in supported:
            cls = getattr(library, name, None)
            if cls is None:
                assert "both releases" not in row[0], f"{name} is missing in this release"
                continue
            if name == "LIAFNode" and not hasattr(library, "SimpleIFNode"):
                continue  # 0.0.0.0.14 cannot construct it: its constructor reads a missing attribute
            neuron = cls(**ARGUMENTS.get(name, {}))
            assert adapter.is_neuron(neuron) and adapter.support(neuron).supported, name
            seen.add(name)
        for name in names(row[2]):
            cls = getattr(library, name, None)
            if cls is None:
                continue
            neuron = cls.__new__(cls)  # its class is all that counts
            nn.Module.__init__(neuron)
            told = adapter.support(neuron)
            assert not told.supported and told.reason, name
    assert seen


def test_solver_table_is_the_registry() -> None:
    from spikede_plugins import available_solvers
    from spikede_plugins.registry import discover

    found = discover("spikede_plugins.solvers")
    ours = {name for name, candidates in found.items() if candidates[0].distribution == "spikede-plugins"}
    assert {n for row in table("solvers") for n in names(row[0])} == ours <= set(available_solvers())


def test_option_table_is_the_signature() -> None:
    import inspect

    from spikede_plugins import convert_to_fractional

    parameters = inspect.signature(convert_to_fractional).parameters
    rows = {names(row[0])[0]: row[1].strip("`") for row in table("options")}
    assert list(rows) == [n for n in parameters if n != "model"]
    for name, default in rows.items():
        assert eval(default) == parameters[name].default, name
