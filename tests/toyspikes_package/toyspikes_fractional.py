"""What a third party writes to make ``toyspikes`` fractional: a fractional neuron and an adapter."""

import torch
from torch import nn
from toyspikes import Step, ToyLatch, ToyLIF

from spikede_plugins import Adapter, Support
from spikede_plugins.engine import FRESH, HistoryLog, charge_step


def take_over(new, old):
    """What every module carries besides its own attributes: hooks and the training flag."""
    vars(new).update({name: value for name, value in vars(old).items() if name.endswith("_hooks")})
    return new.train(old.training)


class FractionalToyLIF(nn.Module):
    """ToyLIF whose charge is replaced by the fractional one; all else reads like the original."""

    charge = ToyLIF.charge

    def __init__(self, native, operator):
        super().__init__()
        self.leak = native.leak
        self.operator = operator
        self.log = HistoryLog()
        self.reset()

    def reset(self):
        self.v, self.history = None, FRESH

    def forward(self, x):
        v = torch.zeros_like(x) if self.v is None else self.v
        v, self.history = charge_step(
            self.operator, lambda v: self.charge(v, x), v, self.history, self.log, affine=True
        )
        spike = Step.apply(v - 1.0)
        self.v = v - spike
        return spike


class ToyAdapter(Adapter):
    name = "toyspikes"

    def is_neuron(self, module):
        return isinstance(module, (ToyLIF, ToyLatch))

    def is_fractional(self, module):
        return isinstance(module, FractionalToyLIF)

    def support(self, module):
        kind = type(module).__name__
        if type(module) is ToyLIF:
            return Support(True, kind)
        if isinstance(module, ToyLIF):
            return Support(False, kind, "a subclass of ToyLIF may have other dynamics")
        return Support(False, kind, "it has no membrane potential")

    def to_fractional(self, module, operator):
        return take_over(FractionalToyLIF(module, operator), module)

    def to_native(self, module):
        native = ToyLIF()
        native.leak = module.leak
        return take_over(native, module)

    def operator(self, module):
        return module.operator

    def reset_state(self, module):
        module.reset()
