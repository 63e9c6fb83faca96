"""Calls in any order, against a model run afresh over the inputs since the last reset."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from fuzz_strategies import Count, fuzz, operators
from hypothesis import given, note
from hypothesis import strategies as st
from small_nets import FRAMEWORKS, INPUTS, Framework
from torch import Tensor, nn

from spikede_plugins import (
    conversion_report,
    convert_to_fractional,
    get_state,
    plan_conversion,
    reset_rows,
    restore_native,
    select_rows,
    set_state,
)
from spikede_plugins.errors import SpikedeError

COUNT = Count("fuzzed call orders")

#: What may come between two time steps, and may not change what they give.
QUIET = (
    "train", "eval", "grad", "no_grad", "detach", "copy", "pickle", "save", "load own state",
    "load state of another", "to", "report", "plan", "backward", "zero_grad", "requires_grad",
    "copy and drop", "branch", "save state",
)  # fmt: skip
#: What happens to samples of the batch.
ROWS = ("reset rows", "zero a row", "zero a row in place", "pick rows")
#: What starts anew.
ANEW = ("reset", "restore and convert", "new shape", "convert a copy")


def detach(framework: Framework, net: nn.Module) -> None:
    if framework.name == "spikingjelly":
        from spikingjelly.activation_based import functional

        functional.detach_net(net)
    else:
        for module in net.modules():
            if hasattr(module, "native_class"):
                module.mem.detach_()


def reset(framework: Framework, net: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        framework.reset(net)
    for (
        module
    ) in net.modules():  # utils.reset does not find the neurons of a copied snnTorch net, nor natively
        if hasattr(module, "reset_mem"):
            module.reset_mem()


class Machine:
    """A converted net, the inputs since its last reset, and what it gave."""

    def __init__(self, framework: Framework, options: dict[str, Any]) -> None:
        self.framework, self.options = framework, options
        # snnTorch's spikes are float32, with which its nets do not run in float64.
        self.dtype = torch.float64 if framework.name == "spikingjelly" else torch.float32
        self.native = framework.net().to(self.dtype)
        self.net = convert_to_fractional(self.native, **options)
        self.grad, self.batch, self.start, self.checked = True, 3, 0, 0
        #: For each sample of the batch its inputs since its last reset, and what came out.
        self.runs: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in range(self.batch)]

    def fresh(self) -> nn.Module:
        return convert_to_fractional(self.native, **self.options)

    def step(self, count: int, whole: bool) -> None:
        """``count`` time steps, at once where the framework can."""
        self.start += 1
        generator = torch.Generator().manual_seed(self.start)
        x = 4 * torch.randn(count, self.batch, INPUTS, generator=generator, dtype=self.dtype)
        with torch.set_grad_enabled(self.grad):
            if whole and self.framework.name == "spikingjelly":
                from spikingjelly.activation_based import functional

                functional.set_step_mode(self.net, "m")
                out = self.net(x)
                functional.set_step_mode(self.net, "s")
            else:
                out = torch.stack([self.net(each) for each in x])
        for row, (inputs, outputs) in enumerate(self.runs):
            inputs.append(x[:, row])
            outputs.append(out[:, row])

    def check(self) -> None:
        """Every sample since its last reset is what a new model gives for its inputs, step by step."""
        close = 1e-9 if self.dtype == torch.float64 else 1e-5
        name = "v" if self.framework.name == "spikingjelly" else "mem"
        for row, (inputs, outputs) in enumerate(self.runs):
            if not inputs:
                continue
            twin = self.fresh()  # not reset: snnTorch would reset all neurons of a class with it
            with torch.no_grad():
                expected = torch.stack([twin(x.unsqueeze(0)) for x in torch.cat(inputs)])[:, 0]
            found = torch.cat([out.detach() for out in outputs])
            assert torch.equal(found, expected), f"{int((found != expected).sum())} spikes of {row} differ"
            for a, b in zip(self.net.modules(), twin.modules(), strict=True):
                if hasattr(a, "native_class"):
                    mine = getattr(a, name).detach()[row]
                    torch.testing.assert_close(mine, getattr(b, name)[0], rtol=close, atol=close)
        self.checked += 1
        self.runs = [([], []) for _ in range(self.batch)]

    def check_spikes(self, row: int) -> None:
        """The same of one sample that ends here; its potentials are gone."""
        inputs, outputs = self.runs[row]
        if inputs:
            twin = self.fresh()
            with torch.no_grad():
                expected = torch.stack([twin(x.unsqueeze(0)) for x in torch.cat(inputs)])[:, 0]
            found = torch.cat([out.detach() for out in outputs])
            assert torch.equal(found, expected), f"{int((found != expected).sum())} spikes of {row} differ"
        self.runs[row] = ([], [])

    def rows(self, what: str, number: int) -> None:
        """Put a sample of the batch back, or pick samples in another order."""
        if not all(inputs for inputs, _ in self.runs):
            return  # a batch of which nothing has run has no state
        row = number % self.batch
        if what == "pick rows":
            index = [(row + 2 * n) % self.batch for n in range(1 + number % 4)]
            for other in set(range(self.batch)) - set(index):
                self.check_spikes(other)
            select_rows(self.net, index)
            self.runs = [(list(self.runs[n][0]), list(self.runs[n][1])) for n in index]
            self.batch = len(index)
            return
        self.check_spikes(row)
        if what == "reset rows":
            reset_rows(self.net, [row])
            return
        name = "v" if self.framework.name == "spikingjelly" else "mem"
        with torch.no_grad() if what == "zero a row in place" else contextlib.nullcontext():
            for module in self.net.modules():
                if not hasattr(module, "native_class"):
                    continue
                value = getattr(module, name)
                if not bool(value[row].any()):  # at its start already: nothing to see, so it is said
                    reset_rows(module, [row])
                elif what == "zero a row in place":
                    value = value.detach()
                    value[row] = 0.0
                    setattr(module, name, value)
                else:
                    mask = torch.ones(self.batch, *[1] * (value.dim() - 1), dtype=value.dtype)
                    mask[row] = 0.0
                    setattr(module, name, value * mask)

    def anew(self, what: str) -> None:
        self.check()
        if what == "restore and convert":
            self.net = convert_to_fractional(restore_native(self.net), **self.options)
        elif what == "convert a copy":
            self.net = convert_to_fractional(copy.deepcopy(self.native), inplace=True, **self.options)
        elif what == "new shape":
            self.batch = self.batch % 7 + 1
            self.runs = [([], []) for _ in range(self.batch)]
            if self.framework.name == "spikingjelly":
                reset(self.framework, self.net)  # releases differ in what they do without
        else:
            reset(self.framework, self.net)
        if what == "new shape":
            return

    def detach_outputs(self) -> None:
        self.runs = [(inputs, [out.detach() for out in outputs]) for inputs, outputs in self.runs]

    def quiet(self, what: str) -> None:
        net = self.net
        if what in ("train", "eval"):
            net.train(what == "train")
        elif what in ("grad", "no_grad"):
            self.grad = what == "grad"
        elif what == "detach":
            detach(self.framework, net)
        elif what == "copy":
            self.net = copy.deepcopy(net)
        elif what == "copy and drop":
            other = copy.deepcopy(net)
            with torch.no_grad():
                for _ in range(3):
                    other(torch.ones(self.batch, INPUTS, dtype=self.dtype))
        elif what == "pickle":
            self.net = pickle.loads(pickle.dumps(net))
        elif what == "save":
            file = io.BytesIO()
            torch.save(net, file)
            self.net = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        elif what in ("load own state", "load state of another"):
            # Loading writes to what the graph needs, natively too.
            detach(self.framework, net)
            self.detach_outputs()
            source = net if what == "load own state" else self.native
            net.load_state_dict(source.state_dict())
        elif what == "to":
            net.to("cpu", self.dtype)
        elif what == "report":
            str(conversion_report(net))
        elif what == "plan":
            try:
                plan_conversion(net)
            except SpikedeError as error:
                assert "already fractional" in str(error)
        elif what == "backward":
            graphs = [out for _, outputs in self.runs for out in outputs if out.requires_grad]
            if graphs:
                sum(out.sum() for out in graphs).backward()
                detach(self.framework, net)
                self.detach_outputs()
        elif what in ("branch", "save state"):
            if self.runs[0][0]:
                state = get_state(net)
                if what == "save state":
                    file = io.BytesIO()
                    torch.save(state, file)
                    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
                with torch.no_grad():
                    net(torch.ones(self.batch, INPUTS, dtype=self.dtype))
                set_state(net, state)
                self.detach_outputs()
        elif what == "zero_grad":
            net.zero_grad()
        elif what == "requires_grad":
            net.requires_grad_(True)


@given(st.data())
@fuzz(15, 1000)
def _calls(data: Any) -> None:
    framework: Framework = data.draw(
        st.sampled_from([p.values[0] for p in FRAMEWORKS if not p.marks[0].args[0]])
    )
    operator = data.draw(operators(16))
    while not isinstance(operator.alpha, float) or operator.impossible():
        operator = data.draw(operators(16))
    options = dict(operator.options)
    actions = data.draw(
        st.lists(
            st.one_of(
                st.tuples(st.just("step"), st.sampled_from([1, 1, 1, 2, 3, 16, 17, 40, 90])),
                st.tuples(st.just("sequence"), st.sampled_from([1, 2, 5, 16, 33, 90])),
                st.tuples(st.sampled_from(QUIET), st.just(0)),
                st.tuples(st.sampled_from(ROWS), st.integers(0, 6)),
                st.tuples(st.sampled_from(ANEW), st.just(0)),
            ),
            min_size=2, max_size=14,
        )
    )  # fmt: skip
    note(str((framework.name, options, actions)))
    try:
        machine = Machine(framework, options)
    except SpikedeError as error:
        assert "exponentials" in str(error)
        COUNT.add("expected errors")
        return
    if not any(hasattr(m, "native_class") for m in machine.net.modules()):
        return
    for what, count in actions:
        if what in ("step", "sequence"):
            machine.step(count, what == "sequence")
        elif what in ANEW:
            machine.anew(what)
        elif what in ROWS:
            machine.rows(what, count)
        else:
            machine.quiet(what)
    machine.check()
    COUNT.add("cases")


@pytest.mark.filterwarnings("ignore:a run has become longer")  # than the horizon: it goes on all the same
def test_calls():
    """Steps and sequences, copies, checkpoints, modes and resets in any order."""
    _calls()
    COUNT.record()
