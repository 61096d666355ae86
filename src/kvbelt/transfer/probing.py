"""Measuring one link: which bytes are moved next, and what that took. Pure; the pump moves them.

A measurement is a transfer that commits nothing: room is reserved as for a prompt, written to and read back, and given
up. So no byte that belongs to another transfer is touched on either side, and whatever goes wrong on the way is handled
as it is for a transfer.

Rules:

1. One operation is in flight at a time, and not larger than one write of a transfer.
2. Small operations come first, and they grow only while they are quick: a slow link carries little of it.
3. It is ended by whoever else wants to send (dispatch.py). What was measured by then is told.
"""

import time
from collections.abc import Callable, Generator
from statistics import median
from typing import Literal, NamedTuple

from kvbelt.wire.layout import KVLayout
from kvbelt.wire.probe import Figures, Probed

SMALL_BYTES = 4096
SMALL_ROUNDS = 9
LARGE_BYTES = 8 << 20
LARGE_ROUNDS = 5
GROWTH = 16

#: An operation that takes so long is not made larger.
QUICK_SECONDS = 0.02

#: So long is enough of one size, even if there are fewer rounds.
ENOUGH_SECONDS = 0.2

#: An operation is waited for on the belt's thread for so long, as dispatch.py's step; then it is looked at once a turn.
SPIN_SECONDS = 1e-3

#: A measurement's deadline.
PROBE_SECONDS = 4.0

#: Of the decode worker's buffer at most this share is asked for.
BUFFER_SHARE = 8


Kind = Literal["write", "read"]


def blocks_to_ask(layout: KVLayout, piece_bytes: int, buffer_bytes: int) -> int:
    """How many blocks of a buffer are asked for: room for the largest operation, in a share of it; at least one."""
    slot, share = layout.slot_bytes(1), buffer_bytes // BUFFER_SHARE
    wanted = min(LARGE_BYTES, piece_bytes, share)
    return max(1, min(-(-wanted // slot), share // slot))


class Operation(NamedTuple):
    """What to move."""

    kind: Kind
    num_bytes: int


class Probing:
    """One measurement.

    Args:
        reads: whether the channel can read.
        clock: a fine one; the belt's own forgives time in which its thread did not run.
    """

    def __init__(self, *, reads: bool, clock: Callable[[], float] = time.perf_counter) -> None:
        self.figures: dict[Kind, Figures] = {}  #: of one round, until there are more
        self.num_bytes = 0  #: that have moved
        #: Why nothing more is measured, and in words; empty: it goes on, or it is complete.
        self.stopped = ("", "")
        self._reads = reads
        self._clock = clock
        self._began = 0.0
        self._course: Generator[Operation, float, None] | None = None
        self.next: Operation | None = None  #: None: not begun, or over

    def begin(self, room: int) -> None:
        """Room for so many bytes was granted."""
        self._course = self._go(min(room, LARGE_BYTES))
        self.next = next(self._course)

    def stop(self, why: str, detail: str) -> None:
        """Measure nothing more."""
        self.stopped = why, detail
        self.next = None

    def posting(self) -> None:
        """The next operation is about to be posted."""
        self._began = self._clock()

    @property
    def spinning(self) -> bool:
        """Whether it is worth while to look at it again at once."""
        return self._clock() - self._began < SPIN_SECONDS

    def ended(self) -> None:
        """It has."""
        seconds = self._clock() - self._began
        if self.next is None or self._course is None:
            return
        self.num_bytes += self.next.num_bytes
        try:
            self.next = self._course.send(seconds)
        except StopIteration:
            self.next = None

    def told(self, channel: str, reason: str, detail: str) -> Probed:
        """What was measured, and why not more (empty: it is complete)."""
        return Probed(
            channel=channel,
            write=self.figures.get("write"),
            read=self.figures.get("read"),
            num_bytes=self.num_bytes,
            reason=reason,
            detail=detail,
        )

    def _go(self, most: int) -> Generator[Operation, float, None]:
        kinds: tuple[Kind, ...] = ("write", "read") if self._reads else ("write",)
        for kind in kinds:
            self.figures[kind] = yield from _grow(kind, most)
        # Only now: memory that nobody has touched yet is one page of zeros to the kernel, and moves faster than any.
        for kind in kinds:
            known = self.figures[kind]
            times = yield from _rounds(Operation(kind, known.num_bytes), LARGE_ROUNDS)
            self.figures[kind] = Figures(known.num_bytes, median(times), known.small_seconds)


def _grow(kind: Kind, most: int) -> Generator[Operation, float, Figures]:
    """Small operations, and then larger ones, as large as is worth while."""
    num_bytes = min(SMALL_BYTES, most)
    yield Operation(kind, num_bytes)  # it may open the connection
    times = yield from _rounds(Operation(kind, num_bytes), SMALL_ROUNDS)
    small = seconds = median(times)
    while num_bytes < most and seconds < QUICK_SECONDS:
        num_bytes = min(num_bytes * GROWTH, most)
        seconds = yield Operation(kind, num_bytes)
    return Figures(num_bytes, seconds, small)


def _rounds(operation: Operation, rounds: int) -> Generator[Operation, float, list[float]]:
    """The same again and again: how long each took."""
    times: list[float] = []
    while len(times) < rounds and sum(times) < ENOUGH_SECONDS:
        seconds = yield operation
        times.append(seconds)
    return times
