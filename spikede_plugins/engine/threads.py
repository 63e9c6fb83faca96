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
from concurrent.futures import ThreadPoolExecutor, wait
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


def in_tiles(
    kernel: Callable[..., None], shared: Callable[..., int], tiles: Any, work: int, *arguments: Any
) -> None:
    """Run ``kernel`` over all tiles, shared among ``torch.get_num_threads()`` threads.

    Args:
        kernel: takes the arguments, the tiles, and which of them to run: first, last.
        shared: the same for OpenMP's threads (see ``engine.outlined``).
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
    parallel = 0 if _forked else _openmp()
    if parallel:
        if shared(arguments, tiles, pieces, threads, parallel):
            kernel(*arguments, tiles, 0, count)  # says what failed
    else:
        bounds = [count * i // pieces for i in range(pieces + 1)]
        _by_workers(threads, iter(list(pairwise(bounds))), lambda piece: kernel(*arguments, tiles, *piece))


def _by_workers(
    threads: int, pieces: Iterator[tuple[int, int]], run: Callable[[tuple[int, int]], None]
) -> None:
    """Every piece once, by whichever thread comes first; the first error is raised here."""
    lock = threading.Lock()

    def take() -> None:
        while True:
            with lock:
                piece = next(pieces, None)
            if piece is None:
                return
            run(piece)

    others = [_workers(threads - 1).submit(take) for _ in range(threads - 1)]
    try:
        take()
    finally:
        wait(others)
    for other in others:
        other.result()


@cache
def _openmp() -> int:
    """Where GNU OpenMP's ``GOMP_parallel(body, data, threads, flags)`` is that torch has loaded; or 0."""
    if "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return 0
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
    except OSError:  # not Linux
        return 0
    home = Path(torch.__file__).parent
    loaded = {Path(line.split()[-1]) for line in maps if "/libgomp" in line}
    found = [path for path in loaded if path.parent in (home / "lib", home.with_suffix(".libs"))]
    if len(found) != 1:
        return 0
    try:
        parallel = ctypes.CDLL(str(found[0])).GOMP_parallel
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(parallel, ctypes.c_void_p).value or 0


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
