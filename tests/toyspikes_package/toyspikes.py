"""A user's own tiny spiking framework: one neuron, driven one step at a time."""

import torch
from torch import nn


class Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x >= 0).to(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad / (1.0 + (torch.pi * x) ** 2)


class ToyLIF(nn.Module):
    """``v <- leak v + x``, fires at 1, soft reset. ``reset()`` forgets ``v``."""

    def __init__(self, leak=0.5):
        super().__init__()
        self.leak = nn.Parameter(torch.tensor(leak))
        self.v = None

    def charge(self, v, x):
        return self.leak * v + x

    def reset(self):
        self.v = None

    def forward(self, x):
        v = torch.zeros_like(x) if self.v is None else self.v
        v = self.charge(v, x)
        spike = Step.apply(v - 1.0)
        self.v = v - spike
        return spike


class ToyLatch(nn.Module):
    """A spiking layer without a membrane: it fires once and stays silent."""

    def __init__(self):
        super().__init__()
        self.fired = None

    def reset(self):
        self.fired = None

    def forward(self, x):
        fired = torch.zeros_like(x) if self.fired is None else self.fired
        spike = (x >= 1).to(x) * (1 - fired)
        self.fired = fired + spike
        return spike
