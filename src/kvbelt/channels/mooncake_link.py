"""The way to one Mooncake peer: an engine of its own, opened on a thread, and the writes that wait for it.

It knows no vendor: an ``Engine`` is what mooncake.py makes of one.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import msgspec

from kvbelt.errors import ChannelError

#: Spans with an engine at a time; it has four connections to a peer. The rest waits here, where it can be aborted.
MAX_POSTED = 8

#: Writes to one peer that may wait.
MAX_WAITING = 1 << 14


class Peer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="mooncake"):
    """What a process tells those that write into it."""

    protocol: Literal["tcp", "rdma"]
    session: str  #: host and port of its engine
    life: str  #: of its engine: the port may be another's later
    regions: list[tuple[int, int]]  #: address and bytes


class Engine(Protocol):
    """What moves the bytes to one peer at a time."""

    known: dict[str, str]  #: the life of each session that it has met, and remembers

    def read(self, there: Peer) -> bool:
        """Open the connection by reading something. Blocks; False: no answer."""

    def submit(self, session: str, local: int, remote: int, num_bytes: int) -> int | None:
        """Post one span. Returns its number; None: it was not taken."""

    def state_of(self, posted: int) -> bool | None:
        """Whether a span has landed; None: it is in flight. Asked no more once it has ended."""

    def end(self) -> None:
        """Close its connections; nothing is in flight afterwards. Takes up to a second."""


class MooncakeWrite:
    """One posted write: done when each of its spans is."""

    def __init__(self, link: "Link", spans: Sequence[tuple[int, int, int]]) -> None:
        self._link = link
        self.waiting = deque(spans)
        self.in_flight = 0  #: spans
        self.error: str | None = None

    @property
    def quiet(self) -> bool:
        """Whether nothing of it is in flight, nor will be."""
        return not self.in_flight and (self.error is not None or not self.waiting)

    def fail(self, error: str) -> None:
        """Post nothing more of it."""
        self.error = self.error or error

    def done(self) -> bool:
        """Whether it has completed.

        Raises:
            ChannelError: it failed, and nothing of it is in flight any more.
        """
        if not self.quiet:
            self._link.step()
        if self.quiet and self.error is not None:
            raise ChannelError(self.error)
        return self.quiet

    def release(self) -> None:
        """Post nothing more of it.

        Raises:
            ChannelError: spans are in flight; Mooncake cannot recall them.
        """
        if self.quiet:
            return
        self.fail(f"the write to {self._link.there.session} was aborted")
        if self.in_flight:
            raise ChannelError(f"{self.in_flight} spans to {self._link.there.session} are in flight")


class Link:
    """The way to one peer."""

    def __init__(
        self,
        there: Peer,
        take_idle: Callable[[Peer], Engine | None],
        make_engine: Callable[[], Engine],
    ) -> None:
        self.there = there
        self._take_idle = take_idle
        self._make_engine = make_engine
        self._opening: Opening | None = None
        self._waiting: deque[MooncakeWrite] = deque()
        self._posted: list[tuple[int, MooncakeWrite]] = []

    def open(self) -> None:
        """Begin to connect, again if it has failed."""
        opening = self._opening
        if opening is None:
            self._opening = Opening(self._take_idle(self.there), self._make_engine, self.there)
        elif opening.ended and opening.error is not None:
            self._opening = Opening(opening.engine, self._make_engine, self.there)

    def write(self, spans: Sequence[tuple[int, int, int]]) -> MooncakeWrite:
        """Post one, behind those that wait.

        Raises:
            ChannelError: too much waits.
        """
        if len(self._waiting) >= MAX_WAITING:
            raise ChannelError(f"{MAX_WAITING} writes to {self.there.session} wait already")
        self.step()
        self.open()
        write = MooncakeWrite(self, spans)
        self._waiting.append(write)
        self.step()
        return write

    def step(self) -> None:
        """Take in what has ended, and post what there is room for. Never blocks."""
        opening = self._opening
        if opening is None or not opening.ended:
            return
        if opening.error is not None or opening.engine is None:
            self.abort(opening.error or "it is closed")
            return
        for item in list(self._posted):
            batch, write = item
            landed = opening.engine.state_of(batch)
            if landed is not None:
                self._posted.remove(item)
                write.in_flight -= 1
                if not landed:
                    write.fail(f"mooncake could not write to {self.there.session}: the peer is gone, or refuses it")
        while self._waiting and len(self._posted) < MAX_POSTED:
            self._post_one(opening.engine)

    def _post_one(self, engine: Engine) -> None:
        write = self._waiting[0]
        if write.error is not None or not write.waiting:
            self._waiting.popleft()
            return
        posted = engine.submit(self.there.session, *write.waiting.popleft())
        if posted is None:
            write.fail(f"mooncake takes no write to {self.there.session}")
            return
        write.in_flight += 1
        self._posted.append((posted, write))

    def abort(self, reason: str) -> None:
        """Post nothing of what waits."""
        for write in self._waiting:
            if write.waiting:
                write.fail(reason)
        self._waiting.clear()

    @property
    def quiet(self) -> bool:
        """Whether nothing is in flight, and no thread is opening it."""
        self.step()
        return not self._posted and (self._opening is None or self._opening.ended)

    def give_up(self, reason: str) -> Engine | None:
        """Let go of its engine; what is in flight is over once that ends. None: a thread has it, and lets it end."""
        self.abort(reason)
        for _, write in self._posted:
            write.in_flight = 0
            write.fail(reason)
        self._posted.clear()
        opening, self._opening = self._opening, None
        return opening.engine if opening is not None and opening.ended else None


class Opening:
    """The thread that opens a connection; it ends by itself, if need be by Mooncake's own limit of a minute."""

    def __init__(self, engine: Engine | None, make_engine: Callable[[], Engine], there: Peer) -> None:
        self.engine = engine
        self.error: str | None = None  #: why it could not be opened
        self._make_engine = make_engine
        self._there = there
        self._thread = threading.Thread(target=self._open, name="kvbelt-mooncake", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether it is open, or ``error`` says why not."""
        return not self._thread.is_alive()

    def _open(self) -> None:
        why = "it does not answer"
        try:
            self.engine = self.engine or self._make_engine()
            if self.engine.read(self._there):
                return
        except Exception as error:  # noqa: BLE001 -- whatever it is, this peer cannot be written
            why = str(error)
        self.error = f"mooncake could not reach {self._there.session}: {why}"
