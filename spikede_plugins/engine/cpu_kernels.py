"""The CPU kernels, and each of them shared among the threads of OpenMP (see ``engine.outlined``)."""

from __future__ import annotations

from typing import Any

from spikede_plugins.engine.compiled import kernel
from spikede_plugins.engine.cpu_dynamics import (
    DELAYED_RESETS,
    DIVIDE,
    DIVIDE_INPUT,
    DIVIDE_ONLY_INPUT,
    DIVIDE_SHORT,
    FACTOR,
    FACTOR_INPUT,
    FACTOR_ONLY_INPUT,
    FACTOR_SHORT,
    INTEGRATE,
    SURROGATES,
)
from spikede_plugins.engine.cpu_sequences import backward, forward
from spikede_plugins.engine.cpu_steps import (
    begin,
    begin_adjoint,
    fire_step,
    fire_step_adjoint,
    step,
    step_adjoint,
)
from spikede_plugins.engine.outlined import share

__all__ = [
    "DELAYED_RESETS", "DIVIDE", "DIVIDE_INPUT", "DIVIDE_ONLY_INPUT", "DIVIDE_SHORT", "FACTOR", "FACTOR_INPUT",
    "FACTOR_ONLY_INPUT", "FACTOR_SHORT",
    "INTEGRATE", "SHARED", "SURROGATES", "backward", "begin", "begin_adjoint",
    "fire_step", "fire_step_adjoint", "forward", "step", "step_adjoint",
]  # fmt: skip

# A function each: only what a module names is kept on disk.


@kernel()
def _share_forward(arguments, tiles, pieces, threads, parallel):
    return share(forward, arguments, tiles, pieces, threads, parallel)


@kernel()
def _share_backward(arguments, tiles, pieces, threads, parallel):
    return share(backward, arguments, tiles, pieces, threads, parallel)


@kernel()
def _share_begin(arguments, tiles, pieces, threads, parallel):
    return share(begin, arguments, tiles, pieces, threads, parallel)


@kernel()
def _share_begin_adjoint(arguments, tiles, pieces, threads, parallel):
    return share(begin_adjoint, arguments, tiles, pieces, threads, parallel)


@kernel()
def _share_step(arguments, tiles, pieces, threads, parallel):
    return share(step, arguments, tiles, pieces, threads, parallel)


@kernel()
def _share_step_adjoint(arguments, tiles, pieces, threads, parallel):
    return share(step_adjoint, arguments, tiles, pieces, threads, parallel)


@kernel()
def _share_fire_step(arguments, tiles, pieces, threads, parallel):
    return share(fire_step, arguments, tiles, pieces, threads, parallel)


@kernel()
def _share_fire_step_adjoint(arguments, tiles, pieces, threads, parallel):
    return share(fire_step_adjoint, arguments, tiles, pieces, threads, parallel)


#: Of each kernel the same shared among threads.
SHARED: dict[Any, Any] = {
    forward: _share_forward,
    backward: _share_backward,
    begin: _share_begin,
    begin_adjoint: _share_begin_adjoint,
    step: _share_step,
    step_adjoint: _share_step_adjoint,
    fire_step: _share_fire_step,
    fire_step_adjoint: _share_fire_step_adjoint,
}
