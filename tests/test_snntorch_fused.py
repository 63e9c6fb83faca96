"""snnTorch's Leaky by the fused kernel of a whole step, against the native code with a fractional charge."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

snn = pytest.importorskip("snntorch")

from snntorch import surrogate
from spikede_snntorch.codes import delayed_reset, named_surrogate
from spikede_snntorch.neurons import FractionalLeaky

from spikede_plugins import PerChannel, SumOfExponentials, convert_to_fractional
from spikede_plugins.engine import cpu

pytestmark = pytest.mark.skipif(bool(cpu.missing()), reason=cpu.missing())

STEPS, SHAPE = 70, (3, 40)
SURROGATES = {
    "atan": surrogate.atan(alpha=1.5),
    "fast_sigmoid": surrogate.fast_sigmoid(slope=5),
    "sigmoid": surrogate.sigmoid(slope=4),
    "triangular": surrogate.triangular(threshold=2),
    "straight_through": surrogate.straight_through_estimator(),
}


def make_input():
    generator = torch.Generator().manual_seed(0)
    return (1.2 * torch.rand(STEPS, *SHAPE, generator=generator)).requires_grad_()


def fractional(alpha=0.7, memory="full", learn_alpha=False, **leaky):
    return convert_to_fractional(
        snn.Leaky(**{"beta": 0.8, **leaky}), alpha=alpha, memory=memory, learn_alpha=learn_alpha
    )


def run(neuron, x, mem=None):
    """Spikes, membranes, and the gradients of both to input and parameters."""
    mem = neuron.reset_mem() if mem is None else mem
    out = []
    for step in x:
        spikes, mem = neuron(step, mem)
        out += [spikes, mem]
    out = torch.stack(out)
    weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    parameters = [p for p in neuron.parameters() if p.requires_grad]
    return [out, *torch.autograd.grad((out * weights).sum(), [x, *parameters])]


def fused_and_native(monkeypatch, neuron, x):
    """The same neuron by its kernel and by the native code; counts that the kernel was used."""
    taken = []
    plain = FractionalLeaky._fused

    def counted(self, *args, **kwargs):
        found = plain(self, *args, **kwargs)
        taken.append(found is not None)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(FractionalLeaky, "_fused", counted)
        fused = run(neuron, x)
    assert sum(taken) == STEPS - 1  # the first step finds no membrane of its shape
    with monkeypatch.context() as patch:
        patch.setattr(FractionalLeaky, "_fused", lambda *_, **__: None)
        return fused, run(neuron, x)


def assert_same(fused, native):
    same = fused[0] == native[0]
    assert torch.equal(fused[0][::2], native[0][::2])  # spikes
    assert same.float().mean() > 0.5
    for a, b in zip(fused, native, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.detach().abs().max())))


@pytest.mark.parametrize("mechanism", ["subtract", "zero", "none"])
@pytest.mark.parametrize("memory", ["full", SumOfExponentials(1e-6, 300)], ids=["full", "soe"])
@pytest.mark.parametrize("learn", [False, True], ids=["fixed", "learned"])
def test_every_reset(monkeypatch, mechanism, memory, learn):
    neuron = fractional(memory=memory, learn_alpha=learn, learn_beta=learn, reset_mechanism=mechanism)
    assert_same(*fused_and_native(monkeypatch, neuron, make_input()))


@pytest.mark.parametrize("name", SURROGATES)
def test_every_surrogate(monkeypatch, name):
    assert named_surrogate(SURROGATES[name])[0] == name
    neuron = fractional(spike_grad=SURROGATES[name], threshold=0.7)
    assert_same(*fused_and_native(monkeypatch, neuron, make_input()))


@pytest.mark.parametrize("learn", [False, True], ids=["fixed", "learned"])
def test_an_order_a_channel(monkeypatch, learn):
    order = PerChannel([0.4, 0.7, 0.9], dim=0)
    neuron = fractional(alpha=order, learn_alpha=learn, learn_beta=True)
    assert_same(*fused_and_native(monkeypatch, neuron, make_input()))


@pytest.mark.parametrize("mechanism", ["subtract", "zero", "none"])
def test_a_learnable_alpha_of_one_is_native_to_the_last_bit(mechanism):
    native = snn.Leaky(beta=0.8, reset_mechanism=mechanism)
    neuron = convert_to_fractional(native, alpha=1.0, learn_alpha=True)
    x = make_input()
    found, expected = run(neuron, x), run(native, x)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"learn_threshold": True},
        {"inhibition": True},
        {"reset_delay": False},
        {"beta": torch.full((SHAPE[1],), 0.8)},
        {"graded_spikes_factor": 2.0},
        {"surrogate_disable": True},
        {"spike_grad": surrogate.SFS(25, 1)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_the_kernel_does_not_know_takes_the_native_way(options):
    neuron = fractional(**options)
    code = delayed_reset(neuron)
    assert code is None or neuron.beta.numel() != 1
    assert run(neuron, make_input())[0].shape == (2 * STEPS, *SHAPE)


def test_a_method_put_into_an_instance_is_heeded():
    neuron = fractional()
    neuron.fire = lambda mem: torch.ones_like(mem)
    assert run(neuron, make_input())[0][2].eq(1).all()


def test_a_subclass_takes_the_native_way():
    class Mine(snn.Leaky):
        """Nothing changed."""

    neuron = convert_to_fractional(Mine(beta=0.8), alpha=0.7)
    assert type(neuron)._fused is not FractionalLeaky._fused
    torch.testing.assert_close(run(neuron, make_input())[0], run(fractional(), make_input())[0])


def test_hidden_and_output_give_what_native_gives():
    x = make_input().detach()
    for hidden, output in ((True, False), (True, True), (False, True)):
        neuron = fractional(init_hidden=hidden, output=output)
        plain = fractional()
        mem = plain.reset_mem()
        own = neuron.reset_mem()
        for step in x:
            spikes, mem = plain(step, mem)
            out = neuron(step) if hidden else neuron(step, own)
            if output:
                assert len(out) == 2 and torch.equal(out[1], mem)
                own = out[1]
            assert torch.equal(out[0] if output else out, spikes)
            assert torch.equal(neuron.mem, mem)


def test_the_reset_attribute_is_that_of_the_native_code():
    neuron, x = fractional(), make_input().detach()
    mem = neuron.reset_mem()
    for step in x[:20]:
        entered = mem
        _, mem = neuron(step, mem)
        if entered.shape == mem.shape:
            assert torch.equal(neuron.reset, (entered > neuron.threshold).float())
    with pytest.raises(AttributeError):
        fractional().reset  # noqa: B018
    carried = pickle.loads(pickle.dumps(neuron))
    assert torch.equal(carried.reset, neuron.reset)


def test_copies_in_the_middle_continue_and_older_membranes_do_too():
    neuron, x = fractional(memory=SumOfExponentials(1e-6, 300), init_hidden=True), make_input().detach()
    with torch.no_grad():
        for step in x[:45]:
            neuron(step)
        twin, loaded = copy.deepcopy(neuron), pickle.loads(pickle.dumps(neuron))
        for step in x[45:]:
            spikes = neuron(step)
            assert torch.equal(twin(step), spikes) and torch.equal(loaded(step), spikes)
        neuron = fractional()
        mem = neuron.reset_mem()
        for step in x[:20]:
            _, mem = neuron(step, mem)
        early, after = mem, []
        for _ in range(2):
            mem = early
            for step in x[20:40]:
                _, mem = neuron(step, mem)
            after.append(mem)
    assert torch.equal(*after)


def test_truncated_backpropagation(monkeypatch):
    neuron, x = fractional(learn_alpha=True), make_input()
    found = []
    for native in (False, True):
        with monkeypatch.context() as patch:
            if native:
                patch.setattr(FractionalLeaky, "_fused", lambda *_, **__: None)
            mem, total = neuron.reset_mem(), 0.0
            for k, step in enumerate(x):
                spikes, mem = neuron(step, mem)
                total = total + spikes.sum() + mem.square().mean()
                if k % 10 == 9:
                    mem = mem.detach()
            found.append(torch.autograd.grad(total, [x, *neuron.parameters()]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.abs().max())))


def test_second_derivatives_with_a_fixed_order(monkeypatch):
    neuron, x, found = fractional(reset_mechanism="zero", learn_beta=True), make_input(), []
    for native in (False, True):
        with monkeypatch.context() as patch:
            if native:
                patch.setattr(FractionalLeaky, "_fused", lambda *_, **__: None)
            mem, total = neuron.reset_mem(), 0.0
            for step in x[:25]:
                spikes, mem = neuron(step, mem)
                total = total + mem.pow(3).sum() + spikes.sum()
            (first,) = torch.autograd.grad(total, x, create_graph=True)
            found.append((first, torch.autograd.grad(first.square().sum(), x)[0]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.detach().abs().max()))


def test_half_precision_inputs_keep_a_float32_membrane():
    neuron, x = fractional(), make_input()
    mem = neuron.reset_mem()
    for step in x[:20]:
        spikes, mem = neuron(step.bfloat16(), mem)
    assert mem.dtype == spikes.dtype == torch.float32
    mem.sum().backward()
    assert x.grad[:20].abs().sum() > 0
