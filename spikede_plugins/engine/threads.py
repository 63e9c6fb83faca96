"""Tiles of neurons shared among Python threads; the kernels hold no lock."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch

#: Below this many multiply-adds a second thread costs more than it saves.
_WORTH_A_THREAD = 200_000
#: Below this many a piece costs more than what it spares a thread that waits.
_WORTH_A_PIECE = 5_000_000

_pool_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def _workers(count: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    with _pool_lock:
        if _pool is None or _pool_size < count:
            _pool, _pool_size = ThreadPoolExecutor(count, thread_name_prefix="spikede"), count
        return _pool


def _after_fork() -> None:
    global _pool, _pool_lock
    _pool, _pool_lock = None, threading.Lock()  # threads do not survive a fork


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def in_tiles(kernel: Callable[..., None], tiles: Any, work: int, *arguments: Any) -> None:
    """Run ``kernel`` over all tiles, shared among ``torch.get_num_threads()`` threads."""
    count = len(tiles)
    threads = min(torch.get_num_threads(), count, 1 + work // _WORTH_A_THREAD)
    if threads <= 1:
        kernel(*arguments, tiles, 0, count)
        return
    # A few pieces a thread, as far as they are worth their call: one that is held up does not hold up all.
    pieces = min(count, threads * max(1, min(4, work // (threads * _WORTH_A_PIECE))))
    bounds = [count * i // pieces for i in range(pieces + 1)]
    pool = _workers(threads - 1)
    remaining = iter(list(pairwise(bounds)))
    lock = threading.Lock()

    def take() -> None:
        while True:
            with lock:
                piece = next(remaining, None)
            if piece is None:
                return
            kernel(*arguments, tiles, *piece)

    others = [pool.submit(take) for _ in range(threads - 1)]
    take()
    for other in others:
        other.result()
