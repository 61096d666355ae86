"""An answer that is arriving: its head, then its body as it comes, or whole."""

import asyncio
from enum import IntEnum
from typing import Protocol

from kvbelt.http.errors import HttpError, TooLargeError
from kvbelt.http.message import Headers


class Stage(IntEnum):
    """What somebody waits for."""

    HEAD = 0
    DATA = 1
    END = 2


class Source(Protocol):
    """The connection that a response arrives on."""

    def abort(self) -> None:
        """Close at once; the answer is not wanted."""

    def fail(self, error: HttpError) -> None:
        """Close at once; the reader gets this error."""

    def resume(self) -> None:
        """There is room again."""


class Response:
    """One answer. Read by one task: ``read`` for the whole body, or ``chunk`` until it returns ``b""``.

    A task cancelled while it waits closes the connection, and so does ``close`` before the end: that is
    how the peer learns to stop working.
    """

    __slots__ = (
        "_buffered",
        "_chunks",
        "_loop",
        "_source",
        "_stage",
        "_waiter",
        "complete",
        "error",
        "head_complete",
        "headers",
        "pause_bytes",
        "pieces",
        "started",
        "status",
    )

    def __init__(self, source: Source, loop: asyncio.AbstractEventLoop, pause_bytes: int) -> None:
        self.status = 0
        self.headers: Headers = {}
        self.started = False  #: any byte has arrived
        self.head_complete = False
        self.complete = False
        self.error: HttpError | None = None
        self.pause_bytes = pause_bytes  #: unread bytes at which the peer is paused
        self.pieces = 0  #: that were taken of the body; a chunk of a chunked one that came whole is a piece
        self._chunks: list[bytes] = []
        self._buffered = 0
        self._source = source
        self._loop = loop
        self._stage = Stage.HEAD
        self._waiter: asyncio.Future[None] | None = None

    async def head(self) -> None:
        """Wait for status and headers.

        Raises:
            HttpError: the connection ended, or what came was not HTTP.
        """
        if not self.head_complete:
            await self._wait(Stage.HEAD)
        if not self.head_complete and self.error is not None:
            raise self.error

    async def read(self, max_bytes: int) -> bytes:
        """The whole (rest of the) body.

        Raises:
            TooLargeError: it is larger than ``max_bytes``; the connection is closed.
            HttpError: the connection ended before the body did.
        """
        self.pause_bytes = max_bytes
        while not self.complete and self.error is None and self._buffered <= max_bytes:
            self._source.resume()
            await self._wait(Stage.END)
        if self._buffered > max_bytes:
            self.close()
            raise TooLargeError(f"the answer is larger than {max_bytes} bytes")
        if self.error is not None:
            raise self.error
        return self._take()

    async def chunk(self) -> bytes:
        """What has arrived of the body since the last call, as soon as there is something; ``b""`` at its end.

        Raises:
            HttpError: the connection ended before the body did (once everything that arrived was returned).
        """
        if not self._chunks and not self.complete and self.error is None:
            await self._wait(Stage.DATA)
        if self._chunks:
            data = self._take()
            if not self.complete:
                self._source.resume()
            return data
        if self.error is not None:
            raise self.error
        return b""

    def close(self) -> None:
        """Close the connection unless the answer is complete. Idempotent."""
        if not self.complete and self.error is None:
            self._source.abort()

    def abandon(self, error: HttpError) -> None:
        """Close the connection, from another task: the reader gets this error. Nothing if the answer is complete."""
        if not self.complete and self.error is None:
            self._source.fail(error)

    def _take(self) -> bytes:
        chunks = self._chunks
        self.pieces += len(chunks)
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self._chunks = []
        self._buffered = 0
        return data

    async def _wait(self, stage: Stage) -> None:
        self._stage = stage
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        except asyncio.CancelledError:
            self.close()
            raise
        finally:
            self._waiter = None

    # The connection's calls

    @property
    def buffered(self) -> int:
        """Body bytes that nobody has taken yet."""
        return self._buffered

    def reached(self, stage: Stage) -> None:
        """Wake the reader if it waits for this."""
        waiter = self._waiter
        if waiter is not None and stage >= self._stage and not waiter.done():
            waiter.set_result(None)

    def add(self, data: bytes) -> None:
        """A piece of the body has come."""
        self._chunks.append(data)
        self._buffered += len(data)

    def fail(self, error: HttpError) -> None:
        """The rest will not come."""
        if not self.complete and self.error is None:
            self.error = error
            self.reached(Stage.END)
