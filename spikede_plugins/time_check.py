"""Whether a model gives the same with all times folded into its batch as when it is called time by time.

Known to be so: chains of torch's own layers that treat each sample alone (``known_layers``). Any other model
is run on a few rows of the input, folded and time by time, on copies of it: what reaches its neurons, what it
returns and what it keeps must be the same. Neurons are not run: each gives drawn spikes, so that every piece
between two of them sees times that differ. Parameters that are all alike (gates that start at 0) are
jittered, and so is the input, within the numbers that it has. If what a piece gives does not change with
time, nothing can be concluded, and the model is called time by time.

Batch normalisation and dropout, which have semantics of their own over folded time, are passed by. What is of
half precision is run in float32: its own rounding would hide samples that are mixed weakly.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from spikede_plugins.known_layers import treats_samples_alone
from spikede_plugins.layer_runs import Layer, Run, call_base, tensors_of
from spikede_plugins.model_state import Captures, poisoned, same
from spikede_plugins.tree import copy_of_state, without_hooks

#: How many times are compared.
_TIMES = 3
_SEED = 20_231


class Finding(NamedTuple):
    """What was found out about a model.

    Attributes:
        folds: whether times may be folded into the batch.
        reason: why not, as a clause that names the layer.
        settled: whether that holds for later calls; else the data could not tell.
        state: what the model keeps from call to call and reads, as a clause; empty if nothing.
    """

    folds: bool
    reason: str = ""
    settled: bool = True
    state: str = ""


class _Difference(Exception):
    """Folded is not stepped: where, as a clause."""


class _Undecided(Exception):
    """The data cannot tell."""


@torch.no_grad()
def find_out(base: nn.Module, x: Tensor) -> Finding:
    """Whether ``base`` treats times alone, for an input like ``x [T, B, ...]``.

    Neither the model nor torch's random state is changed, and no hook of a user is called.
    """
    if treats_samples_alone(base, x.dim() - 1):
        return Finding(True)
    if any(map(is_lazy, base.parameters())) or x.shape[0] < 2 or not x.shape[1]:
        return Finding(False, "", settled=False)
    times, batch = min(_TIMES, x.shape[0]), x.shape[1]
    try:
        copies = [_prepared(base) for _ in range(3)]
    except Exception as error:
        return Finding(False, f"it cannot be copied for a check ({type(error).__name__}: {error})")
    x = _widened(x)
    with _same_draws(x.device), _unrounded(x.device.type):
        rows = _probe(x, times * batch).unflatten(0, (times, batch))
        check = _Check(base, rows, _closeness(x))
        try:
            check.outputs(*copies)
        except _Undecided as why:
            return Finding(False, str(why), settled=False)
        except _Difference as where:
            return Finding(False, _culprit(base, check) or str(where), state=check.state)
        except Exception as error:  # outputs that cannot be compared, say
            return Finding(False, f"a check of it raised {type(error).__name__}: {error}")
    return Finding(True, state=check.state)


# -- what the model is run with ------------------------------------------------------------------------


def _prepared(base: nn.Module) -> nn.Module:
    """A copy with parameters that are all alike jittered, without dropout, normalisation by batch, hooks."""
    model = without_hooks(copy_of_state(base, detached=True, change=_widened))
    generator = torch.Generator().manual_seed(_SEED)
    for module in model.modules():
        if isinstance(module, (_DropoutNd, _SpectralNorm)) or any(
            isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values()
        ):
            module.training = False  # no mask; no further step of an iteration that goes on at every call
        by_batch = isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
        if by_batch or (isinstance(module, _NormBase) and module.training and module.track_running_stats):
            module.forward = _passed  # type: ignore[method-assign, assignment]
        for name, value in module._parameters.items():
            if value is not None and value.is_floating_point() and value.numel():
                low, high = value.detach().aminmax()
                if bool(low == high):
                    drawn = torch.randn(value.shape, generator=generator).to(value)
                    module._parameters[name] = nn.Parameter(value + 0.1 * drawn, requires_grad=False)
    return model


def _widened(tensor: Tensor) -> Tensor:
    """A tensor of half precision in float32; any other one as it is."""
    if tensor.dtype not in (torch.float16, torch.bfloat16):
        return tensor
    wide = tensor.detach().float()
    return nn.Parameter(wide, requires_grad=False) if isinstance(tensor, nn.Parameter) else wide


def _unrounded(device: str) -> contextlib.AbstractContextManager[Any]:
    """Inside, layers are not cast to half precision."""
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else contextlib.nullcontext()


@contextlib.contextmanager
def _same_draws(device: torch.device) -> Iterator[None]:
    """Inside, random numbers are drawn as they please; outside, nobody notices."""
    state = random.getstate()
    numpy = sys.modules.get("numpy")
    theirs = None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(theirs)


def _seed(device: torch.device) -> None:
    torch.random.default_generator.manual_seed(_SEED)
    random.seed(_SEED)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(_SEED)


#: Functions that drop at random, and numbers in the place of drawn ones, by name.
_DROPOUTS = (
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "dropout_",
)  # fmt: skip
_DRAWN = {
    "bernoulli_": 1.0, "rand": 0.5, "rand_like": 0.5, "uniform_": 0.5, "randn": 0.5, "randn_like": 0.5,
    "normal_": 0.5,
}  # fmt: skip


#: Functions that look at numbers: what is done upon that is done for all samples of a batch.
_LOOKS = (
    "__bool__", "__float__", "__int__", "__index__", "item", "tolist", "numpy", "equal", "allclose",
    "is_nonzero",
)  # fmt: skip
#: What may be looked at: whether numbers are any.
_ALLOWED = ("isnan", "isinf", "isfinite")


class _Followed(TorchFunctionMode):
    """Drops nothing, draws the same for each row, and notices when numbers of the batch are looked at.

    What is drawn for each sample alone mixes nothing.

    Args:
        rows: of the batch that the model is called with.
        batch: tensors that depend on the batch; those that are computed from them are added.
    """

    def __init__(self, rows: int, batch: WeakTensorKeyDictionary) -> None:
        super().__init__()
        self.rows, self.batch, self.looked = rows, batch, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        depends = any(t in self.batch for t in _tensors((args, kwargs)))
        self.looked |= depends and name in _LOOKS
        out = func(*args, **kwargs)
        if depends and name not in _ALLOWED:
            written = args[:1] if name == "__setitem__" else ()
            for tensor in _tensors((out, written)):
                self.batch[tensor] = True
        if name in _DRAWN and isinstance(out, Tensor) and out.dim() and out.shape[0] % self.rows == 0:
            out.fill_(_DRAWN[name])
        return out


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _passed(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _probe(x: Tensor, count: int) -> Tensor:
    """``count`` rows of ``x [T, B, ...]`` that differ, with numbers between those of ``x``."""
    generator = torch.Generator().manual_seed(_SEED)
    flat = x.detach().flatten(0, 1)
    rows = flat[torch.randperm(len(flat), generator=generator)[:count].to(x.device)]
    low, high = flat.aminmax()
    whole = bool((rows == rows.round()).all())
    spread = 1.0 if whole else float(rows.double().std()) if rows.numel() > 1 else 0.0
    noise = torch.rand(rows.shape, generator=generator, dtype=torch.float64).to(device=x.device)
    rows = (rows + 0.45 * (spread or abs(float(high)) or 1.0) * noise).to(x.dtype)
    return rows.clamp(low, high) if bool(low < high) else rows  # whole numbers stay whole, rounded down


def _closeness(x: Tensor) -> Callable[[Tensor, Tensor], bool]:
    """When two tensors count as the same: other batch sizes are rounded, and on GPUs added, otherwise."""

    def close(a: Tensor, b: Tensor) -> bool:
        if a.is_meta or b.is_meta or a.layout != torch.strided or b.layout != torch.strided:
            return a is b
        wide = torch.float64 if not a.is_complex() else torch.complex128
        exact = not (a.is_floating_point() or a.is_complex())
        eps = 0.0 if exact else torch.finfo(a.dtype).eps
        few = 64.0 if eps < 1e-4 else 2.0  # what a model casts to half precision itself
        slack = max(few * eps, 2e-3 if x.is_cuda and eps > 1e-9 else 0.0)
        a, b = a.to(wide), b.to(device=a.device, dtype=wide)
        finite = b.isfinite()
        size = float(b[finite].abs().max()) if bool(finite.any()) else 0.0
        return bool(torch.allclose(a, b, rtol=slack, atol=slack * size, equal_nan=True))

    return close


class _Watched(Run):
    """A call in which neurons give drawn spikes; what they and heads are given is written down."""

    def __init__(self, steps: int, batch: int, step: int | None, times: int) -> None:
        super().__init__(steps, batch)
        self.step, self.times = step, times
        self.given: list[tuple[str, Tensor]] = []

    def __call__(self, layer: Layer, current: Tensor) -> Tensor:
        self.given.append((f"before the neuron {len(self.given)}", current))
        rows = len(current) // (self.times if self.step is None else 1) if current.dim() else 0
        generator = torch.Generator().manual_seed(_SEED + len(self.given))
        spikes = torch.randint(0, 2, (self.times, rows, *current.shape[1:]), generator=generator)
        drawn = spikes.flatten(0, 1) if self.step is None else spikes[self.step]
        if drawn.shape != current.shape:
            raise _Difference("its batch is lost")
        return drawn.to(current)

    def unfold_time(self, x: Tensor, last: bool = False) -> Tensor:
        self.given.append(("before a head", x))
        self.time_is_gone |= last
        return x.unflatten(0, (self.steps, -1))


# -- the comparison -----------------------------------------------------------------------------------

_Seen = list[tuple[str, Tensor]]


class _Check:
    """Runs a model folded and time by time.

    Args:
        base: the model, for its names.
        rows: input ``[K, B, ...]``.
        close: when two tensors are the same.
    """

    def __init__(self, base: nn.Module, rows: Tensor, close: Callable[[Tensor, Tensor], bool]) -> None:
        self.base, self.rows, self.close = base, rows, close
        self.times, self.batch = rows.shape[:2]
        self.state = ""
        self.derived = WeakTensorKeyDictionary()

    def call(self, model: nn.Module, step: int | None) -> _Seen:
        """What neurons are given and what is returned, of a time or of all, folded."""
        _seed(self.rows.device)
        run = _Watched(1 if step is not None else self.times, self.batch, step, self.times)
        x = self.rows.flatten(0, 1) if step is None else self.rows[step]
        x = x.clone()
        self.derived[x] = True
        with _Followed(len(x), self.derived) as followed:
            out = call_base(model, run, x, None)
        if followed.looked:
            raise _Difference(f"the forward of {type(self.base).__name__} looks at the numbers of its batch")
        returned = [] if run.time_is_gone else [("in what it returns", t) for t in tensors_of(out)]
        return [*run.given, *returned]

    def outputs(self, stepped: nn.Module, folded: nn.Module, third: nn.Module) -> None:
        """Compare.

        Raises:
            _Difference: if folded is not stepped.
            _Undecided: if that cannot be told.
        """
        kept, after, parts = _Keeper(stepped), [], []
        before = kept.now()
        try:
            for step in range(self.times):
                parts.append(self.call(stepped, step))
                after.append(kept.now())
        except _Difference:
            raise
        except Exception as error:
            # Drawn spikes and rows may be none that the model takes: its own error comes with its own run.
            raise _Undecided(f"a check of it raised {type(error).__name__}: {error}") from error
        read = self._read_again(after, parts[1], third)
        final = _Keeper(folded)
        try:
            whole = self.call(folded, None)
        except _Difference:
            raise
        except Exception as error:
            raise _Difference(f"it does not take times folded into its batch ({error})") from error
        constant = compare(whole, parts, self.close)
        left = final.now()
        for key in sorted({*before, *after[-1], *left}):
            counts = key in read or key[2]
            if counts and not same(left.get(key), after[-1].get(key), self.close):
                raise _Difference(self.state or _keeps(self.base, key))
        if constant:
            raise _Undecided(f"what it computes {constant} is the same at all times")

    def _read_again(self, after: Sequence[_Kept], second: _Seen, third: nn.Module) -> set[_Key]:
        """Which attributes, of those that change from call to call, a later call reads.

        They are given other numbers behind the first call: the second call then gives something else, or
        leaves something else behind, if it reads them.
        """
        changing = {
            key for key in {*after[0], *after[-1]} if not same(after[0].get(key), after[-1].get(key), _exact)
        }
        if not changing:
            return set()
        self.call(third, 0)
        modules = dict(third.named_modules())
        for path, name, is_buffer in changing:
            home: dict[str, Any] = modules[path]._buffers if is_buffer else modules[path].__dict__
            if name in home:
                home[name] = poisoned(home[name])
        keeper = _Keeper(third)
        put = keeper.now()
        try:
            seen = self.call(third, 1)
        except Exception:
            seen = []
        if len(seen) != len(second) or not all(
            a.shape == b.shape and self.close(a, b) for (_, a), (_, b) in zip(seen, second, strict=True)
        ):
            self.state = _keeps(self.base, min(changing))
            return changing
        later = keeper.now()
        return {key for key in changing if self._goes_on(put.get(key), later.get(key), after[1].get(key))}

    def _goes_on(self, put: Any, later: Any, expected: Any) -> bool:
        """Whether what a call left behind depends on what it found there, ``put``."""
        if same(later, expected, self.close) or same(later, put, _exact):
            return False
        if isinstance(put, list) and isinstance(later, list) and isinstance(expected, list):  # written down
            n = len(put)
            return not (same(later[:n], put, _exact) and same(later[n:], expected[n:], self.close))
        return True


_Key = tuple[str, str, bool]
_Kept = dict[_Key, Any]


def _exact(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


class _Keeper:
    """What a model keeps, by path, name, and whether it is a buffer."""

    def __init__(self, model: nn.Module) -> None:
        self.captures = Captures(model)
        self.paths = [path for path, _ in model.named_modules()]

    def now(self) -> _Kept:
        found: _Kept = {}
        for path, (_, own, buffers) in zip(self.paths, self.captures.take(), strict=True):
            found.update({(path, name, False): value for name, value in own.items() if name != "forward"})
            found.update({(path, name, True): value for name, value in buffers.items()})
        return found


def compare(whole: _Seen, parts: Sequence[_Seen], close: Callable[[Tensor, Tensor], bool]) -> str:
    """Compare what was seen of all times with what was seen time by time.

    Returns:
        The first place where nothing changes with time, so that nothing is known of it; empty if none.

    Raises:
        _Difference: at the first place where they differ.
    """
    constant = ""
    times = len(parts)
    if any(len(part) != len(whole) for part in parts):
        raise _Difference("its forward takes another way from time to time")
    for place, (where, folded) in enumerate(whole):
        each_time = [part[place][1] for part in parts]
        if folded.dim() == 0:
            numbers = torch.stack([t.double() for t in each_time])
            slack = 1e-3 * float(numbers.abs().max())  # what is summed may cancel
            if not any(abs(float(folded.double() - n)) <= slack for n in (numbers.mean(), numbers.sum())):
                raise _Difference(f"a number {where} is neither the mean nor the sum of those of all times")
            continue
        if any(t.shape != each_time[0].shape for t in each_time):
            raise _Difference(f"shapes {where} change with time")
        stacked = torch.stack(each_time)
        if folded.shape != stacked.flatten(0, 1).shape or not close(folded, stacked.flatten(0, 1)):
            raise _Difference(f"samples of different times are mixed {where}")
        finite = (stacked.abs() if stacked.is_complex() else stacked.double()).nan_to_num(0.0, 0.0, 0.0)
        if times < 2 or (not constant and bool((finite == finite[:1]).all())):
            constant = where
    return constant


# -- names ----------------------------------------------------------------------------------------------


def _named(base: nn.Module, path: str) -> str:
    kind = type(base.get_submodule(path)).__name__
    return f"layer {path!r} ({kind})" if path else f"the forward of {kind}"


def _keeps(base: nn.Module, key: Any) -> str:
    return f"{_named(base, key[0])} keeps {key[1]!r} from one call to the next"


def _culprit(base: nn.Module, check: _Check) -> str:
    """The first layer whose output, or input, is not that of stepping; empty if none is found."""
    if check.state:
        return check.state
    seen: list[list[tuple[str, bool, Tensor]]] = []
    inside: list[str] = []
    try:
        copies = [_prepared(base), _prepared(base)]
        for model in copies:
            for path, module in model.named_modules():
                _listen(module, path, seen, inside)
        parts = []
        for step in range(check.times):
            seen.append([])
            check.call(copies[0], step)
            parts.append(seen[-1])
        seen.append([])
        try:
            check.call(copies[1], None)
        except Exception:
            if inside:
                return f"{_named(base, inside[-1])} does not take times folded into its batch"
        for place, (path, enters, _) in enumerate(seen[-1]):
            one = [[(path, events[place][2])] for events in parts if place < len(events)]
            try:
                compare([(path, seen[-1][place][2])], one, check.close)
            except _Difference:
                owner = path.rpartition(".")[0] if enters else path
                before = f" mixes samples before {path!r}" if enters and path else " mixes samples"
                return _named(base, owner) + before
    except Exception:
        return ""
    return ""


def _listen(module: nn.Module, path: str, seen: list[Any], inside: list[str]) -> None:
    def entering(_: nn.Module, args: Any) -> None:
        inside.append(path)
        seen[-1].extend((path, True, t) for t in tensors_of(args)[:1])

    def leaving(_: nn.Module, args: Any, out: Any) -> None:
        inside.pop()
        seen[-1].extend((path, False, t) for t in tensors_of(out)[:1])

    module.register_forward_pre_hook(entering)
    module.register_forward_hook(leaving)
