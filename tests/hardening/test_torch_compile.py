"""torch.compile: a compiled model is the model, for every option, length, batch and neuron.

Whole sequences of SpikingJelly are one graph (``fullgraph=True``). A loop of single steps with a hidden state
has graph breaks and is compiled anew as its history grows, until the compiler lets it be; the numbers are the
same. ``step_module`` is the form of a step that is compiled once.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import scale
import torch
from small_nets import Framework, each_framework
from torch import Tensor, nn

from spikede_plugins import PerChannel, convert_to_fractional, sequence_module, step_module

sys.path.append(str(Path(__file__).parents[1] / "sj"))  # sj_cases, where the others find it

needs_spikingjelly = pytest.mark.skipif(
    importlib.util.find_spec("spikingjelly") is None, reason="spikingjelly is not installed"
)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch")


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def sequence_net(reset: float | None = 0.0, **options: object) -> nn.Module:
    """A multi-step network with a LIF and a parametric LIF layer."""
    layer = importlib.import_module("spikingjelly.activation_based.layer")
    functional = importlib.import_module("spikingjelly.activation_based.functional")
    neuron = importlib.import_module("spikingjelly.activation_based.neuron")
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Linear(4, 16), neuron.LIFNode(v_reset=reset),
        layer.Linear(16, 8), neuron.ParametricLIFNode(v_reset=reset),
    )  # fmt: skip
    with torch.no_grad():
        net[0].weight.mul_(4.0)
        net[2].weight.mul_(4.0)
    functional.set_step_mode(net, "m")
    return convert_to_fractional(net, **{"alpha": 0.6, **options})


def drive(steps: int, batch: int) -> Tensor:
    return 5 * torch.rand(steps, batch, 4, generator=torch.Generator().manual_seed(steps))


def reset(net: nn.Module) -> None:
    importlib.import_module("spikingjelly.activation_based.functional").reset_net(net)


def same_gradients(ours: nn.Module, theirs: nn.Module, rounding: float = 0.0) -> None:
    """Gradients as close as torch's defaults; or within ``rounding`` of the largest of their tensor, where
    float32 sums many steps in another order (weights of the first layer get sums that nearly cancel)."""
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None, name
        else:
            close = {"rtol": 0.0, "atol": rounding * float(q.grad.abs().max())} if rounding else {}
            torch.testing.assert_close(p.grad, q.grad, **close, msg=lambda text, name=name: f"{name}: {text}")


CHANNELS = {"1": PerChannel([0.5 + 0.03 * n for n in range(16)]), "*": 0.8}
QUICK = {"soft reset, channels": {"reset": None, "alpha": CHANNELS}}
ALL = QUICK | {
    "full, learned": {"learn_alpha": True},
    "soe": {"memory": "soe"},
    "full": {"memory": "full"},
    "soe, learned": {"memory": "soe", "learn_alpha": True},
    "window": {"memory": 3},
    "window, learned": {"memory": 3, "learn_alpha": True, "method": "l1"},
    "checkpoint": {"checkpoint": 4},
    "channels, learned": {"alpha": CHANNELS, "learn_alpha": True},
    "surrogate": {"surrogate": "gaussian"},
}


@needs_spikingjelly
@pytest.mark.parametrize("options", (ALL if scale.FULL else QUICK).values(), ids=ALL if scale.FULL else QUICK)
def test_a_compiled_sequence_is_one_graph_and_the_eager_one(options: dict) -> None:
    """Other lengths and batches, with and without a reset between, into the compressed part of the memory."""
    net = sequence_net(**options)
    twin = copy.deepcopy(net)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    # The last two go on with one state; 36 steps are more than a sum of exponentials keeps as they are.
    runs = ((6, 3, True), (9, 5, True), (36, 2, True), (4, 2, False))
    for steps, batch, fresh in runs if scale.FULL else runs[:2]:
        x = drive(steps, batch)
        if fresh:
            reset(net)
            reset(twin)
        expected, found = net(x), compiled(x)
        assert torch.equal(found, expected)
    assert expected.any()
    expected.sum().backward()
    found.sum().backward()
    same_gradients(twin, net)
    scale.record("compiled models equal to eager ones", 1, "options and kinds")


@needs_spikingjelly
def test_long_runs_of_the_default_memory_compile_too() -> None:
    """More than 128 steps: there the default memory begins to fold."""
    net = sequence_net(learn_alpha=True)
    twin = copy.deepcopy(net)
    x = drive(140, 2)
    expected = net(x)
    found = torch.compile(twin, fullgraph=True, backend="aot_eager")(x)
    assert net[1].history_start.shape[1:] == net[1].v.shape  # the traces lie behind the start
    assert torch.equal(found, expected) and expected.any()
    assert torch.equal(twin[1].history_start, net[1].history_start)
    expected.sum().backward()
    found.sum().backward()
    same_gradients(twin, net)


@needs_spikingjelly
@pytest.mark.skipif(not scale.FULL, reason="a minute of compiling C++; part of the full run")
@pytest.mark.parametrize("options", [{}, {"memory": "soe", "learn_alpha": True}], ids=str)
def test_the_default_backend_generates_the_same_network(options: dict) -> None:
    net = sequence_net(**options)
    twin = copy.deepcopy(net)
    x = drive(36, 2)
    expected, found = net(x), torch.compile(twin, fullgraph=True)(x)
    assert torch.equal(found, expected) and expected.any()
    expected.sum().backward()
    found.sum().backward()
    same_gradients(twin, net)


def spikingjelly_neurons() -> list[str]:
    if importlib.util.find_spec("spikingjelly") is None:
        return []
    names = importlib.import_module("sj_cases").AVAILABLE
    return [name for name in names if scale.FULL or name == "KLIFNode"]


@pytest.mark.parametrize("name", spikingjelly_neurons())
def test_every_neuron_compiles_as_one_graph(name: str) -> None:
    cases = importlib.import_module("sj_cases")
    node = convert_to_fractional(cases.build(name, "m"), alpha=0.6, learn_alpha=True)
    twin = copy.deepcopy(node)
    x = cases.drive(4, 2, 3)
    expected = node(x)
    found = torch.compile(twin, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(found, expected)
    expected.sum().backward()
    found.sum().backward()
    same_gradients(twin, node)
    scale.record("compiled models equal to eager ones", 1, "options and kinds")


@needs_spikingjelly
@pytest.mark.parametrize("alpha", [0.6, CHANNELS], ids=["one order", "channels"])
def test_a_corrector_that_forgets_at_spikes_is_one_graph(alpha: object) -> None:
    net = sequence_net(method="abm", memory="full", memory_reset="spike", alpha=alpha)
    twin = copy.deepcopy(net)
    x = 3 * drive(8, 2)
    program = torch.export.export(sequence_module(net, x), (x,)).module()
    expected, found = net(x), torch.compile(twin, fullgraph=True, backend="eager")(x)
    assert torch.equal(found, expected) and expected.any()
    assert torch.equal(program(x), expected)


@needs_spikingjelly
@pytest.mark.skipif(not scale.FULL, reason="half a minute of compiling; part of the full run")
@pytest.mark.parametrize(
    ("options", "fullgraph"),
    [
        ({"method": "abm", "memory": "full"}, True),
        ({"memory_reset": "spike"}, True),
        ({"method": "trap", "memory": "full"}, False),  # asks torch.autograd.grad: a graph break
    ],
    ids=["abm", "forgets", "trap"],
)
def test_options_that_go_step_by_step_compile(options: dict, fullgraph: bool) -> None:
    net = sequence_net(**options)
    twin = copy.deepcopy(net)
    compiled = torch.compile(twin, fullgraph=fullgraph, backend="aot_eager")
    for steps in (5, 4):
        x = 3 * drive(steps, 2)
        expected, found = net(x), compiled(x)
        assert torch.equal(found, expected)
        reset(net)
        reset(twin)
    scale.record("compiled models equal to eager ones", 1, "options and kinds")


@needs_spikingjelly
def test_an_implicit_solver_in_one_graph_is_an_error_of_the_compiler() -> None:
    net = sequence_net(method="trap", memory="full")
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend="aot_eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"autograd\.grad"):
        compiled(drive(2, 2))


@needs_spikingjelly
def test_a_compiled_step_with_its_states_given_is_the_eager_one() -> None:
    """SpikingJelly 2.0.0's functional forward of a node: states are arguments and results."""
    neuron = importlib.import_module("spikingjelly.activation_based.neuron")
    node = convert_to_fractional(neuron.LIFNode(), alpha=0.6, memory=3)
    if not hasattr(node, "functional_forward"):
        pytest.skip("this release keeps its states in the module")

    def run(step: Callable, steps: int) -> tuple[Tensor, list[Tensor]]:
        states, spikes = (0.0, None, None), []
        for x in drive(steps, 3):
            (spike,), states = step((x,), states)
            spikes.append(spike)
        return torch.stack(spikes), states

    expected, after = run(node.single_step_functional_forward, 8)
    compiled = torch.compile(node.single_step_functional_forward, fullgraph=True, backend="aot_eager")
    found, then = run(compiled, 8)
    assert torch.equal(found, expected) and expected.any()
    for ours, theirs in zip(then, after, strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)


