"""An answer that is arriving."""

import asyncio
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

from kvbelt.http.errors import HttpError, TooLargeError
from kvbelt.http.message import Headers


class Stage(IntEnum):
    """What the reader waits for."""

    HEAD = 0
    DATA = 1
    END = 2


HEAD, DATA, END = Stage  # on Python 3.11, reading an enum's member takes longer than a call


class Source(Protocol):
    """What a response needs of its connection."""

    def abort(self) -> None:
        """Close at once."""

    def fail(self, error: HttpError) -> None:
        """Close at once; the reader gets this error."""

    def resume(self) -> None:
        """Read on."""


@dataclass(slots=True, eq=False, repr=False)
class Response:
    """One answer. One task reads it: ``read`` for the whole body, or ``chunk`` until it returns ``b""``.

    A task that is cancelled while it waits closes the connection, as does ``close`` before the end. So the peer learns
    that it can stop.
    """

    _source: Source
    _loop: asyncio.AbstractEventLoop
    pause_bytes: int  #: unread bytes at which the peer is paused
    status: int = 0
    headers: Headers = field(default_factory=dict)
    started: bool = False  #: any byte has arrived
    head_complete: bool = False
    complete: bool = False
    error: HttpError | None = None
    pieces: int = 0  #: of the body that were read; about one for each chunk of a chunked body
    buffered: int = 0  #: bytes of the body that were not read yet
    chunks: list[bytes] = field(default_factory=list)  #: them
    _stage: Stage = Stage.HEAD
    _waiter: "asyncio.Future[None] | None" = None

    async def head(self) -> None:
        """Wait for status and headers.

        Raises:
            HttpError: the connection ended, or the answer was not HTTP.
        """
        if not self.head_complete:
            await self._wait(HEAD)
        if not self.head_complete and self.error is not None:
            raise self.error

    async def read(self, max_bytes: int) -> bytes:
        """Read the rest of the body.

        Raises:
            TooLargeError: it is larger than ``max_bytes``; the connection is closed.
            HttpError: the connection ended before the body did.
        """
        self.pause_bytes = max_bytes
        while not self.complete and self.error is None and self.buffered <= max_bytes:
            self._source.resume()
            await self._wait(END)
        if self.buffered > max_bytes:
            self.close()
            raise TooLargeError(f"the answer is larger than {max_bytes} bytes")
        if self.error is not None:
            raise self.error
        return self._take()

    async def chunk(self) -> bytes:
        """Read what has arrived since the last call, waiting if there is nothing; ``b""`` at the end.

        Raises:
            HttpError: the connection ended before the body did (once everything that arrived was returned).
        """
        if not self.chunks and not self.complete and self.error is None:
            await self._wait(DATA)
        if self.chunks:
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
        """Close the connection from another task, unless the answer is complete; the reader gets this error."""
        if not self.complete and self.error is None:
            self._source.fail(error)

    def _take(self) -> bytes:
        chunks = self.chunks
        self.pieces += len(chunks)
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self.chunks = []
        self.buffered = 0
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

    # Called by the connection

    def reached(self, stage: Stage) -> None:
        waiter = self._waiter
        if waiter is not None and stage >= self._stage and not waiter.done():
            waiter.set_result(None)

    def fail(self, error: HttpError) -> None:
        if not self.complete and self.error is None:
            self.error = error
            self.reached(END)
