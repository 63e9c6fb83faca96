"""Programs captured from a converted model: with the state in and out, over a whole sequence, or refused.

``torch.export``, ONNX and TorchScript hold what they meet as a constant if it is no input. A potential or a
history held so would make a program that runs, and is wrong from the second call on: that is refused.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import scale
import torch
from small_nets import Framework, each_framework
from torch import Tensor, nn

from spikede_plugins import (
    ConversionError,
    ExportError,
    OptionError,
    PerChannel,
    convert_to_fractional,
    restore_native,
    sequence_module,
    step_module,
)

sys.path.append(str(Path(__file__).parents[1] / "sj"))  # sj_cases, where the others find it

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's, of TorchScript
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]
Program = Callable[..., tuple[Tensor, ...]]


def drive(steps: int, batch: int = 3) -> Tensor:
    return 6 * torch.randn(steps, batch, 4, generator=torch.Generator().manual_seed(5))


def multi_step(framework: Framework, net: nn.Module) -> nn.Module:
    """The network as one that takes a whole sequence ``[T, B, 4]`` in a call, as its framework has them."""
    if framework.name == "spikingjelly":
        from spikingjelly.activation_based import functional

        functional.set_step_mode(net, "m")
        return net
    return Loop(net)


class Loop(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x_seq: Tensor) -> Tensor:
        return torch.stack([self.net(x) for x in x_seq])


# -- ways to make a program of a module -----------------------------------------------------------


def by_export(module: nn.Module, example: tuple[Tensor, ...], folder: Path) -> Program:
    return torch.export.export(module, example, strict=False).module()


def by_strict_export(module: nn.Module, example: tuple[Tensor, ...], folder: Path) -> Program:
    return torch.export.export(module, example, strict=True).module()


def by_saved_export(module: nn.Module, example: tuple[Tensor, ...], folder: Path) -> Program:
    torch.export.save(torch.export.export(module, example, strict=False), folder / "step.pt2")
    return torch.export.load(folder / "step.pt2").module()


def by_trace(module: nn.Module, example: tuple[Tensor, ...], folder: Path) -> Program:
    return torch.jit.trace(module, example)


def by_onnx(module: nn.Module, example: tuple[Tensor, ...], folder: Path) -> Program:
    pytest.importorskip("onnxscript")
    return _onnx(module, example, folder, dynamo=True)


def by_old_onnx(module: nn.Module, example: tuple[Tensor, ...], folder: Path) -> Program:
    return _onnx(module, example, folder, dynamo=False)


def _onnx(module: nn.Module, example: tuple[Tensor, ...], folder: Path, dynamo: bool) -> Program:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    verbose = {"verbose": False} if dynamo else {}
    torch.onnx.export(module, example, folder / "step.onnx", dynamo=dynamo, **verbose)
    session = runtime.InferenceSession(folder / "step.onnx")
    names = [given.name for given in session.get_inputs()]

    def program(*args: Tensor) -> tuple[Tensor, ...]:
        given = {name: arg.numpy() for name, arg in zip(names, args, strict=True)}
        found = tuple(torch.from_numpy(value) for value in session.run(None, given))
        return found if len(found) > 1 else found[0]

    return program


EXPORTERS = [by_saved_export, by_trace, by_onnx, by_old_onnx]
if scale.FULL:
    EXPORTERS += [by_export, by_strict_export]
each_exporter = pytest.mark.parametrize("exporter", EXPORTERS, ids=lambda exporter: exporter.__name__)


# -- refusals -------------------------------------------------------------------------------------


def chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def refusal(call: Callable[[], object]) -> str:
    """The text of the ExportError that stops this call; torch may wrap it in an error of its own."""
    with pytest.raises(Exception) as caught:
        call()
    for error in chain(caught.value):
        if isinstance(error, ExportError) or "ExportError" in str(error):
            return str(error)
    raise AssertionError(f"not refused but broken: {caught.value!r}") from caught.value


@each_framework
@each_exporter
@pytest.mark.parametrize("stepped", [False, True] if scale.FULL else [True], ids=lambda s: f"stepped={s}")
def test_a_step_with_a_hidden_state_is_refused(
    framework: Framework, exporter: Callable, stepped: bool, tmp_path: Path
) -> None:
    net = convert_to_fractional(framework.net(), alpha=0.6, memory="soe")
    framework.reset(net)
    x = drive(4)
    if stepped:
        net(x[0])
    text = refusal(lambda: exporter(net, (x[1],), tmp_path))
    assert framework.native in text and "step_module(model, x)" in text and "restore_native(model)" in text
    scale.record("captures of a hidden state, refused", 1, "cases")


@each_framework
@pytest.mark.parametrize("exporter", [by_trace, by_old_onnx], ids=lambda exporter: exporter.__name__)
def test_torchscript_holds_no_sequence(framework: Framework, exporter: Callable, tmp_path: Path) -> None:
    net = convert_to_fractional(multi_step(framework, framework.net()), alpha=0.6)
    text = refusal(lambda: exporter(sequence_module(net, drive(5)), (drive(5),), tmp_path))
    assert "torch.jit.trace" in text and "with torch.export, sequence_module" in text


@each_framework
def test_scripting_and_symbolic_tracing_are_refused(framework: Framework) -> None:
    net = convert_to_fractional(framework.net(), alpha=0.6)
    with pytest.raises(ExportError, match=rf"{framework.native} cannot be captured by torch.jit.script"):
        torch.jit.script(net)
    with pytest.raises(ExportError, match=rf"^lif: the fractional {framework.native} .* by torch.fx"):
        torch.fx.symbolic_trace(net)


def test_a_program_holds_no_iteration() -> None:
    """An implicit step of an affine neuron is a formula; that of another is searched for."""
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    x = drive(5)

    def net(node: nn.Module) -> nn.Module:
        return convert_to_fractional(node, alpha=0.6, method="trap", memory="full")

    affine, other = net(neuron.LIFNode(step_mode="m")), net(neuron.QIFNode(step_mode="m"))
    program = torch.export.export(sequence_module(affine, x), (x,), strict=False).module()
    assert torch.equal(program(x), affine(x))
    with pytest.raises(ExportError, match=r'no captured program can hold; convert with method="gl" or "abm"'):
        torch.export.export(sequence_module(other, 0.1 * x), (0.1 * x,), strict=False)


def test_a_sequence_that_would_continue_a_constant_state_is_refused() -> None:
    framework = Framework("spikingjelly", "LIFNode")
    pytest.importorskip("spikingjelly")
    net = convert_to_fractional(multi_step(framework, framework.net()), alpha=0.6)
    x = drive(5)
    expected = net(x)
    assert "sequence_module" in refusal(lambda: torch.export.export(net, (x,), strict=False))
    # A whole sequence from a reset has no state to hold.
    for strict in (False, True):
        framework.reset(net)
        captured = torch.export.export(net, (x,), strict=strict)
        assert not any("spikede" in str(node.target) for node in captured.graph.nodes)  # it loads anywhere
        program = captured.module()
        assert torch.equal(program(x), expected) and torch.equal(program(x), expected)


@each_framework
def test_the_neuron_works_on_after_a_refusal(framework: Framework, tmp_path: Path) -> None:
    net = convert_to_fractional(framework.net(), alpha=0.6)
    x = drive(20)
    expected = framework.run(net, x)
    framework.reset(net)
    found = [net(step) for step in x[:10]]
    for exporter in (by_export, by_trace):
        refusal(lambda exporter=exporter: exporter(net, (x[0],), tmp_path))
    found += [net(step) for step in x[10:]]
    assert torch.equal(torch.stack(found), expected) and expected.any()


# -- one step with the state in and out -----------------------------------------------------------


def follow(step: nn.Module, program: Program, x_seq: Tensor) -> Tensor:
    """The first output of every step of a program that hands on its states."""
    states, outputs = step.initial_states(), []
    with torch.no_grad():
        for x in x_seq:
            output, *states = program(x, *states)
            outputs.append(output)
    return torch.stack(outputs)


CHANNELS = PerChannel([0.5 + 0.03 * n for n in range(16)])
ORDERS = {
    "soe": {"alpha": 0.6, "memory": "soe"},
    "auto": {"alpha": 0.6},
    "window": {"alpha": 0.4, "memory": 5, "method": "l1"},
    "channels": {"alpha": {"lif": CHANNELS, "*": 0.9}, "memory": "soe"},
    "learned": {"alpha": 0.7, "memory": "soe", "learn_alpha": True},
}


def _scripted_surrogates(framework: Framework) -> bool:
    """SpikingJelly 0.0.0.0.14 computes its spikes in TorchScript, which the old exporter cannot look into."""
    return framework.name == "spikingjelly" and isinstance(
        importlib.import_module("spikingjelly.activation_based.surrogate").heaviside, torch.jit.ScriptFunction
    )


@each_framework
@each_exporter
@pytest.mark.parametrize("order", list(ORDERS) if scale.FULL else ["auto"])
def test_a_program_of_one_step_is_the_model_spike_for_spike(
    framework: Framework, exporter: Callable, order: str, tmp_path: Path
) -> None:
    """Beyond the 128 steps from which on the default memory folds, its states fed back."""
    steps = scale.scale(200, 1000)
    net = convert_to_fractional(framework.net(), **ORDERS[order])
    x = drive(steps)
    with torch.no_grad():
        expected = framework.run(net, x)
    step = step_module(net, x[0])
    example = (x[0], *step.initial_states())
    if exporter is by_old_onnx and _scripted_surrogates(framework):
        with pytest.raises(RuntimeError, match="Couldn't export Python operator"):  # nor natively
            exporter(step, example, tmp_path)
        return
    program = exporter(step, example, tmp_path)
    for _ in range(2):  # a program holds nothing: it starts again where it is told to
        assert torch.equal(follow(step, program, x), expected)
    assert 0.02 < expected.mean() < 0.98
    scale.record("exported programs of one step, spike for spike", steps, "steps")


@each_framework
@pytest.mark.parametrize("order", list(ORDERS) if scale.FULL else ["window", "channels"])
def test_a_step_module_is_the_model(framework: Framework, order: str) -> None:
    net = convert_to_fractional(framework.net(), **ORDERS[order])
    x = drive(scale.scale(60, 2000))
    before = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        expected = framework.run(net, x)
        framework.reset(net)
        first = torch.stack([net(each) for each in x[:20]])
        step = step_module(net, x[0])  # a copy, made amid a run that goes on
        rest = torch.stack([net(each) for each in x[20:]])
    assert torch.equal(torch.cat([first, rest]), expected)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(follow(step, step, x), expected)
    assert [name.split(".")[-1] for name in step.state_names].count("history") == 2
    assert len(step.initial_states()) == len(step.state_names)


def spikingjelly_neurons() -> list[str]:
    if importlib.util.find_spec("spikingjelly") is None:
        return []
    return importlib.import_module("sj_cases").AVAILABLE


@pytest.mark.parametrize("name", spikingjelly_neurons())
@pytest.mark.parametrize("exported", [False, True] if scale.FULL else [False], ids=lambda e: f"export={e}")
def test_every_spikingjelly_neuron_hands_its_state_in_and_out(name: str, exported: bool) -> None:
    cases = importlib.import_module("sj_cases")
    neuron = convert_to_fractional(cases.build(name, "s"), alpha=0.6, memory="soe")
    x = cases.drive(60, 2, 3)
    with torch.no_grad():
        expected = torch.stack([neuron(each) for each in x])
    step = step_module(neuron, x[0])
    program = by_export(step, (x[0], *step.initial_states()), Path()) if exported else step
    found = follow(step, program, x)
    if name == "LIAFNode":  # its output is no spike: the sums of another order
        torch.testing.assert_close(found, expected)
    else:
        assert torch.equal(found, expected)
    assert expected.any()
    scale.record("kinds of neurons whose step is a program", 1, "kinds")


def snntorch_neurons() -> list[tuple[str, str]]:
    if importlib.util.find_spec("snntorch") is None:
        return []
    cases = importlib.import_module("snntorch_cases")
    chosen = ("plain", "hidden") + (("inhibition", "learned_hidden", "tensors") if scale.FULL else ())
    return [(name, option) for name in cases.NEURONS for option in chosen if cases.applies(name, option)]


@pytest.mark.parametrize(("name", "option"), snntorch_neurons())
@pytest.mark.parametrize("mechanism", ["subtract", "zero"])
def test_every_snntorch_neuron_hands_its_state_in_and_out(name: str, option: str, mechanism: str) -> None:
    """With its variables as the user's arguments and results only the history is added."""
    cases = importlib.import_module("snntorch_cases")
    neuron = convert_to_fractional(cases.build(name, option, mechanism), alpha=0.6, memory="soe")
    x = cases.inputs(60).detach()
    with torch.no_grad():
        expected, _ = cases.run(neuron, x)
        given = [] if neuron.init_hidden else [torch.zeros_like(x[0])] * (len(_variables(neuron)))
        step = step_module(neuron, x[0], *given)
        states, found = step.initial_states(), []
        for each in x:
            out = step(each, *given, *states)
            spikes, states = out[0], out[len(out) - len(states) :]
            given = list(out[: len(out) - len(states)])[-len(given) :] if given else []
            found.append(spikes)
    width = len(expected) // len(x)
    assert torch.equal(torch.stack(found), torch.stack(expected[::width]))
    assert torch.stack(found).any()
    names = {"history", "traces"} | (set(_variables(neuron)) if neuron.init_hidden else set())
    assert set(step.state_names) == names
    scale.record("kinds of neurons whose step is a program", 1, "kinds")


