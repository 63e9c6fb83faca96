"""Layers of torch that treat each sample of their batch alone, in chains of such layers.

Only exact classes count: a subclass may do something else. Batch normalisation and dropout are among them,
since what they do over folded time is said in ``SNNWrapper``.
"""

from __future__ import annotations

from torch import nn

from spikede_plugins.heads import ClassificationHead, VotingLayer
from spikede_plugins.layer_runs import FrameworkNeuron
from spikede_plugins.neurons import BaseNeuron

#: Element by element.
_ELEMENTWISE = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Softshrink, nn.Hardshrink, nn.Tanhshrink,
    nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Threshold, nn.Dropout, nn.Dropout1d, nn.Dropout2d,
    nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip
#: Along dimensions behind the batch, if there are any.
_ALONG = (nn.Linear, nn.GroupNorm, nn.PReLU, VotingLayer)
#: With a fixed number of dimensions, batch and channels included.
_SPATIAL = {
    nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5,
    nn.ConvTranspose1d: 3, nn.ConvTranspose2d: 4, nn.ConvTranspose3d: 5,
    nn.MaxPool1d: 3, nn.MaxPool2d: 4, nn.MaxPool3d: 5,
    nn.AvgPool1d: 3, nn.AvgPool2d: 4, nn.AvgPool3d: 5,
    nn.AdaptiveAvgPool1d: 3, nn.AdaptiveAvgPool2d: 4, nn.AdaptiveAvgPool3d: 5,
    nn.AdaptiveMaxPool1d: 3, nn.AdaptiveMaxPool2d: 4, nn.AdaptiveMaxPool3d: 5,
    nn.BatchNorm2d: 4, nn.BatchNorm3d: 5, nn.InstanceNorm1d: 3, nn.InstanceNorm2d: 4, nn.InstanceNorm3d: 5,
}  # fmt: skip


def treats_samples_alone(model: nn.Module, dims: int) -> bool:
    """Whether a model is a chain of such layers, for input of ``dims`` dimensions with the batch."""
    return _after(model, dims) is not None


def _after(module: nn.Module, dims: int) -> int | None:
    """How many dimensions the output has; None if the layer is not known for such an input."""
    kind = type(module)
    if kind is nn.Sequential:
        left: int | None = dims
        for child in module.children():
            left = None if left is None else _after(child, left)
        return left
    if "forward" in vars(module):
        return None
    if isinstance(module, (BaseNeuron, FrameworkNeuron)) or kind in _ELEMENTWISE:
        return dims
    if kind in _ALONG:
        return dims if dims >= 2 else None
    if isinstance(module, nn.LayerNorm) and kind is nn.LayerNorm:
        return dims if dims > len(module.normalized_shape) else None
    if kind is nn.BatchNorm1d:
        return dims if dims in (2, 3) else None
    if kind in _SPATIAL:
        return dims if dims == _SPATIAL[kind] else None
    if isinstance(module, (nn.Softmax, nn.LogSoftmax)) and kind in (nn.Softmax, nn.LogSoftmax):
        dim = module.dim
        return dims if dim is not None and dim % dims and -dims <= dim < dims else None
    if isinstance(module, nn.Flatten) and kind is nn.Flatten:
        first, last = module.start_dim, module.end_dim % dims
        return dims - max(last - first, 0) if 1 <= first < dims else None
    if isinstance(module, nn.Unflatten) and kind is nn.Unflatten and isinstance(module.dim, int):
        sizes = module.unflattened_size
        return dims + len(sizes) - 1 if module.dim % dims else None
    if kind is ClassificationHead:
        return 1 if dims >= 3 else None  # behind it nothing is known but that it must be the last
    return None
