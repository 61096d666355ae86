"""Work that takes a shared thread for long, done in pieces.

After each piece others have the thread for ``REST`` times as long, however many clients send such work.
"""

import asyncio
from collections.abc import Awaitable, Callable, Generator
from time import thread_time
from typing import TypeVar

T = TypeVar("T")

Work = Generator[None, None, T]  #: stops between pieces, and returns what came of all

#: Large bodies get a fourth of the event loop at most.
REST = 3.0


def at_once(pieces: Work[T]) -> T:
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            done: T = end.value
            return done


class Turns:
    """For one event loop. ``clock``: seconds of work, in which a thread that the machine lets wait does not grow."""

    def __init__(
        self, clock: Callable[[], float] = thread_time, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._lock = asyncio.Lock()
        self._rest = 0.0  # seconds, owed to others

    async def take(self, pieces: Work[T]) -> T:
        """Do all pieces. Raises what they raise."""
        async with self._lock:
            while True:
                await self._sleep(self._rest)
                began = self._clock()
                try:
                    next(pieces)
                except StopIteration as end:
                    done: T = end.value
                    return done
                finally:
                    self._rest = REST * (self._clock() - began)
