"""What a prefill worker tells the proxy about each transfer, on port 7500 (PUSH to PULL, msgpack)."""

import msgspec

from kvbelt.wire.ids import EngineId, TransferId


class _Notification(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    transfer_id: TransferId
    sender: EngineId
    receiver: EngineId
    num_bytes: int
    #: From the first write posted to the last one completed.
    seconds: float


class TransferDone(_Notification, frozen=True):
    """Every byte has landed and the decode worker has acknowledged the commit."""

    channel: str
    num_tokens: int
    num_writes: int
    #: From the end of the prompt's computation to the acknowledged commit: what was not hidden behind compute.
    exposed_seconds: float


class TransferFailed(_Notification, frozen=True):
    """The transfer ended without a commit."""

    reason: str


Notification = TransferDone | TransferFailed

#: Reasons with which the sending side ends a transfer on purpose: its client has gone, its request was refused or
#: preempted. They are not failures of the transfer, and no alert should fire for them.
ENDED_ON_PURPOSE = frozenset({"aborted", "cancelled", "preempted", "probed", "refused"})

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Notification] = msgspec.msgpack.Decoder(Notification)

#: A notification is small; anything larger is not one.
MAX_BYTES = 4096


def encode(notification: Notification) -> bytes:
    """Serialise for the socket."""
    return _encoder.encode(notification)


class OversizedError(ValueError):
    """It is larger than any notification, and was not looked into."""


def decode(frame: bytes) -> Notification:
    """Parse what came from the socket.

    Raises:
        OversizedError: it is too large.
        ValueError: it is not a notification.
    """
    if len(frame) > MAX_BYTES:
        raise OversizedError(f"a notification of {len(frame)} bytes; at most {MAX_BYTES} are accepted")
    try:
        return _decoder.decode(frame)
    except RecursionError as error:
        raise ValueError(f"a malformed notification: {error}") from None
