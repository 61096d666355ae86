"""What one thread asks another to do: a queue with a bell.

The belt's thread sleeps in a poller over file descriptors; the bell is one of them. It is rung only
while the thread sleeps, so a busy belt costs its callers an append.
"""

import contextlib
import os
from collections import deque
from collections.abc import Callable


class Calls:
    """Calls from any thread, done in order on the belt's thread."""

    def __init__(self) -> None:
        self._queue: deque[Callable[[], None]] = deque()
        self._asleep = False
        self._closed = False
        self.fileno = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def add(self, call: Callable[[], None]) -> None:
        """From any thread."""
        self._queue.append(call)
        if self._asleep and not self._closed:
            os.eventfd_write(self.fileno, 1)

    def fall_asleep(self) -> bool:
        """Before sleeping: True when there is nothing to do first."""
        # In this order: who adds after the look sees the flag, and rings.
        self._asleep = True
        return not self._queue

    def wake(self) -> None:
        """After sleeping."""
        self._asleep = False
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fileno)

    def run(self) -> bool:
        """Do everything that was asked for so far. True when there was something."""
        count = len(self._queue)
        for _ in range(count):
            self._queue.popleft()()
        return count > 0

    def close(self) -> None:
        """No bell any more."""
        self._closed = True
        os.close(self.fileno)
