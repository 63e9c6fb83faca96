"""One of the processes that train together; test_scale_out.py starts it:

    torchrun --standalone --nproc-per-node 2 distributed_worker.py quick|full FOLDER

The first process writes what came out of each case to FOLDER, as ``results.pt``.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed_cases import BATCH, Case, all_cases, batch, build, quick_cases, train
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, always_wrap_policy
from torch.nn.parallel import DistributedDataParallel

from spikede_plugins import conversion_report


def neurons(net: nn.Module) -> list[nn.Module]:
    return [module for module in net.modules() if hasattr(module, "fractional")]


def share(case: Case, net: nn.Module) -> nn.Module:
    """The model as the processes train it together."""
    way, _, which = case.wrapper.partition(" ")
    if way == "ddp":
        return DistributedDataParallel(net)
    if way == "fsdp":
        policy: Any = {
            "neurons": ModuleWrapPolicy({type(neuron) for neuron in neurons(net)}),
            "all": always_wrap_policy,
        }
        return FullyShardedDataParallel(
            net,
            auto_wrap_policy=policy.get(which),
            use_orig_params=which != "flat",
            device_id=torch.device("cpu"),
        )
    units = {"neurons": neurons(net), "all": list(net.modules())[1:]}.get(which, [])
    for unit in reversed(units):
        if any(True for _ in unit.parameters()):
            fully_shard(unit)
    fully_shard(net)
    return net


def whole_weights(shared: nn.Module) -> dict[str, Tensor]:
    """The weights under the names of the unshared model; each process gets all of them."""
    weights = get_model_state_dict(shared, options=StateDictOptions(full_state_dict=True))
    return {name: w.detach().clone() for name, w in weights.items()}


def whole_parameters(shared: nn.Module) -> dict[str, Tensor]:
    """The parameters as the optimiser left them, orders beyond the edge too, which no state_dict holds."""
    if not isinstance(shared, FullyShardedDataParallel):
        found = getattr(shared, "module", shared).named_parameters()
        whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in found}
        return {name: p.detach().clone() for name, p in whole.items()}
    with FullyShardedDataParallel.summon_full_params(shared):
        found = shared.named_parameters()
        return {name.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for name, p in found}


def average(losses: list[float]) -> list[float]:
    total = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()


def same_everywhere(weights: dict[str, Tensor]) -> bool:
    """Whether all processes hold the same weights, to the last bit."""
    mine = torch.cat([w.reshape(-1).double() for w in weights.values()])
    others = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(others, mine)
    return all(torch.equal(mine, other) for other in others)


def run(case: Case) -> dict[str, Any]:
    found: dict[str, Any] = {}
    shared = share(case, build(case))
    part = BATCH // dist.get_world_size()
    mine = batch(case)[:, dist.get_rank() * part :][:, :part]
    losses = train(case, shared, mine, lambda: found.update(descended=whole_parameters(shared)))
    found.update(trained=whole_parameters(shared))
    weights = whole_weights(shared)
    found.update(
        losses=average(losses),
        weights=weights,
        same_everywhere=same_everywhere(weights),
        report=[row.alpha for row in conversion_report(shared).rows],
    )
    return found


def main(which: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    results = {}
    for case in all_cases() if which == "full" else quick_cases():
        results[case.name] = run(case)
    if dist.get_rank() == 0:
        torch.save(results, Path(folder, "results.pt"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    # Gloo's threads may still hold tensors, and end the process when they drop one while the interpreter
    # goes down (pytorch/pytorch#190489): leave without taking it down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