def _variables(neuron: nn.Module) -> list[str]:
    names = ("spk", "syn", "syn_exc", "syn_inh", "mem")
    return [name for name in names if name in dict(neuron.named_buffers())]


@each_framework
def test_what_has_no_step_of_fixed_size_is_refused_with_the_option_that_has(framework: Framework) -> None:
    x = drive(1)[0]
    for options, named in (
        ({"memory": "full"}, r'lif \((?:LIFNode|Leaky)\): memory=.full. grows .* memory="soe"'),
        ({"method": "abm", "memory": 8}, r"lif .*solver 'abm' has no step of fixed size.*method=\"gl\""),
        ({"memory_reset": "spike", "memory": 8}, r'lif .*convert with memory_reset="never"'),
    ):
        net = convert_to_fractional(framework.net(), alpha=0.6, **options)
        with pytest.raises(ExportError, match=named):
            step_module(net, x)
    with pytest.raises(ConversionError, match="no fractional neuron"):
        step_module(framework.net(), x)
    with pytest.raises(ConversionError, match="no fractional neuron"):
        sequence_module(framework.net(), drive(2))


@each_framework
def test_states_that_do_not_fit_are_named(framework: Framework) -> None:
    step = step_module(convert_to_fractional(framework.net(), alpha=0.6, memory=3), drive(1)[0])
    with pytest.raises(OptionError, match=r"1 input\(s\) and 4 states, got 1 arguments.*initial_states"):
        step(drive(1)[0])
    with pytest.raises((OptionError, RuntimeError), match=r"shape|size"):
        step(drive(1, batch=2)[0], *step.initial_states())


