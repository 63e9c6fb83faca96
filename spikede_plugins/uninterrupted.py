"""Changes that Ctrl-C cannot break off half way.

Python runs signal handlers in the main thread, between any two of its operations: one that raises (Ctrl-C, an
alarm, a job's SIGTERM) would leave a model with some neurons exchanged and some not. In another thread a
change runs to its end.
"""

from __future__ import annotations

import _thread
import sys
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Uninterrupted(Generic[T]):
    """``work``, done as a whole or not at all, whatever signals come."""

    # Only single operations on bare locks: those of threading.Thread and Event are written in Python, and a
    # signal in the middle of them leaves a lock taken for ever.

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._claim = _thread.allocate_lock()  # taken once, by who does the work or by who gives it up
        self._running = _thread.allocate_lock()
        self._running.acquire()
        self._ended = False
        self._result: list[T] = []
        self._error: BaseException | None = None

    def give_up(self) -> bool:
        """Whether the work has not begun, and never will; else it is done, or is being brought to its end."""
        return self._claim.acquire(blocking=False)

    def run(self) -> T:
        """The result of the work; raises what it raised, or what a signal handler did in the meantime."""
        interrupted: BaseException | None = None
        if threading.current_thread() is threading.main_thread():
            try:
                _thread.start_new_thread(self._do_in_thread, ())
            except RuntimeError:  # no more threads to be had
                self._do()
            except BaseException as error:  # the thread may have been started
                if self.give_up():
                    raise
                interrupted = error
        else:
            self._do()
        while not self._ended:
            try:
                self._running.acquire(timeout=0.1)
            except BaseException as error:
                interrupted = error
        if self._error is not None:
            raise self._error
        if interrupted is not None:
            raise interrupted
        return self._result[0]

    def _do_in_thread(self) -> None:
        sys.settrace(threading.gettrace())  # a debugger's, or a measurement of coverage
        self._do()

    def _do(self) -> None:
        try:
            if self._claim.acquire(blocking=False):
                self._result.append(self._work())
        except BaseException as error:
            self._error = error
        finally:
            self._ended = True
            self._running.release()
