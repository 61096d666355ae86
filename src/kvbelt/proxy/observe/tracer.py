"""Traces: one a request, made of its record once it has ended (otlp.py), and sent by a thread of its own.

A request pays for some random digits and a place in a queue. The queue is bounded: what finds no place in it is dropped
and counted, so that a receiver that is slow or gone costs nobody anything.
"""

import logging
import threading
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Protocol

from kvbelt.errors import SettingsError, StartError
from kvbelt.http import Headers
from kvbelt.proxy.records import Record
from kvbelt.proxy.settings import ProxySettings
from kvbelt.proxy.trace_context import Ids, Parent, Trace, parse_traceparent

log = logging.getLogger("kvbelt.proxy")

#: Traces that wait to be sent.
MAX_WAITING = 2048

#: Of one message to the receiver.
_MAX_BATCH = 256

#: Between two looks at the queue. A transfer's end may be told a moment after its request has ended.
_PAUSE_SECONDS = 1.0

#: For what still waits when the proxy ends.
_CLOSE_SECONDS = 3.0

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

_OUTCOMES = ("sent", "failed", "dropped")


class Sender(Protocol):
    """Where traces go."""

    def send(self, records: Sequence[Record]) -> bool:
        """Send the spans of these requests; False: they did not arrive."""

    def close(self) -> None:
        """Give up what is being sent, and free everything."""


class Tracer:
    """Of one proxy. ``begin`` and ``ended`` belong to the event loop.

    Args:
        sender: where traces go; None: nothing is recorded, and clients' contexts are passed on as they are.
        ratio: share of the requests that is traced where the client does not say.
    """

    def __init__(self, sender: Sender | None = None, ratio: float = 1.0, most: int = MAX_WAITING) -> None:
        self._sender = sender
        self._ratio = ratio
        self._most = most
        self._ids = Ids()
        self._waiting: deque[Record] = deque()
        self.outcomes: Counter[str] = Counter(dict.fromkeys(_OUTCOMES, 0))  #: of traces
        self._wake = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to send."""
        if self._sender is not None:
            self._thread = threading.Thread(target=self._run, args=(self._sender,), name="kvbelt-traces", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Send what waits, for a moment, and end. Idempotent; takes at most some seconds."""
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(_CLOSE_SECONDS)
            if self._thread.is_alive() and self._sender is not None:
                self._sender.close()

    def begin(self, headers: Headers) -> Trace | None:
        """The trace of a request that has come; None: it has none. Of one that is not kept, workers are told so."""
        said = headers.get(b"traceparent")
        parent = parse_traceparent(said) if said is not None else None
        if self._sender is None and parent is None:
            return None
        state = headers.get(b"tracestate", b"") if parent is not None else b""
        recorded = self._sender is not None and self._wanted(parent)
        if parent is not None and not recorded:
            return Trace(parent.trace_id, parent, parent.span_id, False, state)
        trace_id = parent.trace_id if parent is not None else self._ids.trace()
        return Trace(trace_id, parent, self.new_span(), recorded, state)

    def _wanted(self, parent: Parent | None) -> bool:
        return parent.sampled if parent is not None else self._ratio >= 1.0 or self._ids.chance() < self._ratio

    def new_span(self) -> bytes:
        """An id."""
        return self._ids.span()

    def ended(self, record: Record) -> None:
        """A request is over."""
        if record.trace is None or not record.trace.recorded:
            return
        if len(self._waiting) >= self._most:
            self.outcomes["dropped"] += 1
        else:
            self._waiting.append(record)

    # The thread

    def _run(self, sender: Sender) -> None:
        while not self._closing:
            self._wake.wait(_PAUSE_SECONDS)
            self._send_all(sender)
        sender.close()

    def _send_all(self, sender: Sender) -> None:
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(_MAX_BATCH, len(self._waiting)))]
            try:
                sent = sender.send(batch)
            except Exception:
                log.exception("traces could not be made")
                sent = False
            self.outcomes["sent" if sent else "failed"] += len(batch)


def sender_of(settings: ProxySettings) -> Sender | None:
    """Where a proxy's traces go; None: nowhere.

    Raises:
        StartError: somewhere, but the packages for it are not installed.
    """
    if settings.otlp_endpoint is None:
        return None
    try:
        from kvbelt.proxy.otlp import OtlpSender  # noqa: PLC0415 -- of an extra, and only if it is used
    except ImportError as error:
        said = f"traces need kvbelt's extra: pip install 'kvbelt[traces]' ({error})"
        if settings.otlp_endpoint:
            raise StartError(said) from None
        log.warning("OpenTelemetry's variables ask for traces, and there are none: %s", said)  # they may be everybody's
        return None
    return OtlpSender(settings.otlp_endpoint, f"{settings.host}:{settings.port}")


def wish_of(environment: Mapping[str, str]) -> tuple[str | None, float]:
    """What OpenTelemetry's variables ask for: an endpoint (None: no traces; empty: theirs) and a ratio.

    Raises:
        SettingsError: OTEL_TRACES_SAMPLER_ARG is no ratio.
    """
    off = (
        environment.get("OTEL_SDK_DISABLED", "").lower() == "true" or environment.get("OTEL_TRACES_EXPORTER") == "none"
    )
    asked = any(environment.get(name) for name in _ENDPOINTS)
    ratio = 1.0
    match environment.get("OTEL_TRACES_SAMPLER", "").removeprefix("parentbased_"):
        case "always_off":
            ratio = 0.0
        case "traceidratio":
            said = environment.get("OTEL_TRACES_SAMPLER_ARG", "1.0")
            try:
                ratio = float(said)
            except ValueError:
                raise SettingsError(f"OTEL_TRACES_SAMPLER_ARG is {said!r}; it is a ratio from 0 to 1") from None
    return ("" if asked and not off else None), ratio