@each_framework
def test_a_native_neuron_left_in_the_model_hands_its_state_as_well(framework: Framework) -> None:
    net = convert_to_fractional(framework.net(), alpha=0.6, memory="soe", exclude="lif")
    x = drive(60)
    with torch.no_grad():
        expected = framework.run(net, x)
    step = step_module(net, x[0])
    assert "lif.history" not in step.state_names and len(step.state_names) == 4
    program = torch.export.export(step, (x[0], *step.initial_states()), strict=False).module()
    assert torch.equal(follow(step, program, x), expected)


# -- a whole sequence -----------------------------------------------------------------------------


@each_framework
@pytest.mark.parametrize(
    "exporter", [by_export, by_onnx] if scale.FULL else [by_onnx], ids=lambda exporter: exporter.__name__
)
@pytest.mark.parametrize(
    "options", [{"memory": "full"}, {"memory": "soe", "learn_alpha": True}][: scale.scale(1, 2)], ids=str
)
def test_a_program_of_a_sequence_starts_from_a_reset_in_every_call(
    framework: Framework, exporter: Callable, options: dict, tmp_path: Path
) -> None:
    """Any solver, any memory; amid a run of the model, which goes on untouched."""
    steps = scale.scale(3, 24)
    net = convert_to_fractional(multi_step(framework, framework.net()), alpha=0.6, **options)
    one, other = drive(2 * steps).split(steps)
    with torch.no_grad():
        expected = []
        for x in (one, other, one):
            framework.reset(net)
            expected.append(net(x))
        going = net(other)  # a run that has begun
        module = sequence_module(net, one)
        program = exporter(module, (one,), tmp_path)
        after = net(one)
        framework.reset(net)
        assert torch.equal(net(one), expected[2])
        assert torch.equal(net(other), going) and torch.equal(net(one), after)
        assert torch.equal(module(one), expected[0])
        name = "v" if framework.name == "spikingjelly" else "mem"
        left = [getattr(part, name) for part in module.modules() if hasattr(part, name)]
        assert len(left) == 2  # and nothing of a call is left in it
        assert not any(isinstance(state, Tensor) and state.any() for state in left)
        found = [program(x) for x in (one, other, one)]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs) and theirs.any()
    scale.record("exported programs of a sequence, spike for spike", 3 * steps, "steps")


