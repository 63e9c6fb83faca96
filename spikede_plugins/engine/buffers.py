"""Memory for whole sequences, in large pages where the system has them, and used again.

An array of a layer over T steps is tens of megabytes and new at every pass. The system clears such memory
page by page at the first write, which can cost more than the arithmetic; asked for large pages, as NumPy
asks, it clears 2 MB at a time. And memory that the last pass has let go of need not be cleared at all: up to
an eighth of the machine's memory is kept for the next (``SPIKEDE_BUFFER_MB`` in the environment sets another
limit in MB, 0 none at all). A long training step lives on this: at T = 256 the CNN of the benchmarks lets go
of 2.7 GB, and took a quarter longer when 1 GiB of it was kept.
"""

from __future__ import annotations

import os
from collections import deque
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: NumPy asks for large pages from here on.
_LARGE = 1 << 22
_UNIT = 1 << 20

_NUMPY = {torch.float32: np.float32, torch.float64: np.float64, torch.uint8: np.uint8}


@cache
def _default_limit() -> int:
    """An eighth of the memory that this process may use: what the machine has, or its control group."""
    try:
        sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, OSError, ValueError):  # not a POSIX system
        sizes = [8 << 30]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # version 2, version 1
        with suppress(OSError, ValueError):
            sizes.append(int(Path("/sys/fs/cgroup", name).read_text()))
    return min(sizes) // 8


def _limit() -> int:
    try:
        return max(0, int(os.environ["SPIKEDE_BUFFER_MB"])) * _UNIT
    except (KeyError, ValueError):
        return _default_limit()


#: Buffers nobody uses, by size. Only single, atomic operations: buffers come back whenever, in any thread.
_unused: dict[int, deque[Any]] = {}


def kept_bytes() -> int:
    """How much memory is kept for the next pass."""
    return sum(size * len(buffers) for size, buffers in list(_unused.items()))


def release() -> None:
    """Give the memory that is kept for the next pass back to the system."""
    _unused.clear()


class _Lease:
    """A buffer in use; comes back when the last array in it is gone."""

    def __init__(self, size: int) -> None:
        try:
            self.buffer = _unused[size].pop()
        except (KeyError, IndexError):
            self.buffer = np.empty(size, np.uint8)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self.buffer.__array_interface__  # type: ignore[no-any-return]

    def __del__(self, limit: Any = _limit, unused: dict[int, deque[Any]] = _unused) -> None:
        buffer = getattr(self, "buffer", None)
        if buffer is None:
            return
        for size in list(unused):  # other sizes, which may be of no more use, make room
            while size != buffer.size and kept_bytes() + buffer.size > limit():
                try:
                    unused[size].popleft()
                except (KeyError, IndexError):
                    break
        if kept_bytes() + buffer.size <= limit():
            unused.setdefault(buffer.size, deque()).append(buffer)


def empty(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor on the device of ``like``, in its dtype unless another is given."""
    dtype = like.dtype if dtype is None else dtype
    count = 1
    for size in shape:
        count *= size
    if (
        like.device.type != "cpu"
        or dtype not in _NUMPY
        or count * dtype.itemsize < _LARGE
        or torch.is_inference_mode_enabled()  # a tensor made there must be an inference tensor
        or torch.compiler.is_compiling()
    ):
        return torch.empty(shape, dtype=dtype, device=like.device)
    needed = count * dtype.itemsize
    memory = np.asarray(_Lease(-(-needed // _UNIT) * _UNIT))
    return torch.from_numpy(memory[:needed].view(_NUMPY[dtype])).view(shape)
