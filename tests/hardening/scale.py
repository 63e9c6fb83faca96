"""How much the hardening tests do, and the figures they report.

The default test run does a small part of each; ``python tests/hardening/full_run.py`` (``tox -e hardening``)
sets SPIKEDE_HARDENING=full, does all of it, and writes what was counted into the README.
"""

from __future__ import annotations

import json
import os

FULL = os.environ.get("SPIKEDE_HARDENING") == "full"


def scale(quick: int, full: int) -> int:
    """``full`` in the run that reports, ``quick`` in the default test run."""
    return full if FULL else quick


def record(what: str, count: float, unit: str) -> None:
    """Report that ``count`` more of ``unit`` were done for ``what`` (a row of the README's table).

    Counts of one row and unit add up over tests and over processes. Call it last in a test, when all
    that it counts has passed. Nothing happens in the default test run.
    """
    path = os.environ.get("SPIKEDE_HARDENING_FIGURES")
    if path:
        line = json.dumps({"what": what, "count": count, "unit": unit}) + "\n"
        with open(path, "a", encoding="utf-8") as file:  # a short append is whole, also beside other workers
            file.write(line)
