"""The parsers of everything that comes from outside, each as a function of bytes.

A target returns, whatever it is given, or raises something that its parser does not promise: then the parser has a
bug. What a parser promises to raise is suppressed, and nothing else.
"""

import asyncio
import contextlib
import math
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from kvbelt.errors import RequestError, SettingsError
from kvbelt.http import BadRequestError, ClientLimits, Exchange, ServerLimits
from kvbelt.http.client import ClientConnection
from kvbelt.http.server_connection import ServerConnection
from kvbelt.ops.doctor.checks.links import figures
from kvbelt.ops.doctor.evidence import PairSeen, Sample
from kvbelt.proxy.admin.access import names_loopback
from kvbelt.proxy.admin.http import number_of
from kvbelt.proxy.admin.workers_api import parse_new_worker
from kvbelt.proxy.observe.spans import parse_server_timing
from kvbelt.proxy.observe.trace_context import parse_traceparent
from kvbelt.proxy.request.body import ClientBody
from kvbelt.proxy.request.limits import DEADLINE, ITL, TPOT, TTFT, deadline_seconds, levels_of
from kvbelt.proxy.request.merge import FirstTokenMerger
from kvbelt.proxy.request.prefill_answer import PrefillAnswer
from kvbelt.proxy.workers import vllm_dialect
from kvbelt.proxy.workers.watch import report_of
from kvbelt.routing.endpoint import Report
from kvbelt.routing.levels import ServiceLevels
from kvbelt.routing.token_count import TokenCounts
from kvbelt.security.admin_key import load_admin_key
from kvbelt.security.keys import load_keys
from kvbelt.settings import load_belt_file
from kvbelt.vllm import handoff
from kvbelt.wire import codec, notification
from kvbelt.wire.about import ABOUT
from kvbelt.wire.handoff import DecodeHandoff, PrefillHandoff, ReceiverAddress
from kvbelt.wire.health import WORKER_HEALTH, Role
from kvbelt.wire.ids import EngineId, TransferId
from kvbelt.wire.json_body import MessageError
from kvbelt.wire.peers import PEERS_REQUEST
from kvbelt.wire.probe import PROBE_REQUEST, PROBE_RESULT
from kvbelt.wire.requests import CompletionRequest
from kvbelt.worker.requests import parse_chat, parse_completion, parse_handoff, split_prompts
from kvbelt.worker.sampling import sampling_of

Target = Callable[[bytes], None]

_TO = PrefillHandoff(TransferId("t"), ReceiverAddress(EngineId("d"), "127.0.0.1", 7300, 7400), 9.0)
_FROM = DecodeHandoff(TransferId("t"), 9.0)
_FIRST = PrefillAnswer(
    b'{"id":"a","created":1,"model":"m","choices":[{"text":"x","token_ids":[5]}],"usage":{"prompt_tokens":2},'
    b'"prompt_token_ids":[1,2]}'
)


def _decoded(by: codec.Codec[Any]) -> Target:
    def target(data: bytes) -> None:
        # A frame's header is not what needs luck: the bytes are tried as a frame, and as a body.
        for frame in (data, by.encode(_FROM)[:3] + data):
            with contextlib.suppress(codec.FrameError):
                assert isinstance(by.decode(frame), msgspec.Struct)

    return target


def notifications(data: bytes) -> None:
    """What a prefill worker tells the proxy: a notification or a ValueError."""
    with contextlib.suppress(ValueError):
        assert isinstance(notification.decode(data), msgspec.Struct)


# Bodies that the proxy reads


def _client_body(data: bytes, *, chat: bool) -> None:
    try:
        body = ClientBody(data, chat=chat)
    except RequestError:
        return
    legs = [body.plain(), body.for_prefill(_TO), body.for_decode(_FROM), body.for_continuation(b"[1]", 2, 3, None)]
    with contextlib.suppress(ValueError):
        msgspec.json.decode(data)  # a list of ids that was cut out is not looked into: a worker refuses what is wrong
        for leg in legs:
            assert isinstance(msgspec.json.decode(b"".join(leg)), dict), (
                "a body that was JSON has become something else"
            )
    assert body.num_prompts >= 1
    assert TokenCounts().size_of("", body.prompt).tokens >= 1
    assert body.fields.limit is None or body.fields.limit >= 1


def completion_body(data: bytes) -> None:
    """A client's completion, as the proxy takes it: a body for each leg, or a 400."""
    _client_body(data, chat=False)


def chat_body(data: bytes) -> None:
    """A client's chat completion, as the proxy takes it: a body for each leg, or a 400."""
    _client_body(data, chat=True)


def prefill_answer(data: bytes) -> None:
    """A prefill worker's answer and what is made of it for the client."""
    with contextlib.suppress(ValueError):
        first = PrefillAnswer(data)
        first.why_not_fast(streams=True)
        for chat in (False, True):
            merger = FirstTokenMerger(first, chat=chat, include_usage=True, token_ids=True)
            assert merger.opening("stop").endswith(b"\n\n")
            merger.ending()
            msgspec.json.decode(merger.whole(None, "stop"))


