"""One whole example of each JSON message between processes."""

from msgspec.structs import replace

from kvbelt.about import of_this_process
from kvbelt.pacing.costs import DEFAULT_COSTS
from kvbelt.wire.about import ABOUT, LinkTotals, TransportChoice
from kvbelt.wire.api_error import API_ERROR, ErrorBody, ErrorDetail
from kvbelt.wire.console import (
    CONSOLE_STATE,
    ConsoleState,
    LastError,
    LegRates,
    LinkRates,
    LiveStats,
    Percentiles,
    ProxyStatus,
    RecordCounts,
    RequestRow,
)
from kvbelt.wire.handoff import RankAddress, ReceiverAddress
from kvbelt.wire.health import (
    PROXY_HEALTH,
    SERVER_DESCRIPTION,
    WORKER_HEALTH,
    NotificationPort,
    PlacementNow,
    ProxyHealth,
    Role,
    ServerDescription,
    WorkerHealth,
)
from kvbelt.wire.ids import EngineId
from kvbelt.wire.json_body import JsonMessage
from kvbelt.wire.load import BeltSnapshot, Buffers, Load, Sum
from kvbelt.wire.peers import PEER_STATES, PEERS_REQUEST, PeerState, PeerStates
from kvbelt.wire.probe import PROBE_REQUEST, PROBE_RESULT, LinkSpeed, ProbeRequest, ProbeResult
from kvbelt.wire.replay import (
    REPLAY_ANSWER,
    REPLAY_QUESTION,
    EndedRequest,
    ReplayAnswer,
    ReplayQuestion,
    ReplayWorker,
)
from kvbelt.wire.request_record import (
    REQUEST_LIST,
    REQUEST_RECORD,
    Decision,
    DoneTransfer,
    FailedTransfer,
    Placing,
    RequestAttempt,
    RequestList,
    RequestRecord,
    RequestSpan,
    Timings,
    WorkerNames,
)
from kvbelt.wire.steps import StepsNow
from kvbelt.wire.workers import NEW_WORKER, WORKER_LIST, WORKER_ROW, NewWorker, PairRow, WorkerList, WorkerRow
from tests.wire.support import FIT

RECEIVER = ReceiverAddress(EngineId("d"), "10.0.0.7", 7300, 7400, "key", (RankAddress(EngineId("e"), 7301, 7401),))
STEPS = StepsNow(
    costs=DEFAULT_COSTS,
    prompt_tokens=7000,
    decodes=2,
    kv_tokens=15_000,
    most_prompt_tokens=8192,
    most_requests=256,
    most_kv_tokens=780_000,
    host_kv_tokens=90_000,
)
LOAD = Load(running=1, waiting=2, blocks_total=10, blocks_free=7, blocks_cached=3)


def buffers(**changes):
    """A belt's memory: none of it in use, but for ``changes``."""
    return Buffers(**(dict.fromkeys(Buffers.__struct_fields__, 0) | changes))


def belt_snapshot(**changes):
    """A belt that has done nothing, but for ``changes``."""
    none = dict.fromkeys(BeltSnapshot.__struct_fields__, 0)
    words = {"mechanism": "CURVE", "write_seconds": Sum(1, 0.5), "exposed_seconds": Sum()}
    counts = {"arrivals": {"queued": 1}, "received_total": {"done": 2}, "sends": {}, "sent_total": {}}
    return BeltSnapshot(**(none | words | counts | {"refused_total": {"init": {"malformed": 1}}} | changes))


def worker_row(**changes):
    """A ready decode worker, but for ``changes``."""
    ready = {
        "worker": "127.0.0.1:7200", "role": "decode", "state": "ready", "detail": "", "standing": "active",
        "warming": False, "engine_id": EngineId("d"), "model": "m", "max_model_len": 2048, "load": LOAD,
        "buffers": buffers(receive_bytes=1000), "in_flight": 1,
    }  # fmt: skip
    return WorkerRow(**(ready | changes))


PAIR = PairRow(prefill="p:1", decode="d:1", state="failed", reason="peer_lost", detail="gone")

DONE = DoneTransfer(
    bytes=1000, seconds=0.01, milliseconds=10.0, gb_per_second=0.1, transport="cma/memory",
    channel="nixl", tokens=9, writes=3, exposed_ms=1.0,
)  # fmt: skip
FAILED = FailedTransfer(bytes=0, seconds=0.01, milliseconds=10.0, gb_per_second=None, reason="peer_lost")

