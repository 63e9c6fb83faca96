"""A neuron's own dynamics on one tile of neurons: native charge and surrogate slope.

Charge keeps the native rounding: nothing here is contracted but ``dot``.
"""

from __future__ import annotations

import math

import numpy as np

from spikede_plugins.engine.compiled import kernel

# How charge is written (see ``AffineCode``): the same number, rounded as the framework rounds it.
INTEGRATE, DIVIDE_INPUT, DIVIDE, DIVIDE_SHORT, FACTOR_INPUT, FACTOR, FACTOR_SHORT = range(7)
DIVIDE_ONLY_INPUT, FACTOR_ONLY_INPUT = 7, 8
# Resets that act in the step after the spike (see ``engine.fire_steps``).
DELAYED_RESETS = ("none", "subtract", "zero")
# Surrogates in the order of the slopes below.
SURROGATES = (
    "sigmoid", "atan", "piecewise_quadratic", "piecewise_exp", "soft_sign", "super_spike", "erf",
    "fast_sigmoid", "triangular", "straight_through", "piecewise_linear", "gaussian",
)  # fmt: skip


@kernel()
def charge(c, v, x, count, form, leak, rest):
    """The native charge of one step for ``count`` neurons."""
    if form == INTEGRATE:
        for i in range(count):
            c[i] = v[i] + x[i]
    elif form == DIVIDE_INPUT:
        for i in range(count):
            c[i] = v[i] + (x[i] - (v[i] - rest)) / leak
    elif form == DIVIDE:
        for i in range(count):
            c[i] = v[i] - (v[i] - rest) / leak + x[i]
    elif form in (DIVIDE_SHORT, FACTOR_SHORT):
        for i in range(count):
            c[i] = v[i] * leak + x[i]
    elif form == FACTOR_INPUT:
        for i in range(count):
            c[i] = v[i] + (x[i] - (v[i] - rest)) * leak
    elif form == DIVIDE_ONLY_INPUT:
        for i in range(count):
            c[i] = v[i] + x[i] / leak
    elif form == FACTOR_ONLY_INPUT:
        for i in range(count):
            c[i] = v[i] + x[i] * leak
    else:
        for i in range(count):
            c[i] = v[i] - (v[i] - rest) * leak + x[i]


@kernel()
def surrogate_slope(slope, h, count, threshold, kind, a, one):
    """``slope[i]``: the surrogate's slope at ``h - threshold`` (see ``spikede_plugins.surrogate``)."""
    half = a / (one + one)
    if kind == 0:
        for i in range(count):
            s = one / (one + np.exp(-a * (h[i] - threshold)))
            slope[i] = a * s * (one - s)
    elif kind == 1:
        scale = half * type(one)(math.pi)
        for i in range(count):
            z = scale * (h[i] - threshold)
            slope[i] = half / (one + z * z)
    elif kind == 2:
        for i in range(count):
            slope[i] = max(a - a * a * abs(h[i] - threshold), one - one)
    elif kind == 3:
        for i in range(count):
            slope[i] = half * np.exp(-a * abs(h[i] - threshold))
    elif kind == 4:
        for i in range(count):
            z = one / a + abs(h[i] - threshold)
            slope[i] = one / ((one + one) * a * z * z)
    elif kind == 5:
        for i in range(count):
            z = one + abs(h[i] - threshold)
            slope[i] = a / (z * z)
    elif kind == 6:
        scale = a / type(one)(math.sqrt(math.pi))
        for i in range(count):
            z = a * (h[i] - threshold)
            slope[i] = scale * np.exp(-z * z)
    elif kind == 7:
        for i in range(count):
            z = one + a * abs(h[i] - threshold)
            slope[i] = one / (z * z)
    elif kind == 8:
        for i in range(count):
            slope[i] = a if h[i] < threshold else -a
    elif kind == 10:
        for i in range(count):
            slope[i] = half / (a * a) if abs(h[i] - threshold) <= a else one - one
    elif kind == 11:
        scale = one / (a * type(one)(math.sqrt(2.0 * math.pi)))
        for i in range(count):
            z = (h[i] - threshold) / a
            slope[i] = scale * np.exp(-z * z / (one + one))
    else:
        for i in range(count):
            slope[i] = one


@kernel(fastmath={"contract", "reassoc", "nsz"})
def dot(a, b, count):
    """``sum_i a[i] b[i]``, in any order."""
    total = a[0] * b[0]
    for i in range(1, count):
        total += a[i] * b[i]
    return total
