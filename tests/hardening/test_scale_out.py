"""Training in several processes (DDP, FSDP) is the training of one; replicas; the examples."""

from __future__ import annotations

import copy
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
from torch import nn

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


def differences(case: Case, found: dict[str, Any]) -> list[str]:
    """What two processes found that one does not."""
    net, descended = build(case), {}
    losses = train(case, net, batch(case), lambda: descended.update(copy.deepcopy(net.state_dict())))
    weights = net.state_dict()
    # Sums over the batch are formed in another order: rounding of numbers of about 1, in float64 after four
    # steps. In float32 the first step alone is compared, the forward pass of which is exact to the last bit.
    close = 1e-12 if case.dtype == torch.float64 else 1e-6
    wrong = [] if found["same_everywhere"] else ["the processes hold different weights"]
    if losses != pytest.approx(found["losses"], rel=close, abs=0):
        wrong.append(f"losses {found['losses']} instead of {losses}")
    for what, expected, got in (
        ("after a step of descent", descended, found["descended"]),
        ("at the end", weights, found["weights"]),
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
    scale.record("distributed training equals one process", len(cases), "runs of two processes")
    scale.record("distributed training equals one process", sum(len(r["losses"]) for r in results.values()), "steps")
