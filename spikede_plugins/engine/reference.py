"""The definition of what a solver means, as a plain loop: ``D^alpha y = f(t, y)``, ``y(0) = y0``.

No fused form, no state kept between calls, nothing clever: the engines and the accuracy of every solver are
checked against this.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from spikede_plugins.errors import OptionError, OptionTypeError, StateError
from spikede_plugins.orders import check_alpha
from spikede_plugins.solvers.base import CorrectorSolver, ExplicitSolver, Solver

_FIXED_POINT_STEPS = 200


def integrate(
    f: Callable[[float, Tensor], Tensor],
    y0: Tensor,
    t_end: float,
    steps: int,
    alpha: float | Tensor,
    solver: Solver,
) -> Tensor:
    """Integrate on a grid of ``steps`` equal steps; the whole history is summed up at every step.

        explicit:   u_k = gain f(t_{k-1}, y_{k-1}) - sum_{m=1..k-1} w_m u_{k-m},       y = y0 + u
        corrector:  u_k = gain (f(t_k, y*) + s_k f(0, y0)) - sum_{m=1..k-1} w_m u_{k-m}

    with ``y*`` the prediction of ``solver.predictor``, or ``y_k`` itself, found by fixed-point iteration.

    Args:
        f: the right-hand side ``f(t, y)``, shape of ``y``.
        y0: the start ``[...]``; use float64 to measure accuracy.
        t_end: where to stop, > 0.
        steps: how many steps, >= 1.
        alpha: the Caputo order in (0, 1], one number.
        solver: any solver.

    Returns:
        The solution at ``0, h, ..., t_end``, shape ``[steps + 1, ...]``; differentiable in everything.

    Raises:
        OrderError: if ``alpha`` lies outside (0, 1].
        OptionError: if ``t_end`` or ``steps`` is not positive.
        OptionTypeError: if the solver is neither explicit nor a corrector.
        StateError: if the iteration of an implicit step does not converge.
    """
    check_alpha(alpha)
    if not t_end > 0 or steps < 1:
        raise OptionError(f"t_end and steps must be positive, got t_end={t_end}, steps={steps}.")
    if not isinstance(solver, (ExplicitSolver, CorrectorSolver)):
        raise OptionTypeError(f"{type(solver).__name__} is neither an ExplicitSolver nor a CorrectorSolver.")
    order = torch.as_tensor(alpha, dtype=torch.float64)
    h = t_end / steps
    deviations: list[Tensor] = []  # u_1 ... u_{k-1}

    def past_sum(weights: Tensor) -> Tensor:
        if not deviations:
            return torch.zeros_like(y0)
        newest_last = weights[: len(deviations)].flip(0).to(y0.dtype)
        return torch.tensordot(newest_last, torch.stack(deviations), dims=1)

    explicit = solver.predictor if isinstance(solver, CorrectorSolver) else solver
    if explicit is not None:
        explicit_gain, explicit_weights = explicit.gain(order, h).to(y0.dtype), explicit.weights(order, steps)
    if isinstance(solver, CorrectorSolver):
        gain, weights = solver.gain(order, h).to(y0.dtype), solver.weights(order, steps)
        start_weights, start_rate = solver.start_weights(order, steps).to(y0.dtype), f(0.0, y0)

    y = y0
    for k in range(1, steps + 1):
        guess = y
        if explicit is not None:
            guess = y0 + explicit_gain * f((k - 1) * h, y) - past_sum(explicit_weights)
        if isinstance(solver, CorrectorSolver):
            known = y0 + gain * start_weights[k - 1] * start_rate - past_sum(weights)
            y = known + gain * f(k * h, guess)
            if explicit is None:
                y = _fixed_point(partial(_implicit_step, f, k * h, known, gain), y)
        else:
            y = guess
        deviations.append(y - y0)
    return torch.stack([y0, *(y0 + u for u in deviations)])


def _implicit_step(
    f: Callable[[float, Tensor], Tensor], t: float, known: Tensor, gain: Tensor, y: Tensor
) -> Tensor:
    return known + gain * f(t, y)


def _fixed_point(step: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    for _ in range(_FIXED_POINT_STEPS):
        moved = step(y)
        close = (moved - y).abs() <= 4 * torch.finfo(y.dtype).eps * (1 + moved.abs())
        y = moved
        if bool(close.all()):
            return y
    raise StateError(
        f"a step is unsolved after {_FIXED_POINT_STEPS} fixed-point iterations, which converge for small "
        "steps only; take more steps, or a solver with a predictor (abm)."
    )
