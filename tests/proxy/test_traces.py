"""Traces, as a real OTLP/HTTP receiver gets them."""

import asyncio
import gzip
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from kvbelt.errors import SettingsError, StartError
from kvbelt.http import Exchange, Server
from kvbelt.proxy import Address, ProxySettings
from kvbelt.proxy.observe.trace_context import Parent, parse_traceparent
from kvbelt.proxy.observe.tracer import Tracer, sender_of, wish_of
from kvbelt.wire.ids import EngineId, TransferId
from kvbelt.wire.notification import TransferDone, encode
from tests.proxy.support import Deployment, async_test, eventually

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CLIENT = ((b"traceparent", f"00-{TRACE}-{SPAN}-01".encode()), (b"tracestate", b"vendor=1"))
STREAM = {"prompt": "x", "max_tokens": 3, "stream": True}


class Receiver:
    """Takes spans at /v1/traces."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.services: set[str] = set()
        self.status = 200

    async def handle(self, exchange: Exchange) -> None:
        """One message."""
        request = exchange.request
        assert request.target == "/v1/traces"
        body = gzip.decompress(request.body) if request.headers.get(b"content-encoding") == b"gzip" else request.body
        message = ExportTraceServiceRequest.FromString(body)
        for of_resource in message.resource_spans:
            self.services |= {a.value.string_value for a in of_resource.resource.attributes if a.key == "service.name"}
            self.spans += [span for scope in of_resource.scope_spans for span in scope.spans]
        exchange.respond(self.status, (), b"")

    def named(self, name: str) -> Span:
        """The only span of this name."""
        (found,) = [span for span in self.spans if span.name == name]
        return found


@asynccontextmanager
async def receiver() -> AsyncIterator[tuple[Receiver, str]]:
    """A running receiver and its endpoint."""
    got = Receiver()
    server = Server(got.handle)
    port = await server.start("127.0.0.1", 0)
    try:
        yield got, f"http://127.0.0.1:{port}"
    finally:
        await server.close(0.1)


def attributes(span: Span) -> dict:
    """The attributes of a span."""
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


@async_test
async def test_a_request_is_one_trace_across_its_legs_and_the_transfer() -> None:
    """The client's span is the root's parent. Each worker gets its leg's id. All spans lie within the request."""
    async with receiver() as (got, url), Deployment(otlp_endpoint=url) as deployment:
        prefill, decode = deployment.prefill[0], deployment.decode[0]
        going_on = decode.script.before_head = asyncio.Event()
        asking = asyncio.create_task(deployment.ask(STREAM, headers=CLIENT))
        await eventually(lambda: decode.requests)
        transfer = prefill.requests[0][2]["kv_transfer_params"]["transfer_id"]
        done = TransferDone(
            transfer_id=TransferId(transfer), sender=EngineId("p0"), receiver=EngineId("d0"), num_bytes=2_000_000,
            seconds=0.001, channel="nixl", num_tokens=5, num_writes=3, exposed_seconds=0.0005,
        )  # fmt: skip
        await deployment.notify(encode(done))
        await eventually(lambda: deployment.proxy.context.metrics.transfer_size.count)
        going_on.set()
        assert (await asking).status == 200
        await eventually(lambda: got.spans)
        root, first, second = (got.named(name) for name in ("POST /v1/completions", "prefill leg", "decode leg"))
        assert {span.trace_id.hex() for span in got.spans} == {TRACE}
        assert root.parent_span_id.hex() == SPAN
        assert root.kind == Span.SPAN_KIND_SERVER
        assert attributes(root)["kvbelt.path"] == "first-token"
        assert attributes(root)["http.response.status_code"] == 200
        assert first.parent_span_id == second.parent_span_id == root.span_id
        for leg, standin in ((first, prefill), (second, decode)):
            head = standin.requests[0][1]
            assert head[b"traceparent"].decode() == f"00-{TRACE}-{leg.span_id.hex()}-01"
            assert head[b"tracestate"] == b"vendor=1"
        assert got.named("queue").parent_span_id == got.named("prefill").parent_span_id == first.span_id
        assert got.named("transfer").parent_span_id == first.span_id
        assert attributes(got.named("transfer"))["kvbelt.bytes"] == 2_000_000
        assert got.named("KV wait").parent_span_id == second.span_id
        for span in got.spans:
            assert root.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert got.services == {"kvbelt-proxy"}
        # The proxy counts it once it has the receiver's answer.
        await eventually(lambda: deployment.proxy.context.tracer.outcomes["sent"])
        metrics = (await deployment.get("/metrics")).body
        assert b'kvbelt_proxy_traces_total{outcome="sent"} 1.0' in metrics


