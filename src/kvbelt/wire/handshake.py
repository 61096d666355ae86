"""The handshake: two processes compare themselves before any memory is shared.

Rules:

1. The sender sends ``Hello`` to the receiver's init port; the answer is ``Welcome`` or ``HandshakeRefused``.
2. Everything that must fit is in ``Compatibility`` and nowhere else. A refusal names the first field that differs, with
   both values. All fields must be equal, except that each side may have its own tensor-parallel degree and pipeline
   stages: the two ranks must then have heads and layers for each other (``shards``), and blocks of these heads must be
   equal. Block sizes may be multiples of each other, where the larger blocks can be cut. Drafters may differ.
3. Both sides compare: the receiver before it tells where its memory is, the sender before it writes.
4. The exchange may be repeated at any time and then changes nothing.

Models are compared by fingerprint. Their names are shown only, since copies of one model may have different names.
"""

from typing import NamedTuple

import msgspec

from kvbelt.wire.ids import EngineId
from kvbelt.wire.layout import KVLayout
from kvbelt.wire.shards import ONE_STAGE, Ranks, heads_of, pieces_for

PROTOCOL_VERSION = 6  #: grows with every change of a message; part of every frame (codec.py)


class Compatibility(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What must fit on both sides, in the order in which it is compared."""

    protocol: int
    model: str
    fingerprint: str  #: identifies architecture and weights; equal fingerprints mean equal KV for equal tokens
    layout: KVLayout
    tp_size: int
    tp_rank: int
    hash_scheme: str
    channel: str
    kv_heads: int  #: of the model, on all ranks together; 0: not known, and only equal degrees fit
    layers: int = 0  #: of the model, without a drafter's; 0: this rank has all of them
    stages: tuple[int, ...] = ONE_STAGE  #: the first layer of each pipeline stage
    stage: int = 0  #: of this rank

    @property
    def model_layers(self) -> int:
        return self.layers or self.layout.num_layers - self.layout.draft_layers

    @property
    def ranks(self) -> Ranks:
        """All of its server."""
        return Ranks(self.tp_size, self.stages)

    @property
    def rank(self) -> int:
        """Of these."""
        return self.stage * self.tp_size + self.tp_rank


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
    """The first field in which two servers differ, or None when they fit. Which ranks they are does not matter."""
    for field in ("protocol", "fingerprint", "model_layers", "layout", "kv_heads", "tp_size", "hash_scheme", "channel"):
        mine, other = getattr(ours, field), getattr(theirs, field)
        if mine == other or (field == "tp_size" and ours.kv_heads):
            continue
        if field == "fingerprint":
            return Difference("model", f"{ours.model} (fingerprint {mine})", f"{theirs.model} (fingerprint {other})")
        if field == "layout":
            if difference := _layout_difference(mine, other):
                return difference
            continue
        return Difference("layout.num_layers" if field == "model_layers" else field, str(mine), str(other))
    return None


def _layout_difference(ours: KVLayout, theirs: KVLayout) -> Difference | None:
    mine, other = (_least(layout, ours, theirs) for layout in (ours, theirs))
    # dtype first: it changes block_bytes too, and it is the setting that a user knows.
    for field in ("dtype", *(name for name in KVLayout.__struct_fields__ if name != "dtype")):
        if getattr(mine, field) != getattr(other, field):
            name = field if field == "dtype" else f"layout.{field}"
            return Difference(name, str(getattr(ours, field)), str(getattr(theirs, field)))
    return None


def _least(layout: KVLayout, *both: KVLayout) -> KVLayout:
    """The least blocks of both that one of them can have, as far as it can."""
    tokens, heads = min(each.block_size for each in both), min(each.num_kv_heads for each in both)
    for each in both:
        layout = layout.beside(each)
    layout = layout.of_tokens(tokens) or layout
    layout = layout.of_heads(heads) or layout
    # These say what can be cut, and what a stage has, and so nothing that must be equal.
    return msgspec.structs.replace(layout, tokens_outside=False, num_layers=0)


class Share(NamedTuple):
    """What of every block of one rank travels to or from one rank of the other side."""

    layout: KVLayout  #: of what travels
    heads: range | None = None  #: of this rank's heads; None: all
    per_block: int = 1  #: blocks of ``layout`` in one of this rank's
    layers: range | None = None  #: of this rank's layers; None: all


def share(ours: Compatibility, theirs: Compatibility, *, sends: bool) -> Share | Difference:
    """Our part of what travels between two ranks whose servers fit; ``sends``: it travels from us to them."""
    sender, receiver = (ours, theirs) if sends else (theirs, ours)
    pieces = pieces_for(receiver.rank, sender.ranks, receiver.ranks, ours.kv_heads, ours.model_layers)
    piece = next((piece for piece in pieces if piece.sender == sender.rank), None)
    if piece is None:
        return Difference("tp_rank", *(f"{side.rank} of {side.ranks.number}" for side in (ours, theirs)))
    sizes = ours.layout.block_size, theirs.layout.block_size
    layout = ours.layout.beside(theirs.layout).of_tokens(min(sizes))
    if layout is None:
        return Difference("layout.block_size", *map(str, sizes))
    per_block = ours.layout.block_size // layout.block_size
    # A drafter's layers follow the model's, where there is no pipeline.
    num_layers, begin = len(piece.layers) + layout.draft_layers, piece.layers.start - ours.stages[ours.stage]
    layers = None if num_layers == ours.layout.num_layers else range(begin, begin + num_layers)
    layout = msgspec.structs.replace(layout, num_layers=num_layers)
    if ours.tp_size == theirs.tp_size:
        return Share(layout, None, per_block, layers)
    count = len(piece.heads)
    cut = layout.of_heads(count)
    if cut is None:
        return Difference("layout.num_kv_heads", str(ours.layout.num_kv_heads), str(theirs.layout.num_kv_heads))
    first = piece.heads.start - heads_of(ours.tp_rank, ours.tp_size, ours.kv_heads).start
    heads = None if count == ours.layout.num_kv_heads else range(first, first + count)
    return Share(cut, heads, per_block, layers)