def decode_events(data: bytes) -> None:
    """Events of a decode worker, one piece of the body at a time."""
    for chat, usage, ids in ((False, False, False), (False, True, False), (False, False, True), (True, True, True)):
        with contextlib.suppress(ValueError):
            FirstTokenMerger(_FIRST, chat=chat, include_usage=usage, token_ids=ids).relayed(data)


def decode_answer(data: bytes) -> None:
    """A decode worker's whole answer."""
    for chat in (False, True):
        with contextlib.suppress(ValueError):
            merger = FirstTokenMerger(_FIRST, chat=chat, include_usage=True, token_ids=True)
            msgspec.json.decode(merger.whole(data))


def health(data: bytes) -> None:
    """A worker's answer to /health: always a report."""
    for status in (200, 503):
        assert isinstance(report_of(status, data, Role.DECODE), Report)


def vllm_description(data: bytes) -> None:
    """A vLLM server's description and its peers' states: an answer, None, or a MessageError."""
    with contextlib.suppress(MessageError):
        vllm_dialect.description_of(200, data, "p")
    with contextlib.suppress(MessageError):
        vllm_dialect.peer_states_of(data, "p")


def new_worker(data: bytes) -> None:
    """An operator's worker that is to join."""
    with contextlib.suppress(RequestError):
        parse_new_worker(data)


def traceparent(data: bytes) -> None:
    """A client's trace context: a parent whose ids fit the workers' header, or none."""
    parent = parse_traceparent(data)
    if parent is not None:
        assert len(int(parent.trace_id, 16).to_bytes(16)) == 16
        assert len(int(parent.span_id, 16).to_bytes(8)) == 8
        assert 0 <= parent.flags < 256


def vllm_metrics(data: bytes) -> None:
    """A vLLM server's load: whole numbers, whatever it says."""
    load = msgspec.structs.asdict(vllm_dialect.load_of(data))
    assert all(isinstance(value, int) and value >= 0 for value in load.values()), load


def deadline_header(data: bytes) -> None:
    """A client's own deadline or level: in its range, or a 400."""
    with contextlib.suppress(RequestError):
        assert 0 < deadline_seconds({DEADLINE: data}, 600.0) <= 600.0
    for name in (TTFT, ITL, TPOT):
        with contextlib.suppress(RequestError):
            levels = levels_of({name: data}, ServiceLevels())
            assert all(one is None or 0 < one < math.inf for one in (levels.ttft, levels.itl, levels.tpot))


def console_query(data: bytes) -> None:
    """A query of the console: a number within its range, or a 400."""
    with contextlib.suppress(RequestError):
        assert 1 <= number_of(data.decode("latin-1"), "window", otherwise=10, least=1, most=600) <= 600


def host_header(data: bytes) -> None:
    """The name that a browser was told: loopback's or not, never an error."""
    assert names_loopback(data) in (True, False)


def server_timing(data: bytes) -> None:
    """What a worker says of its times: finite numbers, or nothing."""
    assert all(math.isfinite(value) for value in parse_server_timing(data).values())


# Bodies that a worker reads


def completion_request(data: bytes) -> None:
    """A completion, its prompts, its sampling and its handoff."""
    with contextlib.suppress(RequestError):
        request = parse_completion(data)
        split_prompts(request.prompt)
        _rest(request)


def chat_request(data: bytes) -> None:
    """A chat completion, its sampling and its handoff."""
    with contextlib.suppress(RequestError):
        _rest(parse_chat(data))


def _rest(request: Any) -> None:
    assert isinstance(request, CompletionRequest) or request.messages
    sampling_of(request, 1)
    parse_handoff(request.kv_transfer_params)


def peers(data: bytes) -> None:
    """The proxy's list of decode workers."""
    with contextlib.suppress(MessageError):
        assert all(isinstance(one, ReceiverAddress) for one in PEERS_REQUEST.parse(data, "p"))


def probe_order(data: bytes) -> None:
    """Which link is to be measured."""
    with contextlib.suppress(MessageError):
        assert isinstance(PROBE_REQUEST.parse(data, "p").engine_id, str)


def probe_answer(data: bytes) -> None:
    """A worker's figures, whatever they are, make a line."""
    with contextlib.suppress(ValueError):
        assert figures(PairSeen("p", "d", "warm", probed=PROBE_RESULT.parse(data, "p")))


def vllm_handoff(data: bytes) -> None:
    """``kv_transfer_params`` as vLLM hands them through: never raises."""
    try:
        params = msgspec.json.decode(data)
    except (ValueError, RecursionError):
        return  # vLLM's own parser has refused it
    if isinstance(params, dict):
        handoff.parse(params, "cmpl-1-2-0123abcd")
        with contextlib.suppress(RequestError):
            parse_handoff(params)


# Files