@async_test
async def test_a_failed_leg_is_an_error_in_its_trace() -> None:
    """The request has no error if another worker answers it."""
    async with receiver() as (got, url), Deployment(prefill=2, otlp_endpoint=url) as deployment:
        deployment.prefill[0].script.status = 503
        assert (await deployment.ask(STREAM)).status == 200
        await eventually(lambda: got.spans)
        legs = [span for span in got.spans if span.name == "prefill leg"]
        assert [leg.status.code for leg in legs] == [Status.STATUS_CODE_ERROR, Status.STATUS_CODE_UNSET]
        assert attributes(legs[0])["kvbelt.reason"] == "prefill_5xx"
        assert got.named("POST /v1/completions").status.code == Status.STATUS_CODE_UNSET
        assert got.named("POST /v1/completions").parent_span_id == b""


@async_test
async def test_without_traces_a_client_s_context_is_passed_on_as_it_is() -> None:
    """A request without a context gets none."""
    async with Deployment() as deployment:
        await deployment.ask(STREAM, headers=CLIENT, request_id="a")
        await deployment.ask(STREAM, request_id="b")
        for standin in (deployment.prefill[0], deployment.decode[0]):
            with_one, without = (head for _, head, _ in standin.requests)
            assert with_one[b"traceparent"] == CLIENT[0][1]
            assert b"traceparent" not in without


@async_test
async def test_a_trace_that_the_client_does_not_sample_is_not_sent() -> None:
    """Workers get the client's flag unchanged."""
    async with receiver() as (got, url), Deployment(otlp_endpoint=url) as deployment:
        unkept = (b"traceparent", f"00-{TRACE}-{SPAN}-00".encode())
        await deployment.ask(STREAM, headers=(unkept,), request_id="a")
        assert deployment.decode[0].requests[0][1][b"traceparent"] == unkept[1]
        await deployment.ask(STREAM, request_id="b")
        await eventually(lambda: got.spans)
        assert TRACE not in {span.trace_id.hex() for span in got.spans}


@async_test
async def test_workers_learn_that_the_proxy_keeps_no_trace() -> None:
    """A request outside ``trace_ratio`` has an unsampled trace. Without one a vLLM server would begin its own."""
    async with receiver() as (got, url), Deployment(otlp_endpoint=url, trace_ratio=0.0) as deployment:
        await deployment.ask(STREAM)
        told = [standin.requests[0][1][b"traceparent"] for standin in (deployment.prefill[0], deployment.decode[0])]
        assert told[0] == told[1]
        parent = parse_traceparent(told[0])
        assert parent is not None
        assert not parent.sampled
        assert not got.spans


@pytest.mark.parametrize("traced", [True, False], ids=["traced", "untraced"])
@async_test
async def test_the_proxy_s_own_questions_begin_no_trace(traced: bool) -> None:
    """Its questions to vLLM servers carry an unsampled trace if traces are on."""
    async with receiver() as (_, url):
        deployment = Deployment(otlp_endpoint=url if traced else None)
        prefill, decode = deployment.prefill[0], deployment.decode[0]
        for standin in (prefill, decode):
            standin.script.vllm_metrics, standin.more_health = "", {"engine": "vllm"}
        prefill.script.peers_status, prefill.script.peers_by_request = 404, True
        async with deployment:
            assert len(prefill.questions) == 2
            assert len(decode.questions) == 1
            for head in (*prefill.questions, *decode.questions):
                said = parse_traceparent(head.get(b"traceparent", b""))
                assert (said is not None and not said.sampled) if traced else said is None


