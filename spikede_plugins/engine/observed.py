"""Who looks on while the engine works: counters of operations, checkpoints, function transforms.

Fused kernels work outside torch: a mode that looks at torch's operations (SpikingJelly's
``DispatchCounterMode``, torch's ``FlopCounterMode``, profilers of that kind) does not see what they do. While
such a mode is active the engine takes its path in torch: the same equations, operation by operation, and each
is counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext


def counted() -> bool:
    """Whether a mode is active that looks at each of torch's operations."""
    if torch._C._len_torch_dispatch_stack():
        return True
    if not torch._C._len_torch_function_stack():
        return False
    # A default device (``with torch.device("cuda")``) is such a mode, too, and looks at nothing.
    return any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def recorded() -> bool:
    """Whether hooks on saved tensors are active, as in a call that ``torch.utils.checkpoint`` may repeat.

    A repetition must save tensor for tensor what the first run saved, whatever the engine has kept since.
    """
    return _top_hooks is not None and _top_hooks(True) is not None


@contextmanager
def unrecorded() -> Iterator[None]:
    """A context in which nothing that is saved for a backward pass is noted by such hooks.

    They are taken off, not covered by hooks that change nothing: a tensor that comes out of a hook as it went
    in keeps its own graph alive.
    """
    taken = []
    try:
        while _top_hooks is not None and (top := _top_hooks(True)) is not None:
            torch._C._autograd._pop_saved_tensors_default_hooks()
            taken.append(top)
        yield
    finally:
        for pack, unpack in reversed(taken):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)
