"""The handshake: two processes compare themselves before any memory is shared.

Rules:

1. The sender sends ``Hello`` to the receiver's init port; the answer is ``Welcome`` or ``HandshakeRefused``.
2. Everything that must be equal is in ``Compatibility`` and nowhere else. A refusal names the first field that
   differs, with both values.
3. Both sides compare: the receiver before it tells where its memory is, the sender before it writes.
4. The exchange may be repeated at any time and then changes nothing.

Models are compared by fingerprint. Their names are shown only, since copies of one model may have different names.
"""

from typing import NamedTuple

import msgspec

from kvbelt.wire.ids import EngineId
from kvbelt.wire.layout import KVLayout

PROTOCOL_VERSION = 4  #: grows with every change of a message; part of every frame (codec.py)


class Compatibility(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What must be equal on both sides, in the order in which it is compared."""

    protocol: int
    model: str
    fingerprint: str  #: identifies architecture and weights; equal fingerprints mean equal KV for equal tokens
    layout: KVLayout
    tp_size: int
    tp_rank: int
    hash_scheme: str
    channel: str


class MemoryRegion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A receive buffer, as a peer must address it."""

    address: int
    num_bytes: int
    device: str
    device_index: int


class Hello(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Sender to receiver. ``receiver`` is the engine that the sender expects."""

    engine_id: EngineId
    receiver: EngineId
    role: str
    compatibility: Compatibility


class Welcome(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Receiver to sender: the two fit."""

    engine_id: EngineId
    compatibility: Compatibility
    agent_metadata: bytes
    #: Slots lie in one of them: the receive buffer, then the overflow buffer where there is one.
    regions: tuple[MemoryRegion, ...]
    #: Where the sender opens the connection whose end proves its death, and what it sends there (transfer/liveness.py).
    liveness_port: int = 0
    liveness_token: bytes = b""


class HandshakeRefused(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Receiver to sender: the two do not fit. ``ours`` is the receiver's value, ``theirs`` the sender's."""

    engine_id: EngineId
    field: str
    ours: str
    theirs: str


HandshakeMessage = Hello | Welcome | HandshakeRefused


class Difference(NamedTuple):
    field: str
    ours: str
    theirs: str

    def __str__(self) -> str:
        return f"{self.field}: ours {self.ours}, theirs {self.theirs}"


def first_difference(ours: Compatibility, theirs: Compatibility) -> Difference | None:
    """The first field in which two sides differ, or None when they fit."""
    for field in ("protocol", "fingerprint", "layout", "tp_size", "tp_rank", "hash_scheme", "channel"):
        mine, other = getattr(ours, field), getattr(theirs, field)
        if mine == other:
            continue
        if field == "fingerprint":
            return Difference("model", f"{ours.model} (fingerprint {mine})", f"{theirs.model} (fingerprint {other})")
        if field == "layout":
            return _layout_difference(mine, other)
        return Difference(field, str(mine), str(other))
    return None


def _layout_difference(ours: KVLayout, theirs: KVLayout) -> Difference:
    # dtype first: it changes block_bytes too, and it is the setting that a user knows.
    for field in ("dtype", *(name for name in KVLayout.__struct_fields__ if name != "dtype")):
        mine, other = getattr(ours, field), getattr(theirs, field)
        if mine != other:
            name = field if field == "dtype" else f"layout.{field}"
            return Difference(name, str(mine), str(other))
    raise AssertionError("two unequal layouts without an unequal field")
