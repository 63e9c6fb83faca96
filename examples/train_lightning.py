"""Train a fractional spiking network with Lightning's Trainer, and go on from its checkpoints.

python examples/train_lightning.py
python examples/train_lightning.py --framework snntorch --epochs 10 --resume checkpoints/last.ckpt
python examples/train_lightning.py --devices 2

The learned orders are parameters: the Trainer's checkpoints hold them. Needs lightning and scikit-learn.
"""

from __future__ import annotations

import argparse

import lightning
import torch
from digits import NETS, digits, fractional_net, orders
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader


class Digits(lightning.LightningModule):
    """A converted network, trained on the digits."""

    def __init__(self, framework: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = fractional_net(framework)
        self.losses: list[Tensor] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        loss = cross_entropy(8 * self.net(images), labels)
        self.losses.append(loss.detach())
        return loss

    def on_train_epoch_end(self) -> None:
        loss = torch.stack(self.losses).mean()
        self.losses.clear()
        self.print(f"epoch {self.current_epoch + 1}: loss {loss:.4f}, orders {orders(self.net)}", flush=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--framework", choices=NETS, default="spikingjelly")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--samples", type=int, help="train on so many images only")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--folder", default="checkpoints", help="where checkpoints are written")
    parser.add_argument("--resume", metavar="CHECKPOINT", help="go on from this file")
    options = parser.parse_args()

    lightning.seed_everything(0, verbose=False)
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        devices=options.devices,
        strategy="ddp" if options.devices > 1 else "auto",
        callbacks=[ModelCheckpoint(options.folder, save_last=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(digits(options.samples), batch_size=64, shuffle=True, drop_last=True)
    trainer.fit(Digits(options.framework), loader, ckpt_path=options.resume)


if __name__ == "__main__":
    main()
