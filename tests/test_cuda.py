"""The same networks on a GPU: the numbers of the CPU, moved states, autocast, captured graphs.

Needs a CUDA device; the tests are skipped where there is none.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from spikede_plugins import PerChannel, convert_to_fractional

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def spikingjelly_net():
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    from spikingjelly.activation_based import surrogate

    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(10, 16),
        neuron.LIFNode(tau=2.0, step_mode="m", surrogate_function=surrogate.ATan()),
        nn.Linear(16, 8),
        neuron.IFNode(step_mode="m", v_reset=None, surrogate_function=surrogate.ATan()),
    )


class SnnTorchNet(nn.Module):
    def __init__(self):
        super().__init__()
        snn = pytest.importorskip("snntorch")
        torch.manual_seed(0)
        self.fc1, self.lif1 = nn.Linear(10, 16), snn.Leaky(beta=0.9)
        self.fc2, self.lif2 = nn.Linear(16, 8), snn.Leaky(beta=0.8, learn_threshold=True)

    def forward(self, x_seq):
        mem1, mem2, spikes = self.lif1.init_leaky(), self.lif2.init_leaky(), []
        for x in x_seq:
            s1, mem1 = self.lif1(self.fc1(x), mem1)
            s2, mem2 = self.lif2(self.fc2(s1.to(x.dtype)), mem2)  # snnTorch's spikes are float32
            spikes.append(s2)
        return torch.stack(spikes)


def lively(net):
    """Weights that make the second layer fire as well."""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)
    return net


OPTIONS = {
    "fixed": {"alpha": 0.7},
    "learned": {"alpha": 0.7, "learn_alpha": True, "method": "pred"},
    "window, channels": {"alpha": {"*1": PerChannel([0.5, 0.9] * 8), "*": 0.6}, "memory": 3},
    "corrector": {"alpha": 0.6, "method": "abm"},
}


@pytest.mark.parametrize("make", [spikingjelly_net, SnnTorchNet])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_forward_and_gradients_are_those_of_the_cpu(make, options):
    """In float64, where the two devices differ by rounding only, far from any threshold."""
    net = convert_to_fractional(lively(make().double()), **options)
    on_gpu = copy.deepcopy(net).cuda()
    x = (torch.randn(12, 4, 10, dtype=torch.float64) * 3).requires_grad_()
    x_gpu = x.detach().cuda().requires_grad_()
    out, out_gpu = net(x), on_gpu(x_gpu)
    assert torch.equal(out, out_gpu.cpu())
    assert out.sum() > 0
    out.square().sum().backward()
    out_gpu.square().sum().backward()
    torch.testing.assert_close(x.grad, x_gpu.grad.cpu(), rtol=1e-8, atol=1e-10)
    for (name, p), q in zip(net.named_parameters(), on_gpu.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad.cpu(), rtol=1e-8, atol=1e-10, msg=name)


def test_a_model_moved_in_mid_sequence_continues():
    net = convert_to_fractional(spikingjelly_net().double(), alpha=0.6)
    x = torch.randn(12, 4, 10, dtype=torch.float64) * 3
    with torch.no_grad():
        whole = copy.deepcopy(net)(x)
        first = net(x[:5])
        second = net.cuda()(x[5:].cuda()).cpu()
    assert torch.equal(torch.cat([first, second]), whole)


@pytest.mark.parametrize("make", [spikingjelly_net, SnnTorchNet])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_trains_with_a_float32_history(make, dtype):
    net = convert_to_fractional(make().cuda(), alpha=0.7, learn_alpha=True)
    x = torch.randn(10, 4, 10, device="cuda") * 3
    with torch.autocast("cuda", dtype):
        loss = net(x).float().mean()
    loss.backward()
    for name, p in net.named_parameters():
        assert torch.isfinite(p.grad).all(), name
    for module in net.modules():
        history = getattr(module, "history", None)
        if isinstance(history, torch.Tensor):
            assert history.dtype == torch.float32


def test_compiled_network_equals_eager():
    net = convert_to_fractional(spikingjelly_net().cuda(), alpha=0.7)
    twin = copy.deepcopy(net)
    compiled = torch.compile(twin, fullgraph=True)
    x = torch.randn(8, 4, 10, device="cuda") * 3
    expected, found = net(x), compiled(x)
    assert (expected != found).float().mean() < 0.01  # ties at the threshold may round the other way
    found.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in twin.parameters() if p.grad is not None)


# -- and all the rest: streams, continuous time, equations, events ---------------------------------


@pytest.mark.parametrize("memory", ["full", "soe", 5])
def test_a_stream_of_single_steps_is_that_of_the_cpu(memory):
    """Step by step over the point where the compressed memory takes over, by the framework's own reset."""
    from spikingjelly.activation_based import functional, neuron

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 16), neuron.LIFNode(v_reset=None), nn.Linear(16, 8), neuron.IFNode())
    net = convert_to_fractional(lively(net.double()), alpha=0.6, memory=memory)
    on_gpu = copy.deepcopy(net).cuda()
    x = 3 * torch.randn(200, 4, 10, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(2):
            out = torch.stack([net(step) for step in x])
            out_gpu = torch.stack([on_gpu(step) for step in x.cuda()])
            assert torch.equal(out, out_gpu.cpu()) and out.any()
            functional.reset_net(net)
            functional.reset_net(on_gpu)


def test_mixed_precision_training_with_a_scaler():
    net = convert_to_fractional(spikingjelly_net().cuda(), alpha=0.7, learn_alpha=True)
    functional = pytest.importorskip("spikingjelly.activation_based.functional")
    optimiser = torch.optim.SGD(net.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    x, target = 3 * torch.randn(12, 32, 10, device="cuda"), torch.randint(8, (32,), device="cuda")
    losses = []
    for _ in range(40):
        functional.reset_net(net)
        optimiser.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = nn.functional.cross_entropy(net(x).float().mean(0), target)
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        losses.append(loss.item())
    assert all(torch.isfinite(p).all() for p in net.parameters())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("method", ["gl", "l1", "pred", "trap", "abm", "glmulti"])
def test_equations_of_the_gpu_are_those_of_the_cpu(method):
    from spikede_plugins import MultiTerm, fdeint

    alpha = MultiTerm([0.9, 0.4], [1.0, 0.5]) if method == "glmulti" else 0.6
    matrix = torch.tensor([[-1.0, 0.3], [0.2, -2.0]], dtype=torch.float64)
    found = []
    for device in ("cpu", "cuda"):
        y0 = torch.tensor([[1.0, 0.5], [0.2, -1.0], [0.0, 2.0]], dtype=torch.float64, device=device)
        y0.requires_grad_()
        a = matrix.to(device)
        t = torch.linspace(0, 2, 101, dtype=torch.float64, device=device)
        y = fdeint(lambda t, y, a=a: torch.tanh(y) @ a + torch.sin(t), y0, t, alpha=alpha, method=method)
        y[-1].sum().backward()
        found.append((y.detach().cpu(), y0.grad.cpu()))
    for on_cpu, on_gpu in zip(*found, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("integrator", ["fdeint", "odeint"])
def test_a_wrapped_model_is_that_of_the_cpu(integrator):
    from spikede_plugins import LIFNeuron, SNNWrapper

    if integrator == "odeint":
        pytest.importorskip("torchdiffeq")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(10, 16), LIFNeuron(tau=2.0), nn.Linear(16, 8), LIFNeuron(tau=2.0))
    options = {"alpha": 0.6} if integrator == "fdeint" else {"integrator": "odeint", "method": "rk4"}
    net = SNNWrapper(lively(base.double()), **options)
    on_gpu = copy.deepcopy(net).cuda()
    x, times = 3 * torch.rand(20, 4, 10, dtype=torch.float64), torch.linspace(0, 1, 20, dtype=torch.float64)
    out, out_gpu = net(x, times), on_gpu(x.cuda(), times.cuda())
    torch.testing.assert_close(out_gpu.cpu(), out, rtol=1e-10, atol=1e-12)
    out.square().sum().backward()
    out_gpu.square().sum().backward()
    for (name, p), q in zip(net.named_parameters(), on_gpu.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad.cpu(), rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("fractional", [False, True])
def test_spike_times_are_those_of_the_cpu(fractional):
    from spikede_plugins import FractionalLIFDynamics, SpikingODELayer

    dynamics = FractionalLIFDynamics(alpha=0.7) if fractional else None
    layer = SpikingODELayer(3, 20, dynamics, refractory=2.0, dtype=torch.float64)
    torch.manual_seed(0)
    layer.weight.data = 0.3 * torch.rand(20, 3, dtype=torch.float64)
    on_gpu = copy.deepcopy(layer).cuda()
    x = torch.rand(20, 5, 3, dtype=torch.float64)
    counts, counts_gpu = layer(x), on_gpu(x.cuda())
    assert torch.equal(counts, counts_gpu.cpu()) and counts.any()
    torch.testing.assert_close(on_gpu.spike_times.times.cpu(), layer.spike_times.times, rtol=1e-9, atol=1e-9)
    layer.spike_times.times.sum().backward()
    on_gpu.spike_times.times.sum().backward()
    torch.testing.assert_close(on_gpu.weight.grad.cpu(), layer.weight.grad, rtol=1e-6, atol=1e-8)


def test_a_checkpoint_of_the_gpu_loads_on_the_cpu(tmp_path):
    net = convert_to_fractional(spikingjelly_net(), alpha=0.7, learn_alpha=True)
    on_gpu = copy.deepcopy(net).cuda()
    on_gpu(3 * torch.randn(8, 4, 10, device="cuda")).sum().backward()
    torch.optim.SGD(on_gpu.parameters(), lr=0.1).step()
    torch.save(on_gpu.state_dict(), tmp_path / "net.pt")
    net.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True, map_location="cpu"))
    for p, q in zip(net.parameters(), on_gpu.parameters(), strict=True):
        assert torch.equal(p, q.cpu())
