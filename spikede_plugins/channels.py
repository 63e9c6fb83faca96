"""How many channels reach a neuron, as far as the layers before it tell.

Only the order of an ``nn.Sequential`` is the order of the calls; what comes before a neuron elsewhere is
known when the model runs.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from spikede_plugins.checks import counted
from spikede_plugins.engine import FractionalOperator
from spikede_plugins.errors import OptionError
from spikede_plugins.selection import show

#: Layers that give as many channels as they take, by class.
_KEEPING = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.ReLU, nn.LeakyReLU,
    nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d, nn.Upsample,
)  # fmt: skip
_CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def settle_channels(
    operator: FractionalOperator, model: nn.Module, paths: Sequence[str], neurons: set[int]
) -> None:
    """Give ``PerChannel(alpha)`` its number of channels, or compare the number that it was given.

    Args:
        operator: of the neuron.
        model: the model.
        paths: where the neuron is in it.
        neurons: all spiking neurons of the model, by identity; they keep the channels.

    Raises:
        OptionError: naming the layer, if it has another number of channels than there are orders.
    """
    order = operator.order
    if order.channel_dim is None:
        return
    found = [_before(model, path, order.channel_dim, neurons) for path in paths]
    sizes = [size for size in found if size is not None]
    for path, size in zip(paths, found, strict=True):
        if size is not None and order.sized and size[0] != order.count:
            raise OptionError(
                f"{show(path)}: PerChannel has {counted(order.count, 'order')}, but the layer before it, "
                f"{size[1]}, gives {counted(size[0], 'channel')}; give one order for each, another dim=, or "
                "PerChannel(0.7), which takes the number from the layer."
            )
    if len(sizes) == len(paths) and len({size for size, _ in sizes}) == 1:
        order.size(sizes[0][0])


def _before(model: nn.Module, path: str, dim: int, neurons: set[int]) -> tuple[int, str] | None:
    """The channels of what reaches the module at ``path``, and the layer that they are known from."""
    while path:
        above, _, name = path.rpartition(".")
        holder = model.get_submodule(above)
        if not isinstance(holder, nn.Sequential):
            return None
        names = list(holder._modules)
        for before in reversed(names[: names.index(name)]):
            module, where = holder._modules[before], f"{above}.{before}" if above else before
            if module is None or not _keeps(module, neurons):
                return None if module is None else _gives(module, where, dim, neurons)
        path = above  # the first of its holder: what reaches that reaches it
    return None


def _keeps(module: nn.Module, neurons: set[int]) -> bool:
    return id(module) in neurons or isinstance(module, _KEEPING)


def _gives(module: nn.Module, path: str, dim: int, neurons: set[int]) -> tuple[int, str] | None:
    """The channels that a layer gives in dimension ``dim`` of ``[B, C, ...]``."""
    shown = f"{path} ({type(module).__name__})"
    if isinstance(module, _CONVOLUTIONS) and dim == 1:
        return module.out_channels, shown
    if isinstance(module, _NORMS) and dim == 1:
        return module.num_features, shown
    if isinstance(module, nn.Linear) and dim in (1, -1):  # [B, C] is what a linear layer gives most often
        return module.out_features, shown
    if isinstance(module, nn.Sequential):
        for name, child in reversed(module._modules.items()):
            if child is not None and not _keeps(child, neurons):
                return _gives(child, f"{path}.{name}", dim, neurons)
    return None
