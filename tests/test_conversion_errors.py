"""What cannot be converted says where, why and what to do; the model stays as it was."""

from __future__ import annotations

import pytest
import torch
from plugin_packages import toyspikes_installed
from small_nets import each_framework, frames
from torch import nn

from spikede_plugins import (
    ConversionError,
    MultiTerm,
    OptionError,
    OptionTypeError,
    OrderError,
    PerChannel,
    SpikedeError,
    UnknownNameError,
    UnsupportedNeuronError,
    conversion_report,
    convert_to_fractional,
    plan_conversion,
    restore_native,
)
from spikede_plugins.registry import register_adapter, unregister_adapter

NAN = float("nan")


# -- option values --------------------------------------------------------------------------------


@each_framework
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": 0.0}, OrderError, r"alpha must lie in \(0, 1\], got 0.0"),
        ({"alpha": 1.5}, OrderError, r"alpha must lie in \(0, 1\], got 1.5"),
        ({"alpha": NAN}, OrderError, r"alpha must lie in \(0, 1\], got nan"),
        ({"alpha": "0.5x"}, OptionTypeError, "alpha must be a number"),
        ({"alpha": None}, OptionTypeError, "alpha must be a number"),
        ({"alpha": [0.5, 1.5]}, OrderError, r"alpha\[1\] must lie in"),
        ({"alpha": {"*": 2.0}}, OrderError, r"alpha\['\*'\] must lie in"),
        ({"alpha": [0.5, 0.6, 0.7]}, OrderError, r"each of 2 spiking neurons .*: lif, block.1; got 3"),
        ({"alpha": []}, OrderError, r"each of 2 spiking neurons .*; got 0"),
        ({"alpha": {}}, OptionError, "the mapping is empty"),
        ({"alpha": {1: 0.5}}, OptionTypeError, "the keys of a mapping are patterns, got 1"),
        ({"alpha": {"lif": 0.5}}, OrderError, r"the alpha mapping has no value for block.1; .*\"\*\""),
        ({"alpha": {"lif": 0.5, "blok": 0.5, "*": 1}}, ConversionError, "'blok' matches no .*'block.1'"),
        ({"method": "gll"}, UnknownNameError, "unknown solver 'gll'; did you mean 'gl'"),
        ({"method": 3}, OptionTypeError, "method must be the name of a solver"),
        ({"method": {"lif": "gl"}}, OptionError, "the method mapping has no value for block.1"),
        ({"alpha": MultiTerm([1.0, 0.5], [1.0, 1.0]), "method": "l1"}, OptionError, "lif: a MultiTerm order"),
        ({"memory": 0}, OptionError, "memory must keep at least 1 step, got 0"),
        ({"memory": -3}, OptionError, "memory must keep at least 1 step, got -3"),
        ({"memory": "half"}, OptionError, "memory must be .*'half'"),
        ({"memory": 2.5}, OptionTypeError, "memory must be .*float"),
        ({"memory": {"*": 0}}, OptionError, "memory must keep at least 1 step"),
        ({"step_size": 0.0}, OptionError, "step_size must be finite and positive"),
        ({"step_size": "1"}, OptionTypeError, "step_size must be a number"),
        ({"memory_reset": "always"}, OptionError, "memory_reset must be one of"),
        ({"learn_alpha": "yes"}, OptionTypeError, "learn_alpha must be True or False"),
        ({"strict": 1}, OptionTypeError, "strict must be True or False"),
        ({"inplace": None}, OptionTypeError, "inplace must be True or False"),
        ({"include": "nothing.*"}, ConversionError, r"include: 'nothing.\*' matches no spiking neuron"),
        ({"exclude": ["lif", "bloc"]}, ConversionError, "exclude: 'bloc' .*did you mean 'block.1'"),
        ({"include": 3}, OptionTypeError, "include must be a pattern or a list of patterns"),
        ({"exclude": [3]}, OptionTypeError, "exclude must hold strings"),
        ({"include": []}, OptionError, "include is empty"),
        ({"exclude": "*"}, ConversionError, r"nothing to convert: 2 spiking neurons found, all excluded"),
    ],
    ids=str,
)
def test_every_bad_option_is_named_and_nothing_changes(framework, options, error, message):
    net = framework.net()
    modules = [(name, id(module), type(module)) for name, module in net.named_modules()]
    for call in (plan_conversion, convert_to_fractional):
        with pytest.raises(error, match=message):
            call(net, **{"inplace": True, **options})
    assert [(name, id(module), type(module)) for name, module in net.named_modules()] == modules
    assert issubclass(error, SpikedeError) and issubclass(error, (ValueError, TypeError, LookupError))