def _file(data: bytes, read: Callable[[Path], object]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "one.key"
        path.write_bytes(data)
        path.chmod(0o600)
        with contextlib.suppress(SettingsError):
            read(path)


def belt_file(data: bytes) -> None:
    """A worker's YAML, and not much of it: PyYAML takes seconds for thousands of open brackets."""
    _file(data[:1024], load_belt_file)


def key_file(data: bytes) -> None:
    """A secret key with itself as the folder's one public key."""
    _file(data, lambda path: load_keys(path, path.parent))


def admin_key_file(data: bytes) -> None:
    """An operator's key."""
    _file(data, load_admin_key)


# HTTP. The connections are real; what carries them is a list.


class _Wire(asyncio.Transport):
    """A transport that keeps what is written, and delivers what is given, until it is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.closing = False

    def write(self, data: bytes) -> None:  # type: ignore[override]
        self.written.append(data)

    def write_eof(self) -> None:
        self.closing = True

    def close(self) -> None:
        self.closing = True

    abort = close

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass


class _Owner:
    """A server of one connection, whose handler answers at once."""

    limits = ServerLimits(head_bytes=4096, body_bytes=4096)
    draining = False

    def __init__(self) -> None:
        self.open = 0

    async def handler(self, exchange: Exchange) -> None:
        """Answer with the request."""
        request = exchange.request
        assert len(request.body) <= self.limits.body_bytes
        assert all(not re.search(rb"[\r\n\0]", value) for value in request.headers.values())
        exchange.respond(200, (), request.body)

    def opened(self, connection: ServerConnection) -> None:
        self.open += 1

    def closed(self, connection: ServerConnection) -> None:
        self.open -= 1

    def refusal(self, error: BadRequestError) -> tuple[tuple[tuple[bytes, bytes], ...], bytes]:
        assert error.status in (400, 408, 413, 415, 417, 431, 501), error
        return ((b"content-type", b"text/plain"),), str(error).encode()


def _pieces(data: bytes) -> list[list[bytes]]:
    # The same bytes whole, in two parts, and in many.
    half = len(data) // 2
    few = max(1, len(data) // 16)
    return [[data], [data[:half], data[half:]], [data[at : at + few] for at in range(0, len(data), few)]]


async def _serve(data: bytes) -> None:
    for pieces in _pieces(data):
        owner, wire = _Owner(), _Wire()
        connection = ServerConnection(owner, asyncio.get_running_loop())
        connection.connection_made(wire)
        for piece in pieces:
            if wire.closing:
                break
            connection.data_received(piece)
            await asyncio.sleep(0)
        while connection.busy:  # noqa: ASYNC110 - answers are written at once, so this ends with the requests
            await asyncio.sleep(0)
        connection.connection_lost(None)
        assert owner.open == 0
        assert all(line.startswith(b"HTTP/1.1 ") for line in wire.written)
        assert not any(line.startswith(b"HTTP/1.1 500") for line in wire.written)


class _Keeper:
    """A pool of one connection."""

    def reusable(self, connection: ClientConnection) -> None:
        pass

    def gone(self, connection: ClientConnection) -> None:
        pass


async def _ask(data: bytes) -> None:
    for pieces in _pieces(data):
        wire = _Wire()
        limits = ClientLimits(head_bytes=4096, read_high_bytes=1 << 20)
        connection = ClientConnection(_Keeper(), limits, "d", asyncio.get_running_loop())
        connection.connection_made(wire)
        response = connection.send(b"GET / HTTP/1.1\r\nhost: d\r\n\r\n")
        for piece in pieces:
            if wire.closing:
                break
            connection.data_received(piece)
        connection.connection_lost(None)
        assert response.complete or response.error is not None, "a reader would wait forever"
        assert connection.closed


def http_request(data: bytes) -> None:
    """Requests on one connection of the proxy's server: each answered, or refused; the handler never fails."""
    asyncio.run(_serve(data))


def http_answer(data: bytes) -> None:
    """An answer to the proxy's client: complete, or an error for the caller."""
    asyncio.run(_ask(data))


def about(data: bytes) -> None:
    """A process's facts: its numbers make sense, or a ValueError."""
    with contextlib.suppress(ValueError):
        for link in ABOUT.parse(data, "p").links:
            assert link.gb_per_second is None or link.busy_seconds > 0
    with contextlib.suppress(ValueError):
        Sample.of(WORKER_HEALTH.parse(data, "p"))


TARGETS: Mapping[str, Target] = {
    "handshake": _decoded(codec.handshakes()),
    "from_sender": _decoded(codec.from_sender()),
    "from_receiver": _decoded(codec.from_receiver()),
} | {
    target.__name__: target
    for target in (
        notifications, completion_body, chat_body, prefill_answer, decode_events, decode_answer, health,
        vllm_description, vllm_metrics, new_worker, console_query, host_header, server_timing,
        deadline_header, traceparent, completion_request, chat_request,
        peers, probe_order, probe_answer, vllm_handoff,
        belt_file, key_file, admin_key_file, http_request, http_answer, about,
    )
}  # fmt: skip
