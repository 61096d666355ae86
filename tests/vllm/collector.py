"""An OpenTelemetry collector for tests: takes spans by OTLP over gRPC, vLLM's default, and over HTTP."""

import gzip
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span


@dataclass(frozen=True, slots=True)
class Told:
    """A span and the process that sent it."""

    span: Span
    service: str  #: ``service.name``

    @property
    def trace(self) -> str:
        """The trace's id."""
        return self.span.trace_id.hex()

    @property
    def attributes(self) -> dict[str, Any]:
        return _attributes(self.span.attributes)


def _attributes(told: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in told}


class Collector(TraceServiceServicer):
    """Keeps the spans that it receives."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[Told] = []
        self.grpc = ""  #: where it takes spans over gRPC
        self.http = ""  #: ... and over HTTP: a base, below which ``/v1/traces`` is

    def of(self, trace: str) -> list[Told]:
        """The spans of a trace so far."""
        with self._lock:
            return [told for told in self._spans if told.trace == trace]

    def named(self, name: str) -> list[Told]:
        """All spans of this name so far."""
        with self._lock:
            return [told for told in self._spans if told.span.name == name]

    def take(self, message: ExportTraceServiceRequest) -> None:
        """Keep the spans of a message."""
        with self._lock:
            for of_resource in message.resource_spans:
                service = _attributes(of_resource.resource.attributes).get("service.name", "")
                self._spans += [Told(span, service) for scope in of_resource.scope_spans for span in scope.spans]

    def Export(self, request: ExportTraceServiceRequest, context: object) -> ExportTraceServiceResponse:  # noqa: N802
        """The method that gRPC names."""
        self.take(request)
        return ExportTraceServiceResponse()


def _handler_of(collector: Collector) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            known = self.path == "/v1/traces"
            if known:
                collector.take(ExportTraceServiceRequest.FromString(body))
            self.send_response(200 if known else 404)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            """Nothing."""

    return Handler


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector on free ports."""
    collector = Collector()
    by_grpc = grpc.server(ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(collector, by_grpc)
    collector.grpc = f"http://127.0.0.1:{by_grpc.add_insecure_port('127.0.0.1:0')}"
    by_grpc.start()
    by_http = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(collector))
    collector.http = f"http://127.0.0.1:{by_http.server_port}"
    thread = threading.Thread(target=by_http.serve_forever)
    thread.start()
    try:
        yield collector
    finally:
        by_http.shutdown()
        by_http.server_close()
        thread.join()
        by_grpc.stop(None).wait()
