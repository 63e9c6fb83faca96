"""What a solver answers, looked at before it is used: a solver may be anyone's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from spikede_plugins.errors import PluginError, SpikedeError
from spikede_plugins.solvers.base import Solver


def ask(solver: Solver, what: str, alphas: Tensor, argument: float) -> Tensor:
    """``gain(alphas, h)``, ``weights(alphas, n)`` or ``start_weights(alphas, n)`` of a solver.

    Raises:
        PluginError: if it fails, or does not answer with finite numbers of the right shape and dtype, or with
            weights without a gradient to orders that are learned.
    """
    if torch.compiler.is_compiling():
        answer: Tensor = getattr(solver, what)(alphas, argument)
        return answer
    try:
        answer = getattr(solver, what)(alphas, argument)
    except (SpikedeError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        raise PluginError(f"{_call(solver, what, alphas, argument)} failed: {_text(error)}.") from error
    problem = _problem(what, answer, alphas, argument)
    if problem:
        raise PluginError(f"{_call(solver, what, alphas, argument)} {problem}.")
    return answer


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _call(solver: Solver, what: str, alphas: Tensor, argument: float) -> str:
    orders = ", ".join(f"{alpha:g}" for alpha in alphas.detach().reshape(-1)[:4].tolist())
    orders = f"[{orders}{', ...' if alphas.numel() > 4 else ''}]" if alphas.dim() else orders
    kind = type(solver)
    return f"the solver {solver.name!r} ({kind.__module__}:{kind.__qualname__}): {what}({orders}, {argument})"


def _problem(what: str, answer: object, alphas: Tensor, argument: float) -> str:
    shape = tuple(alphas.shape) if what == "gain" else (int(argument), *alphas.shape)
    if not isinstance(answer, Tensor):
        return f"must give a tensor, got {type(answer).__name__}"
    if answer.dtype != alphas.dtype:
        return f"must give {alphas.dtype} as its order has, got {answer.dtype}"
    if tuple(answer.shape) != shape:
        return f"must have the shape {shape}, got {tuple(answer.shape)}"
    if what == "weights" and torch.is_grad_enabled() and alphas.requires_grad and not answer.requires_grad:
        return (
            "has no gradient to the order, which is learned; compute it with torch from the order that is "
            "given, or fix the order, learn_alpha=False"
        )
    if answer.is_meta or isinstance(answer, FakeTensor):
        return ""
    # Orders that became nan in training are not the solver's fault.
    if not bool(answer.isfinite().all()) and bool(alphas.isfinite().all()):
        return f"must be finite, but has {answer[~answer.isfinite()].reshape(-1)[0].item():g}"
    return ""
