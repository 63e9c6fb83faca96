"""Training in several processes (DDP, FSDP) is the training of one; replicas; the examples."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import scale
import torch
import torch.distributed as dist
from distributed_cases import STYLES, Case, all_cases, batch, build, quick_cases, reset, train
from small_nets import each_framework, frames
from torch import Tensor, nn

from spikede_plugins import (
    ConversionError,
    FractionalOrder,
    PerChannel,
    SpikedeWarning,
    StateError,
    conversion_report,
    convert_to_fractional,
)

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent.parent / "examples"

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


def torchrun(*arguments: str, processes: int = 2) -> str:
    """Run a script in several processes on this machine; what they print. Torch chooses a free port."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


# -- two processes ----------------------------------------------------------------------------------


def parameters(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def differences(case: Case, found: dict[str, Any]) -> list[str]:
    """What two processes found that one does not."""
    net, descended = build(case), {}
    losses = train(case, net, batch(case), lambda: descended.update(parameters(net)))
    trained, weights = parameters(net), net.state_dict()
    # Sums over the batch are formed in another order: rounding of numbers of about 1, in float64 after four
    # steps. In float32 the first step alone is compared, the forward pass of which is exact to the last bit.
    close = 1e-12 if case.dtype == torch.float64 else 1e-6
    wrong = [] if found["same_everywhere"] else ["the processes hold different weights"]
    if losses != pytest.approx(found["losses"], rel=close, abs=0):
        wrong.append(f"losses {found['losses']} instead of {losses}")
    for what, expected, got in (
        ("after a step of descent", descended, found["descended"]),
        ("at the end", trained, found["trained"]),
        ("in a state_dict", weights, found["weights"]),
    ):
        if list(got) != list(expected):
            wrong.append(f"{what} the weights are {list(got)}, not {list(expected)}")
        apart = {n: (got[n] - w).abs().max().item() for n, w in expected.items() if n in got}
        wrong += [f"{what} {n} differs by {d:.1e}" for n, d in apart.items() if not d <= close]
    # What was gathered goes on in one process: it fits, and gives the same spikes.
    alone = build(case)
    alone.load_state_dict(found["weights"])
    reset(case, net)
    if case.dtype == torch.float64 and not torch.equal(alone(batch(case)), net(batch(case))):
        wrong.append("the gathered weights give other spikes")
    # Of an order of which this process has a piece, a report says so; no value that is none.
    for told, row in zip(found["report"], conversion_report(net).rows, strict=True):
        pieces = case.learn_alpha and case.wrapper != "ddp"
        if told != row.alpha and not (pieces and told == "sharded (learned)"):
            wrong.append(f"the report tells {told} of {row.paths[0]}, where the order is {row.alpha}")
    return wrong


def test_training_in_two_processes_is_training_in_one(tmp_path):
    """Losses, gradients and weights of DDP, FSDP and fully_shard, and state_dicts gathered from them."""
    torchrun(str(HERE / "distributed_worker.py"), "full" if scale.FULL else "quick", str(tmp_path))
    results = torch.load(tmp_path / "results.pt")
    cases = all_cases() if scale.FULL else quick_cases()
    assert len(results) == len(cases)
    wrong = {case.name: found for case in cases if (found := differences(case, results[case.name]))}
    assert not wrong
    steps = sum(len(found["losses"]) for found in results.values())
    scale.record("distributed training equals one process", len(cases), "runs of two processes")
    scale.record("distributed training equals one process", steps, "steps")


# -- one process, shared as if it were many ---------------------------------------------------------


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def wrapped(net: nn.Module, way: str) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    if way == "fully_shard":
        return fully_shard(net)
    if way == "DistributedDataParallel":
        return DistributedDataParallel(net)
    return FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=way.endswith("True"))


@each_framework
@pytest.mark.parametrize(
    ("way", "name"),
    [
        ("DistributedDataParallel", "DistributedDataParallel"),
        ("FSDP, use_orig_params=True", "FullyShardedDataParallel"),
        ("fully_shard", "FSDPModule"),
    ],
)
def test_a_model_that_is_shared_already_is_refused_and_reported(framework, way, name, group):
    """An order learned by a neuron that DDP or FSDP does not know of would differ between the processes."""
    why = rf"lif \(\w*{framework.native}\) is inside {name}: .* convert before"
    with pytest.raises(ConversionError, match=why):
        convert_to_fractional(wrapped(framework.net(), way), learn_alpha=True, inplace=True)
    made = wrapped(convert_to_fractional(framework.net(), alpha=0.6), way)
    assert [row.alpha for row in conversion_report(made).rows] == ["0.6", "0.6"]


def test_an_order_in_pieces_says_so_when_it_is_read(group):
    order = FractionalOrder(PerChannel([0.5, 0.6, 0.7]), learn_alpha=True)
    net = wrapped(nn.Sequential(order), "fully_shard")
    with pytest.raises(StateError, match=r"learned order \(alpha\) is sharded .* after model.unshard\(\)"):
        order.alphas()
    assert order.describe() == "sharded (learned)"
    net.unshard()
    assert order.alphas().tolist() == pytest.approx([0.5, 0.6, 0.7])


