"""One client's connection to the server.

Pipelined requests are parsed as they arrive and answered one at a time, in order. While one waits, the socket is not
read, so that at most one read of the transport (256 KiB) is held.

A client that ends its side of the connection during a request counts as gone: HTTP clients close a connection to end
it, and the server cannot tell the two apart before it writes.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic
from typing import Protocol, cast

import httptools

from kvbelt.http.errors import BadRequestError
from kvbelt.http.exchange import Exchange, Outlet
from kvbelt.http.limits import ServerLimits
from kvbelt.http.message import Headers, Request, add_header, encode_head, target_of

log = logging.getLogger("kvbelt.http")

#: Seconds that a refused client has to read the refusal.
_LINGER_SECONDS = 2.0

Handler = Callable[[Exchange], Awaitable[None]]


class Owner(Protocol):
    """What a connection needs of its server."""

    handler: Handler
    limits: ServerLimits
    draining: bool
    refusal: Callable[[BadRequestError], tuple[Sequence[tuple[bytes, bytes]], bytes]]  #: headers and body of its answer

    def opened(self, connection: "ServerConnection") -> None:
        """A connection has opened."""

    def closed(self, connection: "ServerConnection") -> None:
        """A connection has closed, and its handler has ended."""


class ServerConnection(asyncio.Protocol):
    """Parses requests, and runs the handler for one at a time."""

    def __init__(self, owner: Owner, loop: asyncio.AbstractEventLoop) -> None:
        self._owner = owner
        self._limits = owner.limits
        self._loop = loop
        self._parser = httptools.HttpRequestParser(self)
        self._waiting: deque[Request | BadRequestError] = deque()
        self._task: asyncio.Task[None] | None = None
        self._answering = False  # the task has taken its first step and not its last
        self._outlet: Outlet
        self._transport: asyncio.Transport
        self._reading = True
        self._input_ended = False  # the connection parses no more
        self._refusal: BadRequestError | None = None
        #: The loop's time at which a silent connection is closed; None while a handler runs.
        self.deadline: float | None = None
        self._clear()

    def _clear(self) -> None:
        self._in_head = False
        self._in_body = False
        self._head_bytes = 0
        self._url = b""
        self._target = ""
        self._headers: Headers = {}
        self._body: list[bytes] = []
        self._body_bytes = 0

    @property
    def busy(self) -> bool:
        """Whether a request is being answered or waits to be."""
        return self._task is not None

    # Called by the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=self._limits.write_high_bytes)
        self._outlet = Outlet(self._transport)
        self.deadline = self._loop.time() + self._limits.idle_seconds
        self._owner.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - however it ended
        """Cancel the handler: its client is gone."""
        self._outlet.closed = True
        self._outlet.resume()
        self._waiting.clear()
        self._input_ended = True
        self.deadline = None
        if self._task is not None:
            self._task.cancel()
        if not self._answering:  # a task cancelled before its first step never runs, not even its finally
            self._task = None
            self._owner.closed(self)

    def eof_received(self) -> bool:
        """A client that ends its side during a request is gone (see above)."""
        if self._task is not None:
            self._transport.abort()
        return False

    def pause_writing(self) -> None:
        self._outlet.pause()

    def resume_writing(self) -> None:
        self._outlet.resume()

    def data_received(self, data: bytes) -> None:
        if self._input_ended:
            return
        in_head = self._in_head
        try:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                self._decline(data[offer.args[0] :])
        except httptools.HttpParserError as error:
            self._refuse(self._refusal or BadRequestError(400, f"the request is not HTTP/1.1: {error}"))
        else:
            if in_head and self._in_head:
                self._head_bytes += len(data)
                if self._head_bytes > self._limits.head_bytes:
                    self._refuse(self._head_too_large())
        if self._waiting and self._reading:
            self._reading = False
            self._transport.pause_reading()

    def _decline(self, rest: bytes) -> None:
        """Decline an offer to change protocols (RFC 9110, 7.8): answer in this one, as the connection's last request.

        llhttp stops at the end of such a head; a new parser reads the same head without the offer.
        """
        method = self._parser.get_method()
        if method == b"CONNECT":
            self._refuse(BadRequestError(400, "this server does not serve CONNECT"))
            return
        offered = (b"upgrade", b"connection", b"http2-settings", b"expect")
        headers = [(name, value) for name, value in self._headers.items() if name not in offered]
        head = encode_head(b"%b %b HTTP/1.1\r\n" % (method, self._url), (*headers, (b"connection", b"close")))
        self._parser = httptools.HttpRequestParser(self)
        self._parser.feed_data(head + rest)

    # Called by the parser

    def on_message_begin(self) -> None:
        self._clear()
        self._in_head = True
        if self._task is None:
            self.deadline = self._loop.time() + self._limits.head_seconds

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Trailers are dropped."""
        if not self._in_head:
            return
        self._head_bytes += len(name) + len(value)
        if self._head_bytes + len(self._url) > self._limits.head_bytes:
            self._stop(self._head_too_large())
        if len(name) == 4 and name.lower() == b"host" and b"host" in self._headers:
            self._stop(BadRequestError(400, "a request has one Host header"))
        add_header(self._headers, name, value)

    def on_headers_complete(self) -> None:
        """Refuse what cannot be read, or is too large; answer ``Expect: 100-continue``."""
        self._in_head = False
        self._in_body = True
        if len(self._url) > self._limits.head_bytes:
            self._stop(self._head_too_large())
        if b"host" not in self._headers and self._parser.get_http_version() == "1.1":
            self._stop(BadRequestError(400, "an HTTP/1.1 request needs a Host header"))
        self._check_codings()
        try:
            self._target = target_of(self._parser.get_method(), self._url, self._headers)
        except BadRequestError as error:
            self._stop(error)
        length = self._headers.get(b"content-length")
        if length is not None and int(length) > self._limits.body_bytes:
            self._stop(self._body_too_large(int(length)))
        if self._task is None:
            self.deadline = self._loop.time() + self._limits.body_seconds
        expect = self._headers.get(b"expect")
        if expect is None:
            return
        if expect.lower() != b"100-continue":
            self._stop(BadRequestError(417, f"expectation {expect!r} is not supported; only 100-continue is"))
        # After an unanswered request, 100 would be taken for its answer; the client sends its body after a while.
        if self._task is None and self._parser.get_http_version() == "1.1":
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _check_codings(self) -> None:
        coding = self._headers.get(b"transfer-encoding")
        if coding is not None and self._parser.get_http_version() == "1.0":
            self._stop(BadRequestError(400, "HTTP/1.0 has no Transfer-Encoding; send a Content-Length"))
        if coding is not None and coding.strip().lower() != b"chunked":
            shown = coding[:40].decode("latin-1")
            self._stop(BadRequestError(501, f"transfer coding {shown!r} is not supported; only chunked is"))
        coding = self._headers.get(b"content-encoding")
        if coding is not None and coding.strip().lower() not in (b"", b"identity"):
            shown = coding[:40].decode("latin-1")
            message = f"content coding {shown!r} is not supported; send the body as it is"
            self._stop(BadRequestError(415, message, (b"accept-encoding", b"identity")))

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes > self._limits.body_bytes:
            self._stop(self._body_too_large(None))
        self._body.append(body)

    def on_message_complete(self) -> None:
        if self._parser.should_upgrade():
            return  # its head only: see _decline
        self._in_body = False
        request = Request(
            self._parser.get_method().decode("latin-1"),
            self._target,
            self._parser.get_http_version(),
            self._headers,
            self._body[0] if len(self._body) == 1 else b"".join(self._body),
            keep_alive=self._parser.should_keep_alive(),
            arrived=monotonic(),
        )
        if not request.keep_alive:
            self._input_ended = True
        self._body = []
        if self._task is None:
            self._begin(request)
        else:
            self._waiting.append(request)

    # Answering

    def _begin(self, request: Request) -> None:
        self.deadline = None
        keep_alive = request.keep_alive and not self._owner.draining
        exchange = Exchange(request, self._outlet, keep_alive=keep_alive)
        self._task = self._loop.create_task(self._answer(exchange))

    async def _answer(self, exchange: Exchange) -> None:
        self._answering = True
        try:
            await self._owner.handler(exchange)
            if not exchange.ended:
                raise RuntimeError("the handler returned without ending its answer")  # noqa: TRY301
        except asyncio.CancelledError:
            if not self._outlet.closed:
                self._transport.abort()
        except Exception:
            log.exception("the handler of %r failed", exchange.request)
            if exchange.started:
                self._transport.abort()  # a cut body must not look complete
            else:
                exchange.keep_alive = False
                headers, body = self._owner.refusal(BadRequestError(500, "internal error; the log has more"))
                exchange.respond(500, headers, body)
        finally:
            self._answering = False
            self._task = None
            self._answered(exchange)

    def _answered(self, exchange: Exchange) -> None:
        if self._outlet.closed:
            self._owner.closed(self)
        elif self._transport.is_closing():
            pass  # connection_lost comes next
        elif not exchange.keep_alive or self._owner.draining:
            self._input_ended = True
            self._transport.close()
        elif self._waiting:
            following = self._waiting.popleft()
            if isinstance(following, BadRequestError):
                self._write_refusal(following)
            else:
                self._begin(following)
        else:
            limit = self._limits.idle_seconds
            if self._in_head or self._in_body:
                limit = self._limits.head_seconds if self._in_head else self._limits.body_seconds
            self.deadline = self._loop.time() + limit
            if not self._reading:
                self._reading = True
                self._transport.resume_reading()

    # Refusing

    def _stop(self, refusal: BadRequestError) -> None:
        # Raised in the parser's callback, so that the parser stops.
        self._refusal = refusal
        raise refusal

    def _refuse(self, refusal: BadRequestError) -> None:
        self._input_ended = True
        refusal.asked = self._headers
        if self._task is None:
            self._write_refusal(refusal)
        else:
            self._waiting.append(refusal)

    def _write_refusal(self, refusal: BadRequestError) -> None:
        headers, body = self._owner.refusal(refusal)
        request = Request("GET", "", "1.1", {}, b"", keep_alive=False, arrived=0.0)
        exchange = Exchange(request, self._outlet, keep_alive=False)
        exchange.respond(refusal.status, (*headers, *refusal.more), body)
        # Closing with bytes of the client unread sends a reset, which can overtake the answer. So end our side, and
        # drop the client's bytes until it closes or a moment has passed.
        self._in_head = self._in_body = False
        self._transport.write_eof()
        self.deadline = self._loop.time() + _LINGER_SECONDS
        if not self._reading:
            self._reading = True
            self._transport.resume_reading()

    def _head_too_large(self) -> BadRequestError:
        return BadRequestError(431, f"the request's head is larger than {self._limits.head_bytes} bytes")

    def _body_too_large(self, length: int | None) -> BadRequestError:
        said = "" if length is None else f" of {length} bytes"
        limit = self._limits.body_bytes
        return BadRequestError(413, f"the request's body{said} is larger than the limit of {limit} bytes")

    def expire(self) -> None:
        """Close after the deadline; with 408 if a request had begun."""
        self.deadline = None
        if self._in_head or self._in_body:
            self._refuse(BadRequestError(408, "the request did not arrive in time"))
        else:
            self._transport.close()

    def close_if_idle(self) -> None:
        if self._task is None and not (self._in_head or self._in_body):
            self._transport.close()

    def abort(self) -> None:
        self._transport.abort()
