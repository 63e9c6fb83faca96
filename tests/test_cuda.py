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
