"""Interpolation: SciPy's values, the samples themselves, gradients, what is refused, and what it costs."""

from __future__ import annotations

import doctest
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from spikede_plugins import interpolation
from spikede_plugins.errors import OptionError, OptionTypeError, UnknownNameError
from spikede_plugins.interpolation import Interpolant, available_interpolations, interpolate

METHODS = available_interpolations()
FEWEST = {"linear": 1, "nearest": 1, "cubic": 4, "akima": 5}
GRIDS = {
    "uniform": lambda n: np.linspace(-1.0, 2.0, n),
    "non-uniform": lambda n: np.cumsum(np.random.default_rng(n).uniform(0.05, 1.0, n)) - 1.0,
}


def samples(n: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(n).normal(size=(n, *shape))


def places(times: np.ndarray) -> np.ndarray:
    """Everywhere: inside, at the samples, exactly half way, before and after."""
    inside = np.random.default_rng(1).uniform(times[0], times[-1], 50)
    half_way = times[:-1] / 2 + times[1:] / 2
    return np.concatenate([inside, times, half_way, [times[0] - 1.0, times[-1] + 1.0, -np.inf, np.inf]])


def scipy_values(x: np.ndarray, times: np.ndarray, t: np.ndarray, method: str) -> np.ndarray:
    reference = pytest.importorskip("scipy.interpolate")
    t = np.clip(t, times[0], times[-1])  # we hold the boundary values
    if method == "linear":
        channels = [np.interp(t, times, channel) for channel in x.reshape(len(x), -1).T]
        return np.stack(channels, axis=-1).reshape(len(t), *x.shape[1:])
    if method == "nearest":
        return reference.interp1d(times, x, kind="nearest", axis=0)(t)
    if method == "cubic":
        return reference.CubicSpline(times, x, bc_type="not-a-knot")(t)
    return reference.Akima1DInterpolator(times, x, method="akima")(t)


# --- values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 4)], ids=str)
@pytest.mark.parametrize("count", [5, 6, 40])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("method", METHODS)
def test_values_are_those_of_scipy(method, grid, count, shape):
    times, x = GRIDS[grid](count), samples(count, *shape)
    t = places(times)
    found = interpolate(torch.tensor(x), torch.tensor(times), torch.tensor(t), method)
    assert found.dtype == torch.float64 and found.shape == (len(t), *shape)
    np.testing.assert_allclose(found.numpy(), scipy_values(x, times, t, method), rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_float32_samples_give_the_same_values_rounded_once_or_twice(method):
    times, x = GRIDS["non-uniform"](40), samples(40, 3).astype(np.float32)
    t = places(times)
    found = interpolate(torch.tensor(x), torch.tensor(times), torch.tensor(t), method)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(
        found.numpy(), scipy_values(x.astype(np.float64), times, t, method), rtol=0, atol=5e-6
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_is_worked_out_in_float32(method, dtype):
    x = torch.tensor(samples(20, 2)).to(dtype)
    t = torch.linspace(0, 19, 77)
    found = interpolate(x, torch.arange(20), t, method)
    assert found.dtype == dtype
    # One rounding of the float32 result, and nothing else.
    assert torch.equal(found, interpolate(x.float(), torch.arange(20), t, method).to(dtype))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [4, 5, 6])
def test_the_fewest_samples_of_each_method(method, count):
    """With 4 samples the not-a-knot spline is the one cubic through them."""
    times = np.array([0.0, 1.0, 1.5, 4.0, 4.5, 6.0])[:count]
    x = times**3 - 2 * times
    if count < FEWEST[method]:
        with pytest.raises(OptionError, match="needs at least"):
            interpolate(torch.tensor(x), times, 0.5, method)
        return
    t = places(times)
    found = interpolate(torch.tensor(x), times, t, method).numpy()
    np.testing.assert_allclose(found, scipy_values(x, times, t, method), rtol=0, atol=1e-10)
    if method == "cubic":
        inside = np.clip(t, times[0], times[-1])
        np.testing.assert_allclose(found, inside**3 - 2 * inside, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", ["linear", "nearest"])
def test_one_sample_is_a_constant(method):
    only = Interpolant(torch.tensor([[2.0, 3.0]]), [5.0], method)
    for t in (-1.0, 5.0, 9.0):
        assert only(t).tolist() == [2.0, 3.0]
    assert only([1.0, 5.0, 9.0]).tolist() == [[2.0, 3.0]] * 3


def test_nearest_at_half_way_is_the_earlier_sample():
    x = torch.tensor([10, 20, 30])  # any dtype: nothing is computed
    assert interpolate(x, [0.0, 1.0, 2.0], [0.5, 0.5000001, 1.5], "nearest").tolist() == [10, 20, 20]
    assert interpolate(x > 15, [0.0, 1.0, 2.0], 0.6, "nearest").item() is True
    # Between neighbouring floats nothing lies half way; each time still has its own sample.
    times = [1.0, math.nextafter(1.0, 2.0), 2.0]
    assert [interpolate(x, times, t, "nearest").item() for t in times] == [10, 20, 30]
    assert interpolate(x, times, times, "nearest").tolist() == [10, 20, 30]


@pytest.mark.parametrize("method", METHODS)
def test_samples_come_back_exactly(method):
    """Not even the sign of zero changes, and no neighbour that is NaN or infinite gets in."""
    times = GRIDS["non-uniform"](9)
    x = torch.tensor(samples(9, 4))
    x[3, 0], x[4, 0], x[5, 0], x[2, 1] = math.nan, math.inf, -math.inf, -0.0
    function = Interpolant(x, times, method)
    for found in (function(times), torch.stack([function(t) for t in times])):
        assert found.numpy().tobytes() == x.numpy().tobytes()


@pytest.mark.parametrize("method", METHODS)
def test_nan_in_the_samples_is_data(method):
    x = torch.zeros(12, 2)
    x[6, 0] = math.nan
    found = interpolate(x, torch.arange(12), 6.25, method)
    assert found[0].isnan() and found[1] == 0.0


@pytest.mark.parametrize("method", METHODS)
def test_one_time_or_several_however_they_are_given(method):
    """A number and a 0-dim tensor give [...]; [Q] gives [Q, ...], also for Q = 0; times in any form."""
    times, x = GRIDS["non-uniform"](8), torch.tensor(samples(8, 2, 3))
    function = Interpolant(x, times, method)
    t = places(times)
    together = function(torch.tensor(t))
    assert together.shape == (len(t), 2, 3)
    for one in (float, torch.tensor, np.float64):
        assert torch.equal(torch.stack([function(one(v)) for v in t]), together)
    assert torch.equal(function(t), together) and torch.equal(function(list(t)), together)
    assert function([]).shape == (0, 2, 3)
    assert torch.equal(function(0), function(0.0)) and torch.equal(function(torch.tensor(0)), function(0.0))
    for form in (torch.tensor(times), list(times), tuple(times)):
        assert torch.equal(interpolate(x, form, t, method), together)
    assert interpolate(x[:, :, :0], times, t, method).shape == (len(t), 2, 0)


@pytest.mark.parametrize("device", ["meta", *(["cuda"] if torch.cuda.is_available() else [])])
@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_where_the_samples_are(method, device):
    """"meta" holds no values, but refuses as a GPU does what mixes devices."""
    x = torch.tensor(samples(6, 3))
    there, here = Interpolant(x.to(device), range(6), method), Interpolant(x, range(6), method)
    for t in (2.3, 3.0, torch.tensor([0.4, 5.0, 9.0])):
        found, expected = there(t), here(t)
        assert found.device.type == device and found.shape == expected.shape
        if device != "meta":
            torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-12)


def test_times_keep_their_float64_precision():
    """A thousandth of a second, a day later: float32 would not tell these times apart."""
    times = torch.tensor([86400.0, 86400.001, 86400.002], dtype=torch.float64)
    found = interpolate(torch.tensor([0.0, 1.0, 2.0]), times, 86400.0005)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(0.5, abs=1e-6)


def test_akima_treats_each_channel_for_itself():
    """SciPy takes a channel that is 1e-12 of another's size for flat; alone it does not."""
    times, big, small = GRIDS["uniform"](9), samples(9), 1e-12 * samples(10)[:9]
    t = places(times)
    both = interpolate(torch.tensor(np.stack([big, small], axis=1)), times, t, "akima")
    np.testing.assert_allclose(both[:, 0].numpy(), scipy_values(big, times, t, "akima"), rtol=0, atol=1e-10)
    np.testing.assert_allclose(both[:, 1].numpy(), scipy_values(small, times, t, "akima"), rtol=0, atol=1e-22)


def test_akima_bends_a_corner_only_beside_it():
    """It is made for this: the spline swings along the whole curve, Akima in the two intervals that meet."""
    x = torch.tensor([0.0, 1.0, 2.0, 3.0, 3.0, 3.0, 3.0], dtype=torch.float64)
    t = np.linspace(0, 6, 61)
    straight = np.minimum(t, 3.0)
    away = (t <= 2) | (t >= 4)
    akima, cubic = (interpolate(x, range(7), t, method).numpy() for method in ("akima", "cubic"))
    np.testing.assert_allclose(akima[away], straight[away], rtol=0, atol=1e-14)
    assert akima[25] == pytest.approx(2.5 + 1 / 16)  # at t = 2.5, with the slope 1/2 at the corner
    assert np.abs(cubic - straight)[away].max() > 0.01


@pytest.mark.parametrize("method", ["cubic", "akima"])
def test_slopes_do_not_depend_on_the_blocks_they_are_worked_out_in(method, monkeypatch):
    x, times = torch.tensor(samples(10, 7, 5)), GRIDS["non-uniform"](10)
    t = places(times)
    at_once = interpolate(x, times, t, method)
    monkeypatch.setattr(interpolation, "_BLOCK", 20)  # two channels at a time
    assert torch.equal(interpolate(x, times, t, method), at_once)
    monkeypatch.setattr(interpolation, "_BLOCK", 1)  # fewer than one channel: still one
    assert torch.equal(interpolate(x, times, t, method), at_once)


@pytest.mark.parametrize("method", METHODS)
def test_samples_need_not_be_contiguous(method):
    x = torch.tensor(samples(6, 3, 10)).permute(2, 0, 1)
    times, t = GRIDS["uniform"](10), places(GRIDS["uniform"](10))
    assert torch.equal(interpolate(x, times, t, method), interpolate(x.contiguous(), times, t, method))


@pytest.mark.parametrize("method", METHODS)
def test_what_is_returned_is_the_callers(method):
    """Writing into a result changes no sample, also where the result is a sample. Times are copied."""
    x, times = torch.tensor(samples(6, 2)), torch.arange(6.0, dtype=torch.float64)
    before, function = x.clone(), Interpolant(x, times, method)
    expected = function(2.5)
    for t in (3.0, 0.4, 9.0, torch.tensor([1.0, 2.0])):
        function(t).zero_()
    times.add_(100.0)
    assert torch.equal(x, before)
    assert torch.equal(function(2.5), expected) and torch.equal(function([2.5])[0], expected)


steps = st.lists(st.floats(0.1, 10.0), min_size=5, max_size=12)
numbers = st.floats(-10.0, 10.0)


@given(h=steps, data=st.data())
def test_linear_stays_between_its_neighbours(h, data):
    times = np.cumsum(h)
    x = torch.tensor(data.draw(st.lists(numbers, min_size=len(h), max_size=len(h))), dtype=torch.float64)
    i = data.draw(st.integers(0, len(h) - 2))
    t = data.draw(st.floats(times[i], times[i + 1]))
    value = interpolate(x, times, t)
    assert min(x[i], x[i + 1]) <= value <= max(x[i], x[i + 1])


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_stays_what_it_is_to_the_last_bit(method):
    """A constant current that wavered by rounding could cross a threshold it is equal to."""
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([0.1, 1 / 3, 1e9 / 7], dtype=dtype)
        found = interpolate(x.expand(8, 3), range(8), torch.linspace(-1, 8, 301), method)
        assert torch.equal(found, x.expand(301, 3))


@given(h=steps, data=st.data())
def test_every_method_is_continuous_and_gives_back_its_samples(h, data):
    times = np.cumsum(h)
    x = torch.tensor(data.draw(st.lists(numbers, min_size=len(h), max_size=len(h))), dtype=torch.float64)
    for method in METHODS:
        function = Interpolant(x, times, method)
        assert torch.equal(function(times), x)
        if method == "nearest":
            continue
        # Just before a sample the interval to its left answers; it must arrive at the same value.
        arrived = function(np.nextafter(times, -np.inf))
        torch.testing.assert_close(arrived, x, rtol=0, atol=1e-9)


@given(st.floats(-100, 100), st.floats(-100, 100))
def test_every_method_but_nearest_reproduces_lines(offset, slope):
    times = torch.tensor(GRIDS["non-uniform"](9))
    t = torch.linspace(times[0], times[-1], 17, dtype=torch.float64)
    for method in ("linear", "cubic", "akima"):
        torch.testing.assert_close(
            interpolate(offset + slope * times, times, t, method), offset + slope * t, rtol=0, atol=1e-9
        )


# --- gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("method", METHODS)
def test_gradient_by_finite_differences(method, grid):
    times = GRIDS[grid](7)
    x = torch.tensor(samples(7, 2), requires_grad=True)
    t = places(times)[::5]
    assert torch.autograd.gradcheck(lambda x: interpolate(x, times, t, method), x)
    assert torch.autograd.gradcheck(lambda x: torch.stack([interpolate(x, times, v, method) for v in t]), x)


@pytest.mark.parametrize("method", ["linear", "nearest", "cubic"])
def test_three_methods_are_linear_in_the_samples(method):
    """So the gradient is the value for a unit sample, whatever the other samples are."""
    times, t = GRIDS["non-uniform"](8), 0.37
    x = torch.tensor(samples(8), requires_grad=True)
    (gradient,) = torch.autograd.grad(interpolate(x, times, t, method), x)
    unit = interpolate(torch.eye(8, dtype=torch.float64), times, t, method)
    torch.testing.assert_close(gradient, unit, rtol=0, atol=1e-14)


@pytest.mark.parametrize("x", [
    torch.zeros(8),
    torch.full((8,), 3.0),
    torch.arange(8.0),
    0.1 * torch.arange(8.0),  # straight up to rounding
    torch.arange(8.0).clamp(max=4.0),  # a corner: Akima's denominator vanishes on straight data only
    1e-310 * torch.arange(8.0, dtype=torch.float64).square(),  # too small to divide by
], ids=["zero", "constant", "linear", "rounded", "corner", "denormal"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_finite_on_straight_data(method, x):
    x = x.double().requires_grad_()
    t = torch.linspace(-1, 8, 37)
    (gradient,) = torch.autograd.grad(interpolate(x, torch.arange(8), t, method).sum(), x)
    assert gradient.isfinite().all()
    # Adding a constant to all samples adds it to all values.
    assert gradient.sum().item() == pytest.approx(len(t), abs=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_prepared_without_gradients_there_are_none(method):
    x = torch.tensor(samples(6), requires_grad=True)
    with torch.no_grad():
        function = Interpolant(x, range(6), method)
    assert not function(2.5).requires_grad and not function([2.5]).requires_grad
    times = torch.arange(6.0, requires_grad=True)
    found = interpolate(x.detach(), times, torch.tensor(2.5, requires_grad=True), method)
    assert not found.requires_grad  # times get no gradient


# --- what it costs --------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """The sizes (in numbers) of all tensors made, views of older ones left out."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result._is_view() and result._base is None:
            known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
            if result.untyped_storage().data_ptr() not in known:
                self.sizes.append(result.numel())
        return result


@pytest.mark.parametrize("method", ["linear", "nearest"])
def test_linear_and_nearest_touch_only_the_rows_they_need(method):
    x, times = torch.randn(100, 1000), torch.arange(100.0)
    with Allocations() as made:
        function = Interpolant(x, times, method)
        for t in (0.0, 41.3, 99.0, 200.0):
            function(t)
        function(torch.tensor([0.2, 50.7]))
    assert made.sizes and max(made.sizes) <= 2 * 1000


@pytest.mark.parametrize("method", METHODS)
def test_many_single_times_cost_one_gradient_of_the_samples(method):
    """The gradient of x[i] is as large as x; taken at each of 50 times it would be made 50 times."""
    x = torch.randn(100, 1000, requires_grad=True)
    function = Interpolant(x, torch.arange(100.0), method)
    total = sum(function(t).sum() for t in np.linspace(0.3, 98.6, 50))
    with Allocations() as made:
        total.backward()
    assert x.grad is not None and x.grad.count_nonzero() > 0
    # Akima keeps some intermediate values of the size of x, independent of the number of times.
    assert sum(size >= x.numel() for size in made.sizes) < 40


# --- what is refused ------------------------------------------------------------------------------------


def test_unknown_method_offers_the_nearest():
    with pytest.raises(UnknownNameError, match=r"did you mean 'linear'.*akima, cubic, linear, nearest"):
        interpolate(torch.zeros(5), range(5), 0.5, "linaer")
    with pytest.raises(OptionTypeError, match=r"method must be a string, got 3 \(int\)"):
        interpolate(torch.zeros(5), range(5), 0.5, 3)


@pytest.mark.parametrize(("x", "x_time", "message"), [
    (torch.zeros(3, 2), torch.zeros(3, 1), r"x_time must be of shape \[T\], got \[3, 1\]"),
    (torch.zeros(1), 0.0, r"x_time must be of shape \[T\], got \[\]"),
    (torch.zeros(3, 4), range(4), "x has 3 samples but x_time has 4 times"),
    (torch.zeros(0, 2), [], r"x has no samples, its shape is \[0, 2\]"),
    (torch.tensor(1.0), [0.0], "x has no time dimension"),
    (torch.zeros(3), [0.0, math.nan, 2.0], r"x_time\[1\] is nan.*finite"),
    (torch.zeros(3), [0.0, 1.0, math.inf], r"x_time\[2\] is inf.*finite"),
    (torch.zeros(4), [0.0, 1.0, 1.0, 0.5],
     r"strictly increasing, but x_time\[1\] = 1.0 is followed by x_time\[2\] = 1.0; sort"),
    (torch.zeros(3), [0.0, 2.0, 0.5], r"x_time\[1\] = 2.0 is followed by x_time\[2\] = 0.5"),
], ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("method", ["linear", "nearest"])
def test_samples_and_times_that_cannot_be_used(method, x, x_time, message):
    with pytest.raises(OptionError, match=message):
        Interpolant(x, x_time, method)


def test_too_few_samples_name_the_methods_that_need_fewer():
    with pytest.raises(OptionError, match=r"'cubic' needs at least 4 .* has 3; .*'linear' or .*'nearest'"):
        Interpolant(torch.zeros(3), range(3), "cubic")
    with pytest.raises(OptionError, match=r"'akima' needs at least 5 .* has 4; .*'nearest' or .*'cubic'"):
        Interpolant(torch.zeros(4), range(4), "akima")


def test_types_that_cannot_be_used():
    with pytest.raises(OptionTypeError, match=r"x must be a tensor.*got list; pass torch.as_tensor\(x\)"):
        Interpolant([0.0, 1.0], [0.0, 1.0])
    with pytest.raises(OptionTypeError, match=r"dtype torch.int64.*x.float\(\), or method='nearest'"):
        Interpolant(torch.arange(5), range(5), "cubic")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        complex_numbers = ([1j, 2j], torch.ones(2) * 1j, np.ones(2) * 1j)
        for times in ("abc", None, ["a", "b"], torch.ones(2).bool(), *complex_numbers):
            with pytest.raises(OptionTypeError, match="x_time must hold real numbers, got"):
                Interpolant(torch.zeros(2), times)
        for t in ("0.5", None, True, 1j, torch.tensor(True), [[0.0], [1.0, 2.0]]):
            with pytest.raises(OptionTypeError, match=r"^t must hold real numbers, got .*t=0.5"):
                interpolate(torch.zeros(2), [0.0, 1.0], t)


@pytest.mark.parametrize("method", METHODS)
def test_times_to_evaluate_at_that_cannot_be_used(method):
    function = Interpolant(torch.zeros(5), range(5), method)
    for t in (math.nan, torch.tensor(math.nan)):
        with pytest.raises(OptionError, match="t is NaN"):
            function(t)
    with pytest.raises(OptionError, match=r"t\[1\] is NaN"):
        function([0.0, math.nan])
    with pytest.raises(OptionError, match=r"t must be a number or of shape \[Q\], got \[2, 3\]"):
        function(torch.zeros(2, 3))


def test_the_example_in_the_documentation_runs():
    found = doctest.testmod(interpolation)
    assert found.attempted >= 3 and found.failed == 0