RECORD = RequestRecord(
    request_id="r", route="/v1/completions", time=1.0, stream=True, status=200, ended=True,
    decision=Decision("first-token", None, None), after=("peer_lost",), workers=WorkerNames("p:1", "d:1"),
    transfer_id="t", kv="received", tokens=3, transfer=DONE, errors=("e",), prompt='"x"',
    timings_ms=Timings(**dict.fromkeys(Timings.__struct_fields__, 1.5)),
    spans=(RequestSpan(name="prefill", start_ms=0.0, duration_ms=2.0, worker="p:1", failed=None),),
    attempts=(
        RequestAttempt(leg="prefill", worker="p:1", transfer_id="t", began_ms=0.0, answered_ms=1.0, ended_ms=2.0,
                       reason="peer_lost", detail="gone", transfer=FAILED),
    ),
    placing=Placing(action="split", reason=None, meaning=None, waited_ms=0.0, predicted_first_token_ms=1.0,
                    ttft_level_ms=500.0, between_tokens_level_ms=50.0),
)  # fmt: skip

_LIVE = LiveStats(
    seconds=10.0, requests_per_second=1.0, errors_per_second=0.0, tokens_per_second=2.0, transfers_per_second=1.0,
    bytes_per_second=1000, first_token_ms=Percentiles(1, 2.0, 2.0), between_tokens_ms=Percentiles(0, None, None),
    transfer_ms=Percentiles(1, 2.0, 2.0), transfer_gb_per_second=Percentiles(1, 2.0, 2.0),
    legs=LegRates({"p:1": 1.0}, {}),
    links=[LinkRates(prefill="p:1", decode="d:1", transfers_per_second=1.0, failures_per_second=0.0,
                     bytes_per_second=1000)],
    last_errors=[LastError(time=1.0, request_id="r", error="e")],
)  # fmt: skip

_ROW = RequestRow(
    number=1, request_id="r", time=1.0, status=200, path="first-token", reason=None, prefill="p:1", decode="d:1",
    attempts=2, first_token_ms=1.0, between_tokens_ms=1.0, total_ms=9.0, transfer_ms=1.0, transfer_bytes=1000,
    error=None,
)  # fmt: skip

PLACEMENT = PlacementNow(setting="elastic", mode="whole", regret=0.1, actual=0.8, expected=None)
_PROXY = ProxyStatus(
    version="0.2.0", life="l", time=1.0, uptime_seconds=2.0, model="m", records=RecordCounts(1, 1000), prompts=False,
    admin=True, in_flight=0, requests=1, placement=PLACEMENT,
)  # fmt: skip

ABOUT_WORKER = replace(
    of_this_process("prefill", "embedded"),
    device="cpu", compatibility=FIT, links=[LinkTotals("d", 1, 1000, 0.5)],
    transports=[TransportChoice("intra-node", "write", "host", "cma/memory")],
)  # fmt: skip

#: Each contract with its example.
MESSAGES: list[tuple[JsonMessage, object]] = [
    (WORKER_HEALTH, WorkerHealth(
        status="ok", state="ready", role=Role.DECODE, model="m", engine_id=EngineId("d"), engine="embedded",
        receiver=RECEIVER, hash_seed="0", max_model_len=2048, load=LOAD, belt=belt_snapshot(),
        steps=STEPS,
    )),
    (SERVER_DESCRIPTION, ServerDescription(
        role=Role.PREFILL, model="m", engine_id=EngineId("p"), max_model_len=2048, engine="vllm", receiver=None,
        hash_seed="0", about=ABOUT_WORKER, steps=STEPS,
    )),
    (PROXY_HEALTH, ProxyHealth(
        status="ok", state="ready", notifications=NotificationPort(7500, "CURVE"), workers=[worker_row()],
        placement=PLACEMENT,
    )),
    (WORKER_LIST, WorkerList(workers=[worker_row(buffers=None)], pairs=[PAIR], admin=True)),
    (WORKER_ROW, worker_row()),
    (NEW_WORKER, NewWorker("decode", "10.0.0.7", 7200)),
    (PEERS_REQUEST, [RECEIVER]),
    (PEER_STATES, PeerStates([PeerState(EngineId("d"), "failed", "peer_lost", "gone")])),
    (ABOUT, ABOUT_WORKER),
    (PROBE_REQUEST, ProbeRequest(EngineId("d"))),
    (PROBE_RESULT, ProbeResult(channel="nixl", write=LinkSpeed(1 << 20, 0.1, 0.01, 5), num_bytes=1 << 20)),
    (REQUEST_RECORD, RECORD),
    (REQUEST_LIST, RequestList(requests=[RECORD], kept=1)),
    (CONSOLE_STATE, ConsoleState(
        proxy=_PROXY, workers=[worker_row()], pairs=[PAIR], live=_LIVE, requests=[_ROW], after=1,
    )),
    (REPLAY_QUESTION, ReplayQuestion(
        [ReplayWorker(Role.PREFILL, STEPS)],
        [EndedRequest(1.0, 7500, 16, 200, True, 0.5, 0.05, None, True, 0.03, None)],
        0.05, 0.03,
    )),
    (REPLAY_ANSWER, ReplayAnswer(0.98, 0.9)),
    (API_ERROR, ErrorBody(ErrorDetail(message="m", type="t", param=None, code=400, reason="r"))),
]  # fmt: skip
