"""One network written for SpikingJelly and for snnTorch gives the same spikes, before and after conversion.

With ``reset_delay=False`` a membrane above the threshold even after its reset loses another threshold
before snnTorch looks whether it fires; SpikingJelly knows no such thing. So the drive is weak enough here
for one reset to be enough.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

snn = pytest.importorskip("snntorch")
pytest.importorskip("spikingjelly")

from spikingjelly.activation_based import functional, layer, neuron

from spikede_plugins.conversion import convert_to_fractional

TAUS = (2.0, 5.0)
SIZES = (6, 8, 4)
#: Lower orders need a stronger drive; this is the summed positive weight of each neuron.
SCALES = {None: 1.2, 1.0: 1.2, 0.9: 1.2, 0.7: 1.4, 0.6: 1.5, 0.5: 1.5, 0.3: 1.6}


def linears(make, scale):
    torch.manual_seed(0)
    made = [make(a, b) for a, b in pairwise(SIZES)]
    for one in made:
        nn.init.uniform_(one.weight, -0.3, 1.0)
        with torch.no_grad():
            one.weight /= one.weight.clamp(min=0).sum(1, keepdim=True) / scale
        nn.init.zeros_(one.bias)
    return made


def spikingjelly_net(scale, step_mode="s"):
    parts = []
    for linear, tau in zip(linears(layer.Linear, scale), TAUS, strict=True):
        parts += [linear, neuron.LIFNode(tau=tau, decay_input=False, v_reset=None, detach_reset=True)]
    net = nn.Sequential(*parts)
    functional.set_step_mode(net, step_mode)
    return net


def snntorch_net(scale):
    parts = []
    for linear, tau in zip(linears(nn.Linear, scale), TAUS, strict=True):
        parts += [linear, snn.Leaky(beta=1 - 1 / tau, reset_delay=False, init_hidden=True)]
    return nn.Sequential(*parts).double()


def drive():
    generator = torch.Generator().manual_seed(4)
    return torch.rand(30, 3, SIZES[0], dtype=torch.float64, generator=generator) * 1.2


def run_spikingjelly(net, x, step_mode):
    functional.reset_net(net)
    out = net(x) if step_mode == "m" else torch.stack([net(xk) for xk in x])
    return out, [m.v for m in net if hasattr(m, "v")]


def run_snntorch(net, x):
    out = []
    for module in net:
        if isinstance(module, snn.SpikingNeuron):
            module.reset_mem()
    for xk in x:
        for module in net:
            xk = module(xk).to(x.dtype)  # snnTorch's spikes are float32 whatever the input
        out.append(xk)
        assert all((m.mem <= m.threshold).all() for m in net if isinstance(m, snn.SpikingNeuron))
    return torch.stack(out), [m.mem for m in net if isinstance(m, snn.SpikingNeuron)]


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("alpha", [None, 1.0, 0.9, 0.7, 0.5, 0.3])
@pytest.mark.parametrize("method", ["gl", "l1", "pred"])
def test_same_spikes(step_mode, alpha, method):
    one, other = spikingjelly_net(SCALES[alpha], step_mode).double(), snntorch_net(SCALES[alpha])
    if alpha is not None:
        one, other = (convert_to_fractional(n, alpha=alpha, method=method) for n in (one, other))
    x = drive()
    spikes, potentials = run_spikingjelly(one, x, step_mode)
    expected, membranes = run_snntorch(other, x)
    assert 0.02 < expected.mean() < 0.98
    assert torch.equal(spikes.to(expected.dtype), expected)
    for v, mem in zip(potentials, membranes, strict=True):
        torch.testing.assert_close(v, mem, rtol=1e-6, atol=1e-6)  # beta is float32 before it is float64


@pytest.mark.parametrize("memory_reset", ["never", "spike"])
def test_same_with_memory_options(memory_reset):
    options = {"alpha": {"*": 0.6}, "memory": 5, "memory_reset": memory_reset}
    one = convert_to_fractional(spikingjelly_net(SCALES[0.6]).double(), **options)
    other = convert_to_fractional(snntorch_net(SCALES[0.6]), **options)
    x = drive()
    spikes, _ = run_spikingjelly(one, x, "s")
    assert torch.equal(spikes.to(torch.float64), run_snntorch(other, x)[0])
