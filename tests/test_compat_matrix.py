"""The compatibility matrix: its cells cover every pair, and its results are told as they came out.

The cells themselves are run by ``tox -e compat``; their suite (``compat_matrix/suite``) runs with the tests.
"""

from __future__ import annotations

import importlib
import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

MATRIX = Path(__file__).resolve().parent.parent / "compat_matrix"
sys.path.append(str(MATRIX))

import covering
import environment
import golden_cases
import make_golden
import results
import table
from results import Result, read, write

CELLS = covering.read()


# -- the cells -------------------------------------------------------------------------------------


def test_every_pair_that_can_exist_is_in_a_cell() -> None:
    covered = {pair for cell in CELLS.cells for pair in cell.pairs}
    for one, other in itertools.combinations(CELLS.factors, 2):
        for first, second in itertools.product(CELLS.factors[one], CELLS.factors[other]):
            pair = (one, first), (other, second)
            assert (pair in covered) != (pair in CELLS.impossible), pair


def test_the_set_is_small_and_always_the_same() -> None:
    product = 1
    for levels in CELLS.factors.values():
        product *= len(levels)
    assert len(CELLS.cells) <= 20 < product / 100
    assert [cell.name for cell in covering.read().cells] == [cell.name for cell in CELLS.cells]
    assert len({cell.name for cell in CELLS.cells}) == len(CELLS.cells)


def test_torch_is_pinned_with_what_belongs_to_it() -> None:
    for cell in CELLS.cells:
        pins = dict(line.split("==") for line in CELLS.constraints(cell))
        assert pins["torch"] == cell["torch"]
        assert {"torchvision", "torchaudio", "numpy"} < set(pins)
        assert ("snntorch" in pins) == (cell["snntorch"] != "none")
    for name in ("newest", "oldest"):  # the pairs of the default test run are levels of the matrix
        lines = (MATRIX.parent / "constraints" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        pins = dict(line.split("==") for line in lines if "==" in line)
        assert pins["torchvision"] == CELLS.belongs_to_torch[pins["torch"]]["torchvision"]
        assert pins["spikingjelly"] in CELLS.factors["spikingjelly"]
        assert pins["snntorch"] in CELLS.factors["snntorch"]


def test_rules_that_say_nothing_are_refused(tmp_path: Path) -> None:
    text = (MATRIX / "cells.toml").read_text(encoding="utf-8")
    for rule in ('python = "2.7"\nnumpy = "1.26.4"\nreason = "old"', 'python = "3.13"\nnumpy = "1.26.4"'):
        path = tmp_path / "cells.toml"
        path.write_text(f"{text}\n[[impossible]]\n{rule}\n", encoding="utf-8")
        with pytest.raises(ValueError, match="two known levels and a reason"):
            covering.read(path)


# -- the golden spikes -----------------------------------------------------------------------------


def test_every_case_has_its_golden_spikes_and_no_file_is_left_over() -> None:
    assert {case.file.name for case in golden_cases.CASES} == {p.name for p in golden_cases.FOLDER.iterdir()}
    assert len({case.name for case in golden_cases.CASES}) == len(golden_cases.CASES)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in golden_cases.CASES])
def test_no_rounding_decides_over_a_golden_spike(case: golden_cases.Case) -> None:
    golden = golden_cases.read(case.file)
    assert golden.margin >= make_golden.MARGIN
    assert make_golden.RATES[0] <= golden.spikes.double().mean() <= make_golden.RATES[1]
    assert torch.equal(golden.x, golden.x.float().double())  # exact in both precisions


def test_golden_spikes_depend_on_what_they_are_of() -> None:
    """On one input, other orders, solvers and memories give other spikes or potentials."""
    x = golden_cases.read(golden_cases.CASES[0].file).x
    found = {}
    for case in golden_cases.CASES:
        # PLIF is LIF, soe the full memory, and at order one a reset to zero is the same now or a step later.
        if case.neuron != "PLIF" and case.memory != "soe" and case.alpha < 1:
            v = golden_cases.reference(case, x).v
            same = [name for name, other in found.items() if torch.allclose(v, other, atol=1e-6)]
            assert not same, (case.name, same)
            found[case.name] = v


# -- the results -----------------------------------------------------------------------------------

