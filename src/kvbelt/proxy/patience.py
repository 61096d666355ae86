"""Alarms that do not take this process's own absence for somebody's silence.

A proxy that could not run for seconds (a machine under load, a paused virtual machine) has not listened for seconds.
An event loop that goes on runs what was due before it reads what has come: an ordinary timer would end, as
unanswered, questions whose answers lie in the socket.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Protocol

#: In so many looks an alarm's time passes. One that comes late does not count: another one follows.
LOOKS = 10

#: A look that comes this much late was kept from running; less is ordinary scheduling.
STALL_SECONDS = 0.05


class _Loop(Protocol):
    """What an alarm needs of an event loop."""

    def time(self) -> float: ...
    def call_at(self, when: float, callback: Callable[[], object], /) -> asyncio.TimerHandle: ...


class Alarm:
    """Rings once, after so many seconds in which this process could listen."""

    def __init__(self, seconds: float, ring: Callable[[], object], loop: _Loop | None = None) -> None:
        self._loop = loop or asyncio.get_running_loop()
        self._step = seconds / LOOKS
        self._stall = max(self._step, STALL_SECONDS)
        self._left = LOOKS
        self._ring = ring
        self._wind()

    def cancel(self) -> None:
        """It does not ring any more."""
        self._handle.cancel()

    def _wind(self) -> None:
        self._due = self._loop.time() + self._step
        self._handle = self._loop.call_at(self._due, self._look)

    def _look(self) -> None:
        if self._loop.time() - self._due < self._stall:
            self._left -= 1
        if self._left:
            self._wind()
        else:
            self._ring()


@contextlib.asynccontextmanager
async def timeout(seconds: float) -> AsyncIterator[None]:
    """As ``asyncio.timeout``, by an alarm.

    Raises:
        TimeoutError: the body took longer.
    """
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as limit:
        alarm = Alarm(seconds, lambda: limit.reschedule(loop.time()))
        try:
            yield
        finally:
            alarm.cancel()
