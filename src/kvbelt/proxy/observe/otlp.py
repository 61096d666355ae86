"""From records to OpenTelemetry's spans, sent by OTLP over HTTP. The sole importer of opentelemetry (extra ``traces``).

One trace a request: the request itself, below it its legs, and below these their parts (spans.py). A leg's id was told
to its worker, so that a worker's own spans stand below its leg.
"""

import os
from collections.abc import Iterator, Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from kvbelt import __version__
from kvbelt.proxy.records import Attempt, Record
from kvbelt.proxy.spans import Span, spans_of
from kvbelt.proxy.trace_context import Ids
from kvbelt.wire.notification import TransferDone

_SCOPE = InstrumentationScope("kvbelt.proxy", __version__)
_TRACES_PATH = "/v1/traces"

#: Of one message. Retries within it are the exporter's.
_SEND_SECONDS = 10.0

Attributes = dict[str, str | int | float | bool]


class OtlpSender:
    """Sends to one receiver.

    Args:
        endpoint: as ``OTEL_EXPORTER_OTLP_ENDPOINT`` has it, ``http://HOST:4318``; empty: what the environment says.
        instance: tells this proxy from others.
    """

    def __init__(self, endpoint: str, instance: str) -> None:
        url = endpoint.rstrip("/") + _TRACES_PATH if endpoint else None
        self._exporter = OTLPSpanExporter(endpoint=url, timeout=_SEND_SECONDS)
        # What OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say stands above these.
        ours = {SERVICE_NAME: "kvbelt-proxy", SERVICE_VERSION: __version__, SERVICE_INSTANCE_ID: instance}
        named = Resource.create()
        said = {key: value for key, value in named.attributes.items() if key != SERVICE_NAME or _is_named()}
        self._resource = Resource(ours).merge(Resource(said))
        self._ids = Ids()

    def send(self, records: Sequence[Record]) -> bool:
        """Send the spans of these requests; False: they did not arrive."""
        spans = [span for record in records for span in self.spans(record)]
        return self._exporter.export(spans) is SpanExportResult.SUCCESS

    def close(self) -> None:
        """Give up what is being sent, and free everything."""
        self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def spans(self, record: Record) -> Iterator[ReadableSpan]:
        """One request's. The request itself comes first."""
        trace = record.trace
        assert trace is not None
        parent = None if trace.parent is None else trace.parent.span_id
        ended = record.ended if record.ended is not None else record.began
        failed = "; ".join(record.errors) if record.status >= 500 else None
        whole = Span(f"POST {record.route}", 0.0, ended - record.began, failed=failed)
        yield self._span(record, whole, (trace.span_id, parent), _of_request(record), SpanKind.SERVER)
        for attempt in record.attempts:
            start = attempt.began - record.began
            until = next((at for at in (attempt.ended, attempt.answered) if at is not None), ended)
            if attempt is record.attempts[-1] and attempt.leg == "decode":
                until = ended  # its answer went on to the end
            failed = attempt.detail or attempt.reason
            leg = Span(f"{attempt.leg} leg", start, until - attempt.began, failed=failed)
            yield self._span(record, leg, (attempt.span_id, trace.span_id), _of_leg(attempt), SpanKind.CLIENT)
        for part in spans_of(record):
            if part.name.endswith(" leg") or part.name == "answer":
                continue
            owner = _leg_of(record, part)
            attributes = _of_transfer(owner) if owner is not None and part.name == "transfer" else {}
            above = owner.span_id if owner is not None else trace.span_id
            yield self._span(record, part, (self._ids.span(), above), attributes, SpanKind.INTERNAL)

    def _span(
        self,
        record: Record,
        span: Span,
        ids: tuple[bytes, bytes | None],
        attributes: Attributes,
        kind: SpanKind,
    ) -> ReadableSpan:
        """``ids``: its own, and that of the one above it."""
        (span_id, parent), failed = ids, span.failed
        trace = record.trace
        assert trace is not None
        began = record.unix_time + span.start

        def context(of: bytes) -> SpanContext:
            return SpanContext(int(trace.trace_id, 16), int(of, 16), is_remote=False, trace_flags=TraceFlags(1))

        return ReadableSpan(
            span.name,
            context=context(span_id),
            parent=None if parent is None else context(parent),
            resource=self._resource,
            attributes=attributes,
            kind=kind,
            status=Status(StatusCode.ERROR, failed) if failed else Status(),
            start_time=int(began * 1e9),
            end_time=int((began + max(0.0, span.duration)) * 1e9),
            instrumentation_scope=_SCOPE,
        )


def _is_named() -> bool:
    return bool(os.environ.get("OTEL_SERVICE_NAME")) or "service.name" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")


def _of_request(record: Record) -> Attributes:
    said: Attributes = {
        "http.request.method": "POST",
        "http.route": record.route,
        "http.response.status_code": record.status,
        "kvbelt.request_id": record.request_id,
        "kvbelt.path": record.path,
        "kvbelt.stream": record.stream,
    }
    if record.reason is not None:
        said["kvbelt.reason"] = record.reason
    if record.first_token is not None:
        said["kvbelt.ttft_seconds"] = record.first_token - record.began
    if record.kv is not None:
        said["kvbelt.kv"] = record.kv
    return said


def _of_leg(attempt: Attempt) -> Attributes:
    host, _, port = attempt.worker.rpartition(":")
    said: Attributes = {"server.address": host, "server.port": int(port)}
    if attempt.transfer_id:
        said["kvbelt.transfer_id"] = attempt.transfer_id
    if attempt.reason is not None:
        said["kvbelt.reason"] = attempt.reason
    return said


def _of_transfer(attempt: Attempt) -> Attributes:
    told = attempt.transfer
    if told is None:
        return {}
    said: Attributes = {"kvbelt.transfer_id": told.transfer_id, "kvbelt.bytes": told.num_bytes}
    if isinstance(told, TransferDone):
        return said | {
            "kvbelt.channel": told.channel,
            "kvbelt.tokens": told.num_tokens,
            "kvbelt.writes": told.num_writes,
        }
    return said | {"kvbelt.reason": told.reason}


def _leg_of(record: Record, part: Span) -> Attempt | None:
    """The leg that a part belongs to: the latest one to its worker that had begun by then."""
    legs = [one for one in record.attempts if one.worker == part.worker]
    begun = [one for one in legs if one.began - record.began <= part.start + 1e-6]
    return next(reversed(begun or legs), None)
