"""The client's answer: heads, relayed streams, errors; and the record of it."""

import logging
from collections.abc import Callable
from time import monotonic

from kvbelt.errors import RequestError
from kvbelt.http import JSON, Exchange, Response
from kvbelt.proxy.observe.metrics import Metrics
from kvbelt.proxy.observe.records import Record
from kvbelt.proxy.request.merge import error_event, excerpt
from kvbelt.routing.booking import Booking
from kvbelt.wire.api_error import error_body

log = logging.getLogger("kvbelt.proxy")

Header = tuple[bytes, bytes]


class Reply:
    """One client's answer. An error after the head becomes an event of the stream."""

    def __init__(self, exchange: Exchange, record: Record, metrics: Metrics) -> None:
        self._exchange = exchange
        self._record = record
        self._metrics = metrics

    @property
    def path(self) -> bytes:
        """The present value of ``x-kvbelt-path``."""
        record = self._record
        value = record.path if record.reason is None else f"{record.path}; reason={record.reason}"
        return (f"{value}; after={','.join(record.after)}" if record.after else value).encode()

    def start(self, kind: Header, first: bytes = b"") -> None:
        self._exchange.start(200, self._head(kind), first)

    def whole(self, kind: Header, body: bytes) -> None:
        self._exchange.respond(200, self._head(kind), body)
        self.told_first_token()

    def pass_on(self, response: Response, body: bytes) -> None:
        headers = self._head((b"content-type", response.headers.get(b"content-type", JSON[1])))
        retry = response.headers.get(b"retry-after")
        if retry is not None:
            headers.append((b"retry-after", retry))
        self._exchange.respond(response.status, headers, body)
        if response.status == 200 and self._record.first_token is None:
            self.told_first_token()

    def fail(self, error: RequestError, retry_after: int = 1) -> None:
        """Answer with an error of the proxy itself. ``retry_after``: seconds, for what may succeed later."""
        body = error_body(error.message, kind=error.kind, param=error.param, code=error.code, reason=error.reason)
        self._record.errors += (error.message,)
        if error.reason is not None:
            self._metrics.errors[error.reason] += 1
        if self._exchange.started:
            self.break_off(body)
            return
        headers = self._head(JSON)
        if error.status in (429, 503):
            headers.append((b"retry-after", b"%d" % retry_after))
        self._exchange.respond(error.status, headers, body)

    def break_off(self, body: bytes) -> None:
        """End a stream with an error event."""
        if self._exchange.ended:
            return
        self._metrics.broken_streams += 1
        log.warning("a stream ends with an error: %s", excerpt(body), extra={"request_id": self._record.request_id})
        self._exchange.end(error_event(body))

    def comment_path(self) -> None:
        """Tell a new path inside a stream."""
        self._exchange.write(b": x-kvbelt-path %b\n\n" % self.path)

    async def stream(
        self,
        response: Response,
        chunk: bytes,
        transform: Callable[[bytes], bytes] | None,
        booking: Booking | None = None,
    ) -> None:
        """Relay whole events as they arrive, beginning with ``chunk``; a lost worker's incomplete event is dropped.

        ``booking`` learns how much has been generated.

        Raises:
            HttpError: the worker's connection ended.
            ValueError: by ``transform``.
        """
        record = self._record
        record.decode_first = monotonic()
        if record.first_token is None:
            self.told_first_token()
        record.streaming = response
        exchange = self._exchange
        rest = b""
        try:
            while chunk:
                if booking is not None:
                    booking.generated = response.pieces
                events = rest + chunk if rest else chunk
                rest = b""
                if not events.endswith(b"\n\n"):
                    end = events.rfind(b"\n\n")
                    whole = 0 if end < 0 else end + 2
                    events, rest = events[:whole], events[whole:]
                if events:
                    shown = events if transform is None else transform(events)
                    if response.complete and not rest:  # usually the last events and the end arrive together
                        exchange.end(shown)
                        return
                    exchange.write(shown)
                    if exchange.paused:
                        await exchange.drain()
                chunk = await response.chunk()
            exchange.end(rest)
        finally:
            record.streaming, record.streamed = None, response.pieces

    def _head(self, kind: Header) -> list[Header]:
        head = [kind, (b"x-request-id", self._record.request_id.encode())]
        if self._record.path:
            head.append((b"x-kvbelt-path", self.path))
        if self._record.action:
            head.append((b"x-kvbelt-placement", self._placement))
        return head

    @property
    def _placement(self) -> bytes:
        record = self._record
        value = record.action
        if record.predicted is not None:
            value += f"; predicted-ttft-ms={round(1e3 * (record.predicted - record.began))}"
        return (f"{value}; waited-ms={round(1e3 * record.waited)}" if record.waited else value).encode()

    def told_first_token(self) -> None:
        """The first token was written to the client's socket."""
        self._record.first_token = monotonic()
        self._metrics.first_token(self._record)
