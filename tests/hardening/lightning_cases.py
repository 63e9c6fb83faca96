"""A converted model as a LightningModule, and how the tests fit it."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning_here import import_lightning
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

INPUTS, HIDDEN, CLASSES = 4, 16, 3


class SnnTorchNet(nn.Module):
    """Spike rates ``[B, 3]`` for sequences ``[B, T, 4]``; one membrane is passed on, one hidden."""

    def __init__(self) -> None:
        super().__init__()
        import snntorch

        self.fc1, self.lif1 = nn.Linear(INPUTS, HIDDEN), snntorch.Leaky(beta=0.6)
        self.fc2, self.lif2 = nn.Linear(HIDDEN, CLASSES), snntorch.Leaky(beta=0.6, init_hidden=True)

    def forward(self, x: Tensor) -> Tensor:
        mem, rate = self.lif1.reset_mem(), torch.zeros(())
        self.lif2.reset_mem()
        for step in x.unbind(1):
            spikes, mem = self.lif1(self.fc1(step), mem)
            rate = rate + self.lif2(self.fc2(spikes.to(x.dtype)))
        return rate / x.shape[1]


class SpikingJellyNet(nn.Module):
    """The same, in multi-step mode."""

    def __init__(self) -> None:
        super().__init__()
        from spikingjelly.activation_based import functional, layer, neuron

        self.reset = functional.reset_net
        self.layers = nn.Sequential(
            layer.Linear(INPUTS, HIDDEN), neuron.LIFNode(), layer.Linear(HIDDEN, CLASSES), neuron.LIFNode()
        )
        functional.set_step_mode(self.layers, "m")

    def forward(self, x: Tensor) -> Tensor:
        self.reset(self.layers)
        return self.layers(x.transpose(0, 1)).mean(0)


def net(framework: str) -> nn.Module:
    """The native net, strong enough to fire; the same whenever it is made."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = {"snntorch": SnnTorchNet, "spikingjelly": SpikingJellyNet}[framework]()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3.0)
    return made


@functools.cache
def module_class(package: str) -> type:
    """A LightningModule of ``lightning`` or ``pytorch_lightning``, with a converted net."""
    from spikede_plugins import convert_to_fractional

    class Classifier(import_lightning(package).LightningModule):
        def __init__(self, framework: str, convert: bool = True) -> None:
            super().__init__()
            native = net(framework)
            self.net = convert_to_fractional(native, alpha=0.7, learn_alpha=True) if convert else native
            self.losses: list[float] = []

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            loss = nn.functional.cross_entropy(8 * self.net(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.02)

    Classifier.package = package
    return Classifier


def loader(batch: int = 16, processes: int = 1, rank: int = 0) -> DataLoader:
    """Sequences ``[T = 10, 4]`` and classes, in the same order always; a part for each process."""
    numbers = torch.Generator().manual_seed(1)
    x = 3 * torch.randn(64, 10, INPUTS, generator=numbers)
    data = TensorDataset(x, torch.randint(CLASSES, (64,), generator=numbers))
    sampler = DistributedSampler(data, processes, rank, shuffle=False)
    return DataLoader(data, batch // processes, sampler=sampler)


def fit(
    module: Any,
    folder: Path,
    epochs: int,
    resume: Path | None = None,
    data: DataLoader | None = None,
    **options: Any,
) -> Any:
    """``module``, fitted by a Trainer that saves a checkpoint at the end of the last epoch, ``last.ckpt``."""
    package = import_lightning(module.package)
    trainer = package.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        use_distributed_sampler=False,  # which shuffles
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's own: few workers, no logger
        trainer.fit(module, data or loader(), ckpt_path=resume)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module
