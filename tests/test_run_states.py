"""SNNWrapper's runs begin where they are told to, and go on in chunks as if they were one."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from torch import nn

from spikede_plugins import (
    BaseNeuron,
    IFNeuron,
    LIFNeuron,
    MultiTerm,
    SNNWrapper,
    SpikedeWarning,
    SumOfExponentials,
    get_state,
    reset_rows,
    select_rows,
    set_state,
)
from spikede_plugins.errors import OptionError, OptionTypeError, StateError

B = 3


class Net(nn.Module):
    """Two layers; the second neuron is of a kind that is run step by step."""

    def __init__(self, second: nn.Module | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.lif = nn.Linear(4, 6), LIFNeuron(tau=2.0)
        self.fc2, self.out = nn.Linear(6, 2), second or IFNeuron(tau=1.5, threshold=0.8)
        with torch.no_grad():  # so that both layers fire
            self.fc1.weight.add_(0.3)
            self.fc2.weight.add_(0.1)

    def forward(self, x):
        return self.out(self.fc2(3.0 * self.lif(self.fc1(x))))


class Quadratic(BaseNeuron):
    """A neuron of a user's own, which the wrapper runs step by step."""

    def forward(self, v_mem, current_input=None):
        rate = (current_input - v_mem * v_mem) / self.get_tau()
        fired = self.surrogate_f(v_mem + rate - self.threshold, self.surrogate_grad_scale)
        return rate - fired.detach() * self.threshold / self.get_tau(), fired