# -- formats that know integer neurons only -------------------------------------------------------


def _spikingjelly_to_nir(net: nn.Module, x: Tensor) -> object:
    exchange = pytest.importorskip("spikingjelly.activation_based.nir_exchange")
    return exchange.export_to_nir(net, x)


def _snntorch_to_nir(net: nn.Module, x: Tensor) -> object:
    return importlib.import_module("snntorch.export_nir").export_to_nir(net, x, ignore_dims=[0])


@each_framework
def test_nir_is_refused_and_holds_the_restored_model(framework: Framework) -> None:
    pytest.importorskip("nir")
    pytest.importorskip("nirtorch")
    export = _spikingjelly_to_nir if framework.name == "spikingjelly" else _snntorch_to_nir
    torch.manual_seed(0)
    if framework.name == "spikingjelly":
        layer = importlib.import_module("spikingjelly.activation_based.layer")
        neurons = [framework.neuron(), framework.neuron()]
        net = nn.Sequential(layer.Linear(4, 8), neurons[0], layer.Linear(8, 3), neurons[1])
    else:  # a number a neuron, from which NIR takes the shape
        snn = importlib.import_module("snntorch")
        neurons = [
            snn.Leaky(beta=torch.full((n,), 0.6), threshold=torch.ones(n), init_hidden=True) for n in (8, 3)
        ]
        net = nn.Sequential(nn.Linear(4, 8), neurons[0], nn.Linear(8, 3), neurons[1])
    x = drive(1, batch=1)[0]
    fractional = convert_to_fractional(net, alpha=0.6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nirtorch's, of deprecations
        with pytest.raises(ExportError, match=r"restore_native\(model\)") as caught:
            export(fractional, x)
        if framework.name == "spikingjelly":
            assert str(caught.value).startswith("1: the fractional LIFNode cannot be captured by torch.fx")
        graph = export(restore_native(fractional), x)
    assert sum(type(node).__name__ == "LIF" for node in graph.nodes.values()) == 2
    with torch.no_grad():  # and the fractional model works on
        assert framework.run(fractional, drive(10)).shape == (10, 3, 3)


def test_nirtorch_finds_no_map_for_a_fractional_neuron() -> None:
    """Also where a map for the native class is at hand: looked up by class, a fractional one is not in it."""
    nirtorch, nir = pytest.importorskip("nirtorch"), pytest.importorskip("nir")
    snn = pytest.importorskip("snntorch")
    ones = torch.ones(8).numpy()
    maps = {snn.Leaky: lambda neuron: nir.LIF(tau=ones, v_threshold=ones, v_leak=ones, r=ones)}
    net = nn.Sequential(nn.Linear(4, 8), snn.Leaky(beta=0.9, init_hidden=True))
    assert len(nirtorch.torch_to_nir(net, maps).nodes) == 4
    with pytest.raises((KeyError, ExportError), match=r"FractionalLeaky|restore_native"):
        nirtorch.torch_to_nir(convert_to_fractional(net, alpha=0.6), maps)


def test_lynxi_gets_no_integer_neuron_for_a_fractional_one() -> None:
    pytest.importorskip("spikingjelly")
    exchange = pytest.importorskip("spikingjelly.activation_based.lynxi_exchange")
    neuron = importlib.import_module("spikingjelly.activation_based.neuron")
    node = convert_to_fractional(nn.Sequential(neuron.LIFNode()), alpha=0.6)[0]
    assert type(exchange.to_lynxi_supported_module(neuron.LIFNode(), 4)) is exchange.LIFNode
    with pytest.raises(ExportError, match=r"LIFNode.*lynxi_exchange.*restore_native\(model\)"):
        exchange.to_lynxi_supported_module(node, 4)
    assert type(exchange.to_lynxi_supported_module(restore_native(node), 4)) is exchange.LIFNode
