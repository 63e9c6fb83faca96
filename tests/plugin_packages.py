"""Installing small packages with real entry points: a module and a ``*.dist-info`` on ``sys.path``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spikede_plugins import refresh_plugins

TOYSPIKES = Path(__file__).parent / "toyspikes_package"


def write_package(
    folder: Path, name: str, entry_points: dict[str, dict[str, str]], modules: dict[str, str] | None = None
) -> None:
    """What an installer would leave: METADATA, entry_points.txt ({group: {name: value}}) and modules."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = []
    for group, entries in entry_points.items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    for module, text in (modules or {}).items():
        (folder / f"{module}.py").write_text(text)


@contextmanager
def installed(*folders: Path) -> Iterator[None]:
    """The packages in these folders are installed inside the block."""
    paths, modules = list(sys.path), set(sys.modules)
    sys.path[:0] = [str(folder) for folder in folders]
    refresh_plugins()
    try:
        yield
    finally:
        sys.path[:] = paths
        for name in set(sys.modules) - modules:
            where = getattr(sys.modules[name], "__file__", None) or ""
            if any(where.startswith(str(folder)) for folder in folders):
                del sys.modules[name]
        refresh_plugins()


@contextmanager
def toyspikes_installed(folder: Path) -> Iterator[None]:
    """The toy framework and the package that makes it fractional, found by its entry point alone."""
    write_package(
        folder,
        "toyspikes-fractional",
        {"spikede_plugins.adapters": {"toyspikes": "toyspikes_fractional:ToyAdapter"}},
    )
    with installed(folder, TOYSPIKES):
        import toyspikes  # noqa: F401  (the framework is in use)

        yield
