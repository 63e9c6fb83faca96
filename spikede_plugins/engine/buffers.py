"""Memory for whole sequences, obtained in large pages where the system has them.

An array of a layer over T steps is tens of megabytes and new at every pass. The system clears such memory
page by page at the first write, 4 kB at a time, which can cost more than the arithmetic; asked for large
pages, as NumPy asks, it clears 2 MB at a time.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

#: NumPy asks for large pages from here on.
_LARGE = 1 << 22

_NUMPY = {torch.float32: np.float32, torch.float64: np.float64, torch.uint8: np.uint8}


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
    return torch.from_numpy(np.empty(shape, _NUMPY[dtype]))