@each_framework
def test_an_order_in_a_flat_parameter_says_so_when_it_cannot_be_put_back(framework, group):
    net = convert_to_fractional(framework.net(), alpha=1.0, learn_alpha=True)
    with torch.no_grad():
        net.lif.fractional.order.alpha.fill_(1.1)
    shared = wrapped(net, "FSDP, use_orig_params=False")
    with pytest.warns(SpikedeWarning, match=r"\(alpha\) has left its interval .* Pass use_orig_params=True"):
        shared(frames()[0]).sum().backward()


def test_scalar_orders_of_older_checkpoints_load():
    """An order was a scalar before FSDP, which takes none, was supported."""
    order = FractionalOrder(0.5, learn_alpha=True)
    order.load_state_dict({"alpha": torch.tensor(0.8)})
    assert order.alphas().item() == pytest.approx(0.8)


# -- replicas ---------------------------------------------------------------------------------------


def replicas(net: nn.Module, count: int) -> list[nn.Module]:
    """Copies as ``torch.nn.DataParallel`` makes them, but on the CPU; their parameters lead to those of net.

    (``torch.nn.parallel.replicate`` itself copies to GPUs only.)
    """
    modules = list(net.modules())
    made = []
    for _ in range(count):
        copies = {id(module): module._replicate_for_data_parallel() for module in modules}
        tensors = {id(p): p * 1.0 for p in net.parameters()}
        for module in modules:
            twin = copies[id(module)]
            for name, child in module._modules.items():
                twin._modules[name] = None if child is None else copies[id(child)]
            for name, parameter in module._parameters.items():
                if parameter is None:
                    twin._parameters[name] = None
                else:
                    setattr(twin, name, tensors[id(parameter)])
            for name, buffer in module._buffers.items():
                twin._buffers[name] = None if buffer is None else buffer.clone()
        made.append(copies[id(net)])
    return made


@pytest.mark.parametrize("orders", ["at the edge", "an order a channel", "one order"][: scale.scale(2, 3)])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("memory", ["soe", "full"][: scale.scale(1, 2)])
def test_replicas_train_as_one_model_does(style, orders, memory):
    """Each takes a part of the batch, with a history of its own; orders come back from the edge as ever."""
    case = Case(style, "replicas", orders, memory=memory)
    alone, net, x = build(case), build(case), batch(case)
    rules = [torch.optim.SGD(n.parameters(), lr=0.5, momentum=0.9) for n in (alone, net)]
    for _ in range(scale.scale(2, 8)):
        for n, rule in zip((alone, net), rules, strict=True):
            reset(case, n)
            rule.zero_grad()
            if n is net:
                parts = [copy_(part) for copy_, part in zip(replicas(n, 2), x.chunk(2, dim=1), strict=True)]
                out = torch.cat(parts, dim=1)
            else:
                out = n(x)
            (out.mean(0) - 0.3).square().mean().backward()
            rule.step()
        for (name, p), q in zip(net.named_parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    scale.record("replicas train as one model", 1, "models")


@each_framework
def test_a_replica_keeps_its_history_to_itself(framework):
    """Two replicas run two sequences, step by step in turn; neither they nor their model mix."""
    net = convert_to_fractional(framework.net(), alpha=0.6, learn_alpha=True)
    sequences = [frames(), 1.5 * frames().flip(0)]
    with torch.no_grad():
        expected = [framework.run(net, x) for x in sequences]
        framework.reset(net)
        pair = replicas(net, 2)
        found: list[list[Tensor]] = [[], []]
        for steps in zip(*sequences, strict=True):
            for replica, step, spikes in zip(pair, steps, found, strict=True):
                spikes.append(replica(step))
        for spikes, known in zip(found, expected, strict=True):
            assert torch.equal(torch.stack(spikes), known)
        assert torch.equal(framework.run(net, sequences[0]), expected[0])


# -- the example ------------------------------------------------------------------------------------


def epochs(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("epoch")]


@each_framework
def test_the_example_trains_alike_with_and_without_torchrun(framework, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    script = EXAMPLES / "train_distributed.py"
    arguments = ["--framework", framework.name, "--samples", "256", "--epochs", "2"]
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    runpy.run_path(str(script), run_name="__main__")
    alone = epochs(capsys.readouterr().out)
    assert len(alone) == 2 and "(learned), " in alone[-1]
    if scale.FULL or framework.name == "snntorch":
        together = epochs(torchrun(str(script), *arguments, processes=scale.scale(1, 2)))
        # In float32 the two sum up in another order: after the first epoch they may go apart.
        assert len(together) == 2 and figures(together[0]) == pytest.approx(figures(alone[0]), rel=1e-3)


def figures(line: str) -> list[float]:
    """The numbers of a line."""
    return [float(number) for number in re.findall(r"\d+\.\d+", line)]
