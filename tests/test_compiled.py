"""Kernels on disk: never stale, never mixed up, and never a reason to fail."""

from __future__ import annotations

import errno
import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("numba")

from spikede_plugins import FractionalOrder, SpikingODELayer, notices
from spikede_plugins.engine import FractionalOperator, compiled, cpu, gpu
from spikede_plugins.engine.choice import engines, say_if_slow
from spikede_plugins.memory import as_memory
from spikede_plugins.registry import get_solver

INNER = "from spikede_plugins.engine.compiled import kernel\n\n@kernel()\ndef inner(x):\n    return x + {}\n"
OUTER = """
from spikede_plugins.engine.compiled import kernel
from inner_of_test import inner

@kernel()
def outer(x):
    return 10 * inner(x)
"""


def load(path: Path, name: str) -> ModuleType:
    """A module as a new process would import it."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def start(tmp_path, monkeypatch):
    """``start(n)``: as a new process, whose inner kernel, in another file, adds n; gives the outer kernel."""

    def started(addend):
        inner = tmp_path / f"inner_of_test_{addend}.py"
        inner.write_text(INNER.format(addend))
        outer = tmp_path / "outer_of_test.py"
        if not outer.exists():
            outer.write_text(OUTER)
        monkeypatch.setitem(sys.modules, "inner_of_test", load(inner, "inner_of_test"))
        return load(outer, "outer_of_test").outer

    return started


def files(folder: Path) -> list[Path]:
    return sorted((folder / "__pycache__").glob("*.nb?"))


def test_a_kernel_is_read_by_the_next_process(start, tmp_path):
    assert start(1)(1) == 20
    written = {path: path.stat().st_mtime_ns for path in files(tmp_path)}
    again = start(1)
    assert written and again(1) == 20
    assert again.overloads and {path: path.stat().st_mtime_ns for path in files(tmp_path)} == written


def test_a_kernel_built_from_an_older_file_is_not_used(start, tmp_path, monkeypatch):
    """As after an upgrade: the outer file is the same, what it was built from is not."""
    assert start(1)(1) == 20
    monkeypatch.setattr(compiled, "SOURCES", "of the new release")
    assert start(2)(1) == 30


def test_the_digest_is_of_all_kernels(tmp_path, monkeypatch):
    for name in ("compiled.py", "outlined.py", "cpu_sums.py", "gpu.py"):
        (tmp_path / name).write_text("one")
    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "compiled.py"))
    digests = [compiled._sources()]
    for name in ("cpu_sums.py", "outlined.py", "compiled.py"):
        (tmp_path / name).write_text("other")
        digests.append(compiled._sources())
    assert len(set(digests)) == 4
    (tmp_path / "gpu.py").write_text("other")
    assert compiled._sources() == digests[-1]


def test_every_signature_has_files_of_its_own(start, tmp_path):
    """Two processes that compile for two signatures at once never write to the same file."""
    outer = start(1)
    outer(1)
    whole = set(files(tmp_path))
    start(1)(1.0)
    fractional = set(files(tmp_path)) - whole
    assert whole and len(fractional) == len(whole)
    assert all(path.stat().st_size for path in whole | fractional)


@pytest.mark.parametrize("damage", [b"", b"no pickle", None], ids=["empty", "garbage", "cut off"])
def test_damaged_files_are_written_anew(start, tmp_path, damage):
    assert start(1)(1) == 20
    for path in files(tmp_path):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if damage is None else damage)
    assert start(1)(1) == 20
    assert all(path.stat().st_size > 50 for path in files(tmp_path))


def test_a_full_disk_is_no_reason_to_fail(start, tmp_path, monkeypatch):
    def full(self, key, data):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(compiled.IndexDataCacheFile, "save", full)
    assert start(1)(1) == 20
    assert not list(tmp_path.rglob("*.nbc"))


def test_without_a_folder_kernels_run_and_the_doctor_says_that_they_are_not_kept(monkeypatch):
    """numba finds no folder for what lies in no file; so it is where nothing can be written."""
    monkeypatch.setattr(compiled, "not_kept", "")
    scope: dict = {"kernel": compiled.kernel}
    exec("@kernel()\ndef double(x):\n    return 2 * x\n", scope)
    assert scope["double"](3) == 6
    assert "NUMBA_CACHE_DIR" in cpu.not_kept()
    (said,) = (why for name, active, why in engines() if "numba" in name and active)
    assert "compiled anew in every process" in said


def test_the_real_kernels_are_kept_this_way():
    from spikede_plugins.engine import cpu_kernels

    for kernel in cpu_kernels.SHARED:
        assert isinstance(kernel._cache, compiled.KernelCache)


# -- what is said while it takes long -------------------------------------------------------------


@pytest.fixture
def said(monkeypatch):
    """What was logged, as in a new process."""
    monkeypatch.setattr(notices, "_said", set())
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    level = notices.logger.level
    notices.logger.addHandler(handler)
    yield lines
    notices.logger.removeHandler(handler)
    notices.logger.setLevel(level)


def test_compiling_says_so_once_and_reading_from_disk_says_nothing(start, said, tmp_path):
    outer = start(1)
    assert outer(1) == outer(1.0) == 20
    (line,) = said
    assert line.startswith("spikede-plugins: compiling CPU kernels") and str(tmp_path / "__pycache__") in line
    notices.forget()
    assert start(1)(1) == 20  # the next process
    assert len(said) == 1


def test_where_nothing_can_be_kept_every_process_is_told(said):
    scope: dict = {"kernel": compiled.kernel}
    exec("@kernel()\ndef double(x):\n    return 2 * x\n", scope)
    assert scope["double"](3) == 6
    (line,) = said
    assert "in every process" in line and "NUMBA_CACHE_DIR" in line


def operator(method="gl", memory="full", **options):
    return FractionalOperator(FractionalOrder(0.7), get_solver(method), as_memory(memory), **options)


def test_without_numba_a_user_is_told_once_what_it_costs_and_how_to_get_it(said, monkeypatch):
    monkeypatch.setattr(cpu, "installed", lambda: False)
    monkeypatch.setattr(gpu, "missing", lambda: "there is no CUDA device")
    # Kernels would not serve these: nothing to tell.
    say_if_slow([operator("abm"), operator(memory_reset="spike")])
    assert not said
    say_if_slow([operator("abm"), operator()])
    say_if_slow([operator()])
    (line,) = said
    assert "plain torch" in line and 'pip install "numba' in line and "\n" not in line


def test_without_numba_a_run_that_converted_nothing_is_told_as_well(said, monkeypatch):
    monkeypatch.setattr(cpu, "installed", lambda: False)
    layer = SpikingODELayer(2, 3)
    with torch.no_grad():
        for _ in range(2):
            layer(torch.ones(2, 2))
    (line,) = said
    assert "plain torch" in line


def test_with_numba_there_is_nothing_to_tell(said):
    say_if_slow([operator()])
    assert not said


def test_the_standard_logging_silences_it(said):
    logging.getLogger("spikede_plugins").setLevel(logging.ERROR)
    notices.say_once("a topic", "a line")
    assert not said