@each_framework
def test_a_compiled_loop_with_a_hidden_state_is_the_eager_one(framework: Framework) -> None:
    """Beyond the compiler's limit of variants, where it goes on without compiling; and after a reset."""

    def make() -> nn.Module:  # not a deep copy, which snnTorch's reset would not know
        torch.manual_seed(0)
        native = framework.net() if scale.FULL else nn.Sequential(nn.Linear(4, 16), framework.neuron())
        return convert_to_fractional(native, alpha=0.6, learn_alpha=True)

    net, twin = make(), make()
    compiled = torch.compile(twin, backend="aot_eager")
    x = 20 * torch.randn(scale.scale(3, 24), 3, 4, generator=torch.Generator().manual_seed(2))
    for _ in range(2):
        framework.reset(net)
        expected = torch.stack([net(step) for step in x])
        framework.reset(twin)
        found = torch.stack([compiled(step) for step in x])
        assert torch.equal(found, expected)
    assert expected.any()
    expected.sum().backward()
    found.sum().backward()
    same_gradients(twin, net, rounding=2e-5)


@each_framework
@pytest.mark.parametrize("memory", ["soe", 5])
def test_a_step_module_is_compiled_once(framework: Framework, memory: object) -> None:
    net = convert_to_fractional(framework.net(), alpha=0.6, memory=memory)
    x = 8 * torch.randn(scale.scale(60, 400), 3, 4, generator=torch.Generator().manual_seed(2))
    step = step_module(net, x[0])
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    states, found = step.initial_states(), []
    with torch.no_grad():
        expected = framework.run(net, x)
        for each in x:
            spikes, *states = compiled(each, *states)
            found.append(spikes)
    assert torch.equal(torch.stack(found), expected) and expected.any()
    assert len(graphs) == 1
    scale.record("steps of a model compiled once", len(x), "steps")
