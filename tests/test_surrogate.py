"""Surrogates: a step forward, the named slope backward; each slope is that of a step in the limit."""

from __future__ import annotations

import pytest
import torch

from spikede_plugins.errors import UnknownNameError
from spikede_plugins.surrogate import available_surrogates, slope, spike, surrogate_name


@pytest.mark.parametrize("name", available_surrogates())
def test_spike_is_a_step_with_the_slope_of_its_surrogate(name):
    z = torch.linspace(-2, 2, 101, dtype=torch.float64, requires_grad=True)
    s = spike(z, name, 2.0)
    assert torch.equal(s, (z >= 0).double())
    (found,) = torch.autograd.grad(s.sum(), z)
    torch.testing.assert_close(found, slope(z.detach(), name, 2.0))


#: Their scale is free: integral 2a, 2/a, or none at all.
NO_SIGMOIDS = {"super_spike", "fast_sigmoid", "triangular", "straight_through"}


@pytest.mark.parametrize("name", sorted(set(available_surrogates()) - NO_SIGMOIDS))
def test_slopes_integrate_to_one(name):
    """The others are derivatives of a rising sigmoid."""
    z = torch.linspace(-2000, 2000, 2_000_001, dtype=torch.float64)
    area = torch.trapezoid(slope(z, name, 2.0), z).item()
    assert area == pytest.approx(1.0, abs=2e-3)


def test_unknown_surrogate_offers_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'sigmoid'"):
        spike(torch.zeros(1), "sigmoyd")


def test_other_ways_to_write_a_name():
    assert surrogate_name("arctan") == surrogate_name("arctan_surrogate") == surrogate_name("atan") == "atan"
    assert surrogate_name("gaussian_surrogate") == "gaussian"
    with pytest.raises(UnknownNameError, match="did you mean 'arctan'"):
        surrogate_name("arctann")
