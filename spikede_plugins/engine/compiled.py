"""How the CPU kernels are compiled, and kept on disk for the next process.

numba keeps the machine code of a function under the name of its file, so code into which a function of
*another* file was built outlives a change of that file, as in an upgrade of the package; its files are
numbered, so that two processes that compile at once can write into each other's; and a folder that takes
nothing is an error. Here every kernel's file carries a digest of all kernels' sources and of its own
signature. What cannot be read is compiled anew, what cannot be written is left.

The files lie where numba puts them: in ``__pycache__`` beside the sources or, where that takes nothing, in
the user's cache folder; ``NUMBA_CACHE_DIR`` names another. Like ``.pyc`` files they are code: whoever can
write there can run code in your process.

Compiling takes seconds, so the first kernel that a process has to compile says so, through
``spikede_plugins.notices``; one that is read from disk says nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache, IndexDataCacheFile, NullCache

from spikede_plugins.notices import say_once


def _sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.name.startswith("cpu_") or path.name in ("outlined.py", "compiled.py"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


try:
    #: Of everything that kernels are built from.
    SOURCES = _sources()
except OSError:  # no files, as in a frozen program: then no two versions share a folder either
    SOURCES = ""

#: Why kernels are compiled anew in every process; empty if they are kept.
not_kept = ""


class KernelCache(FunctionCache):  # type: ignore[misc]
    """The compiled forms of one kernel on disk, a pair of files for each signature."""

    def _file(self, sig: Any, codegen: Any) -> tuple[Any, Any]:
        key = self._index_key(sig, codegen)
        name = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
        return key, IndexDataCacheFile(self._cache_path, f"{self._impl.filename_base}-{name}", SOURCES)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled form of a signature; None if there is none that can be used: then it is compiled."""
        target_context.refresh()
        try:
            key, file = self._file(sig, target_context.codegen())
            data = file.load(key)
            loaded = None if data is None else self._impl.rebuild(target_context, data)
        except Exception:  # a damaged file can raise anything; it is written anew below
            loaded = None
        if loaded is None:
            _say_that_it_takes_long(f"once on this machine (they are kept in {self._cache_path})")
        return loaded

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a compiled form, if the folder takes it."""
        if not self._impl.check_cachable(data):
            return
        with contextlib.suppress(OSError):  # a full disk, a folder that was removed: the form is in memory
            self._impl.locator.ensure_cache_path()
            key, file = self._file(sig, data.codegen)
            file.flush()  # saving reads the index first, which may be what was damaged
            file.save(key, self._impl.reduce(data))


class NoCache(NullCache):  # type: ignore[misc]
    """Where nothing can be kept: every process compiles."""

    def load_overload(self, sig: Any, target_context: Any) -> None:
        """Nothing, but it is said that this takes long."""
        _say_that_it_takes_long(f"in every process ({not_kept})")


def _say_that_it_takes_long(how_often: str) -> None:
    say_once("compiling", f"compiling CPU kernels, which takes some seconds, {how_often}.")


def kernel(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function at its first call for each signature, without Python's lock; keep it on disk.

    Args:
        options: what ``numba.njit`` takes besides.
    """

    def compiled(function: Callable[..., Any]) -> Any:
        global not_kept
        dispatcher = njit(nogil=True, **options)(function)
        try:
            dispatcher._cache = KernelCache(function)
        except RuntimeError:  # numba found no folder that can be written
            not_kept = "no folder can be written to keep them; set NUMBA_CACHE_DIR"
            dispatcher._cache = NoCache()
        return dispatcher

    return compiled