@each_framework
def test_an_unknown_keyword_is_a_type_error_and_options_have_names(framework):
    with pytest.raises(TypeError, match="unexpected keyword argument 'alhpa'"):
        convert_to_fractional(framework.net(), alhpa=0.5)
    with pytest.raises(TypeError, match="positional argument"):
        convert_to_fractional(framework.net(), 0.5)


@each_framework
def test_orders_per_channel_that_do_not_fit_say_so_when_the_shape_is_known(framework):
    net = convert_to_fractional(framework.net(), alpha=[PerChannel([0.5, 0.6]), 0.5])
    with pytest.raises(OptionError, match=r"PerChannel has 2 orders .* shape \(3, 16\)"):
        framework.run(net, frames())


# -- models ---------------------------------------------------------------------------------------


def test_what_is_no_module_is_refused():
    with pytest.raises(OptionTypeError, match=r"must be a torch.nn.Module, got str"):
        convert_to_fractional("net")
    with pytest.raises(OptionTypeError, match="pass an instance, not the class"):
        plan_conversion(nn.Linear)
    for call in (conversion_report, restore_native):
        with pytest.raises(OptionTypeError, match=r"must be a torch.nn.Module"):
            call(None)


@each_framework
def test_a_model_without_neurons_names_the_frameworks_that_are_looked_for(framework):
    framework.neuron()  # the framework is in use
    with pytest.raises(ConversionError, match=f"no spiking neuron found in Linear; .*{framework.name}"):
        convert_to_fractional(nn.Linear(1, 1))


@each_framework
def test_a_plain_list_of_neurons_is_explained(framework):
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [framework.neuron()]

    with pytest.raises(ConversionError, match=r"belong into an nn.ModuleList"):
        convert_to_fractional(Hidden())


@each_framework
def test_all_unsupported_neurons_are_listed_at_once_and_nothing_changes(framework):
    net = nn.Sequential(framework.unsupported(), framework.neuron(), nn.Sequential(framework.unsupported()))
    modules = list(map(id, net.modules()))
    with pytest.raises(UnsupportedNeuronError) as caught:
        convert_to_fractional(net, inplace=True)
    text = str(caught.value)
    assert text.startswith("no fractional form for 2 spiking neurons:\n  0 (Homemade): ")
    assert "\n  2.0 (Homemade): " in text and "strict=False" in text
    assert isinstance(caught.value, (ConversionError, TypeError))
    assert list(map(id, net.modules())) == modules
    assert convert_to_fractional(net, exclude=["0", "2"])


@each_framework
def test_nothing_converted_is_an_error_even_when_not_strict(framework):
    with pytest.raises(UnsupportedNeuronError, match="nothing to convert"):
        convert_to_fractional(nn.Sequential(framework.unsupported()), strict=False)


@each_framework
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_converting_twice_is_refused(framework, alpha):
    fractional = convert_to_fractional(framework.net(), alpha=alpha)
    with pytest.raises(ConversionError, match=r"already fractional: 2 .* call restore_native\(model\) first"):
        convert_to_fractional(fractional, alpha=0.7)
    assert convert_to_fractional(restore_native(fractional), alpha=0.7)
    half = convert_to_fractional(framework.net(), include="lif")
    with pytest.raises(ConversionError, match="would be converted twice: lif; exclude them"):
        convert_to_fractional(half)


@each_framework
def test_a_native_model_cannot_be_restored(framework):
    with pytest.raises(ConversionError, match="nothing to restore: Net has 2 spiking neurons, none"):
        restore_native(framework.net())


@each_framework
def test_wrapped_models_are_to_be_converted_before_they_are_wrapped(framework):
    message = r"_orig_mod.lif .* is inside OptimizedModule: .* convert before torch.compile"
    with pytest.raises(ConversionError, match=message):
        convert_to_fractional(torch.compile(framework.net()))
    with pytest.raises(ConversionError, match="TorchScript"):
        convert_to_fractional(torch.jit.trace(nn.Linear(1, 1), torch.zeros(1, 1)))
    parallel = convert_to_fractional(nn.DataParallel(framework.net()))
    assert [row.path for row in conversion_report(parallel).converted] == ["module.lif", "module.block.1"]


