"""What the fuzz tests found, each as the smallest example."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from small_nets import Framework, each_framework, frames
from torch import nn

from spikede_plugins import (
    ConversionError,
    IFNeuron,
    LIFNeuron,
    MultiTerm,
    NoisyLIFNeuron,
    ODEIFDynamics,
    ODELIFDynamics,
    OptionError,
    OptionTypeError,
    OrderError,
    PerChannel,
    SNNWrapper,
    SpikedeError,
    SpikingODELayer,
    StateError,
    SumOfExponentials,
    Surrogate,
    UnknownNameError,
    WindowMemory,
    convert_to_fractional,
    fdeint,
    mittag_leffler,
)
from spikede_plugins.exponentials import choose_nodes

HUGE = 10**400  # an int that no float can be


@each_framework
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": HUGE}, OrderError, r"must lie in \(0, 1\]"),
        ({"alpha": np.bool_(True)}, OptionTypeError, "must be a number"),
        ({"alpha": torch.tensor(0.5, device="meta")}, OptionTypeError, "must be a number"),
        ({"alpha": torch.tensor([0.5]).to_sparse()}, OptionTypeError, "must hold numbers"),
        ({"step_size": HUGE}, OptionError, "finite and positive"),
        ({"memory_reset": np.array([None, 0.5])}, OptionError, "memory_reset must be one of"),
        ({"exclude": np.array("lif")}, OptionTypeError, "a pattern or a list of patterns"),
        ({"include": torch.tensor(0.5)}, OptionTypeError, "a pattern or a list of patterns"),
    ],
)
def test_options_that_raised_errors_of_python_or_torch(framework: Framework, options, error, message):
    with pytest.raises(error, match=message):
        convert_to_fractional(framework.net(), **options)


def test_weights_that_vanish():
    """Those of an order like 1e-320, of which rounding to zero leaves nothing."""
    with pytest.raises(OptionError, match="vanish in float64"):
        choose_nodes(torch.zeros(200, 1, dtype=torch.float64), 1e-6, 200, "gl")


@pytest.mark.parametrize("coefficients", [None, 1.0, True, HUGE, torch.ones(1, device="meta"), np.array(1.0)])
def test_coefficients_that_are_no_sequence(coefficients):
    with pytest.raises(OptionTypeError, match="sequence of numbers"):
        MultiTerm([0.5], coefficients)


def test_a_coefficient_that_no_float_can_be():
    with pytest.raises(OptionError, match="finite and positive"):
        MultiTerm([0.5], [HUGE])


def test_one_is_singular():
    with pytest.raises(OrderError, match=r"has 1 order but 2 coefficients"):
        MultiTerm([0.5], [1.0, 2.0])
    node = PerChannel([0.5])
    with pytest.raises(OrderError, match="alpha has 1 order,"):
        SNNWrapper(nn.Sequential(IFNeuron(), IFNeuron()), "fdeint", alpha=[0.5])
    assert node.alphas == (0.5,)


def test_a_horizon_whose_weights_no_memory_holds():
    with pytest.raises(OptionError, match="horizon must lie between 1 and 10000000"):
        SumOfExponentials(horizon=2**40)


@pytest.mark.parametrize("name", [None, 1, ["atan"], {"atan"}, np.array(["atan"])])
def test_a_surrogate_by_anything_but_a_name(name):
    with pytest.raises(OptionTypeError, match="name of a surrogate"):
        Surrogate(name)


@each_framework
@pytest.mark.parametrize("scale", [1e-300, 1e300, HUGE])
def test_scales_that_divide_by_zero(framework: Framework, scale):
    with pytest.raises(OptionError, match="scale of a surrogate"):
        Surrogate("gaussian", scale)
    net = framework.net()
    if framework.name == "spikingjelly":
        from spikingjelly.activation_based import surrogate

        net.lif.surrogate_function = surrogate.SoftSign(alpha=min(scale, 1e300))
    else:
        from snntorch import surrogate

        net.lif.spike_grad = surrogate.atan(alpha=min(scale, 1e300))
    x = frames().requires_grad_()
    framework.run(convert_to_fractional(net, alpha=0.6), x).sum().backward()  # as natively: no error


def test_a_time_constant_without_an_inverse():
    with pytest.raises(OptionError, match="tau must be at least 1e-30"):
        LIFNeuron(tau=1e-320)


def test_the_noisy_surrogate_is_offered():
    with pytest.raises(UnknownNameError, match="'noisy'"):
        LIFNeuron(surrogate_opt="noise")


@pytest.mark.parametrize("learn", [None, 1, 0.5, np.bool_(True), nn.Linear(1, 1)])
def test_learn_by_anything_but_names(learn):
    with pytest.raises(OptionTypeError, match="learn must be"):
        ODELIFDynamics(learn=learn)


@pytest.mark.parametrize("value", [HUGE, -HUGE])
def test_dynamics_of_numbers_that_no_float_can_be(value):
    with pytest.raises(OptionError, match="tau_mem must be finite"):
        ODELIFDynamics(tau_mem=value)
    with pytest.raises(OptionTypeError, match="tau_mem must hold numbers"):
        ODELIFDynamics(tau_mem=torch.tensor(1.0, device="meta"))


def test_numbers_beyond_the_dtype_of_the_layer():
    with pytest.raises(OptionError, match=r"more than torch\.float32 can hold"):
        SpikingODELayer(2, 3, ODEIFDynamics(v_threshold=1e308))
    with pytest.raises(OptionError, match=r"slope_floor = 1e\+308 is more than torch\.float32 can hold"):
        SpikingODELayer(2, 3, slope_floor=1e308)
    with pytest.raises(OptionError, match="n_inputs must be at most"):
        SpikingODELayer(2**63, 3)


def test_more_spikes_than_can_be_counted():
    layer = SpikingODELayer(2, 3, ODEIFDynamics(v_threshold=1e-320))
    layer.weight.data.fill_(1.0)
    with pytest.raises(StateError, match="more often in one interval than can be counted"):
        layer(torch.ones(1, 1, 2), interval=1.0)


def test_the_smallest_order_of_the_mittag_leffler_function():
    assert mittag_leffler(-1.0, 1e-320).item() == pytest.approx(0.5)  # E_0(z) = 1 / (1 - z)
    with pytest.raises(OrderError, match="alpha must lie in"):
        mittag_leffler(0.5, HUGE)
    with pytest.raises(OptionTypeError, match="meta or sparse"):
        mittag_leffler(torch.ones(2).to_sparse(), 0.5)


def test_times_without_numbers():
    for t in (torch.linspace(0, 1, 5).to_sparse(), torch.empty(5, device="meta")):
        with pytest.raises(OptionTypeError, match="t must hold numbers"):
            fdeint(lambda t, y: -y, torch.ones(2), t, alpha=0.5)
    with pytest.raises(OptionError, match="step_size"):
        fdeint(
            lambda t, y: -y, torch.ones(2), torch.linspace(0, 1, 5), alpha=0.5, options={"step_size": HUGE}
        )


@pytest.mark.parametrize("length", [None, True, 2.5, torch.ones(2), "3"])
def test_a_window_of_anything_but_steps(length):
    with pytest.raises(OptionTypeError, match="length must be an int"):
        WindowMemory(length)
    with pytest.raises(OptionError, match="at most 2147483647 steps"):
        WindowMemory(10**30)


@pytest.mark.parametrize(
    "options", [{"adjoint": 1}, {"bias": "no"}, {"dtype": torch.int64}, {"dtype": float}]
)
def test_settings_of_the_event_driven_layer(options):
    with pytest.raises(OptionTypeError, match=f"{next(iter(options))} must be"):
        SpikingODELayer(2, 3, **options)


def test_a_solver_that_is_an_array():
    with pytest.raises(UnknownNameError, match="unknown solver"):
        SpikingODELayer(2, 3, solver=np.array(["dopri5", "bosh3"]))


def test_settings_of_the_noisy_neuron():
    with pytest.raises(OptionTypeError, match="hard_eval must be True or False"):
        NoisyLIFNeuron(hard_eval=np.array([True, False]))
    with pytest.raises(UnknownNameError, match="train_spike_mode"):
        NoisyLIFNeuron(train_spike_mode=np.array(["concrete"]))


# -- the wrapper ----------------------------------------------------------------------------------


def wrapped(**options) -> SNNWrapper:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(3, 4), LIFNeuron(tau=2.0), nn.Linear(4, 2), IFNeuron())
    return SNNWrapper(base, **{"integrator": "fdeint", "alpha": 0.6, **options})


X, TIMES = 4 * torch.ones(6, 2, 3), torch.linspace(0.0, 1.0, 6)


def test_a_wrapper_in_a_wrapper():
    for base in (wrapped(), nn.Sequential(wrapped(), nn.Linear(2, 2), IFNeuron())):
        with pytest.raises(ConversionError, match="holds an SNNWrapper"):
            SNNWrapper(base)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_output_behind_the_input(method):
    pytest.importorskip("torchdiffeq")
    net = wrapped(integrator="odeint", method=method)
    with pytest.raises(OptionError, match=r"output_time ends at 1\.5, behind x_time, 1"):
        net(X, TIMES, output_time=[0.5, 1.5])
    assert net(X, TIMES, output_time=[0.5, 1.0]).shape == (2, 2, 2)
    longer = torch.linspace(0.0, 1.2, 7)  # one more: the end of the last step
    assert net(X, longer, output_time=[0.5, 1.2]).shape == (2, 2, 2)


def test_options_that_a_method_of_torchdiffeq_does_not_have():
    pytest.importorskip("torchdiffeq")
    with pytest.raises(UnknownNameError, match=r"'max_num_step'.*did you mean 'max_num_steps'"):
        wrapped(integrator="odeint", method="dopri5", options={"max_num_step": 5})
    with pytest.raises(OptionTypeError, match="rtol"):
        wrapped(integrator="odeint", method="dopri5", options={"rtol": "small"})
    with pytest.raises(OptionError, match="rtol"):
        wrapped(integrator="odeint", method="dopri5", options={"rtol": math.nan})
    with pytest.raises(UnknownNameError, match="unknown interp 'x'"):
        wrapped(integrator="odeint", method="rk4", options={"interp": "x"})


def test_a_neuron_put_in_the_place_of_another():
    """Before the first run and after it: it takes the order of its place; elsewhere it is an error."""
    before, after = wrapped(), wrapped()
    after(X, TIMES)
    for net in (before, after):
        net.base[1] = IFNeuron()
    assert torch.equal(before(X, TIMES), after(X, TIMES))
    before.base[1] = nn.Identity()
    with pytest.raises(StateError, match="neuron layers are 3 now, and were 1, 3"):
        before(X, TIMES)


def test_a_memory_that_is_a_tensor():
    with pytest.raises(OptionTypeError, match="memory must be"):
        wrapped(memory=torch.ones(2))


@pytest.mark.parametrize("name", ["integrator", "alpha_mode", "dropout", "interpolation_method"])
def test_words_that_are_arrays(name):
    with pytest.raises(SpikedeError, match=f"unknown {name}"):
        wrapped(**{name: np.array([["a", "b"]])})


@pytest.mark.parametrize(
    "options", [{"integrator": "fdeint_adjoint"}, {"integrator": "odeint", "method": "rk4"}]
)
def test_an_empty_batch(options):
    if options.get("method") == "rk4":
        pytest.importorskip("torchdiffeq")
    assert wrapped(**options)(X[:, :0], TIMES).shape == (6, 0, 2)
