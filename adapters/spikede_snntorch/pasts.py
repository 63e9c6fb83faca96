"""Which history belongs to which membrane potential.

snnTorch hands the membrane ``mem`` to the user and takes it back at the next step, from an argument or from
its own attribute, and starts again from zeros whenever it (or the user) likes. So a history cannot belong
to the neuron: it belongs to one returned ``mem``. It is found again by the memory that this tensor occupies
or, if the user hands back an edited one, by where that came from (:mod:`.matching`).
"""

from __future__ import annotations

import functools
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor

from spikede_plugins.engine import FRESH, HistoryLog
from spikede_plugins.errors import SpikedeWarning, StateError

from .entries import Entry, Past, Stream
from .matching import holds_row, is_reentrant, likeness, nearer, readable, trace
from .restarts import restarted

_KEPT = 16
_LOOKED_AT = 64
#: So many bytes of histories are kept for sequences that seem to have ended.
_ROOM = 2**26

_DOUBT = (
    "{0} was handed an edited membrane that could belong to several of the sequences that run through it; it "
    "continues the one that took the newest step. Hand back the tensor that {0} returned (or mem.detach()), "
    "edit it with gradients enabled, or give every sequence a neuron of its own."
)
_PICKED = (
    "{0} was handed rows picked out of a membrane that it returned (batch of {1}, now {2}): they begin a new "
    "history, since picking cannot take the history along. spikede_plugins.select_rows(model, index) selects "
    "rows of the history; pick the same rows of the membrane then."
)
_REENTRANT = (
    "{0} continues a membrane that was computed in a checkpoint with use_reentrant=True, which runs its "
    "steps without a graph: the gradients of its history would be lost. Call "
    "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
)


def _opaque(method: Any) -> Any:
    """``method``, which captured graphs do not look into; plain code pays nothing for that."""
    hidden = torch.compiler.disable(method)

    def chosen(*args: Any) -> Any:
        return (hidden if torch.compiler.is_compiling() else method)(*args)

    return functools.wraps(method)(chosen)