def sample(steps: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return 3.0 * torch.rand(steps, B, 4, generator=generator), 0.5 * torch.arange(float(steps))


def in_chunks(net, x, times, sizes, **options):
    """The outputs of all chunks as one, and the last state."""
    parts, state, begin = [], None, 0
    v0 = options.pop("v0", None)
    for size in sizes:
        piece = slice(begin, begin + size)
        start = {"v0": v0} if state is None else {"initial_state": state}
        out, state = net(x[piece], times[begin : begin + size + 1], return_state=True, **start, **options)
        parts.append(out)
        begin += size
    return torch.cat(parts), state


MEMORIES = ["full", 5, SumOfExponentials(1e-6, 200)]


@pytest.mark.parametrize("memory", MEMORIES, ids=["full", "window", "soe"])
@pytest.mark.parametrize("method", ["gl", "l1", "pred", "abm", "trap", "glmulti"])
def test_chunks_are_the_whole_run_bit_for_bit(method, memory):
    if method in ("abm", "trap") and isinstance(memory, SumOfExponentials):
        pytest.skip("solvers with a corrector have no sum of exponentials")
    alpha = MultiTerm([0.9, 0.4], [1.0, 0.5]) if method == "glmulti" else 0.6
    net = SNNWrapper(Net(), "fdeint", alpha=alpha, method=method, memory=memory)
    sizes = [1, 6, 13] if method == "trap" else [1, 6, 33, 60]  # trap searches for each step
    x, times = sample(sum(sizes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpikedeWarning)  # trap says where rates jump
        whole, end = net(x, times, v0=0.2, return_state=True)
        parts, last = in_chunks(net, x, times, sizes, v0=0.2)
    assert 0 < whole.sum() < whole.numel()
    assert torch.equal(parts, whole)
    for name in ("lif", "out"):
        assert torch.equal(last[name]["variables"]["v"], end[name]["variables"]["v"])


@pytest.mark.parametrize("kind", ["steps of a user's neuron", "a model called once a step", "odeint"])
def test_chunks_of_runs_of_other_kinds(kind):
    x, times = sample()
    net = {
        "steps of a user's neuron": lambda: SNNWrapper(Net(Quadratic(tau=2.0)), "fdeint", alpha=0.7),
        "a model called once a step": lambda: SNNWrapper(Net(), "fdeint", alpha=0.7, time="step"),
        "odeint": lambda: SNNWrapper(Net(), "odeint"),
    }[kind]()
    whole = net(x, times)
    assert whole.any()
    assert torch.equal(in_chunks(net, x, times, [1, 7, 32])[0], whole)


@pytest.mark.parametrize("memory", MEMORIES, ids=["full", "window", "soe"])
@pytest.mark.parametrize("method", ["gl", "l1", "pred", "abm"])
def test_gradients_go_through_the_state(method, memory):
    if method == "abm" and isinstance(memory, SumOfExponentials):
        pytest.skip("solvers with a corrector have no sum of exponentials")
    x, times = sample(60)
    x = x.double().requires_grad_()
    v0 = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    found = []
    for sizes in ([60], [1, 9, 22, 28]):
        net = SNNWrapper(Net(), "fdeint", alpha=0.6, learn_alpha=True, method=method, memory=memory).double()
        out = in_chunks(net, x, times, sizes, v0=v0)[0]
        scale = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
        found.append(torch.autograd.grad((out * scale).sum(), [x, v0, *net.parameters()]))
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-11)
    assert all(bool(grad.any()) for grad in found[0])


def test_a_state_is_plain_tensors_that_torch_saves():
    x, times = sample()
    net = SNNWrapper(Net(), "fdeint", alpha=0.6)
    _, state = net(x[:20], times[:20], return_state=True)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded["lif"]["variables"]["v"].shape == (B, 6)
    assert loaded["lif"]["histories"][0]["rows"].shape == (19, B, 6)
    want = net(x[20:], times[20:], initial_state=state)
    assert torch.equal(net(x[20:], times[20:], initial_state=loaded), want)
    assert torch.equal(net(x[20:], times[20:], initial_state=loaded), want), "a state can be used again"


def test_initial_potentials_by_hand():
    """``2 D v = -v``, from v = 0.8 and with Euler's steps of 0.5: v is 0.8 (3/4)^k."""
    x, times = torch.zeros(4, 1, 1), 0.5 * torch.arange(4.0)
    net = SNNWrapper(LIFNeuron(tau=2.0), "odeint")
    _, potentials = net(x, times, v0=0.8, return_potentials=True)
    assert potentials["base"].flatten().tolist() == pytest.approx([0.8, 0.6, 0.45, 0.3375])


@pytest.mark.parametrize("integrator", ["odeint", "odeint_adjoint", "fdeint", "fdeint_adjoint"])
@pytest.mark.parametrize("time", ["fold", "step"])
def test_every_integrator_begins_at_the_potentials_given(integrator, time):
    if integrator == "odeint_adjoint":
        pytest.importorskip("torchdiffeq")
    x, times = sample(8)
    v0 = {"out": torch.tensor([0.5, -1.0]), "lif": 0.25}
    net = SNNWrapper(Net(), integrator, alpha=0.7, time=time)
    _, potentials = net(x, times, v0=v0, return_potentials=True)
    assert torch.equal(potentials["lif"][0], torch.full((B, 6), 0.25))
    assert torch.equal(potentials["out"][0], torch.tensor([0.5, -1.0]).expand(B, 2))
    kind = "odeint" if integrator.startswith("ode") else "fdeint"
    same = SNNWrapper(Net(), kind, alpha=0.7)(x, times, v0=v0, return_potentials=True)[1]
    torch.testing.assert_close(potentials["out"], same["out"])


def test_a_caputo_derivative_counts_from_the_initial_potential():
    """``D^a v = -(v - v0)/tau``-like rest: with x = v0 nothing moves, whatever the order."""
    net = SNNWrapper(LIFNeuron(tau=2.0, threshold=9.0), "fdeint", alpha=0.4)
    _, potentials = net(torch.full((30, 2, 3), 0.7), torch.arange(30.0), v0=0.7, return_potentials=True)
    torch.testing.assert_close(potentials["base"], torch.full((30, 2, 3), 0.7))


@pytest.mark.parametrize("method", ["gl", "abm"])
def test_rows_of_a_state_begin_anew_alone(method):
    x, times = sample()
    net = SNNWrapper(Net(), "fdeint", alpha=0.6, method=method)
    _, state = net(x[:20], times[:20], return_state=True)
    before = state["lif"]["histories"][0]["rows"].clone()
    again = net(x[20:], times[20:], initial_state=reset_rows(state, [1]))
    assert torch.equal(state["lif"]["histories"][0]["rows"], before), "the state given stays as it is"
    torch.testing.assert_close(again[:, 1], net(x[20:], times[20:])[:, 1])
    others = net(x[20:], times[20:], initial_state=state)
    assert torch.equal(again[:, [0, 2]], others[:, [0, 2]])
    assert not torch.equal(again[:, 1], others[:, 1])


@pytest.mark.parametrize("method", ["gl", "abm"])
def test_rows_of_a_state_are_picked(method):
    x, times = sample()
    net = SNNWrapper(Net(), "fdeint", alpha=0.6, method=method)
    _, state = net(x[:20], times[:20], v0=0.1, return_state=True)
    pick = [2, 0, 2]
    want = net(x[20:], times[20:], initial_state=state)[:, pick]
    got = net(x[20:, pick], times[20:], initial_state=select_rows(state, pick))
    assert torch.equal(got, want)
    one = net(x[20:, :1], times[20:], initial_state=select_rows(state, torch.tensor([True, False, False])))
    assert torch.equal(one, want[:, 1:2])


def test_the_wrapper_itself_keeps_no_state():
    net = SNNWrapper(Net(), "fdeint", alpha=0.6)
    for call in (
        get_state,
        lambda n: set_state(n, {}),
        lambda n: reset_rows(n, 0),
        lambda n: select_rows(n, 0),
    ):
        with pytest.raises(StateError, match=r"return_state=True.*initial_state=state"):
            call(net)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"v0": "rest"}, OptionTypeError, "v0 of lif must be a number or a tensor, got str"),
        ({"v0": float("nan")}, OptionError, "v0 of lif must be finite"),
        ({"v0": torch.zeros(5)}, OptionError, r"shape \(5,\), which does not broadcast.*\(3, 6\)"),
        ({"v0": {"lfi": 1.0}}, StateError, "v0 names 'lfi'; the model's neurons are lif, out"),
        ({"v0": {"lif (call 2)": 1.0}}, StateError, r"names lif \(call 2\), which the model did not call"),
        ({"initial_state": 3}, OptionTypeError, "return_state=True"),
        ({"initial_state": {}}, StateError, "has nothing of lif"),
        ({"initial_state": {"lif": {"v": torch.zeros(3, 6)}}}, OptionTypeError, "the state of lif must hold"),
        ({"initial_state": {}, "v0": 1.0}, OptionError, "leave v0 out"),
        ({"return_state": 1}, OptionTypeError, "return_state must be True or False"),
    ],
)  # fmt: skip
def test_beginnings_that_cannot_be_used(given, error, text):
    x, times = sample(6)
    with pytest.raises(error, match=text):
        SNNWrapper(Net(), "fdeint", alpha=0.6)(x, times, **given)


