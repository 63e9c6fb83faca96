"""Power series in one variable, truncated: the arithmetic behind the memory weights.

A series ``q_0 + q_1 z + ... + q_n z^n`` is a tensor ``[n + 1, ...]``; trailing dimensions are
independent series. All functions are differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: From here on the series of second differences has converged to all digits.
_FAR = 32


def power_difference(p: Tensor, n: int, order: int) -> Tensor:
    """First or second differences of ``m^p`` for ``m = 1 ... n``, shape ``[n, *p.shape]``.

    order 1: ``(m+1)^p - m^p``; order 2: ``(m+1)^p - 2 m^p + (m-1)^p``, with ``0^p = 0``.
    The plain formulas lose all digits at large m; ``expm1`` and ``log1p`` keep about ``eps * m``, and the
    binomial series, from ``m = 32`` on, all of them: ``2 m^p sum_j C(p, 2j) m^(-2j)``.
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
    if n >= _FAR:
        far, terms, binomial = m[_FAR - 1 :], torch.zeros_like(scale[_FAR - 1 :]), torch.ones_like(p)
        for j in range(1, 13):
            binomial = binomial * (p - (j - 1)) / j
            if j % 2 == 0:
                terms = terms + binomial * far ** (-j)
        second = torch.cat([second[: _FAR - 1], 2.0 * scale[_FAR - 1 :] * terms])
    # m^1 has no second difference. Where p is 1 (alpha = 1), rounding would leave 1e-16 where the
    # integer neuron needs an exact zero; the derivative in p stays.
    return torch.where(p == 1.0, second - second.detach(), second)


def multiply(a: Tensor, b: Tensor, n: int) -> Tensor:
    """The first ``n`` coefficients of the product of two series."""
    if n <= 0:
        return a[:0]
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
    first, n = q[0], q.shape[0]
    q = q / first
    known = min(n, 64)
    inverse = torch.zeros_like(q[:known])
    inverse[0] = 1.0
    for k in range(1, known):
        inverse[k] = -(q[1 : k + 1] * inverse[:k].flip(0)).sum(0)
    while known < n:
        # Newton: each round doubles the number of right coefficients. The leading ones are kept out of the
        # products: their rounding is relative to the largest factor, and far coefficients are tiny.
        more = min(2 * known, n)
        tail = inverse[1:]
        off = q[known:more] + multiply(q[1:more], tail, more - 1)[known - 2 : more - 2]
        change = off.clone()
        change[1:] += multiply(tail, off, more - known - 1)
        inverse = torch.cat([inverse, -change])
        known = more
    return inverse / first


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
        square = 2.0 * inverse[0] * inverse  # 1 / q^2, its leading term kept out of the product as above
        square[0] = inverse[0].square()
        if n > 2:
            square[2:] += multiply(inverse[1:], inverse[1:], n - 2)
        # sum_k grad_k (-(square * dq))_k = sum_j dq_j (-sum_k grad_k square_{k-j})
        return -multiply(grad.flip(0), square, n).flip(0)


def reciprocal(q: Tensor) -> Tensor:
    """The series ``1 / q`` to as many terms as ``q`` has; ``q[0]`` must not be zero."""
    return _Reciprocal.apply(q)
