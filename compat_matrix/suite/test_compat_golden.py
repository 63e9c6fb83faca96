"""The golden spikes: every framework that is installed, both precisions, every way to run a neuron."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from golden_cases import BETA, CASES, TAU, WINDOW, Case, read
from torch import Tensor, nn

from spikede_plugins import convert_to_fractional

#: Of the last potential.
CLOSE = {torch.float32: 1e-4, torch.float64: 1e-10}
#: A learned order is float32 where a neuron has no parameter of another precision.
CLOSE_LEARNED = 1e-6
#: The compressed memory's weights are right to 1e-6, and the potential sums 40 of them.
CLOSE_SOE = 1e-4

EACH_CASE = [
    pytest.param(
        case,
        id=case.name,
        marks=pytest.mark.skipif(
            importlib.util.find_spec(case.framework) is None, reason=f"{case.framework} is not installed"
        ),
    )
    for case in CASES
]


def native(case: Case) -> nn.Module:
    """The framework's own neuron."""
    if case.framework == "snntorch":
        import snntorch

        return snntorch.Leaky(beta=BETA, reset_mechanism=case.reset, reset_delay=case.delay)
    from spikingjelly.activation_based import neuron

    v_reset = case.v_reset if case.reset == "hard" else None
    if case.neuron == "IF":
        return neuron.IFNode(v_reset=v_reset)
    if case.neuron == "LIF":
        return neuron.LIFNode(tau=TAU, decay_input=case.decay_input, v_reset=v_reset)
    return neuron.ParametricLIFNode(init_tau=TAU, decay_input=case.decay_input, v_reset=v_reset)


def neuron_of(case: Case, dtype: torch.dtype, learn_alpha: bool) -> nn.Module:
    """The converted neuron, its constants exact in its own precision."""
    module = native(case).to(dtype)
    if case.neuron == "PLIF":
        with torch.no_grad():
            module.w.fill_(-math.log(TAU - 1.0))
    memory = WINDOW if case.memory == "window" else case.memory
    return convert_to_fractional(
        module, alpha=case.alpha, method=case.method, memory=memory, learn_alpha=learn_alpha
    )


def run(case: Case, node: nn.Module, x: Tensor, step_mode: str) -> tuple[Tensor, Tensor]:
    """Spikes ``[T, N]`` of a freshly reset neuron, and the potential that it carries on."""
    if case.framework == "snntorch":
        mem, spikes = node.reset_mem(), []
        for x_k in x:
            spike, mem = node(x_k, mem)
            spikes.append(spike)
        return torch.stack(spikes), mem
    node.reset()
    node.step_mode = step_mode
    spikes = node(x) if step_mode == "m" else torch.stack([node(x_k) for x_k in x])
    return spikes, node.v


@pytest.mark.parametrize("case", EACH_CASE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_the_spikes_are_golden(case: Case, dtype: torch.dtype) -> None:
    golden = read(case.file)
    for learn_alpha in (False, True):  # at order one: the native neuron, and the engine at order one
        tolerance = max(
            CLOSE[dtype], CLOSE_LEARNED if learn_alpha else 0.0, CLOSE_SOE if case.memory == "soe" else 0.0
        )
        node = neuron_of(case, dtype, learn_alpha)
        for training in (True, False):
            for step_mode in "ms" if case.framework == "spikingjelly" else "s":
                spikes, v = run(case, node.train(training), golden.x.to(dtype), step_mode)
                where = f"learn_alpha={learn_alpha}, training={training}, step mode {step_mode}"
                assert torch.equal(spikes.bool(), golden.spikes), where
                torch.testing.assert_close(
                    v.detach().double(), golden.v, rtol=tolerance, atol=tolerance, msg=where
                )
