"""Power series in one variable, truncated: the arithmetic behind the memory weights.

A series ``q_0 + q_1 z + ... + q_n z^n`` is a tensor ``[n + 1, ...]``; trailing dimensions are
independent series. All functions are differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def power_difference(p: Tensor, n: int, order: int) -> Tensor:
    """First or second differences of ``m^p`` for ``m = 1 ... n``, shape ``[n, *p.shape]``.

    order 1: ``(m+1)^p - m^p``; order 2: ``(m+1)^p - 2 m^p + (m-1)^p``, with ``0^p = 0``.
    The plain formulas lose all digits at large m; ``expm1`` and ``log1p`` keep about ``eps * m``.
    """
    m = torch.arange(1, n + 1, dtype=p.dtype, device=p.device).reshape(-1, *([1] * p.dim()))
    scale = torch.pow(m, p)
    ahead = torch.expm1(p * torch.log1p(1.0 / m))
    if order == 1:
        return scale * ahead
    # m = 1: 0^p counts as 0 also at p = 0, which is where alpha = 1 puts it.
    behind = torch.cat(
        [
            torch.full_like(scale[:1], -1.0),
            torch.expm1(p * torch.log1p(-1.0 / m[1:])),
        ]
    )
    second = scale * (ahead + behind)
    # m^1 has no second difference. Where p is 1 (alpha = 1), rounding would leave 1e-16 where the
    # integer neuron needs an exact zero; the derivative in p stays.
    return torch.where(p == 1.0, second - second.detach(), second)


def multiply(a: Tensor, b: Tensor, n: int) -> Tensor:
    """The first ``n`` coefficients of the product of two series."""
    if n <= 64:
        rows = [
            (a[: min(k + 1, a.shape[0])] * b[: k + 1].flip(0)[: min(k + 1, a.shape[0])]).sum(0)
            if b.shape[0] > k
            else _coefficient(a, b, k)
            for k in range(n)
        ]
        return torch.stack(rows)
    size = 1 << (a.shape[0] + b.shape[0] - 1).bit_length()
    spectrum = torch.fft.rfft(a, size, dim=0) * torch.fft.rfft(b, size, dim=0)
    return torch.fft.irfft(spectrum, size, dim=0)[:n]


def _coefficient(a: Tensor, b: Tensor, k: int) -> Tensor:
    low, high = max(0, k - b.shape[0] + 1), min(k, a.shape[0] - 1)
    terms = [a[j] * b[k - j] for j in range(low, high + 1)]
    return torch.stack(terms).sum(0) if terms else torch.zeros_like(a[0])


def _reciprocal(q: Tensor) -> Tensor:
    n = q.shape[0]
    known = min(n, 64)
    inverse = torch.zeros_like(q[:known])
    inverse[0] = 1.0 / q[0]
    for k in range(1, known):
        inverse[k] = -(q[1 : k + 1] * inverse[:k].flip(0)).sum(0) / q[0]
    while known < n:  # Newton: each round doubles the number of right coefficients
        known = min(2 * known, n)
        twice = -multiply(q[:known], inverse, known)
        twice[0] += 2.0
        inverse = multiply(inverse, twice, known)
    return inverse


class _Reciprocal(torch.autograd.Function):
    """``r = 1 / q``; since ``dr = -r r dq``, the adjoint is one more product of series."""

    @staticmethod
    def forward(ctx: Any, q: Tensor) -> Tensor:
        inverse = _reciprocal(q)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        n = inverse.shape[0]
        square = multiply(inverse, inverse, n)
        # sum_k grad_k (-(square * dq))_k = sum_j dq_j (-sum_k grad_k square_{k-j})
        return -multiply(grad.flip(0), square, n).flip(0)


def reciprocal(q: Tensor) -> Tensor:
    """The series ``1 / q`` to as many terms as ``q`` has; ``q[0]`` must not be zero."""
    return _Reciprocal.apply(q)
