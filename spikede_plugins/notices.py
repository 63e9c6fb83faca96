"""Lines that a user should see once: why something takes long, and what would make it faster.

They go through the standard logger ``spikede_plugins`` at level WARNING, which a program without any logging
set up prints to standard error. They are no Python warnings: nothing is wrong, and ``python -W error`` stays
as it is. To silence them:

    logging.getLogger("spikede_plugins").setLevel(logging.ERROR)
"""

from __future__ import annotations

import logging
import threading

logger = logging.getLogger("spikede_plugins")

_lock = threading.Lock()
_said: set[str] = set()


def say_once(topic: str, line: str) -> None:
    """Log a line, unless one on the same topic was logged in this process."""
    with _lock:
        if topic in _said:
            return
        _said.add(topic)
    logger.warning("spikede-plugins: %s", line)


def forget() -> None:
    """Every line may be said again; for tests."""
    _said.clear()
