"""Bugs that SNNWrapper had, each with the example that shows it."""

from __future__ import annotations

import sys
import threading
from collections import defaultdict

import numpy as np
import pytest
import torch
from torch import nn

from spikede_plugins import BaseNeuron, ClassificationHead, LIFNeuron, SNNWrapper
from spikede_plugins.errors import (
    OptionError,
    OptionTypeError,
    OrderError,
    StateError,
    UnsupportedNeuronError,
)

TIMES = torch.arange(10.0)


def mlp(*behind):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), LIFNeuron(2.0, 0.3), *behind)


def sample(steps=10):
    return 3 * torch.randn(steps, 3, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("integrator", ["fdeint", "fdeint_adjoint"])
def test_a_head_sees_all_steps_at_once(integrator):
    base = nn.Sequential(nn.Linear(4, 6), LIFNeuron(2.0), nn.Unflatten(-1, (3, 2)), ClassificationHead(3, 5))
    x, times = sample(40), torch.arange(40.0)
    scores = SNNWrapper(base, integrator, alpha=0.7)(x, times)
    torch.testing.assert_close(scores, SNNWrapper(base, "fdeint", alpha=0.7)(x, times))
    assert scores.shape == (3, 5)
    with pytest.raises(OptionError, match="averages over time"):
        SNNWrapper(base, integrator, alpha=0.7)(x, times, output_time=[3.0, 4.0])


@pytest.mark.parametrize(
    ("integrator", "method"),
    [("odeint", "rk4"), ("odeint_adjoint", "rk4"), ("fdeint_adjoint", None), ("fdeint", None)],
)
def test_one_dropout_mask_a_sequence_in_forward_and_backward(integrator, method):
    if method == "rk4":
        pytest.importorskip("torchdiffeq")

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fc, self.drop, self.lif = nn.Linear(4, 8), nn.Dropout(0.5, inplace=True), LIFNeuron(2.0, 0.3)

        def forward(self, x):
            return self.lif(self.drop(self.fc(self.drop(x * 1.0))))

    net, x = SNNWrapper(Twice(), integrator, dropout="sequence", method=method), sample()
    torch.manual_seed(3)
    (found,) = torch.autograd.grad(net(x, TIMES).sum(), net.base.fc.weight)
    torch.manual_seed(3)
    direct = SNNWrapper(net.base, integrator.removesuffix("_adjoint"), dropout="sequence", method=method)
    (known,) = torch.autograd.grad(direct(x, TIMES).sum(), net.base.fc.weight)
    torch.testing.assert_close(found, known, rtol=1e-3, atol=1e-3 * known.abs().max().item())
    with pytest.raises(OptionError, match="AlphaDropout does not"):
        SNNWrapper(nn.Sequential(nn.AlphaDropout(), LIFNeuron()), dropout="sequence")


def test_times_far_from_zero():
    net, start = SNNWrapper(mlp(), "fdeint"), 1.7e9
    x = sample(4)
    with pytest.raises(OptionError, match="uniform grid"):
        net(x, torch.tensor([0.0, 1.0, 50.0, 51.0], dtype=torch.float64) + start)
    exact = torch.arange(4, dtype=torch.float64) + start
    assert torch.equal(net(x, exact), net(x, range(4)))
    with pytest.raises(OptionError, match="none of the times"):
        net(x, exact, output_time=[start + 100])
    with pytest.raises(OptionError, match="too coarse in its precision"):
        net(x, exact.float().unique().new_tensor([1.7e9, 1.7e9 + 128, 1.7e9 + 256, 1.7e9 + 384]))


def test_times_of_two_precisions():
    pytest.importorskip("torchdiffeq")
    net, times = SNNWrapper(mlp(), method="rk4"), torch.linspace(0, 1, 7, dtype=torch.float64)
    assert net(sample(7), times, times.float()).shape == (7, 3, 8)
    far = SNNWrapper(mlp(), method="rk4")(sample(7), times + 1.7e9)
    assert far.shape == (7, 3, 8) and far.isfinite().all()


def test_a_neuron_that_runs_in_several_threads_keeps_its_parameters():
    class Elementwise(BaseNeuron):
        elementwise = True

        def forward(self, v_mem, current_input):
            fired = self.surrogate_f(v_mem - 1.0, 5.0)
            return (current_input - v_mem - fired.detach()) / self.get_tau(), fired

    net, x, failed = SNNWrapper(nn.Sequential(Elementwise(tau_learnable=True)), "fdeint"), sample(), []

    def work():
        try:
            for _ in range(15):
                torch.autograd.grad(net(x, TIMES).sum(), list(net.parameters()))
        except Exception as error:
            failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert not failed
    assert type(net.base[0].tau_param) is nn.Parameter


def test_an_elementwise_neuron_is_checked_as_well():
    class Wrong(BaseNeuron):
        elementwise = True

        def forward(self, v_mem, current_input):
            return current_input - v_mem, v_mem[..., :1]

    with pytest.raises(OptionError, match=r"must return \(dv_dt, spike\)"):
        SNNWrapper(Wrong(), "fdeint")(sample(), TIMES)


def test_adaptive_solvers_end_where_neurons_fire():
    pytest.importorskip("torchdiffeq")
    net = SNNWrapper(mlp(), method="dopri5")
    assert net(sample(), TIMES).mean() > 0.05
    with pytest.raises(StateError, match="Where neurons fire their rates jump"):
        net(sample(), TIMES, options={"rtol": 1e-9, "atol": 1e-9, "max_num_steps": 100})


def test_a_checkpoint_is_the_same_before_and_after_a_run():
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    net = SNNWrapper(nn.Sequential(nn.Linear(4, 8), neuron.LIFNode()), "fdeint", learn_alpha=True)
    keys = list(net.state_dict())
    net(sample(), TIMES)
    assert list(net.state_dict()) == keys
    assert [name for name, _ in net.named_parameters()] == ["base.0.weight", "base.0.bias", "orders.0.alpha"]
    assert net.base[1].v_threshold == 1.0  # what a model looks up of its neuron


def test_framework_layers_that_carry_something_from_step_to_step_are_refused():
    layer = pytest.importorskip("spikingjelly.activation_based.layer")
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    functional = pytest.importorskip("spikingjelly.activation_based.functional")
    with pytest.raises(UnsupportedNeuronError, match=r"0 \(SynapseFilter\)"):
        SNNWrapper(nn.Sequential(layer.SynapseFilter(tau=3.0), neuron.LIFNode()))
    base = nn.Sequential(layer.Conv1d(3, 5, 1), neuron.LIFNode())
    functional.set_step_mode(base, "m")
    net = SNNWrapper(base, "fdeint")
    assert net(torch.rand(6, 2, 3, 4), range(6)).shape == (6, 2, 5, 4)


def test_replicas_find_their_own_operators():
    net = SNNWrapper(mlp(), "fdeint", alpha=0.7)
    expected = net(sample(), TIMES)
    replica = net._replicate_for_data_parallel()
    assert replica._operators == {} and net._operators
    replica.base = nn.Sequential(*(m._replicate_for_data_parallel() for m in net.base))
    for copy, own in zip(replica.base, net.base, strict=True):
        for name, value in own._parameters.items():
            setattr(copy, name, value)
    assert torch.equal(replica(sample(), TIMES), expected)


@pytest.mark.parametrize(
    ("integrator", "method"), [("odeint", "rk4"), ("fdeint_adjoint", None), ("fdeint", None)]
)
@pytest.mark.parametrize("only", [True, False], ids=["training only", "eval only"])
def test_neurons_called_in_one_mode_only(integrator, method, only):
    if method == "rk4":
        pytest.importorskip("torchdiffeq")

    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.a, self.b = nn.BatchNorm1d(4), LIFNeuron(), LIFNeuron()

        def forward(self, x):
            y = self.a(self.norm(x))
            return self.b(y) if self.training == only else y

    net = SNNWrapper(Either(), integrator, method=method)
    assert net(sample(), TIMES).shape == (10, 3, 4)
    net.eval()
    mean = net.base.norm.running_mean.clone()
    assert net(sample(), TIMES).shape == (10, 3, 4)
    assert torch.equal(net.base.norm.running_mean, mean)


def test_heads_folded_into_the_batch():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.lif = LIFNeuron(2.0, 0.2)

        def forward(self, x):
            n, tokens, width = x.shape
            heads = x.reshape(n, tokens, 2, width // 2).transpose(1, 2).reshape(2 * n, tokens, width // 2)
            out = self.lif(heads).reshape(n, 2, tokens, width // 2)
            return out.transpose(1, 2).reshape(n, tokens, width)

    x = 2 * torch.rand(6, 2, 3, 8)
    found = SNNWrapper(Attention(), "fdeint")(x, range(6))
    assert torch.equal(found, SNNWrapper(LIFNeuron(2.0, 0.2), "fdeint")(x, range(6)))


def test_many_output_times_cost_little():
    net = SNNWrapper(nn.Sequential(LIFNeuron()), "fdeint")
    x, times = torch.rand(4000, 1, 1), torch.arange(4000.0)
    assert torch.equal(net(x, times, output_time=times.clone()), net(x, times))
    assert net(x, times, output_time=times[1:]).shape == (3999, 1, 1)


def test_windows_of_a_recording_share_their_step():
    net, times = SNNWrapper(mlp(), "fdeint"), torch.arange(1000) * 0.001
    for begin in range(0, 100, 10):
        net(sample(), times[begin : begin + 10])
    assert len(net._operators) == 1


@pytest.mark.parametrize("x_time", [None, "abc", ["a"], {}, [1j, 2j]])
def test_times_that_are_none(x_time):
    with pytest.raises((OptionTypeError, OptionError)):
        SNNWrapper(mlp(), "fdeint")(sample(2), x_time)


def test_further_arguments_that_cannot_be():
    for options in (50, [1]):
        with pytest.raises(OptionTypeError, match="options must be a dict"):
            SNNWrapper(mlp(), options=options)
    with pytest.raises(Exception, match="unknown option 'memroy'"):
        SNNWrapper(mlp(), options={"memroy": 5})
    with pytest.raises(OptionError, match="step_size must be a positive number"):
        SNNWrapper(mlp(), "fdeint")(sample(), TIMES, options={"step_size": "a"})
    with pytest.raises(OrderError, match="layer '1': alpha must lie"):
        SNNWrapper(mlp(), alpha=1.5)
    net = SNNWrapper(mlp(), "fdeint")
    net.base.append(LIFNeuron())
    with pytest.raises(StateError, match="layers are 1, 2 now, and were 1"):
        net(sample(), TIMES)
    assert SNNWrapper(mlp(), "fdeint", alpha=np.array([0.5]))(3e38 * torch.ones(3, 2, 4), range(3)).shape


def test_outputs_of_any_mapping_and_neurons_with_a_mixin():
    class Dynamics:
        def forward(self, v_mem, current_input):
            return current_input - v_mem, self.surrogate_f(v_mem - 0.5, 2.0)

    class Mixed(Dynamics, BaseNeuron):
        pass

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.neuron = Mixed()

        def forward(self, x):
            return defaultdict(list, a=self.neuron(x))

    assert SNNWrapper(Model(), "fdeint")(sample(), TIMES)["a"].shape == (10, 3, 4)


@pytest.mark.parametrize(("integrator", "method"), [("fdeint_adjoint", "gl"), ("odeint_adjoint", "euler")])
def test_the_output_is_read_with_the_batch_statistics_it_was_integrated_with(integrator, method):
    """Both evaluate single times, so batch normalisation is over B at each of them."""
    neuron, times = LIFNeuron(2.0, 0.3), torch.arange(40.0)
    x = sample(40) + times[:, None, None] / 4
    out = SNNWrapper(nn.Sequential(nn.BatchNorm1d(4), neuron), integrator, method=method)(x, times)
    normed = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    assert 0 < out.mean() < 1
    torch.testing.assert_close(out, SNNWrapper(neuron, integrator, method=method)(normed, times))


@pytest.mark.parametrize("integrator", ["fdeint_adjoint", "odeint"])
def test_a_number_beside_the_spikes_is_that_of_all_times(integrator):
    class Rated(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            spikes = self.net(x)
            return spikes, spikes.mean()

    method = "rk4" if integrator == "odeint" else "gl"
    spikes, rate = SNNWrapper(Rated(), integrator, alpha=0.7, method=method)(sample(40), torch.arange(40.0))
    assert 0 < rate < 1
    torch.testing.assert_close(rate, spikes.mean())


def test_a_head_beside_another_output_is_refused():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.neuron, self.head = LIFNeuron(2.0, 0.3), ClassificationHead(2, 5)

        def forward(self, x):
            spikes = self.neuron(x)
            return self.head(spikes.unflatten(-1, (2, 2))), spikes

    with pytest.raises(OptionError, match="return the head's alone"):
        SNNWrapper(Two(), "fdeint")(sample(), TIMES)