REPORT = """<testsuites><testsuite>
<testcase classname="a.b" name="one"/>
<testcase classname="a.b" name="two"><failure message="1 == 2 in {folder}/x.py">trace</failure></testcase>
<testcase classname="a.b" name="three"><error message="no fixture"/></testcase>
<testcase classname="a.b" name="four"><skipped message="snntorch is not installed"/></testcase>
</testsuite></testsuites>"""


def test_a_report_is_counted_with_every_reason(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT.format(folder=tmp_path), encoding="utf-8")
    result = Result("not installed")
    environment.count(tmp_path / "report.xml", result, tmp_path)
    assert (result.outcome, result.passed, result.failed, result.skipped) == ("failed", 1, 2, 1)
    assert result.failures == [
        {"test": "b::two", "reason": "1 == 2 in (env)/x.py"},
        {"test": "b::three", "reason": "no fixture"},
    ]
    assert result.skips == {"snntorch is not installed": 1}


def test_results_come_back_and_cells_of_another_matrix_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.json"
    assert results.read(path) == {}
    known = {CELLS.cells[1].name: Result("passed", {"torch": "2"}, passed=3), "gone": Result("passed")}
    results.write(known, CELLS, path)
    assert results.read(path) == {CELLS.cells[1].name: known[CELLS.cells[1].name]}
    assert [p.name for p in tmp_path.iterdir()] == ["RESULTS.json"]


def test_what_a_cell_depends_on(tmp_path: Path) -> None:
    one, other = CELLS.cells[:2]
    (tmp_path / "spikede_plugins").mkdir()
    source = tmp_path / "spikede_plugins" / "x.py"
    source.write_text("x = 1\n")
    before = results.inputs(CELLS, one, tmp_path)
    assert results.inputs(CELLS, one, tmp_path) == before
    assert results.inputs(CELLS, other, tmp_path)["levels"] != before["levels"]
    source.write_text("x = 2\n")
    after = results.inputs(CELLS, one, tmp_path)
    assert after["package"] != before["package"] and after["suite"] == before["suite"]


def test_the_table_tells_every_failure() -> None:
    cell, broken = CELLS.cells[:2]
    text = table.render(
        CELLS,
        {
            cell.name: Result("passed", {"torch": "2.6.0+cu1"}, passed=7, skipped=2),
            broken.name: Result("failed", failed=1, failures=[{"test": "t::x", "reason": "it broke"}]),
        },
    )
    assert f"2 of {len(CELLS.cells)} cells ran." in text
    assert "| 2.6.0+cu1 |" in text and "| 7 | 0 | 2 |" in text
    assert f"* `{broken.name}`, t::x: it broke" in text
    for reason in CELLS.impossible.values():
        assert reason in text


def test_the_written_tables_are_the_results() -> None:
    text = table.render(CELLS, results.read())
    assert (MATRIX / "RESULTS.md").read_text(encoding="utf-8") == text
    readme = (MATRIX.parent / "README.md").read_text(encoding="utf-8")
    assert f"{table.BEGIN}\n{text}{table.END}" in readme


def test_every_result_is_of_what_its_cell_asks_for() -> None:
    for name, result in results.read().items():
        (cell,) = (cell for cell in CELLS.cells if cell.name == name)
        if result.outcome != "not installed":
            assert result.versions["python"].startswith(cell["python"] + ".")
            assert result.versions["torch"].partition("+")[0] == cell["torch"]
            for framework in ("spikingjelly", "snntorch"):
                assert result.versions.get(framework, "none") == cell[framework]
            assert result.passed > 0 and (result.outcome == "passed") == (result.failed == 0)
        assert len(result.failures) == result.failed or result.outcome == "not installed"


def test_no_cell_fails() -> None:
    """One that cannot be made to pass is listed in cells.toml as impossible, with the reason, and the package
    refuses it (``spikede_plugins/releases.py``)."""
    failures = {
        name: result.failures for name, result in results.read().items() if result.outcome != "passed"
    }
    assert not failures


# -- the runner ------------------------------------------------------------------------------------


@pytest.fixture
def runner() -> ModuleType:
    pytest.importorskip("rich")
    return importlib.import_module("run")


