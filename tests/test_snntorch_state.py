"""The history goes with ``mem``: continuing, restarting, detaching, resetting, copying, moving."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

snn = pytest.importorskip("snntorch")

from snntorch import utils
from snntorch_cases import NEURONS, build, inputs, run

from spikede_plugins.conversion import convert_to_fractional
from spikede_plugins.errors import SpikedeWarning

ALL = list(NEURONS)


def fractional(name="Leaky", option="plain", **options):
    return convert_to_fractional(build(name, option), **{"alpha": 0.6, **options})


def same(a, b):
    return len(a) == len(b) and all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


# -- one sequence ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("option", ["plain", "hidden_output"])
def test_two_chunks_are_the_sequence(name, option):
    x = inputs(9)
    whole, _ = run(fractional(name, option), x)
    neuron = fractional(name, option)
    first, states = run(neuron, x[:4])
    second, _ = run(neuron, x[4:], states)
    assert same(whole, first + second)


@pytest.mark.parametrize("name", ALL)
def test_explicit_mem_is_hidden_mem(name):
    x = inputs()
    assert same(run(fractional(name), x)[0], run(fractional(name, "hidden_output"), x)[0])


@pytest.mark.parametrize("name", ALL)
def test_train_is_eval(name):
    x = inputs()
    neuron = fractional(name)
    trained, _ = run(neuron.train(), x)
    assert same(trained, run(neuron.eval(), x)[0])
    with torch.no_grad():
        assert same(trained, run(neuron, x)[0])
    with torch.inference_mode():
        assert same(trained, run(neuron, x)[0])


def test_history_matters():
    x = inputs()
    neuron = fractional()
    whole, _ = run(neuron, x)
    _, (mem,) = run(neuron, x[:4])
    found, _ = run(fractional(), x[4:], (mem.clone(),))  # a neuron that does not know the membrane
    assert not torch.equal(found[1], whole[9])


# -- which mem continues --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "view", [lambda m: m, lambda m: m.detach(), lambda m: m.data, lambda m: m.view_as(m)]
)
def test_returned_mem_and_its_views_continue(view):
    x = inputs(9)
    neuron = fractional()
    whole, _ = run(neuron, x)
    _, (mem,) = run(neuron, x[:4])
    mem = view(mem)
    neuron.reset_mem()  # the neuron itself holds another membrane now
    assert same(run(neuron, x[4:], (mem,))[0], whole[8:])


def test_detached_mem_outlives_the_tensor_it_came_from():
    x = inputs(9)
    neuron, mem = fractional(), torch.zeros_like(inputs()[0])
    out = []
    for xk in x:
        spike, mem = neuron(xk, mem.detach())
        neuron.reset_mem()
        out += [spike, mem]
    assert same(out, run(fractional(), x)[0])


def test_the_start_is_kept_when_its_tensor_is_reused():
    x, start = inputs(), torch.full((2, 4), 0.3)
    expected, _ = run(fractional(), x, (start.clone(),))
    neuron = fractional()
    first, states = run(neuron, x[:1], (start,))
    start.zero_()
    assert same(first + run(neuron, x[1:], states)[0], expected)


def test_interleaved_sequences_do_not_mix():
    x, y = inputs(9), inputs(9).detach() * 1.3
    neuron = fractional()
    expected = run(neuron, x)[0], run(neuron, y)[0]
    found, states = ([], []), [(torch.zeros(2, 4),), (torch.zeros(2, 4),)]
    for xk, yk in zip(x, y, strict=True):
        for i, part in enumerate((xk, yk)):
            out, states[i] = run(neuron, part.unsqueeze(0), states[i])
            found[i].extend(out)
    assert same(found[0], expected[0])
    assert same(found[1], expected[1])


def test_an_older_mem_may_be_taken_up_again():
    x = inputs(9)
    neuron = fractional()
    _, states = run(neuron, x[:4])
    assert same(run(neuron, x[4:], states)[0], run(neuron, x[4:], states)[0])
    assert same(run(neuron, x, None)[0][8:], run(neuron, x[4:], states)[0])


def test_histories_die_with_their_membranes():
    neuron = fractional("Leaky", "learned_hidden", learn_alpha=True)
    for _ in range(5):
        neuron.reset_mem()
        run(neuron, inputs(60))
    neuron.reset_mem()
    run(neuron, inputs(1))
    assert len(neuron._pasts._entries) == 1
    with torch.no_grad():
        for xk in inputs(200):
            neuron(xk)
    assert len(neuron._pasts._entries) <= 16


# -- resets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "reset",
    [lambda n: utils.reset(nn.Sequential(n)), lambda n: n.reset_mem(), lambda n: type(n).reset_hidden()],
)
def test_resets_restart(name, reset):
    x = inputs()
    neuron = fractional(name, "hidden_output")
    expected, _ = run(neuron, x)
    run(neuron, x)
    reset(neuron)
    if isinstance(neuron, snn.RSynaptic):
        neuron.spk = torch.zeros_like(neuron.spk)  # natively forgotten by reset_hidden
    assert same(run(neuron, x)[0], expected)


def test_init_leaky_restarts():
    x = inputs()
    neuron = fractional()
    expected, _ = run(neuron, x, (neuron.init_leaky(),))
    assert same(run(neuron, x, (neuron.init_leaky(),))[0], expected)


@pytest.mark.parametrize("name", ALL)
def test_another_batch_size_restarts(name):
    neuron = fractional(name, "hidden_output")
    run(neuron, inputs())
    small = inputs()[:, :1]
    assert same(run(neuron, small)[0], run(fractional(name, "hidden_output"), small)[0])


def test_reset_reaches_copies_and_leaves_the_original_native():
    net = nn.Sequential(nn.Linear(4, 4), snn.Leaky(0.9, init_hidden=True, output=True))
    made = convert_to_fractional(net, alpha=0.6)
    x = inputs()
    expected = torch.stack([made(xk)[1] for xk in x])
    utils.reset(made)
    assert torch.equal(torch.stack([made(xk)[1] for xk in x]), expected)
    assert type(net[1]) is snn.Leaky
    native = torch.stack([net(xk)[1] for xk in x])
    utils.reset(net)
    assert torch.equal(torch.stack([net(xk)[1] for xk in x]), native)


# -- truncated backpropagation --------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_detach_hidden_cuts_the_history(name):
    x = inputs(9)
    neuron = fractional(name, "learned_hidden", learn_alpha=True)
    run(neuron, x[:4])
    type(neuron).detach_hidden()
    if isinstance(neuron, snn.RSynaptic):
        neuron.spk = neuron.spk.detach()  # natively forgotten by detach_hidden
    run(neuron, x[4:6])
    (gradient,) = torch.autograd.grad(neuron.mem.sum(), x)
    assert gradient[:4].abs().sum() == 0
    assert gradient[4].abs().sum() > 0


def test_mem_detach_cuts_the_history():
    x = inputs(9)
    neuron = fractional()
    whole, _ = run(neuron, x)
    _, (mem,) = run(neuron, x[:4])
    for cut in (mem.detach(), mem.detach().requires_grad_()):
        found, _ = run(neuron, x[4:], (cut,))
        assert same(found, whole[8:])
        (gradient,) = torch.autograd.grad(found[-1].sum(), x)
        assert gradient[:4].abs().sum() == 0
        assert gradient[4:].abs().sum() > 0
    found, _ = run(neuron, x[4:], (mem,))
    assert torch.autograd.grad(found[-1].sum(), x)[0][0].abs().sum() > 0


def test_two_backward_passes_over_two_chunks():
    x = inputs(8).detach()
    neuron = fractional("Leaky", "learned", learn_alpha=True)
    mem = neuron.init_leaky()
    for chunk in x.split(4):
        mem = mem.detach()
        out, (mem,) = run(neuron, chunk, (mem,))
        torch.stack(out).sum().backward()
    assert neuron.fractional.order.alpha.grad.isfinite()


# -- copies ---------------------------------------------------------------------------------------


def saved(neuron):
    buffer = io.BytesIO()
    torch.save(neuron, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("option", ["hidden_output", "quant_hidden", "learned_hidden"])
@pytest.mark.parametrize("way", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n)), saved])
def test_copies_after_a_forward_pass_go_on_alike(name, option, way):
    x = inputs(9)
    neuron = fractional(name, option, learn_alpha=True)
    run(neuron, x[:4])
    other = way(neuron)
    assert type(other) is type(neuron)
    assert not any(p is q for p, q in zip(neuron.parameters(), other.parameters(), strict=True))
    assert same(run(neuron, x[4:])[0], run(other, x[4:])[0])
    assert other.state_function.__self__ is other


def test_a_copy_does_not_disturb_the_original():
    x = inputs(9)
    expected, _ = run(fractional("Leaky", "hidden_output"), x)
    neuron = fractional("Leaky", "hidden_output")
    first, _ = run(neuron, x[:4])
    run(copy.deepcopy(neuron), -x)
    assert same(first + run(neuron, x[4:])[0], expected)


def test_dtype_follows():
    x = inputs(9)
    neuron = fractional("Leaky", "hidden_output")
    expected, _ = run(fractional("Leaky", "hidden_output").double(), x.double())
    run(neuron, x[:4])
    neuron.double()
    found, _ = run(neuron, x[4:].double())
    assert found[1].dtype == torch.float64
    torch.testing.assert_close(found, expected[8:], rtol=1e-5, atol=1e-5)


def test_autocast_keeps_float32_states():
    x = inputs(40).detach().bfloat16()
    native, neuron = build("Leaky", "hidden_output"), fractional("Leaky", "hidden_output")
    expected, _ = run(fractional("Leaky", "hidden_output"), x.float())
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = run(neuron, x)
        spike = native(x[0])[0]
    assert found[0].dtype == spike.dtype
    assert found[1].dtype == torch.float32
    assert same(found, expected)


def test_nothing_of_the_state_is_saved():
    neuron = fractional("Synaptic", "hidden")
    keys = set(neuron.state_dict())
    run(neuron, inputs())
    assert set(neuron.state_dict()) == keys
    assert keys == {*build("Synaptic").state_dict(), "fractional._extra_state"}  # its settings
    other = fractional("Synaptic", "hidden")
    run(other, inputs()[:, :1])
    other.load_state_dict(neuron.state_dict())
    build("Synaptic").load_state_dict(neuron.state_dict(), strict=False)


class Same(torch.autograd.Function):
    """The same numbers in the same memory, which hold no reference to the tensor that they were."""

    @staticmethod
    def forward(ctx, x):
        return x.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.parametrize("how", ["view", "alias"])
def test_what_continues_a_membrane_that_is_gone(how):
    """A view keeps its membrane, and with it the way back; where there is none left, a warning says so."""
    neuron, whole = fractional(learn_alpha=True), fractional(learn_alpha=True)
    x = torch.rand(3, 2, 4, requires_grad=True)
    mem = same_mem = torch.zeros(2, 4)
    for step in x[:2]:
        _, mem = neuron(step, mem)
        _, same_mem = whole(step, same_mem)
    mem = mem.view_as(mem) if how == "view" else Same.apply(mem)
    for _ in range(3):  # other sequences, that go on without it
        _, other = neuron(x[0], torch.zeros(2, 4))
        neuron(x[0], other)
    expected = whole(x[2], same_mem)[1]
    if how == "alias":
        with pytest.warns(SpikedeWarning, match="gradients of its history end here"):
            assert torch.equal(neuron(x[2], mem)[1], expected)
        return
    found = neuron(x[2], mem)[1]
    assert torch.equal(found, expected)
    ours, theirs = (
        torch.autograd.grad(out.sum(), [x, net.fractional.order.alpha])
        for net, out in ((neuron, found), (whole, expected))
    )
    assert same(ours, theirs) and ours[0][0].abs().sum() > 0
