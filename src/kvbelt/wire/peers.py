"""``POST /kvbelt/peers``: the proxy tells a prefill worker of decode workers, before a request names one.

The body is a list of ``ReceiverAddress``. A vLLM server has no such route: it is told in ``kv_transfer_params``
(``handoff.WarmRequest``), and answers there.
"""

from typing import Literal

import msgspec

from kvbelt.wire.handoff import ReceiverAddress
from kvbelt.wire.ids import EngineId
from kvbelt.wire.json_body import JsonMessage


class PeerState(msgspec.Struct, frozen=True):
    """Whether a prefill worker is connected to one decode worker."""

    engine_id: EngineId
    state: Literal["ready", "failed"]
    reason: str  #: why not, of ``wire/reasons.py``; empty: it is connected
    detail: str = ""  #: for people; a vLLM server gives none


class PeerStates(msgspec.Struct, frozen=True):
    """The answer: one state for each receiver of the request."""

    peers: list[PeerState]


PEERS_REQUEST = JsonMessage(list[ReceiverAddress], "the list of receivers")
PEER_STATES = JsonMessage(PeerStates, "/kvbelt/peers")
