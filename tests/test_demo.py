"""The demo runs, and what it writes is what it promises."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

for needed in ("sklearn", "matplotlib", "rich"):
    pytest.importorskip(needed)

from spikede_plugins import demo
from spikede_plugins.cli import main
from spikede_plugins.errors import MissingExtraError, OptionError

INSTALLED = [name for name in ("spikingjelly", "snntorch") if demo._installed(name)]

if not INSTALLED:
    pytest.skip("no framework installed", allow_module_level=True)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("demo") / "made" / "by the demo"
    return demo.run_demo(folder, quick=True), folder


def comparable(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds_per_epoch"} for row in result["results"]]


def test_the_figure_is_a_picture(quick: tuple[dict[str, Any], Path]) -> None:
    result, folder = quick
    assert Path(result["figure"]) == folder / "demo.png"
    content = (folder / "demo.png").read_bytes()
    assert content.startswith(b"\x89PNG") and 20_000 < len(content) < 400_000


def test_the_json_holds_what_is_returned(quick: tuple[dict[str, Any], Path]) -> None:
    result, folder = quick
    text = (folder / "demo.json").read_text(encoding="utf-8")
    assert json.loads(text) == json.loads(json.dumps({**result, "figure": "demo.png"}))
    assert {"settings", "versions", "results", "summary", "verdicts", "seconds", "figure"} <= result.keys()
    assert set(result["versions"]) == {"python", "torch", *INSTALLED}
    assert result["quick"] is True and result["seconds"] < 60


def test_every_framework_runs_every_variant(quick: tuple[dict[str, Any], Path]) -> None:
    result, _ = quick
    seen = [(row["framework"], row["variant"]) for row in result["results"]]
    assert seen == [(f, v) for f in INSTALLED for v in ("integer", "fractional", "learned", "slow")]
    for row in result["results"]:
        assert 0.0 <= row["clean"] <= 1.0 and 0.0 <= row["noisy"] <= 1.0
        assert len(row["alphas"]) == 2 and all(0.0 < a <= 1.0 for a in row["alphas"])
    fixed, learned = (
        [row["alphas"] for row in result["results"] if row["variant"] == variant]
        for variant in ("fractional", "learned")
    )
    assert all(a == [0.7, 0.7] for a in fixed)
    assert all(a != [0.7, 0.7] for a in learned), "training did not move the orders"
    assert len(result["verdicts"]) == 2 * len(INSTALLED)


def test_alpha_one_is_the_native_net(quick: tuple[dict[str, Any], Path]) -> None:
    flags = [row["same_as_native"] for row in quick[0]["results"] if row["variant"] == "integer"]
    assert flags == [True] * len(INSTALLED)


def test_one_framework_alone_gives_the_same_numbers_again(
    quick: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Deterministic, and a missing framework is left out with a word."""
    kept = INSTALLED[0]
    installed = demo._installed
    monkeypatch.setattr(
        demo, "_installed", lambda name: installed(name) and (name == kept or name not in INSTALLED)
    )
    torch.manual_seed(5)
    random_state, threads = torch.get_rng_state(), torch.get_num_threads()
    result = demo.run_demo(tmp_path, quick=True)
    assert comparable(result) == [row for row in comparable(quick[0]) if row["framework"] == kept]
    assert result["skipped_frameworks"] == [n for n in ("spikingjelly", "snntorch") if n != kept]
    assert "is not installed and is left out" in capsys.readouterr().out
    assert torch.equal(torch.get_rng_state(), random_state), "the caller's random state was touched"
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("package", ["sklearn", "matplotlib", "rich"])
def test_a_missing_extra_names_the_pip_command(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_installed", lambda name: name != package)
    with pytest.raises(MissingExtraError, match=r'pip install "spikede-plugins\[demo\]"') as caught:
        demo.run_demo(tmp_path / "out")
    assert package.removeprefix("sk") in str(caught.value)
    assert isinstance(caught.value, ImportError)
    assert not (tmp_path / "out").exists()


def test_without_any_framework(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_installed", lambda name: name not in ("spikingjelly", "snntorch"))
    with pytest.raises(MissingExtraError, match="spikingjelly or snntorch"):
        demo.run_demo(tmp_path)
    with pytest.raises(MissingExtraError, match=r"\[demo,snntorch\]"):
        demo.run_demo(tmp_path, frameworks=["snntorch"])


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="at least 1, got 0"):
        demo.run_demo(tmp_path, seeds=0)
    with pytest.raises(OptionError, match="did you mean 'snntorch'"):
        demo.run_demo(tmp_path, frameworks="snntroch")


def test_a_place_that_cannot_be_written_is_said_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "_run", lambda *_: pytest.fail("it was trained"))
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "taken" / "demo.png").mkdir(parents=True)
    for place in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "taken"):
        with pytest.raises(OptionError, match=r"cannot write into .* name another folder"):
            demo.run_demo(place)
        assert main(["demo", "--out", str(place)]) == 2
        told = capsys.readouterr()
        assert told.err.startswith("spikede: the demo cannot write") and told.err.count("\n") == 1
    assert not list((tmp_path / "taken").glob("*.json")), "the probe was left"


def test_a_disk_that_is_full_after_training_costs_the_files_and_not_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    tiny = demo.Settings(seeds=1, hidden=4, train_epochs=1, tune_epochs=1, samples=100)
    monkeypatch.setattr(demo, "Settings", lambda seeds: tiny)
    monkeypatch.setattr(demo, "_draw", full)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert "test accuracy in %" in told.out and "best:" in told.out
    assert told.err.count("\n") == 1 and "No space left on device" in told.err


def test_ctrl_c_stops_it_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pressed(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(demo, "_one_seed", pressed)
    threads = torch.get_num_threads()
    # A shell starts what it puts in the background with Ctrl-C ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["demo", "--out", str(tmp_path)]) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert capsys.readouterr().err == "spikede: stopped.\n"
    assert torch.get_num_threads() == threads and not list(tmp_path.iterdir())


def test_a_pipe_that_nobody_reads_ends_it_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["demo", "--quick", "--out", str(tmp_path)]) == 141
    assert not capsys.readouterr().err


def test_mean_and_spread() -> None:
    assert demo._mean_std([0.5]) == (0.5, 0.0)
    mean, std = demo._mean_std([1.0, 2.0, 3.0])
    assert mean == 2.0 and std == pytest.approx(1.0)


def test_a_row_lasts_as_many_steps_as_asked() -> None:
    images = torch.arange(2 * 64.0).reshape(2, 8, 8)
    sequence = demo._sequence(images, demo.Settings(repeat=2))
    assert sequence.shape == (16, 2, 8)
    assert torch.equal(sequence[6], images[:, 3]) and torch.equal(sequence[7], images[:, 3])
