"""What the client gets: heads, relayed answers, errors; and what the record keeps of it."""

import logging
from collections.abc import Callable
from time import monotonic

from kvbelt.errors import RequestError
from kvbelt.http import Exchange, Response
from kvbelt.proxy.answers import JSON, error_body, error_event
from kvbelt.proxy.legs import excerpt
from kvbelt.proxy.metrics import Metrics
from kvbelt.proxy.records import Record

log = logging.getLogger("kvbelt.proxy")

Header = tuple[bytes, bytes]


class Reply:
    """One client's answer. What has been said is never taken back: an error behind it is an event of its own."""

    def __init__(self, exchange: Exchange, record: Record, metrics: Metrics) -> None:
        self._exchange = exchange
        self._record = record
        self._metrics = metrics

    @property
    def path(self) -> bytes:
        """The value of ``x-kvbelt-path`` as it is now."""
        record = self._record
        value = record.path if record.reason is None else f"{record.path}; reason={record.reason}"
        return (f"{value}; after={','.join(record.after)}" if record.after else value).encode()

    def start(self, kind: Header, first: bytes = b"") -> None:
        """A stream begins."""
        self._exchange.start(200, self._head(kind), first)

    def whole(self, kind: Header, body: bytes) -> None:
        """The answer, in one piece."""
        self._exchange.respond(200, self._head(kind), body)
        self.told_first_token()

    def pass_on(self, response: Response, body: bytes) -> None:
        """A worker's whole answer with its status."""
        if self._exchange.started:
            self.break_off(body)
            return
        headers = self._head((b"content-type", response.headers.get(b"content-type", b"application/json")))
        retry = response.headers.get(b"retry-after")
        if retry is not None:
            headers.append((b"retry-after", retry))
        self._exchange.respond(response.status, headers, body)
        if response.status == 200 and self._record.first_token is None:
            self.told_first_token()

    def fail(self, error: RequestError) -> None:
        """An error of the proxy's own."""
        body = error_body(error.message, kind=error.kind, param=error.param, code=error.status, reason=error.reason)
        self._record.errors += (error.message,)
        if error.reason is not None:
            self._metrics.errors[error.reason] += 1
        if self._exchange.started:
            self.break_off(body)
            return
        headers = self._head(JSON)
        if error.status == 503:
            headers.append((b"retry-after", b"1"))
        self._exchange.respond(error.status, headers, body)

    def break_off(self, body: bytes) -> None:
        """An error inside a stream."""
        if self._exchange.ended:
            return
        self._metrics.broken_streams += 1
        log.warning("a stream ends with an error: %s", excerpt(body), extra={"request_id": self._record.request_id})
        self._exchange.end(error_event(body))

    def comment_path(self) -> None:
        """Say in a stream which way it takes after all."""
        self._exchange.write(b": x-kvbelt-path %b\n\n" % self.path)

    async def stream(self, response: Response, chunk: bytes, transform: Callable[[bytes], bytes] | None) -> None:
        """Whole events, as they come, from the first ``chunk`` on; what a lost worker left of an event is dropped.

        Raises:
            HttpError: the worker's connection has ended.
            RequestError: 502, ``transform`` has raised a ValueError.
        """
        record = self._record
        record.decode_first = monotonic()
        if record.first_token is None:
            self.told_first_token()
        record.streaming = response
        try:
            await self._stream(response, chunk, transform)
        finally:
            record.streaming, record.streamed = None, response.pieces

    async def _stream(self, response: Response, chunk: bytes, transform: Callable[[bytes], bytes] | None) -> None:
        exchange = self._exchange
        rest = b""
        while chunk:
            events = rest + chunk if rest else chunk
            rest = b""
            if not events.endswith(b"\n\n"):
                whole = events.rfind(b"\n\n") + 2
                if whole == 1:  # not one event is complete
                    events, rest = b"", events
                else:
                    events, rest = events[:whole], events[whole:]
            if events:
                shown = events if transform is None else self._transformed(events, transform)
                if response.complete and not rest:  # as is usual, the last events and the end came together
                    exchange.end(shown)
                    return
                exchange.write(shown)
                if exchange.paused:
                    await exchange.drain()
            chunk = await response.chunk()
        exchange.end(rest)

    def _transformed(self, events: bytes, transform: Callable[[bytes], bytes]) -> bytes:
        try:
            return transform(events)
        except ValueError as error:
            raise RequestError(
                f"{self._record.decode_worker} sent an event that is not a completion's: {error}",
                status=502,
                kind="upstream_error",
                reason="bad_answer",
            ) from None

    def _head(self, kind: Header) -> list[Header]:
        head = [kind, (b"x-request-id", self._record.request_id.encode())]
        if self._record.path:
            head.append((b"x-kvbelt-path", self.path))
        return head

    def told_first_token(self) -> None:
        """It has been handed to the client's socket."""
        self._record.first_token = monotonic()
        self._metrics.first_token(self._record)
