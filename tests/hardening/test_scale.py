"""The figures of the hardening run: counted over tests, written only where they belong."""

from __future__ import annotations

import full_run
import scale


def test_counts_of_one_row_add_up(tmp_path, monkeypatch):
    lines = tmp_path / "figures.jsonl"
    monkeypatch.setenv("SPIKEDE_HARDENING_FIGURES", str(lines))
    for count, unit in ((3, "cases"), (4, "cases"), (2, "faults")):
        scale.record("a row", count, unit)
    assert full_run.read_figures(lines) == {"a row": {"cases": 7, "faults": 2}}


def test_nothing_is_recorded_in_the_default_run(tmp_path, monkeypatch):
    monkeypatch.delenv("SPIKEDE_HARDENING_FIGURES", raising=False)
    scale.record("a row", 1, "cases")


def test_the_readme_shows_the_results(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{full_run.BEGIN}\nold\n{full_run.END}\nafter\n")
    results = {
        "date": "2026-01-01",
        "minutes": 3.2,
        "versions": {"Python": "3.11"},
        "outcomes": {"passed": 2, "failed": 1, "skipped": 0, "failures": ["test_x::test_y"]},
        "figures": {"streamed": {"steps": 1_000_000.0}},
    }
    full_run.write_readme(results, readme)
    page = readme.read_text()
    assert "1 000 000 steps" in page and "test_x::test_y" in page
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
