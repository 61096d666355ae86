"""A client of one endpoint, with connections kept open between requests."""

import asyncio
import socket
import ssl
from time import monotonic
from typing import cast

import httptools

from kvbelt import stall_aware_clock
from kvbelt.http.errors import ConnectError, HttpError, PeerClosedError, ProtocolViolationError
from kvbelt.http.limits import ClientLimits
from kvbelt.http.message import HeadersToSend, Pieces, add_header, encode_lines
from kvbelt.http.response import DATA, END, HEAD, Response

_MOST_BEGUN = 64

#: A host that has gone is noticed within 25 s. A process that stands still is not: its kernel answers.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))


class ClientConnection(asyncio.Protocol):
    """Sends one request at a time and parses its answer."""

    def __init__(self, pool: "Pool", limits: ClientLimits, name: str, loop: asyncio.AbstractEventLoop) -> None:
        self._pool = pool
        self._limits = limits
        self._name = name  # the peer, for messages
        self._loop = loop
        self._body: list[bytes] = []  # pieces that the response does not have yet
        self.on_body = self._body.append  # called by the parser: a stream has many pieces
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport
        self._response: Response | None = None
        self._head_bytes = 0
        self._until_eof = False  # the body has no length and ends with the connection
        self._paused = False
        self.served = 0  #: requests sent on this connection
        self.closed = False

    def send(self, request: bytes) -> Response:
        self.served += 1
        self._head_bytes = 0
        self._until_eof = False
        self._response = Response(self, self._loop, self._limits.read_high_bytes)
        self._transport.write(request)
        return self._response

    @property
    def answering(self) -> bool:
        return self._response is not None and self._response.started

    def abort(self) -> None:
        self.fail(PeerClosedError("closed by this side"))

    def fail(self, error: HttpError) -> None:
        """Close at once; the reader of the answer gets this error."""
        response, self._response = self._response, None
        if response is not None:
            response.fail(error)
        self._close()

    def keep_alive(self) -> None:
        """Let the kernel notice a host that is gone, while an answer is awaited."""
        sock: socket.socket = self._transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            self._transport.resume_reading()

    # Called by the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        response, self._response = self._response, None
        if response is not None:
            if self._until_eof and exc is None:
                response.complete = True
                response.reached(END)
            else:
                how = "mid-answer" if response.started else "without an answer"
                response.fail(
                    PeerClosedError(
                        f"{self._name} closed the connection {how}",
                        started=response.started,
                        reused=self.served > 1,
                        reset=isinstance(exc, ConnectionResetError | BrokenPipeError),
                    )
                )
        self._pool.gone(self)

    def eof_received(self) -> bool:
        return False

    def data_received(self, data: bytes) -> None:
        response = self._response
        if response is None:
            # An answer without a request: the peer cannot be trusted with the next one.
            self._close()
            return
        response.started = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.fail(ProtocolViolationError(f"{self._name} changed protocols unasked"))
            return
        except httptools.HttpParserError as error:
            if not response.complete:
                self._hand_over(response)
                self.fail(ProtocolViolationError(f"{self._name} did not answer in HTTP/1.1: {error}"))
                return
            self._close()  # what follows the complete answer is malformed; the answer itself is good
        if not response.head_complete:
            self._head_bytes += len(data)
            if self._head_bytes > self._limits.head_bytes:
                limit = self._limits.head_bytes
                self.fail(ProtocolViolationError(f"{self._name} sent a head of more than {limit} bytes"))
            return
        if response.complete:
            response.reached(END)
            return
        if self._body:
            self._hand_over(response)
        if response.buffered:
            response.reached(DATA)
            if response.buffered > response.pause_bytes and not self._paused:
                self._paused = True
                self._transport.pause_reading()
                response.reached(END)  # a reader of the whole body sees that it is too large
        else:
            response.reached(HEAD)

    # Called by the parser

    def on_message_begin(self) -> None:
        if self._response is None:
            self._close()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Trailers are dropped."""
        response = self._response
        if response is not None and not response.head_complete:
            add_header(response.headers, name, value)

    def on_headers_complete(self) -> None:
        """Interim heads (100, 103) are dropped."""
        response = self._response
        if response is None:
            return
        status = self._parser.get_status_code()
        if status < 200:
            response.headers.clear()
            return
        response.status = status
        response.head_complete = True
        headers = response.headers
        self._until_eof = b"content-length" not in headers and b"chunked" not in headers.get(b"transfer-encoding", b"")

    def on_message_complete(self) -> None:
        response = self._response
        if response is None or not response.head_complete:
            return
        self._hand_over(response)
        response.complete = True
        self._response = None
        self.resume()
        if self._parser.should_keep_alive():
            self._pool.reusable(self)
        else:
            self._close()

    def _hand_over(self, response: Response) -> None:
        response.chunks += self._body
        response.buffered += sum(map(len, self._body))
        self._body.clear()

    def _close(self) -> None:
        self.closed = True
        self._transport.abort()


class Pool:
    """An HTTP/1.1 client of one endpoint, with as many connections as concurrent requests.

    A request is sent again only if the peer cannot have processed it: it was sent on a kept connection that was reset
    before any byte of the answer arrived, as a peer resets what it never read.
    """

    def __init__(
        self, host: str, port: int, *, limits: ClientLimits | None = None, tls: ssl.SSLContext | None = None
    ) -> None:
        self.name = f"{host}:{port}"
        self._host = host
        self._port = port
        self._limits = limits or ClientLimits()
        self._tls = tls
        self._authority = (f"[{host}]:{port}" if ":" in host else f"{host}:{port}").encode()
        self._begun: dict[tuple[str, str], bytes] = {}  # first lines of heads, by method and target
        self._idle: dict[ClientConnection, float] = {}  # connection → when it became idle; the newest last
        self._open: set[ClientConnection] = set()
        self._closed = False

    async def request(
        self, method: str, target: str, headers: HeadersToSend = (), body: bytes | Pieces | None = None
    ) -> Response:
        """Send a request and wait for the head of its answer. HEAD is not supported: its answers look incomplete.

        Raises:
            ConnectError: no connection; nothing was sent.
            HttpError: the connection ended before the head, or the answer was not HTTP.
        """
        response = await self.send(method, target, headers, body)
        try:
            await response.head()
        except PeerClosedError as error:
            if error.started or not (error.reused and error.reset):
                raise
            response = (await self._connect()).send(self._encode(method, target, headers, body))
            await response.head()
        return response

    async def send(
        self, method: str, target: str, headers: HeadersToSend = (), body: bytes | Pieces | None = None
    ) -> Response:
        """Send a request, once, and return without waiting for the answer.

        Raises:
            ConnectError: no connection; nothing was sent.
        """
        data = self._encode(method, target, headers, body)
        return (self._take_idle() or await self._connect()).send(data)

    def abort_all(self, error: HttpError, *, answering: bool = True) -> None:
        """Close every connection; calls under way raise this error. ``answering``: also where an answer has begun."""
        for connection in list(self._open):
            if answering or not connection.answering:
                connection.fail(error)
        self._idle.clear()

    def close(self) -> None:
        """Close every connection, including those that are being made. Idempotent."""
        self._closed = True
        self.abort_all(PeerClosedError(f"the pool of {self.name} was closed"))

    def __repr__(self) -> str:
        return f"<Pool {self.name} {len(self._open)} open, {len(self._idle)} idle>"

    def _encode(self, method: str, target: str, headers: HeadersToSend, body: bytes | Pieces | None) -> bytes:
        begin = self._begun.get((method, target))
        if begin is None:
            begin = encode_lines(
                b"%b %b HTTP/1.1\r\n" % (method.encode(), target.encode()), [(b"host", self._authority)]
            )
            if len(self._begun) < _MOST_BEGUN:  # targets may come from clients
                self._begun[method, target] = begin
        lines = headers if isinstance(headers, bytes) else encode_lines(b"", headers)
        if body is None:
            return b"".join((begin, lines, b"\r\n"))
        pieces = body if isinstance(body, tuple) else (body,)
        return b"".join((begin, lines, b"content-length: %d\r\n\r\n" % sum(map(len, pieces)), *pieces))

    def _take_idle(self) -> ClientConnection | None:
        oldest = monotonic() - self._limits.idle_seconds
        while self._idle:
            connection, since = self._idle.popitem()
            if connection.closed:
                continue
            if since >= oldest:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> ClientConnection:
        loop = asyncio.get_running_loop()
        try:
            async with stall_aware_clock.timeout(self._limits.connect_seconds):
                _, connection = await loop.create_connection(
                    lambda: ClientConnection(self, self._limits, self.name, loop), self._host, self._port, ssl=self._tls
                )
        except TimeoutError:
            raise ConnectError(f"no connection to {self.name} within {self._limits.connect_seconds} s") from None
        except OSError as error:
            raise ConnectError(f"cannot connect to {self.name}: {error}") from error
        if self._closed:
            connection.abort()
            raise ConnectError(f"the pool of {self.name} was closed")
        connection.keep_alive()
        self._open.add(connection)
        return connection

    # Called by connections

    def reusable(self, connection: ClientConnection) -> None:
        """The answer is complete, and the connection can take another request."""
        if self._closed or len(self._idle) >= self._limits.max_idle_connections:
            connection.abort()
        else:
            self._idle[connection] = monotonic()

    def gone(self, connection: ClientConnection) -> None:
        self._open.discard(connection)
        self._idle.pop(connection, None)
