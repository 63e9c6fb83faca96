"""The cells of the matrix: few environments in which every possible pair of levels appears.

Most failures of a combination need two of its parts. So instead of the full product (thousands of
environments) the matrix takes a *pairwise covering set*, built greedily: the next cell is always the one
with most pairs that no earlier cell has; the first one in the order of ``cells.toml`` if several have.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

CELLS = Path(__file__).resolve().parent / "cells.toml"
PROJECT = CELLS.parent.parent / "pyproject.toml"

#: Two levels of two factors: ((factor, level), (factor, level)).
Pair = tuple[tuple[str, str], tuple[str, str]]

#: How the levels of a factor are written in a cell's name; an extra gives its own name, or nothing.
_SHORT = {"python": "py", "torch": "torch", "spikingjelly": "sj", "snntorch": "snn", "numpy": "np"}


@dataclass(frozen=True)
class Cell:
    """One environment.

    Attributes:
        levels: the level of every factor, in the order of ``cells.toml``.
    """

    levels: tuple[tuple[str, str], ...]

    def __getitem__(self, factor: str) -> str:
        return dict(self.levels)[factor]

    @property
    def name(self) -> str:
        """E.g. ``py3.11-torch2.6.0-sj2.0.0-np2+fast``: what is absent is left out."""
        main = [
            _SHORT[factor] + level.removesuffix(".*")
            for factor, level in self.levels
            if factor in _SHORT and level != "none"
        ]
        lowest = ["lowest"] if self["bounds"] == "lowest" else []
        return "-".join(main + lowest) + "".join(f"+{extra}" for extra in self.extras)

    @property
    def extras(self) -> list[str]:
        """The extras of the package that are asked for beside the frameworks."""
        return [factor for factor, level in self.levels if level == "with"]

    @property
    def pairs(self) -> list[Pair]:
        return list(itertools.combinations(self.levels, 2))


@dataclass(frozen=True)
class Matrix:
    """What ``cells.toml`` says.

    Attributes:
        factors: the levels of every factor.
        belongs_to_torch: the releases that go with a release of torch, by package.
        impossible: pairs of levels that cannot exist together, with the reason.
    """

    factors: dict[str, list[str]]
    belongs_to_torch: dict[str, dict[str, str]]
    impossible: dict[Pair, str]

    @cached_property
    def pairs(self) -> list[Pair]:
        """Every pair of levels that can exist together."""
        levels = [[(factor, level) for level in levels] for factor, levels in self.factors.items()]
        all_pairs = (
            pair for one, other in itertools.combinations(levels, 2) for pair in itertools.product(one, other)
        )
        return [pair for pair in all_pairs if pair not in self.impossible]

    @cached_property
    def cells(self) -> list[Cell]:
        """The covering set."""
        bit = {pair: 1 << i for i, pair in enumerate(self.pairs)}
        factors = [[(factor, level) for level in levels] for factor, levels in self.factors.items()]
        candidates: dict[Cell, int] = {}
        for levels in itertools.product(*factors):
            cell = Cell(levels)
            if not any(pair in self.impossible for pair in cell.pairs):
                candidates[cell] = sum(bit[pair] for pair in cell.pairs)
        missing = (1 << len(bit)) - 1
        chosen: list[Cell] = []
        while missing:
            best = max(candidates, key=lambda cell: (candidates[cell] & missing).bit_count())
            if not candidates[best] & missing:
                left = [pair for pair in self.pairs if bit[pair] & missing]
                raise ValueError(f"no cell can hold these pairs; list them as impossible: {left}")
            chosen.append(best)
            missing &= ~candidates[best]
        return chosen

    def constraints(self, cell: Cell) -> list[str]:
        """The pins of a cell, one a line of a constraints file."""
        torch = cell["torch"]
        pins = {"torch": torch, **self.belongs_to_torch[torch], "numpy": cell["numpy"]}
        pins |= {name: cell[name] for name in ("spikingjelly", "snntorch") if cell[name] != "none"}
        if cell["bounds"] == "lowest":
            pins = {**lower_bounds(), **pins}
        return [f"{package}=={release}" for package, release in pins.items()]


def lower_bounds(path: Path = PROJECT) -> dict[str, str]:
    """The lowest releases that ``pyproject.toml`` takes: of the core, and of the extras in the matrix."""
    project: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    extras = (project["optional-dependencies"][name] for name in ("plot", "fast", "ode", "demo"))
    asked = [*project["dependencies"], *itertools.chain(*extras)]
    return dict(re.findall(r"^([\w-]+)>=([\w.]+)$", "\n".join(asked), re.MULTILINE))


def read(path: Path = CELLS) -> Matrix:
    """The matrix of a file.

    Raises:
        ValueError: if a rule does not name two known levels and a reason, or a torch has no companions.
    """
    written: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    factors: dict[str, list[str]] = written["factors"]
    order = list(factors)
    impossible: dict[Pair, str] = {}
    for rule in written["impossible"]:
        levels = sorted(((k, v) for k, v in rule.items() if k != "reason"), key=lambda kv: order.index(kv[0]))
        if len(levels) != 2 or not rule.get("reason") or any(v not in factors[k] for k, v in levels):
            raise ValueError(f"{path.name}: [[impossible]] takes two known levels and a reason, got {rule}")
        impossible[levels[0], levels[1]] = rule["reason"]
    alone = set(factors["torch"]) - set(written["belongs_to_torch"])
    if alone:
        raise ValueError(f"{path.name}: [belongs_to_torch] lacks {sorted(alone)}")
    return Matrix(factors, written["belongs_to_torch"], impossible)
