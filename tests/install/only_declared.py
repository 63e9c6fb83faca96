"""Runs a script as though an environment held nothing but what a set of extras declares.

    python only_declared.py EXTRA[,EXTRA] SCRIPT [ARGUMENT ...]       "none" is no extra at all

What the package declares is read from the source tree (an editable installation keeps what was true when it
was made), what its dependencies declare from their metadata. Every other distribution of the environment is
hidden: its modules cannot be imported or found, its version is not told. So an import of something that is
installed here by chance, and that nobody asked for, fails as it would for a user.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import runpy
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGE = "spikede-plugins"
_PROJECT = Path(__file__).resolve().parent.parent.parent / "pyproject.toml"


def extras_of_the_package() -> list[str]:
    """All extras, in the order of pyproject.toml."""
    return list(tomllib.loads(_PROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"])


def _requirements(name: str, extra: str) -> list[Requirement]:
    """What one distribution requires for one of its extras; for "" itself."""
    if name == PACKAGE:
        project = tomllib.loads(_PROJECT.read_text(encoding="utf-8"))["project"]
        texts = project["optional-dependencies"][extra] if extra else project["dependencies"]
        requirements = [Requirement(text) for text in texts]
    else:
        try:
            requirements = [Requirement(text) for text in importlib.metadata.requires(name) or []]
        except importlib.metadata.PackageNotFoundError:
            return []  # a build of torch for the CPU comes without what it declares for GPUs
    environment = {key: str(value) for key, value in default_environment().items()}
    environment["extra"] = extra
    return [each for each in requirements if each.marker is None or each.marker.evaluate(environment)]


def declared(extras: Iterable[str]) -> set[str]:
    """The distributions that ``pip install "spikede-plugins[extras]"`` brings, by their metadata."""
    seen: set[tuple[str, str]] = set()
    ahead = [(PACKAGE, extra) for extra in ("", *extras)]
    while ahead:
        name, extra = ahead.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for requirement in _requirements(name, extra):
            ahead += [(canonicalize_name(requirement.name), each) for each in ("", *requirement.extras)]
    return {name for name, _ in seen}


def hide_all_but(names: set[str]) -> list[str]:
    """Hide every distribution but these; the top-level modules that are hidden."""
    belongs = importlib.metadata.packages_distributions()
    hidden = {
        module
        for module, owners in belongs.items()
        if not any(canonicalize_name(owner) in names for owner in owners)
    }
    sys.meta_path[:] = [_Hiding(finder, hidden, names) for finder in sys.meta_path]
    # What Python itself imported at its start, for files that name modules (*.pth).
    for module in [name for name in sys.modules if name.partition(".")[0] in hidden]:
        del sys.modules[module]
    return sorted(hidden)


class _Hiding:
    """A finder of modules and distributions that does not find some."""

    def __init__(self, finder: Any, hidden: set[str], names: set[str]) -> None:
        self._finder, self._hidden, self._names = finder, hidden, names

    def find_spec(
        self, name: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] in self._hidden:
            return None
        found: importlib.machinery.ModuleSpec | None = self._finder.find_spec(name, path, target)
        return found

    def find_distributions(self, *context: Any) -> Iterator[importlib.metadata.Distribution]:
        for distribution in getattr(self._finder, "find_distributions", lambda *_: ())(*context):
            name = distribution.metadata["Name"]
            if name is not None and canonicalize_name(name) in self._names:
                yield distribution

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


def main() -> None:
    extras, script, *arguments = sys.argv[1:]
    hidden = hide_all_but(declared(extra for extra in extras.split(",") if extra != "none"))
    assert "pytest" in hidden, "nothing is hidden, so nothing is tested"
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
