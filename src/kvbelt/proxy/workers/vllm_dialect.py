"""How the proxy talks with a vLLM server, whose ``/health`` has no body and which has no route of ours.

The connector inside it answers questions in ``kv_transfer_params`` of a completion of a token or two. A server that
answers without them has no connector: the proxy uses it as it is, and it computes its prompts itself. How busy it is
stands in its ``/metrics``.
"""

import re
from collections.abc import Sequence

import msgspec

from kvbelt.wire.handoff import DecodeOutcome, Describe, ReceiverAddress, Warm
from kvbelt.wire.health import ServerDescription
from kvbelt.wire.json_body import JsonDecoder, JsonMessage, MessageError
from kvbelt.wire.load import NO_LOAD, Load
from kvbelt.wire.peers import PeerStates

PATH = "/v1/completions"
MAX_BYTES = 256 * 1024  #: the answer includes the links of every rank

METRICS_PATH = "/metrics"
MAX_METRICS_BYTES = 8 * 1024 * 1024
#: Between two questions for ``/metrics``: making that text costs the server some milliseconds.
METRICS_INTERVAL_SECONDS = 5.0
METRICS_SECONDS = 1.0  #: for one question, which the server's health check waits for
WHOLE = 10_000  #: vLLM reports its KV memory as a share; blocks of its load are parts of this
_MOST = 1e9  #: no server has so many requests

_SERIES = re.compile(
    rb"^vllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc)(?:\{[^\n]*\})? ([0-9.eE+-]+)\s*$",
    re.MULTILINE,
)


class _Question(msgspec.Struct, frozen=True, kw_only=True):
    prompt: tuple[int, ...] = (0,)
    max_tokens: int
    temperature: float = 0.0
    kv_transfer_params: Describe | Warm


class _Described(msgspec.Struct, frozen=True):
    kv_transfer_params: ServerDescription | None = None


class _Warmed(msgspec.Struct, frozen=True):
    kv_transfer_params: PeerStates | None = None


#: The parameters of an answer, and how far from its end they may begin.
_HANDOFF = re.compile(rb'"kv_transfer_params"\s*:\s*(\{[^{}]*\})')
_TAIL_BYTES = 4096

_DESCRIBED = JsonMessage(_Described, PATH)
_WARMED = JsonMessage(_Warmed, PATH)
_outcome = JsonDecoder[DecodeOutcome](DecodeOutcome)
_encode = msgspec.json.Encoder().encode


def describe_question(itl_seconds: float) -> bytes:
    """The body that asks a server to describe itself, and tells it the level between tokens; 0: none."""
    return _encode(_Question(max_tokens=1, kv_transfer_params=Describe(itl_seconds)))


def description_of(status: int, body: bytes, server: str) -> ServerDescription | None:
    """The answer to ``describe_question``; None: the server has no connector. Raises MessageError: something else."""
    if status != 200:
        raise MessageError(f"{PATH} of {server}: status {status}, {body[:200]!r}")
    return _DESCRIBED.parse(body, server).kv_transfer_params


def warm_question(receivers: Sequence[ReceiverAddress]) -> bytes:
    """The body that tells a prefill server of decode servers. Of two tokens: the handshakes take a step or two."""
    return _encode(_Question(max_tokens=2, kv_transfer_params=Warm(tuple(receivers))))


def peer_states_of(body: bytes, server: str) -> PeerStates | None:
    """The answer to ``warm_question``; None: it connects on first use. Raises MessageError: something else came."""
    return _WARMED.parse(body, server).kv_transfer_params


def take_outcome(answer: bytes, transfer_id: str) -> tuple[DecodeOutcome | None, bytes]:
    """What a decode server's whole answer says became of this transfer's KV, and the answer as a plain server's.

    The outcome is None if the answer says nothing of it.
    """
    # Near the answer's end. In a text of the answer the quotes would be escaped.
    found = _HANDOFF.search(answer, max(0, len(answer) - _TAIL_BYTES))
    if found is None:
        return None, answer
    try:
        outcome = _outcome.decode(found[1])
    except msgspec.DecodeError:
        return None, answer
    if outcome.transfer_id != transfer_id:
        return None, answer
    return outcome, b"".join((answer[: found.start(1)], b"null", answer[found.end(1) :]))


def load_of(metrics: bytes) -> Load:
    """The sums over the server's engines, and of their KV memory the mean; 0 for what the text does not say."""
    found: dict[bytes, list[float]] = {}
    for name, said in _SERIES.findall(metrics):
        try:
            value = float(said)
        except ValueError:
            return NO_LOAD
        if not 0.0 <= value < _MOST:
            return NO_LOAD
        found.setdefault(name, []).append(value)
    used = found.get(b"kv_cache_usage_perc")
    free = 1.0 - min(1.0, sum(used) / len(used)) if used else 0.0
    return Load(
        running=int(sum(found.get(b"num_requests_running", ()))),
        waiting=int(sum(found.get(b"num_requests_waiting", ()))),
        blocks_total=WHOLE if used else 0,
        blocks_free=round(WHOLE * free),
        blocks_cached=0,
    )
