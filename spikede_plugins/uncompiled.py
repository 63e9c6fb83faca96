"""Parts of a run that ``torch.compile`` leaves as they are.

What a wrapper does around its model (times, steps, the choice of a solver) depends on data, and the neurons
have compiled kernels of their own. Traced, it would be traced anew for every length and every step, and a
compiler that takes a number of one call for a constant would be wrong in the next. What is worth compiling
lies between the neurons, and is compiled.
"""

from __future__ import annotations

import functools
import sys
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

#: What the compiler is to be told, once somebody has imported it.
_untold: deque[Callable[[], None]] = deque()


def uncompiled(function: F, recursive: bool = True) -> F:
    """``function``, run as Python within what torch.compile compiled; ``recursive``: all that it calls too.

    As ``torch.compiler.disable``, but importing this does not import the compiler, and a frame that many
    objects share is not compiled for each of them before it is given up.
    """
    chosen: list[Any] = [function]

    def tell() -> None:
        _skip(call)
        chosen[0] = torch.compiler.disable(function) if recursive else _skip(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _untold and "torch._dynamo" in sys.modules:
            torch.compiler.disable(_tell)()
        return chosen[0](*args, **kwargs)

    _untold.append(tell)
    return call  # type: ignore[return-value]


def uncompiled_alone(function: F) -> F:
    """The same for ``function`` itself; what it calls may be compiled."""
    return uncompiled(function, recursive=False)


def _tell() -> None:
    while True:
        try:
            tell = _untold.popleft()
        except IndexError:  # all are told, maybe by another thread
            return
        tell()


def _skip(function: Any) -> Any:
    from torch._dynamo.decorators import skip

    return skip(function)
