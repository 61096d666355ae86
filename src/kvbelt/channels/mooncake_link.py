"""The link to one Mooncake peer: its engine, which a thread opens, and the writes that wait for it.

The vendor is behind ``Engine``, which mooncake.py implements.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import msgspec

from kvbelt.errors import ChannelError

#: Spans that an engine has at a time; it has four connections to a peer. The others wait here, and can be aborted.
MAX_POSTED = 8

#: Most writes to one peer that wait.
MAX_WAITING = 1 << 14


class Peer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="mooncake"):
    """The metadata that a process gives to its senders."""

    protocol: Literal["tcp", "rdma"]
    session: str  #: host and port of its engine
    #: Of its engine; another engine may have the port later.
    incarnation: str = msgspec.field(name="life")
    regions: list[tuple[int, int]]  #: address and bytes


class Engine(Protocol):
    """Moves the bytes to one peer at a time."""

    known: dict[str, str]  #: session to incarnation, of the peers that it has met

    def read(self, there: Peer) -> bool:
        """Open the connection by reading from the peer. Blocks; False: no answer."""

    def submit(self, session: str, local: int, remote: int, num_bytes: int) -> int | None:
        """Post one span. Returns its number; None: it was refused."""

    def state_of(self, posted: int) -> bool | None:
        """Whether a span has landed; None: it is in flight. Must not be called again once it has ended."""

    def end(self) -> None:
        """Close the connections; then nothing is in flight. The interpreter stands still for up to a second."""


class MooncakeWrite:
    """One posted write. It is done when each of its spans is."""

    def __init__(self, link: "Link", spans: Sequence[tuple[int, int, int]]) -> None:
        self._link = link
        self.waiting = deque(spans)
        self.in_flight = 0  #: spans
        self.error: str | None = None

    @property
    def quiet(self) -> bool:
        """Whether no span is in flight, or will be."""
        return not self.in_flight and (self.error is not None or not self.waiting)

    def fail(self, error: str) -> None:
        """Post no more spans."""
        self.error = self.error or error

    def done(self) -> bool:
        """Whether it has completed. A failed write raises once no span is in flight."""
        if not self.quiet:
            self._link.step()
        if self.quiet and self.error is not None:
            raise ChannelError(self.error)
        return self.quiet

    def release(self) -> None:
        """Post no more spans. Mooncake cannot recall those in flight, so they raise."""
        if self.quiet:
            return
        self.fail(f"the write to {self._link.there.session} was aborted")
        if self.in_flight:
            raise ChannelError(f"{self.in_flight} spans to {self._link.there.session} are in flight")


class Link:
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
        """Begin to connect, also if the last attempt has failed."""
        opening = self._opening
        if opening is None:
            self._opening = Opening(self._take_idle(self.there), self._make_engine, self.there)
        elif opening.ended and opening.error is not None:
            self._opening = Opening(opening.engine, self._make_engine, self.there)

    def write(self, spans: Sequence[tuple[int, int, int]]) -> MooncakeWrite:
        """Post a write behind those that wait, unless there are too many."""
        if len(self._waiting) >= MAX_WAITING:
            raise ChannelError(f"{MAX_WAITING} writes to {self.there.session} wait already")
        self.step()
        self.open()
        write = MooncakeWrite(self, spans)
        self._waiting.append(write)
        self.step()
        return write

    def step(self) -> None:
        """Collect spans that have ended, and post as many as there is room for. Never blocks."""
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
                    write.fail(f"mooncake could not write to {self.there.session}: the peer is gone or refuses it")
        while self._waiting and len(self._posted) < MAX_POSTED:
            self._post_one(opening.engine)

    def _post_one(self, engine: Engine) -> None:
        write = self._waiting[0]
        if write.error is not None or not write.waiting:
            self._waiting.popleft()
            return
        posted = engine.submit(self.there.session, *write.waiting.popleft())
        if posted is None:
            write.fail(f"mooncake refuses a write to {self.there.session}")
            return
        write.in_flight += 1
        self._posted.append((posted, write))

    def abort(self, reason: str) -> None:
        for write in self._waiting:
            if write.waiting:
                write.fail(reason)
        self._waiting.clear()

    @property
    def quiet(self) -> bool:
        """Whether no span is in flight, and no thread opens the connection."""
        self.step()
        return not self._posted and (self._opening is None or self._opening.ended)

    def give_up(self, reason: str) -> Engine | None:
        """Return the engine; spans in flight end with it. None: a thread is opening the connection, and will end it."""
        self.abort(reason)
        for _, write in self._posted:
            write.in_flight = 0
            write.fail(reason)
        self._posted.clear()
        opening, self._opening = self._opening, None
        return opening.engine if opening is not None and opening.ended else None


class Opening:
    """The thread that opens a connection. It ends by itself, after a minute at most (Mooncake's limit)."""

    def __init__(self, engine: Engine | None, make_engine: Callable[[], Engine], there: Peer) -> None:
        self.engine = engine
        self.error: str | None = None  #: why it could not be opened
        self._make_engine = make_engine
        self._there = there
        self._thread = threading.Thread(target=self._open, name="kvbelt-mooncake", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether the connection is open, or ``error`` says why not."""
        return not self._thread.is_alive()

    def _open(self) -> None:
        why = "it does not answer"
        try:
            self.engine = self.engine or self._make_engine()
            if self.engine.read(self._there):
                return
        except Exception as error:  # noqa: BLE001 -- whatever it is, this peer cannot be reached
            why = str(error)
        self.error = f"mooncake could not reach {self._there.session}: {why}"
