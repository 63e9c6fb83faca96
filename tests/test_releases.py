"""Releases of the frameworks: those known not to work are refused, untested ones warn once."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
from packaging.version import Version
from plugin_packages import installed
from torch import nn

from spikede_plugins import (
    ConversionError,
    PluginError,
    ReleaseError,
    SpikedeWarning,
    convert_to_fractional,
    releases,
)
from spikede_plugins.registry import get_adapter
from spikede_plugins.releases import REFUSED, TESTED, check_releases

CELLS = Path(__file__).resolve().parent.parent / "compat_matrix" / "cells.toml"
ADAPTERS = {"spikingjelly": "spikede_spikingjelly", "snntorch": "spikede_snntorch"}


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch):
    """Pretend that a release of a package is installed, nothing of which was told yet."""
    real = importlib.metadata.version
    pretended = {"torch": TESTED["torch"][0]}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: pretended.get(name) or real(name))
    monkeypatch.setattr(releases, "_told", set())
    return pretended.__setitem__


def test_the_tested_ranges_are_those_of_the_matrix() -> None:
    factors = tomllib.loads(CELLS.read_text(encoding="utf-8"))["factors"]
    for package, tested in TESTED.items():
        levels = sorted((level for level in factors[package] if level != "none"), key=Version)
        assert tested == (levels[0], levels[-1]), package


@pytest.mark.parametrize("package", ["torch", *ADAPTERS])
def test_a_release_outside_the_tested_range_warns_once(package: str, release) -> None:
    framework = "snntorch" if package == "torch" else package
    release(framework, TESTED[framework][0])
    release(package, "99.1")
    newest = TESTED[package][1]
    with pytest.warns(
        SpikedeWarning, match=rf"{package} 99\.1 was not tested.*pip install \"{package}=={newest}\""
    ):
        check_releases(framework)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_releases(framework)


@pytest.mark.parametrize("package", TESTED)
@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize("build", ["", "+cpu"])
def test_the_ends_of_the_range_are_tested(package: str, end: int, build: str, release) -> None:
    framework = "snntorch" if package == "torch" else package
    release(framework, TESTED[framework][end])
    release(package, TESTED[package][end] + build)
    check_releases(framework)  # warnings of ours are errors here


@pytest.mark.parametrize("told", ["an odd version", None])
def test_a_release_that_cannot_be_told_is_taken_as_it_is(
    told, release, monkeypatch: pytest.MonkeyPatch
) -> None:
    if told is None:
        monkeypatch.setattr(importlib.metadata, "version", importlib.metadata.distribution)
        check_releases("no-such-framework")
    else:
        release("snntorch", told)
        check_releases("snntorch")


@pytest.mark.parametrize(
    ("package", "old"), [("spikingjelly", "0.0.0.0.12"), ("snntorch", "0.9.1"), ("snntorch", "0.9.0")]
)
def test_a_release_known_not_to_work_is_refused_with_the_reason(package: str, old: str, release) -> None:
    release(package, old)
    (refused,) = (entry for entry in REFUSED if entry.package == package)
    with pytest.raises(ReleaseError) as caught:
        check_releases(package)
    assert isinstance(caught.value, ImportError)
    assert f"{package} {old}" in str(caught.value) and refused.reason in str(caught.value)
    assert str(caught.value).endswith(f'pip install "{refused.instead}"')


@pytest.mark.parametrize(("package", "old"), [("spikingjelly", "0.0.0.0.12"), ("snntorch", "0.9.1")])
def test_the_adapter_refuses_it_on_import_and_says_so_where_it_is_asked_for(
    package: str, old: str, release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(package)
    release(package, old)
    for name in [name for name in sys.modules if name.partition(".")[0] == ADAPTERS[package]]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ReleaseError, match="does not work"):
        importlib.import_module(ADAPTERS[package])
    with installed(tmp_path):  # plugins are loaded anew
        with pytest.raises(
            PluginError, match=rf'{package} {old} does not work.*pip install "{package}>=\S+"$'
        ):
            get_adapter(package)
        with pytest.warns(SpikedeWarning, match="does not work"), pytest.raises(ConversionError):
            convert_to_fractional(nn.Linear(1, 1))
