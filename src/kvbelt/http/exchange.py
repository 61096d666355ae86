"""One request and its answer, as a handler sees them."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from kvbelt.http.message import Request, date, encode_head, status_line

_NO_BODY = frozenset({204, 304})


@dataclass(slots=True, eq=False)
class Outlet:
    transport: asyncio.Transport
    closed: bool = False
    _resumed: "asyncio.Future[None] | None" = None

    @property
    def paused(self) -> bool:
        """Whether more bytes are unsent than the limit allows."""
        return self._resumed is not None

    def pause(self) -> None:
        self._resumed = asyncio.get_running_loop().create_future()

    def resume(self) -> None:
        if self._resumed is not None:
            if not self._resumed.done():
                self._resumed.set_result(None)
            self._resumed = None

    async def drained(self) -> None:
        if self._resumed is not None:
            await asyncio.shield(self._resumed)


@dataclass(slots=True, eq=False, repr=False)
class Exchange:
    """A request and its answer: either ``respond``, or ``start``, any number of ``write``, ``end``.

    Writes never block, and do not raise when the client has left: then the handler is cancelled. A handler that writes
    much awaits ``drain`` whenever ``paused``.
    """

    request: Request
    _outlet: Outlet
    keep_alive: bool  #: whether the connection takes another request after this one
    started: bool = False
    ended: bool = False
    status: int = 0  #: of the answer, once started
    more: Sequence[tuple[bytes, bytes]] = ()  #: headers of any answer to this request
    _chunked: bool = False

    @property
    def paused(self) -> bool:
        """Whether the client reads more slowly than the handler writes."""
        return self._outlet.paused

    async def drain(self) -> None:
        await self._outlet.drained()

    def respond(self, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> None:
        """Answer with a whole body; its content-length is added."""
        extra = () if status in _NO_BODY else ((b"content-length", b"%d" % len(body)),)
        head = self._head(status, headers, extra)
        self._send(head if self.request.method == "HEAD" else head + body)
        self.ended = True

    def start(self, status: int, headers: Sequence[tuple[bytes, bytes]], first: bytes = b"") -> None:
        """Begin an answer of unknown length. HTTP/1.0 clients get it unframed, ended by closing.

        The head is sent at once, together with the ``first`` piece of the body: each write is a system call, and on
        loopback it wakes the reader, which costs more than all the rest.
        """
        if self.request.version == "1.0":
            self.keep_alive = False
            head = self._head(status, headers, ())
        else:
            self._chunked = True
            head = self._head(status, headers, ((b"transfer-encoding", b"chunked"),))
        self._send(head + self._framed(first))

    def write(self, data: bytes) -> None:
        if not self.started or self.ended:
            raise RuntimeError("write outside start and end")
        framed = self._framed(data)
        if framed:
            self._send(framed)

    def end(self, last: bytes = b"") -> None:
        """The body is complete, with this last piece."""
        if not self.started or self.ended:
            raise RuntimeError("end outside an answer")
        self.ended = True
        framed = self._framed(last)
        if self._chunked and self.request.method != "HEAD":
            framed += b"0\r\n\r\n"
        if framed:
            self._send(framed)

    def _framed(self, data: bytes) -> bytes:
        if not data or self.request.method == "HEAD":
            return b""
        return b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data

    def _head(
        self, status: int, headers: Sequence[tuple[bytes, bytes]], extra: tuple[tuple[bytes, bytes], ...]
    ) -> bytes:
        if self.started:
            raise RuntimeError("an answer has already been started")
        # HTTP/1.1 keeps a connection unless told otherwise, HTTP/1.0 closes it unless told otherwise.
        if not self.keep_alive:
            extra = (*extra, (b"connection", b"close"))
        elif self.request.version == "1.0":
            extra = (*extra, (b"connection", b"keep-alive"))
        head = encode_head(status_line(status), (*headers, *self.more, (b"date", date()), *extra))
        self.started = True
        self.status = status
        return head

    def _send(self, data: bytes) -> None:
        if not self._outlet.closed:
            self._outlet.transport.write(data)