class Pasts:
    """The histories of the membranes that one neuron has returned.

    A membrane is known by its memory: the tensor itself or a detached view of it. An edited one belongs to
    the membrane that its graph leads to, else to the sequence whose newest membrane it is most like. Several
    sequences may run through a neuron in turn, each with its own ``mem``, and an older ``mem`` may be taken
    up again. A sequence that nobody holds is let go of once another one has begun and gone on without it.
    """

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}
        self._limit = _KEPT
        self._clock = 0
        self._ended_at = -1
        self._reset = False
        self._said = False
        self._again = 0

    # -- finding ----------------------------------------------------------------------------------

    @_opaque
    def find(self, mem: Tensor, owner: Any = None) -> Past | None:
        """The past that a step from ``mem`` continues; one without rows if the step begins a sequence.

        Without an ``owner`` only what is known by its memory is found, None else.

        Raises:
            StateError: if the membrane comes from a checkpoint that ran without a graph.
        """
        entry = self._known(mem)
        if owner is None:
            return None if entry is None else entry.take(mem.grad_fn is not None)._replace(origin=entry)
        others = owner.handed()
        connected = mem.grad_fn is not None
        if entry is not None:
            edited = entry.edited(mem, others)
            if connected and not entry.had_graph and is_reentrant(mem.grad_fn):
                raise StateError(_REENTRANT.format(type(owner).__name__))
        else:
            entry, connected = self._sought(mem, others, owner)
            edited = True
        if entry is None:
            return self._begin(others, owner)
        past = entry.take(connected)
        if edited:
            entry.stream.edited = True
            changed = restarted(owner.fractional, entry, past.history, (mem, *others))
            if changed is None:
                return self._begin(others, owner)
            past = past._replace(history=changed)
        if entry.had_graph and not connected:
            self._cut()
        return past._replace(origin=entry)

    def _known(self, mem: Tensor) -> Entry | None:
        entry = self._entries.get(mem.untyped_storage()._cdata)
        if entry is None or entry.mark is None or not entry.mark.occupies(mem):
            return None
        return entry

    def _sought(
        self, mem: Tensor, others: tuple[Tensor, ...], owner: Any
    ) -> tuple[Entry | None, bool]:  # fmt: skip
        """Where an edited membrane came from, and whether a gradient flows there."""
        found: list[Entry] = []
        connected = unknown = reentrant = False
        if not self._entries:
            return None, False
        if mem.grad_fn is not None:
            tokens = self._tokens()
            traced = trace(mem, set(tokens))
            connected, unknown, reentrant = bool(traced.through), not traced.whole, traced.reentrant
            found = [tokens[id(token)] for token in traced.through or traced.beside]
        same = [entry for entry in found if entry.shape == mem.shape]
        if len(same) == 1:
            return same[0], connected
        if not readable(mem) or _at_zero(mem, others):
            return None, False
        entry = self._by_values(mem, same, owner) if same else self._by_kind(mem, owner)
        if entry is None:
            self._say_if_picked(mem, found, owner)
        elif reentrant and not connected and not entry.had_graph:
            raise StateError(_REENTRANT.format(type(owner).__name__))
        return entry, connected or unknown

    def _tokens(self) -> dict[int, Entry]:
        """The living marks in graphs, and the membranes that they mark."""
        pairs = ((token(), entry) for entry in self._entries.values() for token in entry.tokens)
        return {id(token): entry for token, entry in pairs if token is not None}

    def _by_kind(self, mem: Tensor, owner: Any) -> Entry | None:
        """The sequence that an edited membrane without a graph belongs to; None if it begins another."""
        heads = [e for e in self._newest_first() if e.head and e.shape == mem.shape]
        if self._was_reset(mem, owner):
            likely = [e for e in heads if (found := e.newest()) is not None and likeness(mem, found).same]
            return likely[0] if likely else None
        return self._by_values(mem, heads, owner) if heads else None

    def _by_values(self, mem: Tensor, entries: list[Entry], owner: Any) -> Entry:
        current = [entry for entry in entries if not self._ended(entry)] or entries
        past_ones = [entry for entry in entries if entry not in current]
        older = [
            e for e in self._newest_first() if not e.head and e.shape == mem.shape and e not in entries
        ]  # fmt: skip
        if len(current) == 1 and not past_ones and not older:
            return current[0]
        ranked = [(like, e) for e in current if (like := e.like(mem)) is not None]
        if not ranked:
            return current[0]
        (best, chosen), doubt = max(ranked, key=lambda pair: pair[0].rank), False
        for like, entry in ranked:
            if entry is chosen or nearer(best, like):
                continue
            if _alike(entry, chosen):
                chosen = min(entry, chosen, key=lambda e: e.time)  # sequences that are the same until now
            else:
                doubt = True
        if not best.close:
            for entry in (*past_ones, *older[:_LOOKED_AT]):
                like = entry.like(mem)
                if like is None:
                    continue
                if (like.same and like.share > best.share) or (entry.head and nearer(like, best, ended=True)):
                    best, chosen, doubt = like, entry, False
                elif nearer(like, best, ended=True):
                    doubt = True
        if doubt:
            if not self._said:
                warnings.warn(_DOUBT.format(type(owner).__name__), SpikedeWarning, stacklevel=7)
            self._said = True
            return current[0]
        return chosen

    def _say_if_picked(self, mem: Tensor, found: list[Entry], owner: Any) -> None:
        """A membrane of another batch size that was picked out of one that was returned begins anew."""
        if mem.dim() == 0 or self._was_reset(mem, owner):
            return
        for entry in found or [e for e in self._newest_first() if e.head]:
            values = entry.newest()
            if values is None or values.dim() != mem.dim() or values.shape[1:] != mem.shape[1:]:
                continue
            if found or holds_row(values, mem):
                text = _PICKED.format(type(owner).__name__, values.shape[0], mem.shape[0])
                warnings.warn(text, SpikedeWarning, stacklevel=6)
                return

    def _was_reset(self, mem: Tensor, owner: Any) -> bool:
        """Whether the neuron's state was put back to its start since its last step."""
        if self._reset:
            return True
        last = owner._last
        if last is None or last is mem or not last.numel() or self._known(last) is not None:
            return False
        return readable(last) and not bool(last.any())

    def _newest_first(self) -> list[Entry]:
        return sorted(self._entries.values(), key=lambda entry: -entry.time)

    def _going(self) -> list[Stream]:
        """The sequences that have gone on after their first step."""
        return [e.stream for e in self._entries.values() if e.head and e.stream.steps > 1]

    def _ended(self, entry: Entry, going: list[Stream] | None = None) -> bool:
        """Whether a younger sequence has gone on without this one."""
        if entry.time <= self._ended_at:
            return True
        going = self._going() if going is None else going
        return any(stream.began >= entry.time and stream is not entry.stream for stream in going)

    # -- keeping ----------------------------------------------------------------------------------

    def _begin(self, others: tuple[Tensor, ...], owner: Any) -> Past:
        if self._was_reset(owner.mem, owner):
            self._ended_at = self._clock
        self._settle(beginning=True, held=owner.init_hidden)
        firsts = tuple(t.detach().clone() if readable(t) and bool(t.any()) else None for t in others)
        return Past(FRESH, HistoryLog(), Stream(self._clock, firsts))

    @_opaque
    def add(
        self, mem: Tensor, past: Past, others: tuple[Tensor, ...] = (), values: Tensor | None = None
    ) -> None:  # fmt: skip
        """``mem`` was returned, with this past.

        Args:
            mem, past: the membrane and what came before it.
            others: the other variables that were returned with it.
            values: the values of ``mem`` in memory that nobody else writes to; None to copy them.
        """
        self._clock += 1
        self._reset = False
        origin, again = past.origin, False
        if isinstance(origin, Entry):
            again = not origin.head
            stream = Stream(self._clock, origin.stream.firsts) if again else origin.stream
            origin.head, origin.values = False, None
        else:
            stream = origin if isinstance(origin, Stream) else Stream(self._clock)
        stream.steps += 1
        entry = Entry(mem, others, past, stream, self._clock)
        kept = mem.detach().clone() if values is None else values
        entry.values = (kept, *(other.detach().clone() for other in others))
        key = mem.untyped_storage()._cdata
        self._entries.pop(key, None)
        self._entries[key] = entry
        if again:
            self._leave_again(key)
        if stream.steps == 2 or len(self._entries) > self._limit:
            self._settle()
            self._limit = max(_KEPT, 2 * len(self._entries))

    def current(self, mem: Tensor, held: bool) -> list[Entry]:
        """The membranes that steps may go on from, oldest first: of a neuron that holds ``mem``, its own."""
        heads = [entry for entry in self._newest_first() if entry.head and entry.values is not None]
        if held:
            if (own := self._known(mem)) is not None:
                return [own]
            return [] if self._reset else [e for e in heads if e.shape == mem.shape][:1]
        return [e for e in heads if e.shape == heads[0].shape and not self._ended(e)][::-1]

    @_opaque
    def restore(self, pasts: list[tuple[Tensor, Past]]) -> None:
        """Steps go on from these membranes with these pasts, oldest first, instead of those of today."""
        tokens = self._tokens()
        traced = [trace(mem, set(tokens)) if mem.grad_fn is not None else None for mem, _ in pasts]
        marks = [() if t is None else tuple(weakref.ref(token) for token in t.through) for t in traced]
        self._entries = {key: entry for key, entry in self._entries.items() if not entry.head}
        self._reset, self._said = False, False
        for (mem, past), found in zip(pasts, marks, strict=True):
            self.add(mem, past)
            newest = self._entries[mem.untyped_storage()._cdata]
            newest.tokens, newest.stream.edited = (*newest.tokens, *found), True

    def reset(self) -> None:
        """The neuron's own state was put back to its start."""
        self._reset = True

    def _leave_again(self, key: int) -> None:
        """A step was taken again, by a checkpoint perhaps: nobody holds what such a step before it gave."""
        before, self._again = self._again, key
        entry = self._entries.get(before)
        if entry is not None and entry.head and entry.stream.steps == 1 and entry.tensor() is None:
            del self._entries[before]

    def _cut(self) -> None:
        """Gradients end here: nobody asks for the graphs of membranes that are gone."""
        for entry in self._entries.values():
            if not entry.head and entry.tensor() is None:
                entry.graph = None

    def _settle(self, beginning: bool = False, held: bool = False) -> None:
        """Let go of what nobody can hand back: newest first, as its graph may be all that keeps the older.

        An edited copy of a membrane that is gone may still be there. A few sequences that have ended are
        kept for it, one of them with its graph.
        """
        graphs, room, going = 1, _ROOM, self._going()
        for key in sorted(self._entries, key=lambda key: -self._entries[key].time):
            entry = self._entries[key]
            ended = held or self._ended(entry, going)
            spare = entry.head and entry.stream.edited and ended and not held
            if entry.graph is not None and entry.tensor() is None and (ended or beginning > entry.head):
                if spare and graphs:
                    graphs -= 1
                else:
                    entry.graph = None
            if entry.alive or (entry.head and not ended):
                continue
            if spare and room > 0:
                room -= max(entry.size, _ROOM // 4)
            else:
                del self._entries[key]

    def __deepcopy__(self, memo: dict[int, Any]) -> Pasts:
        return Pasts()

    def __reduce__(self) -> tuple[type[Pasts], tuple[()]]:
        return Pasts, ()


def _at_zero(mem: Tensor, others: tuple[Tensor, ...]) -> bool:
    return not any(bool(t.any()) for t in (mem, *others))


def _alike(a: Entry, b: Entry) -> bool:
    """Whether two sequences are the same until now, so that either may be continued."""
    if a.values is None or b.values is None or len(a.values) != len(b.values):
        return False
    mine, theirs = (*a.past.history, *a.values), (*b.past.history, *b.values)
    return all(
        (x is None and y is None)
        or (x is not None and y is not None and x.shape == y.shape and torch.equal(x, y.to(x)))
        for x, y in zip(mine, theirs, strict=True)
    )