def test_states_of_other_runs_are_told_apart():
    x, times = sample(200)
    net = SNNWrapper(Net(), "fdeint", alpha=0.6)

    def state_of(**options):
        return net(x[:150], times[:150], return_state=True, **options)[1]

    plain = state_of()
    for changed, text in (
        (lambda: net(x[150:], 2.0 * times[150:], initial_state=plain), "comes from steps of 0.5"),
        (lambda: net(x[150:], times[150:], method="abm", initial_state=plain), "another kind of method"),
        (lambda: net(x[150:, :2], times[150:], initial_state=plain), r"select_rows\(state, index\)"),
        (lambda: net(x[150:], times[150:], options={"memory": "full"}, initial_state=plain), "other memory"),
    ):  # fmt: skip
        with pytest.raises(StateError, match=text):
            changed()


@pytest.mark.parametrize("given", [{"return_state": True}, {"initial_state": {}}])
def test_integrators_without_a_state_say_what_to_use(given):
    x, times = sample(6)
    with pytest.raises(OptionError, match=r'use integrator="fdeint", which gives'):
        SNNWrapper(Net(), "fdeint_adjoint", alpha=0.6)(x, times, **given)
    pytest.importorskip("torchdiffeq")
    with pytest.raises(OptionError, match=r'use method="euler" with integrator'):
        SNNWrapper(Net(), "odeint")(x, times, method="rk4", **given)


def test_neurons_of_a_framework_are_refused_by_name():
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    x, times = sample(6)
    net = SNNWrapper(Net(neuron.LIFNode()), "fdeint", alpha=0.6)
    with pytest.raises(OptionError, match=r"out: .* get_state and set_state"):
        net(x, times, return_state=True)


def test_a_neuron_called_twice_has_two_states():
    lif = LIFNeuron(tau=2.0)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.lif = lif

        def forward(self, x):
            return self.lif(2.0 * self.lif(x))

    x, times = sample()
    net = SNNWrapper(Twice(), "fdeint", alpha=0.6)
    whole = net(x, times, v0={"lif": 0.5, "lif (call 2)": -0.5})
    parts, state = in_chunks(net, x, times, [15, 25], v0={"lif": 0.5, "lif (call 2)": -0.5})
    assert sorted(state) == ["lif", "lif (call 2)"]
    assert torch.equal(parts, whole)
