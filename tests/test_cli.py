"""The command line, run as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from plugin_packages import installed, toyspikes_installed, write_package

from spikede_plugins.cli import main

MODELS = """
from torch import nn
from toyspikes import ToyLIF, ToyLatch

def net():
    return nn.Sequential(nn.Linear(2, 2), ToyLIF(), ToyLIF())

def greek():
    model = net()
    model.add_module("\u03b1", ToyLIF())
    return model

def mixed():
    return nn.Sequential(ToyLIF(), ToyLatch())

ready = net()
text = "no model"

def fails():
    raise RuntimeError("no weights")

def ends():
    raise SystemExit(3)

def interrupted():
    raise KeyboardInterrupt
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A directory with a user's module, which is the current one."""
    (tmp_path / "cli_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    with toyspikes_installed(tmp_path / "packages"):
        yield
    sys.modules.pop("cli_models", None)


def test_doctor_shows_versions_adapters_solvers_and_engines(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for line in ("versions", "adapters", "solvers", "engines"):
        assert f"\n{line}\n" in f"\n{out}"
    assert "torchdiffeq" in out and "torch                  active" in out
    assert "fused CPU (numba)" in out and "fused GPU (Triton)" in out
    assert "accuracy 2 at alpha = 0.5, 1.5 from a t^alpha start: product trapezoidal" in out


def test_doctor_shows_what_is_broken_and_exits_with_one(capsys, tmp_path):
    groups = {"spikede_plugins.solvers": {"mine": "mine_solver:Mine"}}
    write_package(tmp_path, "mine", groups, {"mine_solver": "raise RuntimeError('half an installation')"})
    with installed(tmp_path):
        assert main(["doctor"]) == 1
    assert "mine             broken: RuntimeError: half an installation" in capsys.readouterr().out


def test_plan_prints_the_table_of_a_users_model(models, capsys):
    assert main(["plan", "cli_models:net", "--alpha", "0.5", "--method", "l1", "--memory", "9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = ["1", "ToyLIF", "converted", "0.5", "l1", "window 9", "torch, step by step"]
    assert " ".join(lines[2].split()) == " ".join(cells)
    assert lines[-1] == "2 converted"


def test_plan_takes_one_alpha_a_layer_patterns_and_a_finished_model(models, capsys):
    assert main(["plan", "cli_models:ready", "--alpha", "0.5", "1", "--learn-alpha"]) == 0
    assert "1 (learned)" in capsys.readouterr().out
    assert main(["plan", "cli_models:ready", "--alpha", "2=0.25", "*=0.75", "--exclude", "1"]) == 0
    assert "0.25" in (out := capsys.readouterr().out) and "1 converted" in out and "1 excluded" in out


def test_plan_exits_with_one_if_a_neuron_has_no_fractional_form(models, capsys):
    assert main(["plan", "cli_models:mixed"]) == 1
    assert "it has no membrane potential" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cli_models"], "expected MODULE:FACTORY"),
        (["cli_nothing:net"], "No module named 'cli_nothing'"),
        (["cli_models:nets"], "has no attribute 'nets'"),
        (["cli_models:fails"], "gave no model: RuntimeError: no weights"),
        (["cli_models:ends"], "gave no model: SystemExit: 3"),
        (["cli_models:text"], "'str' object is not callable"),
        (["cli_models:dict"], "has no attribute 'dict'"),
        (["cli_models:net", "--alpha", "x"], "--alpha takes a number"),
        (["cli_models:net", "--alpha", "1=0.5", "0.7"], "--alpha takes a number"),
        (["cli_models:net", "--alpha", "1.5"], "alpha must lie in (0, 1]"),
        (["cli_models:net", "--method", "gll"], "did you mean 'gl'"),
        (["cli_models:net", "--memory", "0"], "memory must keep at least 1 step"),
        (["cli_models:net", "--include", "conv"], "'conv' matches no spiking neuron"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(models, capsys, arguments, message):
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("spikede: ") and message in captured.err
    assert captured.err.count("\n") == 1 and not captured.out


def test_help_says_that_plan_runs_the_users_code(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--help"])
    assert stopped.value.code == 0
    assert "it runs your code" in " ".join(capsys.readouterr().out.split())


def test_the_module_and_the_command_are_the_same_program():
    command = Path(sys.executable).with_name("spikede")
    for start in ([sys.executable, "-m", "spikede_plugins"], [str(command)]):
        done = subprocess.run([*start, "--version"], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.startswith("0.")


def test_no_command_is_an_error_of_usage(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2


@contextmanager
def nobody_reads():
    """Standard output is a pipe whose reader is gone, as behind ``| head -1``."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as stdout, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        yield
        stdout.write("what Python flushes at its end goes nowhere, and is no error")


@pytest.mark.parametrize("command", [["doctor"], ["plan", "cli_models:net"]])
def test_a_reader_that_wants_no_more_is_no_error_to_tell_of(models, capsys, command):
    with nobody_reads():
        assert main(command) == 141
    assert not capsys.readouterr().err


def test_help_and_version_into_a_pipe_that_nobody_reads():
    for option in ("--version", "--help"):
        command = f"{sys.executable} -m spikede_plugins {option} | true; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        assert done.returncode in (0, 141) and not done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_behind_the_output_is_one_line(models, monkeypatch, capsys):
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["plan", "cli_models:net"]) == 1
        assert capsys.readouterr().err == "spikede: No space left on device.\n"


def test_ctrl_c_is_one_line_and_exit_code_130(models, capsys):
    assert main(["plan", "cli_models:interrupted"]) == 130
    assert capsys.readouterr().err == "spikede: stopped.\n"


def test_a_terminal_without_greek_letters_shows_a_question_mark(models, tmp_path, monkeypatch):
    with open(tmp_path / "out.txt", "w", encoding="ascii") as ascii_only:
        monkeypatch.setattr(sys, "stdout", ascii_only)
        assert main(["plan", "cli_models:greek"]) == 0
    assert "?" in (tmp_path / "out.txt").read_text(encoding="ascii")
