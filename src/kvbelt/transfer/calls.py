"""What one thread asks another to do: a queue with a bell.

The belt's thread sleeps in a poller over file descriptors; the bell is one of them. It is rung only
while the thread sleeps, so a busy belt costs its callers an append.
"""

import contextlib
import logging
import os
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import ParamSpec

log = logging.getLogger(__name__)

P = ParamSpec("P")


def call_back(callback: Callable[..., object], *arguments: object) -> None:
    """Call a caller's code on the belt's thread: its mistake must not end all transfers."""
    try:
        callback(*arguments)
    except Exception:
        log.exception("a callback of the belt has failed")


class Calls:
    def __init__(self) -> None:
        self._queue: deque[Callable[[], object]] = deque()
        self._asleep = False
        self._closed = False
        self.fileno = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def add(self, call: Callable[P, object], *arguments: P.args, **named: P.kwargs) -> None:
        self._queue.append(partial(call, *arguments, **named))
        if self._asleep and not self._closed:
            os.eventfd_write(self.fileno, 1)

    def fall_asleep(self) -> bool:
        """Before sleeping: True when there is nothing to do first."""
        # In this order: a caller that adds after the look sees the flag, and rings.
        self._asleep = True
        return not self._queue

    def wake(self) -> None:
        self._asleep = False
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fileno)

    def run(self) -> bool:
        """Do everything that was asked for so far. True: there was something."""
        count = len(self._queue)
        for _ in range(count):
            self._queue.popleft()()
        return count > 0

    def close(self) -> None:
        self._closed = True
        os.close(self.fileno)
