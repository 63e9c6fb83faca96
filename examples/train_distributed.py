"""Train a fractional spiking network in one process or, with DistributedDataParallel, in several.

python examples/train_distributed.py
torchrun --nproc-per-node 2 examples/train_distributed.py --framework snntorch

Convert first, then wrap: DDP takes the learned orders for what they are, parameters. Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import gc
import os

import torch
import torch.distributed as dist
from digits import NETS, digits, fractional_net, orders
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--framework", choices=NETS, default="spikingjelly")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64, help="images a step, over all processes")
    parser.add_argument("--samples", type=int, help="train on so many images only")
    options = parser.parse_args()

    train(options)
    gc.collect()  # DDP keeps the process group, whose threads should end before Python does
    if dist.is_initialized():
        dist.destroy_process_group()


def train(options: argparse.Namespace) -> None:
    together = "RANK" in os.environ  # set by torchrun
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    if together:
        dist.init_process_group("nccl" if gpu else "gloo")
    processes, rank = (dist.get_world_size(), dist.get_rank()) if together else (1, 0)

    torch.manual_seed(0)  # the same start in every process
    net = fractional_net(options.framework).to(device)
    model = DistributedDataParallel(net) if together else net
    data = digits(options.samples)
    # In one process as well: the batches are then the same, however many share them.
    sampler = DistributedSampler(data, processes, rank, seed=0, drop_last=True)
    loader = DataLoader(data, options.batch // processes, sampler=sampler, drop_last=True)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)

    for epoch in range(options.epochs):
        sampler.set_epoch(epoch)
        total = torch.zeros(3, device=device)  # loss, right answers, batches
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            rates = model(images)
            loss = cross_entropy(8 * rates, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            right = (rates.argmax(1) == labels).float().mean()
            total += torch.stack([loss.detach(), right, torch.ones_like(right)])
        if together:
            dist.all_reduce(total)
        if rank == 0:
            loss, right = (total[:2] / total[2]).tolist()
            print(f"epoch {epoch + 1}: loss {loss:.4f}, right {right:.1%}, orders {orders(net)}", flush=True)


if __name__ == "__main__":
    main()
