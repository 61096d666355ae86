"""One trace for each request, made of its record once it has ended (otlp.py), and sent by a separate thread.

A request costs some random digits and a place in a queue. The queue is bounded, and traces that do not fit are dropped
and counted, so that a slow or missing receiver slows no request.
"""

import logging
import random
import threading
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Protocol

from kvbelt.errors import SettingsError, StartError
from kvbelt.http import Headers
from kvbelt.proxy.observe.records import Record
from kvbelt.proxy.observe.trace_context import Trace, new_span_id, new_trace_id, parse_traceparent

log = logging.getLogger("kvbelt.proxy")

MAX_WAITING = 2048  #: traces that may wait to be sent
_MAX_BATCH = 256  #: traces in one message to the receiver

#: Between two rounds of sending. A transfer's end may be reported a moment after its request has ended.
_PAUSE_SECONDS = 1.0

_CLOSE_SECONDS = 3.0  #: for the traces that still wait when the proxy ends

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

_OUTCOMES = ("sent", "failed", "dropped")


class Sender(Protocol):
    def send(self, records: Sequence[Record]) -> bool:
        """Send the spans of these requests; False: they did not arrive."""

    def close(self) -> None:
        """Give up what is being sent, and free everything."""


class Tracer:
    """The traces of one proxy. ``begin`` and ``ended`` are for the event loop's thread.

    Without a sender nothing is recorded, and clients' contexts are passed on as they are. ``ratio`` of the requests is
    traced where the client does not decide.
    """

    def __init__(self, sender: Sender | None = None, ratio: float = 1.0, most: int = MAX_WAITING) -> None:
        self._sender = sender
        self._ratio = ratio
        self._most = most
        self._waiting: deque[Record] = deque()
        self.outcomes: Counter[str] = Counter(dict.fromkeys(_OUTCOMES, 0))  #: of traces
        self._wake = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._sender is not None:
            self._thread = threading.Thread(target=self._run, args=(self._sender,), name="kvbelt-traces", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Send the waiting traces, for at most some seconds, and end. Idempotent."""
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(_CLOSE_SECONDS)
            if self._thread.is_alive() and self._sender is not None:
                self._sender.close()

    def begin(self, headers: Headers) -> Trace | None:
        """The trace of a new request; None: it has none."""
        said = headers.get(b"traceparent")
        parent = parse_traceparent(said) if said is not None else None
        if self._sender is None and parent is None:
            return None
        state = headers.get(b"tracestate", b"") if parent is not None else b""
        wanted = parent.sampled if parent is not None else self._ratio >= 1.0 or random.random() < self._ratio  # noqa: S311
        recorded = self._sender is not None and wanted
        if parent is not None and not recorded:
            return Trace(parent.trace_id, parent, parent.span_id, False, state)
        trace_id = parent.trace_id if parent is not None else new_trace_id()
        return Trace(trace_id, parent, new_span_id(), recorded, state)

    def ended(self, record: Record) -> None:
        if record.trace is None or not record.trace.recorded:
            return
        if len(self._waiting) >= self._most:
            self.outcomes["dropped"] += 1
        else:
            self._waiting.append(record)

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


def sender_of(endpoint: str | None, instance: str) -> Sender | None:
    """The receiver of traces, if there is one, which knows this proxy as ``instance``.

    Raises StartError: the packages for it are not installed.
    """
    if endpoint is None:
        return None
    try:
        from kvbelt.proxy.observe.otlp import OtlpSender  # noqa: PLC0415 -- of an extra
    except ImportError as error:
        said = f"traces need packages that are missing ({error}): pip install 'kvbelt[traces]'"
        if endpoint:
            raise StartError(said) from None
        # The variables may be meant for other processes.
        log.warning("OpenTelemetry's variables ask for traces, but none are sent: %s", said)
        return None
    return OtlpSender(endpoint, instance)


def wish_of(environment: Mapping[str, str]) -> tuple[str | None, float]:
    """The endpoint (None: no traces; empty: the variables' own) and the ratio of OpenTelemetry's variables."""
    disabled = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    off = disabled or environment.get("OTEL_TRACES_EXPORTER") == "none"
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
