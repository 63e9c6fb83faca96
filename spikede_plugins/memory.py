"""How much of the past a neuron keeps: all of it, or a window.

A memory tells how many lags of the history sum a step may use. What a new memory needs beyond that
(compressed forms keep no rows at all) belongs here too, so that engines ask one object.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from spikede_plugins.errors import OptionError, OptionTypeError


class Memory(ABC):
    """What is remembered of the states ``u_1 ... u_{k-1}`` when step k is taken."""

    @abstractmethod
    def lags(self, past: int) -> int:
        """How many of ``past`` earlier states enter the sum (the newest ones)."""

    @abstractmethod
    def describe(self) -> str:
        """A short text for reports."""


@dataclass(frozen=True)
class FullMemory(Memory):
    """Every state since the last reset."""

    def lags(self, past: int) -> int:
        return past

    def describe(self) -> str:
        return "full"


@dataclass(frozen=True)
class WindowMemory(Memory):
    """The newest ``length`` states (short-memory principle, Podlubny 1999, section 7.3).

    Raises:
        OptionError: if ``length`` < 1.
    """

    length: int

    def __post_init__(self) -> None:
        if self.length < 1:
            raise OptionError(
                f"memory must keep at least 1 step, got {self.length}; "
                'pass memory="full" to keep every step or an int >= 1 for a window.'
            )

    def lags(self, past: int) -> int:
        return min(past, self.length)

    def describe(self) -> str:
        return f"window {self.length}"


def as_memory(spec: Any) -> Memory:
    """``"full"``, an int window or a :class:`Memory` as a :class:`Memory`.

    Raises:
        OptionError: for a window below 1 or an unknown word.
        OptionTypeError: for anything else.
    """
    if isinstance(spec, Memory):
        return spec
    if isinstance(spec, bool) or not isinstance(spec, (str, int)):
        raise OptionTypeError(
            f'memory must be "full", an int window or a Memory, got {type(spec).__name__}.'
        )
    if isinstance(spec, int):
        return WindowMemory(spec)
    if spec == "full":
        return FullMemory()
    raise OptionError(f'memory must be "full" or an int window, got {spec!r}.')