def test_cells_are_selected_by_name_and_by_what_changed(runner: ModuleType, capsys) -> None:
    cells = runner.select(CELLS, ["py3.12*"], False, {})
    assert cells and all(cell["python"] == "3.12" for cell in cells)
    first = CELLS.cells[0]
    known = {first.name: Result("passed", inputs=results.inputs(CELLS, first))}
    assert runner.select(CELLS, [], True, known) == CELLS.cells[1:]
    known[first.name].inputs["package"] = "other"
    assert runner.select(CELLS, [], True, known) == CELLS.cells
    with pytest.raises(SystemExit, match="no cell is called 'py2"):
        runner.select(CELLS, ["py2*"], False, {})
    assert runner.main(["--list"]) == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        cell.name for cell in CELLS.cells
    ]


def test_an_interrupted_run_goes_on(runner: ModuleType, tmp_path: Path) -> None:
    path, cells = tmp_path / "unfinished.json", CELLS.cells[:3]
    journal = runner.Journal(CELLS, cells, False, path)
    journal.add(cells[0])
    assert runner.Journal(CELLS, cells, False, path).done == [cells[0].name]
    assert runner.Journal(CELLS, cells, True, path).done == []  # --fresh
    assert runner.Journal(CELLS, cells[:2], False, path).done == []  # another run
    written = json.loads(path.read_text(encoding="utf-8"))
    written["run"][cells[1].name]["package"] = "other"  # other sources
    path.write_text(json.dumps(written), encoding="utf-8")
    assert runner.Journal(CELLS, cells, False, path).done == []
    journal.close()
    assert not path.exists()


def test_an_environment_that_cannot_be_made_is_a_result_and_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment.tempfile, "tempdir", str(tmp_path))
    made = []

    def create(cell, folder, interpreters, say):
        made.append(folder)
        (folder / "env").mkdir()
        return folder / "env" / "no-python"

    def refuse(command, cwd, seconds):
        assert any(word.startswith("x.whl") for word in command) and made[0].is_dir()
        raise environment.StepFailed(f"ERROR: no such release, see {made[0]}/log")

    monkeypatch.setattr(environment, "_create", create)
    monkeypatch.setattr(environment, "_run", refuse)
    result = environment.run_cell(CELLS, CELLS.cells[1], Path("x.whl"), [], lambda what: None)
    assert result.outcome == "not installed" and result.passed == 0
    assert result.failures == [{"test": "installation", "reason": "ERROR: no such release, see (env)/log"}]
    assert not made[0].exists() and not list(tmp_path.iterdir())


def test_what_a_killed_run_left_behind_is_removed_by_the_next(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    mine = tmp_path / f"spikede-compat-{os.getpid()}-abc"
    others = tmp_path / "spikede-compat-notes-abc"
    left = tmp_path / f"spikede-compat-{ended.pid}-abc"
    for folder in (mine, others, left):
        (folder / "env").mkdir(parents=True)
    assert environment.remove_left_over(tmp_path) == [left]
    assert mine.exists() and others.exists() and not left.exists()


def test_every_result_is_written_as_soon_as_it_is_there(
    runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at two cells at a time, and none is written of a cell that could not be tried."""
    path, cells = tmp_path / "RESULTS.json", CELLS.cells[:3]
    monkeypatch.setattr(runner.results, "read", lambda: read(path))
    monkeypatch.setattr(runner.results, "write", lambda known, matrix: write(known, matrix, path))
    monkeypatch.setattr(runner.table, "write", lambda matrix, known: None)
    monkeypatch.setattr(runner, "build_wheel", lambda folder: folder / "x.whl")

    def run_cell(matrix, cell, wheel, interpreters, say):
        say("testing")
        if cell is cells[1]:
            raise runner.NoInterpreter("no such Python")
        return Result("passed", passed=1)

    monkeypatch.setattr(runner, "run_cell", run_cell)
    journal = runner.Journal(CELLS, cells, False, tmp_path / "unfinished.json")
    console = runner.Console(file=io.StringIO())
    came_out = runner.run(CELLS, cells, 2, [], journal, console)
    assert set(came_out) == set(read(path)) == set(journal.done) == {cells[0].name, cells[2].name}
    assert read(path)[cells[0].name].inputs == results.inputs(CELLS, cells[0])
    assert f"{cells[1].name}: not run. no such Python" in console.file.getvalue()


def test_no_folder_of_the_tests_passes_for_a_framework() -> None:
    """On the path of the suite a folder is a package: a framework that is absent would seem to be there."""
    root = Path(__file__).resolve().parent
    for folder in (root, root / "sj", root.parent / "compat_matrix"):
        assert folder.is_dir()
        assert not {each.name for each in folder.iterdir() if each.is_dir()} & set(CELLS.factors)
