"""What workers tell the proxy unasked, on port 7500 (PUSH to PULL, msgpack).

A prefill worker tells how each transfer ended, a vLLM decode server what became of its KV, and every worker what its
engine's steps cost.
"""

import msgspec

from kvbelt.wire.codec import FrameError, OversizedError
from kvbelt.wire.handoff import DecodeOutcome
from kvbelt.wire.ids import EngineId, TransferId
from kvbelt.wire.steps import StepsNow


class _TransferEnd(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    transfer_id: TransferId
    sender: EngineId
    receiver: EngineId
    num_bytes: int
    seconds: float  #: from the first write posted to the last one completed


class TransferDone(_TransferEnd, frozen=True):
    """Every byte has landed and the decode worker has acknowledged the commit."""

    channel: str
    num_tokens: int
    num_writes: int
    #: From the end of the prompt's computation to the acknowledged commit: what was not hidden behind compute.
    exposed_seconds: float


class TransferFailed(_TransferEnd, frozen=True):
    """The transfer ended without a commit."""

    reason: str


class StepsReport(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The engine's steps as they are now; a report that is lost is replaced by the next."""

    engine: EngineId
    steps: StepsNow


class OutcomeReport(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """What became of the KV of a request. vLLM's streams, whose heads leave before that is known, have no place for it.

    A later report of the same transfer replaces an earlier one.
    """

    engine: EngineId  #: the decode server's
    outcome: DecodeOutcome


TransferEnd = TransferDone | TransferFailed
Notification = TransferEnd | StepsReport | OutcomeReport

#: Reasons with which the sending side ends a transfer on purpose: its client has gone, its request was refused or
#: preempted. They are not failures of the transfer, and no alert should fire for them.
ENDED_ON_PURPOSE = frozenset({"aborted", "cancelled", "preempted", "probed", "refused"})

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Notification] = msgspec.msgpack.Decoder(Notification)

MAX_BYTES = 4096  #: a notification is small; anything larger is not one


def encode(notification: Notification) -> bytes:
    return _encoder.encode(notification)


def decode(frame: bytes) -> Notification:
    """Parse a frame. Raises FrameError: it is too large, or not a notification."""
    if len(frame) > MAX_BYTES:
        raise OversizedError(f"a notification of {len(frame)} bytes; at most {MAX_BYTES} are accepted")
    try:
        return _decoder.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FrameError(f"a malformed notification: {error}") from None
