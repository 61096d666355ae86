"""Reservation, lease and commit: the messages of one transfer, on the alloc port.

Rules:

1. Any message may be lost, repeated, delayed or overtaken. Every request is repeated until it is answered, and a
   repeated request gets the same answer.
2. ``Granted`` names a slot (engine, slot, generation). Every later message about it repeats that name.
3. ``Commit`` means that every byte has landed. Before it nothing is visible; after it the sender writes no more.
4. A lease lasts from one ``Reserve``, ``Heartbeat`` or ``Commit`` to the next. When it lapses the receiver sends
   ``Expired`` and quarantines the slot until the sender has sent ``Cancel`` or ``Cancelled``, or is known to be dead.
5. A sender answers ``Cancelled`` about a transfer that it does not know, because it writes no such transfer. A sender
   that has ended a transfer repeats ``Cancel`` until it receives ``Cancelled``.
6. Times travel as remaining seconds.
7. A slot holds the prompt's blocks from ``Granted.first_block`` on: those before it are on the receiver already.
8. A prompt larger than every buffer travels in parts of ``Granted.part_blocks`` blocks through a slot of two parts:
   part *k* is written to the place of part *k - 2* after ``PartsTaken`` says that this part was read. ``PartLanded``
   and ``PartsTaken`` count up and are repeated, so losing some does no harm. ``Commit`` follows the last
   ``PartsTaken``.
9. Digests (digest.py) are of the sender's staging memory. A receiver that asked for them (``Granted.verify``) delivers
   nothing before its own memory has the same digest.
"""

from typing import Literal

import msgspec

from kvbelt.wire.ids import EngineId, SlotName, TransferId

#: What is compared before KV becomes visible: nothing, a sample of its cells, all of them.
Verify = Literal["off", "sample", "always"]


class _Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True, kw_only=True):
    transfer_id: TransferId


class _FromSender(_Message, frozen=True, kw_only=True):
    sender: EngineId


# From the sender.


class Reserve(_FromSender, frozen=True, kw_only=True):
    """Ask for a slot. Repeated until answered, and while waiting."""

    receiver: EngineId  #: the receiver's engine id; another incarnation refuses
    num_tokens: int
    num_blocks: int
    num_bytes: int
    deadline_seconds: float
    #: Hashes of the prompt's full blocks, 16 bytes each, from the first on (block_hash.py); as many as fit a frame.
    prefix: bytes = b""


class Heartbeat(_FromSender, frozen=True, kw_only=True):
    """The sender is alive and still writing."""

    slot: SlotName


class PartLanded(_FromSender, frozen=True, kw_only=True):
    """Every byte of this part has landed. Repeated until ``PartsTaken`` covers it."""

    slot: SlotName
    part: int
    digest: int | None = None  #: of the part; None: not asked for


class Commit(_FromSender, frozen=True, kw_only=True):
    """Every byte of the slot has landed and the sender writes no more. Repeated until answered."""

    slot: SlotName
    num_tokens: int
    num_bytes: int  #: that were sent, of all parts
    digest: int | None = None  #: of the whole slot; None: not asked for, or said of each part


# From either side.


class Cancel(_Message, frozen=True, kw_only=True):
    """The transfer is over.

    From the sender: it writes no more. From the receiver: the consumer has gone; stop and answer.
    """

    slot: SlotName | None  #: None: no slot was known when it was sent
    reason: str
    sender: EngineId | None = None  #: None in a receiver's message


class Cancelled(_Message, frozen=True, kw_only=True):
    """Acknowledges ``Cancel`` or ``Expired``. From the sender it means that it writes no more into this slot."""

    slot: SlotName | None
    sender: EngineId | None = None


# From the receiver.


class Granted(_Message, frozen=True, kw_only=True):
    """The slot belongs to the sender until the lease lapses. Its layout: transfer/shape.py."""

    slot: SlotName
    region: int  #: which of ``Welcome.regions``
    offset: int  #: bytes from the start of that region
    num_bytes: int
    lease_seconds: float
    first_block: int  #: the prompt's blocks before it do not travel: they are here
    part_blocks: int  #: blocks of one part; where that is all that travel, there are no parts
    verify: Verify  #: what ``PartLanded`` and ``Commit`` must carry digests of


class Wait(_Message, frozen=True, kw_only=True):
    """No slot yet. Ask again after so long, or the place in the queue is lost with the lease."""

    retry_after_seconds: float
    position: int


class Refused(_Message, frozen=True, kw_only=True):
    """There will be no slot. ``reason`` has low cardinality."""

    reason: str
    detail: str


class Renewed(_Message, frozen=True, kw_only=True):
    slot: SlotName


class PartsTaken(_Message, frozen=True, kw_only=True):
    """The first so many parts were read: their places may be written again."""

    slot: SlotName
    parts: int


class Committed(_Message, frozen=True, kw_only=True):
    """The KV is visible here."""

    slot: SlotName


class Expired(_Message, frozen=True, kw_only=True):
    """The lease or the deadline has passed. Stop, then send ``Cancel``."""

    slot: SlotName | None  #: None: no slot is known by this transfer's name
    reason: str


FromSender = Reserve | Heartbeat | PartLanded | Commit | Cancel | Cancelled
FromReceiver = Granted | Wait | Refused | Renewed | PartsTaken | Committed | Expired | Cancel | Cancelled
