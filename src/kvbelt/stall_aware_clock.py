"""Timeouts that do not count the time in which this process itself did not run.

A process that could not run for two seconds (a machine under load, a paused virtual machine, SIGSTOP) has not listened
for two seconds, and must not conclude that its peers were silent. An event loop makes it worse: when it goes on, it
runs what was due before it reads what has come, so an ordinary timer ends questions whose answers lie in the socket.

``StallAwareClock`` is for a thread that polls, ``Alarm`` and ``timeout`` are for an event loop.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

STALL_SECONDS = 0.1  #: running late by more than this is a stall; by less it is ordinary scheduling
STEPS = 10  #: of an alarm; a step that ends late does not count, and another one follows


class StallAwareClock:
    """Monotonic seconds in which one thread could listen.

    The thread tells the clock how long it means to sleep and when it woke. What goes beyond that is not counted.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._stalled = 0.0
        self._woke = clock()

    def __call__(self) -> float:
        """Now. May be called from any thread."""
        return self._clock() - self._stalled

    def asleep(self, seconds: float) -> "Callable[[], None]":
        """Call before sleeping for at most so long, and call what is returned on waking."""
        self.worked()
        before = self._woke

        def woke() -> None:
            now = self._clock()
            self._forgive(now - before - seconds)
            self._woke = now

        return woke

    def worked(self) -> float:
        """Now, less a stall since it woke. Call before anything that is due: it may have come since it listened."""
        now = self._clock()
        self._forgive(now - self._woke)
        self._woke = now
        return now - self._stalled

    def _forgive(self, late: float) -> None:
        if late > STALL_SECONDS:
            self._stalled += late


class Alarm:
    """Calls ``ring`` once, after so many seconds in which this process could listen."""

    def __init__(
        self, seconds: float, ring: Callable[[], object], loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        self._loop = loop or asyncio.get_running_loop()
        self._step = seconds / STEPS
        self._stall = max(self._step, STALL_SECONDS)
        self._left = STEPS
        self._ring = ring
        self._wind()

    def cancel(self) -> None:
        self._handle.cancel()

    def _wind(self) -> None:
        self._due = self._loop.time() + self._step
        self._handle = self._loop.call_at(self._due, self._on_step)

    def _on_step(self) -> None:
        if self._loop.time() - self._due < self._stall:
            self._left -= 1
        if self._left:
            self._wind()
        else:
            self._ring()


@contextlib.asynccontextmanager
async def timeout(seconds: float) -> AsyncIterator[None]:
    """As ``asyncio.timeout``, by an alarm."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as limit:
        alarm = Alarm(seconds, lambda: limit.reschedule(loop.time()))
        try:
            yield
        finally:
            alarm.cancel()
