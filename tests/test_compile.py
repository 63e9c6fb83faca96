"""The scan in captured graphs: one registered operation, no graph break, the same numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from spikede_plugins import PerChannel
from spikede_plugins.engine import (
    FRESH,
    AffineCode,
    FractionalOperator,
    HistoryLog,
    affine_neuron,
    charge_step,
    scan,
)
from spikede_plugins.engine.scan_op import encode, scan_op
from spikede_plugins.memory import as_memory
from spikede_plugins.orders import FractionalOrder
from spikede_plugins.solvers.gl import GrunwaldLetnikov
from spikede_plugins.solvers.pred import Predictor


class Layer(nn.Module):
    """A parametric LIF layer on the scan engine that carries its state from call to call."""

    def __init__(self, alpha=0.6, learn=True, solver=None, memory="full", reset=None):
        super().__init__()
        self.operator = FractionalOperator(
            FractionalOrder(alpha, learn), solver or GrunwaldLetnikov(), as_memory(memory)
        )
        self.w = nn.Parameter(torch.tensor(0.3))
        self.code = AffineCode(leak="multiply", reset=reset, surrogate="atan", surrogate_alpha=2.0)
        self.log, self.history, self.v = HistoryLog(), FRESH, None

    def forward(self, x):
        v = torch.zeros_like(x[0]) if self.v is None else self.v
        neuron = affine_neuron(self.code, (self.w.sigmoid(),))
        spikes, self.v, self.history, _ = scan(self.operator, neuron, x, v, self.history, self.log)
        return spikes


def make_net(**options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), Layer(**options), nn.Linear(6, 3), Layer())
    with torch.no_grad():
        net[0].weight.abs_().mul_(2.0)
        net[2].weight.abs_().mul_(2.0)
    return net


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"learn": False},
        {"memory": 3, "reset": 0.0},
        {"alpha": PerChannel([0.5, 0.6, 0.7, 0.8, 0.9, 1.0]), "solver": Predictor()},
    ],
    ids=["learned", "fixed", "window", "channels"],
)
def test_compiled_network_equals_eager(options):
    net = make_net(**options)
    twin = copy.deepcopy(net)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x = torch.rand(7, 2, 5)
    for _ in range(2):  # the second call continues the state of the first
        expected, found = net(x), compiled(x)
        assert torch.equal(expected, found)
    expected.sum().backward()
    found.sum().backward()
    for (name, a), (_, b) in zip(net.named_parameters(), twin.named_parameters(), strict=True):
        assert a.grad.abs().sum() > 0, name
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_default_backend_generates_the_same_network():
    net = make_net(learn=False)
    twin = copy.deepcopy(net)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True)
    x = torch.randn(7, 2, 5) * 2
    torch.testing.assert_close(compiled(x), net(x))


def test_registered_operation_passes_torch_own_checks():
    """Schema, fake kernel, autograd registration and tracing, as torch.library.opcheck sees them."""
    operator = FractionalOperator(FractionalOrder(0.7, learn_alpha=True), GrunwaldLetnikov())
    x = torch.randn(4, 2, 3, requires_grad=True)
    v = torch.zeros(2, 3)
    code = AffineCode(leak="multiply", reset=None, surrogate="atan")
    factor = torch.tensor(0.4, requires_grad=True)

    def check(operator, rows, traces=None):
        kernel = operator.kernel(34, v, traces is not None)
        given = [None if t is None else t.detach().requires_grad_() for t in (kernel.weights, kernel.readout)]
        arguments = (
            x, v, rows, torch.zeros(2, 3), traces, kernel.gain.detach().requires_grad_(), *given,
            kernel.decay, kernel.inject, [factor], list(operator.reach()), -1, *encode(code),
        )  # fmt: skip
        torch.library.opcheck(scan_op, arguments)

    for rows in (None, torch.randn(2, 2, 3)):
        check(operator, rows)
    folding = FractionalOperator(FractionalOrder(0.7), GrunwaldLetnikov(), as_memory("soe"))
    check(folding, torch.randn(30, 2, 3))
    check(folding, torch.randn(30, 2, 3), torch.randn(len(folding.kernel(8, v, True).decay), 2, 3))


def test_steps_of_a_neuron_without_a_code_compile_too():
    """Any charge: the loop is captured step by step, with the history handled functionally."""
    operator = FractionalOperator(FractionalOrder(0.6), GrunwaldLetnikov())

    def run(x_seq):
        v, history, log = torch.zeros_like(x_seq[0]), FRESH, HistoryLog()
        for x in x_seq:
            v, history = charge_step(operator, lambda u, x=x: u + 0.1 * u * u + x, v, history, log)
        return v

    x = torch.randn(5, 3) * 0.1
    expected = run(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x), expected)