# -- failures on the way --------------------------------------------------------------------------


@pytest.fixture
def toys(tmp_path):
    with toyspikes_installed(tmp_path):
        yield
    unregister_adapter("toyspikes")


def failing_adapter(where):
    """The toy adapter, failing at the second neuron or at the end; it records what it is told to undo."""
    from toyspikes_fractional import ToyAdapter

    class Failing(ToyAdapter):
        def __init__(self):
            self.calls, self.abandoned, self.finished = 0, [], []

        def to_fractional(self, module, operator):
            self.calls += 1
            if where == "build" and self.calls == 2:
                raise ArithmeticError("out of numbers")
            return super().to_fractional(module, operator)

        def finish(self, model, replaced, added):
            self.finished.append((list(replaced), list(added)))
            if where == "finish" and len(self.finished) == 1:
                raise ArithmeticError("out of numbers")

        def abandon(self, made):
            self.abandoned += made

    adapter = Failing()
    register_adapter(adapter, replace=True)
    return adapter


@pytest.mark.parametrize("where", ["build", "finish"])
@pytest.mark.parametrize("inplace", [True, False])
def test_a_failure_half_way_leaves_the_model_as_it_was(toys, where, inplace):
    from toyspikes import ToyLIF

    adapter = failing_adapter(where)
    net = nn.Sequential(ToyLIF(), ToyLIF(), ToyLIF())
    net.kept = [net[0]]
    modules = list(net.modules())
    with pytest.raises((ConversionError, ArithmeticError), match="out of numbers") as caught:
        convert_to_fractional(net, alpha={"2": 1.0, "*": 0.5}, inplace=inplace)
    if where == "build":  # names the neuron, and chains what the adapter raised
        assert str(caught.value).startswith("1 (ToyLIF) could not be rebuilt by the adapter 'toyspikes'")
        assert isinstance(caught.value.__cause__, ArithmeticError)
    assert all(a is b for a, b in zip(net.modules(), modules, strict=True))
    assert net.kept[0] is net[0]
    assert not conversion_report(net)  # nothing is marked as converted either
    built = [m for m in adapter.abandoned if adapter.is_fractional(m)]
    assert len(built) == (1 if where == "build" else 2)
    if where == "finish":  # what was put in place was taken out again
        (out, new), (back_out, back) = adapter.finished
        assert [id(m) for m in out] == [id(m) for m in back] and [*map(id, new)] == [*map(id, back_out)]


def test_a_failure_on_a_model_that_is_a_neuron_restores_it(toys):
    from toyspikes import ToyLIF

    failing_adapter("finish")
    neuron = ToyLIF()
    leak = neuron.leak
    with pytest.raises(ArithmeticError):
        convert_to_fractional(neuron, inplace=True)
    assert type(neuron) is ToyLIF and neuron.leak is leak
    convert_to_fractional(neuron, inplace=True)  # the second call of finish goes through


def test_what_cannot_be_copied_is_explained(toys):
    from toyspikes import ToyLIF

    net = nn.Sequential(ToyLIF())
    net.stream = (number for number in range(3))
    with pytest.raises(ConversionError, match=r"cannot be copied: TypeError: .*generator.*inplace=True"):
        convert_to_fractional(net)
    assert convert_to_fractional(net, inplace=True) is net


def test_states_in_any_container_are_copied_without_their_graph(toys):
    """Whatever holds a tensor with a history: a list, a dict, an object of the user's own."""
    from toyspikes import ToyLIF

    class Trace:
        pass

    net = nn.Sequential(nn.Linear(2, 2), ToyLIF())
    out = net(torch.ones(1, 2))
    net.trace = Trace()
    net.trace.log = [{"out": (out,)}]
    copied = convert_to_fractional(net)
    assert torch.equal(copied.trace.log[0]["out"][0], out) and copied.trace.log[0]["out"][0].grad_fn is None
    assert net.trace.log[0]["out"][0] is out and out.grad_fn is not None
