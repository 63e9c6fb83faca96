"""The output of a model at times where its input and its neurons' potentials are known.

Solvers that evaluate the network at single times keep potentials only; the output is read from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spikede_plugins.errors import OptionError
from spikede_plugins.heads import ClassificationHead
from spikede_plugins.layer_runs import Masks, Run, StateRun, call_base, joined, tensors_of
from spikede_plugins.step_runs import At, HeadInputs, gathered

#: How many steps ``fdeint_adjoint`` reads out at a time.
_CHUNK = 16


def _takes_batch_statistics(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and (
        module.training or module.running_mean is None
    )


def refuse_times(run: Run) -> None:
    """An output without time has no times to choose from."""
    if run.time_is_gone:
        raise OptionError("output_time: the model averages over time (ClassificationHead); leave it out.")


class Reading(NamedTuple):
    """The output of ``base`` at times where its input ``x`` and the ``states`` of its neurons are known.

    Attributes:
        chosen: whether the times were asked for.
        again: keep no activations, but compute them once more in backward.
    """

    base: nn.Module
    x: Tensor
    states: Sequence[Tensor]
    masks: Masks | None
    chosen: bool
    again: bool = False

    def several(self, times: Tensor) -> Any:
        """The output at some times, which are folded into the batch."""

        def read(x: Tensor, *states: Tensor) -> Any:
            run = StateRun(x.shape[0], x.shape[1], [v.flatten(0, 1) for v in states])
            return run.output(call_base(self.base, run, x.flatten(0, 1), self.masks)), run

        return self._made(read, self.x[times], *(v[times] for v in self.states))[0]

    def one(self, k: int, heads: HeadInputs) -> tuple[Any, Run]:
        """The output at one time, ``[B, ...]``."""

        def read(x: Tensor, *states: Tensor) -> Any:
            run = At(len(x), list(states), False, heads, k)
            return call_base(self.base, run, x, self.masks), run

        return self._made(read, self.x[k], *(v[k] for v in self.states))

    def _made(self, read: Callable[..., Any], *given: Tensor) -> tuple[Any, Run]:
        out, run = checkpoint(read, *given, use_reentrant=False) if self.again else read(*given)
        if self.chosen:
            refuse_times(run)
        return out, run

    def all_times(self, folds: bool) -> Any:
        """The output at all times, ``[T, ...]``.

        Batch statistics are taken at each time, as they were when the network was integrated, and a model
        that mixes samples sees each time alone. What averages over time (a head, or a model that returns a
        number) must see all of it at once: a head is given what came before it at all times.
        """
        times, modules = len(self.x), list(self.base.modules())
        by_batch = any(map(_takes_batch_statistics, modules))
        if not folds or by_batch:
            heads, parts = HeadInputs(times), []
            for k in range(times):
                part, run = self.one(k, heads)
                if folds and times > 1 and any(t.dim() == 0 for t in tensors_of(part)):
                    return self.several(torch.arange(times))
                parts.append(part)
            return gathered(run, parts)
        most = times if not self.again or any(isinstance(m, ClassificationHead) for m in modules) else _CHUNK
        pieces = torch.arange(times).split(most)
        first = self.several(pieces[0])
        if len(pieces) > 1 and any(t.dim() == 0 for t in tensors_of(first)):
            return self.several(torch.arange(times))
        return joined([first, *map(self.several, pieces[1:])])
