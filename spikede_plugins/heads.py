"""Layers behind the last neuron: voting, and a classifier that averages over time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spikede_plugins.errors import OptionError
from spikede_plugins.neurons import current_driver
from spikede_plugins.uncompiled import uncompiled


class VotingLayer(nn.Module):
    """The mean over groups of ``voting_size`` neighbours in the last dimension: ``[..., L] -> [..., L / n]``.

    Args:
        voting_size: how many vote together.
        strict: refuse an L that is no multiple of it; without, the rest is left out.

    Raises:
        OptionError: for a size below 1, or, in ``forward``, an L that does not fit.
    """

    def __init__(self, voting_size: int = 10, strict: bool = True) -> None:
        super().__init__()
        if isinstance(voting_size, bool) or not isinstance(voting_size, int) or voting_size < 1:
            raise OptionError(f"voting_size must be an int of at least 1, got {voting_size!r}.")
        self.voting_size, self.strict = voting_size, strict

    def forward(self, x: Tensor) -> Tensor:
        size = self.voting_size
        groups = x.shape[-1] // size
        if (self.strict and x.shape[-1] % size) or not groups:
            raise OptionError(
                f"the last dimension, {x.shape[-1]}, is no multiple of voting_size={size}; "
                "strict=False leaves the rest out."
            )
        return x[..., : groups * size].unflatten(-1, (groups, size)).mean(-1)

    def extra_repr(self) -> str:
        return f"voting_size={self.voting_size}, strict={self.strict}"


class ClassificationHead(nn.Module):
    """Scores ``[B, classes]`` from embeddings ``[T, B, embed_dims, patches]``: means over patches and time.

    Inside a model that ``SNNWrapper`` runs, where time lies in the batch, it must be the last layer.

    Args:
        embed_dims: size of an embedding.
        num_classes: number of classes; 0 for the mean embedding itself.
    """

    def __init__(self, embed_dims: int, num_classes: int) -> None:
        super().__init__()
        self.embed_dims, self.num_classes = embed_dims, num_classes
        self.head = nn.Linear(embed_dims, num_classes) if num_classes > 0 else nn.Identity()

    @uncompiled
    def forward(self, x: Tensor) -> Tensor:
        driver = current_driver()
        unfold = getattr(driver, "unfold_time", None)  # time lies in the batch
        x = x if unfold is None else unfold(x, last=True)
        scores: Tensor = self.head(x.mean(-1))
        return torch.mean(scores, 0)
