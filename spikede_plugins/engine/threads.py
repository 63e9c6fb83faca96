"""Tiles of neurons shared among threads; the kernels hold no lock.

The threads are those of torch itself where its OpenMP library can be found (Linux, GNU): after each operation
of torch they wait in a loop for the next, for a millisecond or more, and any other thread would have to
compete with them for the cores. Elsewhere, and in a process that was forked (where OpenMP's threads are
gone), they are Python threads of our own.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

#: Below this many multiply-adds a second thread costs more than it saves.
_WORTH_A_THREAD = 200_000
#: Below this many a piece costs more than what it spares a thread that waits.
_WORTH_A_PIECE = 5_000_000

_pool_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_forked = False

_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def in_tiles(kernel: Callable[..., None], tiles: Any, work: int, *arguments: Any) -> None:
    """Run ``kernel`` over all tiles, shared among ``torch.get_num_threads()`` threads.

    Args:
        kernel: takes the arguments, the tiles, and which of them to run: first, last.
        tiles: ``[tiles, 3]``, as the kernel reads them.
        work: multiply-adds in all, about.
    """
    count = len(tiles)
    threads = min(torch.get_num_threads(), count, 1 + work // _WORTH_A_THREAD)
    if threads <= 1:
        kernel(*arguments, tiles, 0, count)
        return
    # A few pieces a thread, as far as they are worth their call: one that is held up does not hold up all.
    pieces = min(count, threads * max(1, min(4, work // (threads * _WORTH_A_PIECE))))
    bounds = [count * i // pieces for i in range(pieces + 1)]
    _share(threads, iter(list(pairwise(bounds))), lambda piece: kernel(*arguments, tiles, *piece))


def _share(threads: int, pieces: Iterator[tuple[int, int]], run: Callable[[tuple[int, int]], None]) -> None:
    """Every piece once, by whichever thread comes first; the first error is raised here."""
    lock, errors = threading.Lock(), []

    def take(_: Any = None) -> None:
        try:
            while True:
                with lock:
                    piece = next(pieces, None)
                if piece is None:
                    return
                run(piece)
        except BaseException as error:
            errors.append(error)

    parallel = None if _forked else _openmp()
    if parallel is not None:
        parallel(_Body(take), None, threads, 0)
    else:
        others = [_workers(threads - 1).submit(take) for _ in range(threads - 1)]
        take()
        for other in others:
            other.result()
    if errors:
        raise errors[0]


@cache
def _openmp() -> Callable[..., None] | None:
    """GNU OpenMP's ``GOMP_parallel(body, data, threads, flags)`` of the library that torch has loaded."""
    if "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
    except OSError:  # not Linux
        return None
    home = Path(torch.__file__).parent
    loaded = {Path(line.split()[-1]) for line in maps if "/libgomp" in line}
    found = [path for path in loaded if path.parent in (home / "lib", home.with_suffix(".libs"))]
    if len(found) != 1:
        return None
    try:
        parallel = ctypes.CDLL(str(found[0])).GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes = [_Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel  # type: ignore[no-any-return]


def _workers(count: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    with _pool_lock:
        if _pool is None or _pool_size < count:
            _pool, _pool_size = ThreadPoolExecutor(count, thread_name_prefix="spikede"), count
        return _pool


def _after_fork() -> None:
    global _pool, _pool_lock, _forked
    # Threads do not survive a fork.
    _pool, _pool_lock, _forked = None, threading.Lock(), True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
