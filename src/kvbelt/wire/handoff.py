"""``kv_transfer_params``: what a proxy tells a worker about the transfer that goes with a request.

The proxy writes it into the request's body, the worker parses it once, at its wall. Times travel as
remaining seconds, because clocks of different hosts differ.
"""

from typing import Literal

import msgspec

from kvbelt.wire.ids import EngineId, TransferId


class ReceiverAddress(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where a decode worker takes handshakes (init port) and reservations (alloc port)."""

    engine_id: EngineId
    host: str
    init_port: int
    alloc_port: int
    #: Its CURVE key in Z85, which a sender believes only if it trusts that key already. None: it asks for no keys.
    public_key: str | None = None


class PrefillHandoff(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """To a prefill worker: compute this prompt and send its KV to ``receiver``."""

    transfer_id: TransferId
    receiver: ReceiverAddress
    deadline_seconds: float


class DecodeHandoff(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """To a decode worker: the KV of this prompt comes, or has come, under this name."""

    transfer_id: TransferId
    deadline_seconds: float


class HandoffState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """In a prefill worker's answer: what became of the transfer so far.

    ``open``: it is under way or done, the decode worker will learn the end. ``failed``: it has ended,
    with this reason, and the decode worker need not wait.
    """

    transfer_id: TransferId
    state: Literal["open", "failed"]
    reason: str | None = None


def prompt_transfer_id(base: TransferId, prompt_index: int) -> TransferId:
    """The transfer of one prompt of a request with several; the first keeps the request's own."""
    return base if prompt_index == 0 else TransferId(f"{base}.{prompt_index}")
