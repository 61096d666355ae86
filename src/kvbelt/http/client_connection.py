"""One connection to a server: sends a request, parses the answer, goes back to its pool."""

import asyncio
from typing import Protocol, cast

import httptools

from kvbelt.http.errors import HttpError, PeerClosedError, ProtocolViolationError
from kvbelt.http.limits import ClientLimits
from kvbelt.http.message import add_header
from kvbelt.http.response import Response, Stage


class Keeper(Protocol):
    """The pool, as its connections see it."""

    def reusable(self, connection: "ClientConnection") -> None:
        """The answer is complete and the connection takes another request."""

    def gone(self, connection: "ClientConnection") -> None:
        """The connection has ended."""


class ClientConnection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self, keeper: Keeper, limits: ClientLimits, name: str, loop: asyncio.AbstractEventLoop) -> None:
        self._keeper = keeper
        self._limits = limits
        self._name = name  # the peer, for messages
        self._loop = loop
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._response: Response | None = None
        self._head_bytes = 0
        self._until_eof = False  # the body has no length and ends with the connection
        self._paused = False
        self.served = 0  #: requests sent on this connection
        self.closed = False

    def send(self, request: bytes) -> Response:
        """Write a request; its answer arrives in the response returned."""
        assert self._transport is not None  # the pool hands out connected ones only
        self.served += 1
        self._head_bytes = 0
        self._until_eof = False
        self._response = Response(self, self._loop, self._limits.read_high_bytes)
        self._transport.write(request)
        return self._response

    def abort(self) -> None:
        """Close at once, so that the peer notices."""
        self._fail(PeerClosedError("closed by this side"))

    def fail(self, error: HttpError) -> None:
        """Close at once; whoever waits for the answer gets this error."""
        self._fail(error)

    def resume(self) -> None:
        """The reader has taken what was buffered."""
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()

    # The transport's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The peer has accepted."""
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended: well, if that is what ends the body."""
        self.closed = True
        response, self._response = self._response, None
        if response is not None:
            if self._until_eof and exc is None:
                response.complete = True
                response.reached(Stage.END)
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
        self._keeper.gone(self)

    def eof_received(self) -> bool:
        """The peer sends nothing more: close our side too."""
        return False

    def data_received(self, data: bytes) -> None:
        """Parse, and wake the reader."""
        response = self._response
        if response is None:
            # Nothing was asked: a peer that answers anyway is not to be trusted with the next request.
            self._close()
            return
        response.started = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail(ProtocolViolationError(f"{self._name} changed protocols, which nobody had asked for"))
            return
        except httptools.HttpParserError as error:
            if not response.complete:
                self._fail(ProtocolViolationError(f"{self._name} did not answer in HTTP/1.1: {error}"))
                return
            self._close()  # what follows the complete answer is malformed; the answer itself is good
        if not response.head_complete:
            self._head_bytes += len(data)
            if self._head_bytes > self._limits.head_bytes:
                limit = self._limits.head_bytes
                self._fail(ProtocolViolationError(f"{self._name} sent a head of more than {limit} bytes"))
            return
        if response.complete:
            response.reached(Stage.END)
        elif response.buffered:
            response.reached(Stage.DATA)
            if response.buffered > response.pause_bytes and not self._paused and self._transport is not None:
                self._paused = True
                self._transport.pause_reading()
                response.reached(Stage.END)  # a reader of the whole body sees that it is too large
        else:
            response.reached(Stage.HEAD)

    # The parser's calls

    def on_message_begin(self) -> None:
        """An answer begins; one behind a complete answer was not asked for."""
        if self._response is None:
            self._close()

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header; trailers are dropped."""
        response = self._response
        if response is not None and not response.head_complete:
            add_header(response.headers, name, value)

    def on_headers_complete(self) -> None:
        """The head is there, unless it is an interim one (100, 103)."""
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

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        if self._response is not None:
            self._response.add(body)

    def on_message_complete(self) -> None:
        """The answer is complete."""
        response = self._response
        if response is None or not response.head_complete:
            return
        response.complete = True
        self._response = None
        self.resume()
        if self._parser.should_keep_alive():
            self._keeper.reusable(self)
        else:
            self._close()

    def _fail(self, error: HttpError) -> None:
        response, self._response = self._response, None
        if response is not None:
            response.fail(error)
        self._close()

    def _close(self) -> None:
        self.closed = True
        if self._transport is not None:
            self._transport.abort()
