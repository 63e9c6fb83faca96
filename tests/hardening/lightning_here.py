"""Lightning, where it is installed."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

import torch


def import_lightning(name: str = "lightning") -> ModuleType:
    """``lightning`` or ``pytorch_lightning``.

    It reads torchmetrics, which reads torchvision if that is there. One that was built for another torch than
    this (from the usual index, beside a torch without GPU) has none of its operators and fails on the
    first of them when it is imported; declared here, they are missed by nobody.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        import_module("torchvision")
    except ImportError:
        pass
    except RuntimeError:
        for part in [module for module in sys.modules if module.partition(".")[0] == "torchvision"]:
            del sys.modules[part]
        for operator in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{operator}", schema)
    return import_module(name)
