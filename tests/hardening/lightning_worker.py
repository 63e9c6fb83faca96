"""A converted model fitted by two processes of Lightning's own; test_lightning.py starts it.

python lightning_worker.py FRAMEWORK FOLDER DEVICES
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from lightning_cases import fit, loader, module_class


def main(framework: str, folder: str, devices: str) -> None:
    torch.set_num_threads(1)
    fitted = fit(
        module_class("lightning")(framework),
        Path(folder),
        epochs=2,
        data=loader(32, int(devices), int(os.environ.get("LOCAL_RANK", 0))),
        devices=int(devices),
        strategy="auto" if devices == "1" else "ddp",
        precision="64-true",
    )
    if fitted.trainer.is_global_zero:
        torch.save(fitted.net.state_dict(), Path(folder, f"weights-{devices}.pt"))


if __name__ == "__main__":
    main(*sys.argv[1:])