@async_test
async def test_a_receiver_that_refuses_delays_no_request() -> None:
    """The failure is counted, and requests are answered."""
    async with receiver() as (got, url), Deployment(otlp_endpoint=url) as deployment:
        got.status = 400
        assert (await deployment.ask(STREAM)).status == 200
        outcomes = deployment.proxy.context.tracer.outcomes
        await eventually(lambda: outcomes["failed"])
        assert outcomes == {"sent": 0, "failed": 1, "dropped": 0}


@async_test
async def test_a_full_queue_drops_and_counts() -> None:
    """Spans in the queue stay, and are sent once the thread runs."""

    class Nowhere:
        def send(self, records) -> bool:
            return True

        def close(self) -> None:
            pass

    async with Deployment() as deployment:
        tracer = deployment.proxy.context.tracer = Tracer(Nowhere(), most=2)
        for number in range(5):
            await deployment.ask(STREAM, request_id=f"r{number}")
        assert tracer.outcomes["dropped"] == 3
        tracer.start()
        await asyncio.to_thread(tracer.close)
        assert tracer.outcomes == {"sent": 2, "failed": 0, "dropped": 3}


@pytest.mark.parametrize(
    ("header", "parent"),
    [
        (f"00-{TRACE}-{SPAN}-01", Parent(TRACE.encode(), SPAN.encode(), 1)),
        (f"00-{TRACE}-{SPAN}-00", Parent(TRACE.encode(), SPAN.encode(), 0)),
        (f"cc-{TRACE}-{SPAN}-01-more", Parent(TRACE.encode(), SPAN.encode(), 1)),
        (f"00-{TRACE}-{SPAN}-01-more", None),
        (f"ff-{TRACE}-{SPAN}-01", None),
        (f"00-{TRACE.upper()}-{SPAN}-01", None),
        (f"00-{'0' * 32}-{SPAN}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        ("", None),
        (f"00-{TRACE}-{SPAN}", None),
    ],
)
def test_a_traceparent_is_read_as_the_standard_says(header: str, parent: Parent | None) -> None:
    """Any other header is ignored."""
    assert parse_traceparent(header.encode()) == parent


def test_opentelemetry_s_variables_ask_for_traces() -> None:
    """They may also forbid traces."""
    there = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}
    assert wish_of({}) == (None, 1.0)
    assert wish_of(there) == ("", 1.0)
    assert wish_of(there | {"OTEL_SDK_DISABLED": "true"}) == (None, 1.0)
    assert wish_of(there | {"OTEL_TRACES_EXPORTER": "none"}) == (None, 1.0)
    sampled = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.25"}
    assert wish_of(there | sampled) == ("", 0.25)
    with pytest.raises(SettingsError, match="'often'"):
        wish_of(sampled | {"OTEL_TRACES_SAMPLER_ARG": "often"})


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"otlp_endpoint": "grpc://collector:4317"}, "grpc://collector:4317"),
        ({"trace_ratio": 1.5}, "trace_ratio is 1.5"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict, said: str) -> None:
    """The error names the value."""
    with pytest.raises(SettingsError, match=said):
        ProxySettings(decode=(Address("127.0.0.1", 7200),), **wrong)


def test_traces_without_their_packages_are_refused_or_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start fails if the command line asks for traces. The environment's variables may be for another program."""
    monkeypatch.setitem(sys.modules, "kvbelt.proxy.observe.otlp", None)
    with pytest.raises(StartError, match=r"kvbelt\[traces\]"):
        sender_of("http://127.0.0.1:4318", "proxy:9100")
    assert sender_of("", "proxy:9100") is None
