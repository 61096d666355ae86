"""What a vLLM server is asked and told. Its ``/health`` has no body, so it is done by a request of a token or two.

The connector inside it answers in ``kv_transfer_params``. A server that answers without them has no connector: it is
used as it is, and computes its prompts itself.
"""

from collections.abc import Sequence
from typing import Literal

import msgspec

from kvbelt.wire.handoff import ReceiverAddress
from kvbelt.wire.ids import EngineId
from kvbelt.wire.json_body import JsonDecoder

PATH = "/v1/completions"
BODY = b'{"prompt":[0],"max_tokens":1,"temperature":0,"kv_transfer_params":{"kvbelt":"describe"}}'
MAX_BYTES = 256 * 1024  #: it tells of every rank's links, too


class Description(msgspec.Struct, frozen=True):
    """What a vLLM server says of itself. Of one life of it."""

    role: Literal["prefill", "decode", "both"] | None = None
    model: str = ""
    engine_id: str | None = None
    max_model_len: int | None = None
    receiver: ReceiverAddress | None = None
    engine: str = ""
    hash_seed: str | None = None


class _Answer(msgspec.Struct, frozen=True):
    kv_transfer_params: Description | None = None


class PeerState(msgspec.Struct, frozen=True):
    """What a prefill worker says of one decode worker that it was told of; one of ours says the same."""

    engine_id: EngineId
    state: Literal["ready", "failed"]
    reason: str = ""
    detail: str = ""


class Peers(msgspec.Struct, frozen=True):
    """... of all of them."""

    peers: list[PeerState]


class _Warmed(msgspec.Struct, frozen=True):
    kv_transfer_params: Peers | None = None


_decoder: JsonDecoder[_Answer] = JsonDecoder(_Answer)
_warmed: JsonDecoder[_Warmed] = JsonDecoder(_Warmed)
_encode = msgspec.json.Encoder().encode


def description_of(status: int, body: bytes) -> Description | None:
    """What a server's answer says; None if it says nothing of use."""
    if status != 200:
        return None
    try:
        return _decoder.decode(body).kv_transfer_params or Description()
    except ValueError:
        return None


def telling(receivers: Sequence[ReceiverAddress]) -> bytes:
    """The body that tells a prefill server of decode servers. Of two tokens: the handshakes take a step or two."""
    params = {"kvbelt": "warm", "receivers": receivers}
    return _encode({"prompt": [0], "max_tokens": 2, "temperature": 0, "kv_transfer_params": params})


def told(status: int, body: bytes) -> list[PeerState] | None:
    """What came of it; None: this server connects on first use."""
    if status != 200:
        return None
    try:
        answer = _warmed.decode(body).kv_transfer_params
    except ValueError:
        return None
    return None if answer is None else answer.peers
