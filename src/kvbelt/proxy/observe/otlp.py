"""Records as OpenTelemetry's spans, sent by OTLP over HTTP. The sole importer of opentelemetry (extra ``traces``).

One trace for each request: the request itself, below it its legs, and below these their parts (spans.py). The worker
of a leg got the leg's id, so that its own spans are below the leg.
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
from kvbelt.proxy.observe.records import Attempt, Record
from kvbelt.proxy.observe.spans import ON_THE_WAY, Span, spans_of
from kvbelt.proxy.observe.trace_context import new_span_id
from kvbelt.wire.notification import TransferDone

_SCOPE = InstrumentationScope("kvbelt.proxy", __version__)
_TRACES_PATH = "/v1/traces"

_SEND_SECONDS = 10.0  #: for one message, the exporter's retries included

Attributes = dict[str, str | int | float | bool]


class OtlpSender:
    """Sends to one receiver: ``http://HOST:4318``, or for an empty ``endpoint`` the environment's."""

    def __init__(self, endpoint: str, instance: str) -> None:
        url = endpoint.rstrip("/") + _TRACES_PATH if endpoint else None
        self._exporter = OTLPSpanExporter(endpoint=url, timeout=_SEND_SECONDS)
        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win over these.
        ours = {SERVICE_NAME: "kvbelt-proxy", SERVICE_VERSION: __version__, SERVICE_INSTANCE_ID: instance}
        named = Resource.create()
        said = {key: value for key, value in named.attributes.items() if key != SERVICE_NAME or _is_named()}
        self._resource = Resource(ours).merge(Resource(said))

    def send(self, records: Sequence[Record]) -> bool:
        """Send the spans of these requests; False: they did not arrive."""
        spans = [span for record in records for span in self.spans(record)]
        return self._exporter.export(spans) is SpanExportResult.SUCCESS

    def close(self) -> None:
        self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def spans(self, record: Record) -> Iterator[ReadableSpan]:
        """The spans of one request. The request itself comes first."""
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
            if part.name.endswith(" leg") or part.name in ("answer", ON_THE_WAY):
                continue
            attributes = _of_transfer(part.leg) if part.leg is not None and part.name == "transfer" else {}
            above = part.leg.span_id if part.leg is not None else trace.span_id
            yield self._span(record, part, (new_span_id(), above), attributes, SpanKind.INTERNAL)

    def _span(
        self, record: Record, span: Span, ids: tuple[bytes, bytes | None], attributes: Attributes, kind: SpanKind
    ) -> ReadableSpan:
        """``ids``: the span's own, and its parent's."""
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


def _known(**attributes: str | float | None) -> Attributes:
    """Kvbelt's own attributes; unknown ones are left out."""
    return {f"kvbelt.{name}": value for name, value in attributes.items() if value is not None}


def _of_request(record: Record) -> Attributes:
    http: Attributes = {"http.request.method": "POST", "http.route": record.route}
    return (
        http
        | {"http.response.status_code": record.status}
        | _known(
            request_id=record.request_id,
            path=record.path,
            stream=record.stream,
            reason=record.reason,
            ttft_seconds=record.time_to_first_token,
            kv=record.kv,
        )
    )


def _of_leg(attempt: Attempt) -> Attributes:
    host, _, port = attempt.worker.rpartition(":")
    address: Attributes = {"server.address": host, "server.port": int(port)}
    return address | _known(transfer_id=attempt.transfer_id or None, reason=attempt.reason)


def _of_transfer(attempt: Attempt) -> Attributes:
    told = attempt.transfer
    if told is None:
        return {}
    common = _known(transfer_id=told.transfer_id, bytes=told.num_bytes)
    if isinstance(told, TransferDone):
        return common | _known(channel=told.channel, tokens=told.num_tokens, writes=told.num_writes)
    return common | _known(reason=told.reason)
