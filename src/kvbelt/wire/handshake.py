"""The handshake: what two processes tell each other before any memory is shared.

Rules:

1. The sender says ``Hello`` on the receiver's init port; the answer is ``Welcome`` or ``HandshakeRefused``.
2. Everything that must be equal on both sides stands in ``Compatibility`` and nowhere else. The first
   field that differs is named, with both values side by side.
3. Both sides compare. The receiver compares before it tells where its memory is, the sender before it writes.
4. The whole exchange may be repeated at any time: it changes nothing on either side.

A model is compared by its fingerprint. Its name is only shown: one model may lie in folders of different names.
"""

from typing import NamedTuple

import msgspec

from kvbelt.wire.ids import EngineId
from kvbelt.wire.layout import KVLayout

#: Grows with every change of a message of this protocol. Stands in every frame (codec.py).
PROTOCOL_VERSION = 2


class ProcessIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which process of which machine: enough to find out, on the same machine, that it is dead."""

    #: The kernel's boot id; empty when it could not be read (then nobody is ever declared dead by it).
    boot_id: str
    #: The pid namespace: pids compare only within one.
    pid_namespace: str
    pid: int
    #: Clock ticks between boot and the start of the process: tells two processes with one pid apart.
    start_time: int


class Compatibility(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What must be equal on both sides, in the order in which it is compared."""

    protocol: int
    model: str
    #: Identifies architecture and weights; equal fingerprints mean equal KV for equal tokens.
    fingerprint: str
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
    """Sender to receiver: who I am. ``receiver`` is whom I believe to be talking to."""

    engine_id: EngineId
    receiver: EngineId
    #: The worker's name across its lives (empty: none). A new life under the same name proves the old one dead.
    worker: str
    role: str
    process: ProcessIdentity
    compatibility: Compatibility


class Welcome(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Receiver to sender: we fit, and here is my memory."""

    engine_id: EngineId
    compatibility: Compatibility
    agent_metadata: bytes
    #: Slots lie in one of them: the receive buffer, then the overflow buffer where there is one.
    regions: tuple[MemoryRegion, ...]


class HandshakeRefused(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Receiver to sender: we do not fit. ``ours`` is the receiver's value, ``theirs`` the sender's."""

    engine_id: EngineId
    field: str
    ours: str
    theirs: str


HandshakeMessage = Hello | Welcome | HandshakeRefused


class Difference(NamedTuple):
    """The first field that differs between two sides."""

    field: str
    ours: str
    theirs: str

    def __str__(self) -> str:
        """One line for a log or an error."""
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
    # dtype first: it also changes block_bytes, and it is what a user has set.
    for field in ("dtype", *(name for name in KVLayout.__struct_fields__ if name != "dtype")):
        mine, other = getattr(ours, field), getattr(theirs, field)
        if mine != other:
            name = field if field == "dtype" else f"layout.{field}"
            return Difference(name, str(mine), str(other))
    raise AssertionError("two unequal layouts without an unequal field")
