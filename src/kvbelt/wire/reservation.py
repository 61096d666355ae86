"""Reservation, lease and commit: what a sender and a receiver say about one transfer, on the alloc port.

Rules:

1. Any message may be lost, repeated, delayed or overtaken. Whoever waits for an answer asks again; every
   request may be repeated and is answered as before.
2. ``Granted`` names a slot (engine, slot, generation). Every later message about it repeats that name.
3. ``Commit`` says that every byte has landed. Before it nothing is visible; after it the sender writes no more.
4. A lease holds from one ``Reserve``, ``Heartbeat`` or ``Commit`` to the next. When it lapses the receiver
   says ``Expired``; the slot is quarantined until the sender has said ``Cancel`` or ``Cancelled``: I write no more.
5. A sender that is asked about a transfer it does not know answers ``Cancelled``: what it does not know it
   does not write. One that has ended a transfer says ``Cancel`` until it hears ``Cancelled``.
6. Times travel as remaining seconds.
7. A slot holds the prompt's blocks from ``Granted.first_block`` on: those before it are on the receiver already.
8. A prompt larger than every buffer travels in parts of ``Granted.part_blocks`` blocks through a slot of two parts:
   part *k* is written into the place of part *k - 2* once ``PartsTaken`` has said that this one was read.
   ``PartLanded`` and ``PartsTaken`` count up and are repeated, so losing some of them loses nothing. ``Commit``
   follows the last ``PartsTaken``.
9. Digests (digest.py) are of what the sender has staged. A receiver that asked for them (``Granted.verify``) shows
   nothing to a reader before it has found the same in its own memory.
"""

import msgspec

from kvbelt.wire.digest import Verify
from kvbelt.wire.ids import EngineId, SlotName, TransferId


class _Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True, kw_only=True):
    transfer_id: TransferId


class _FromSender(_Message, frozen=True, kw_only=True):
    sender: EngineId


# From the sender.


class Reserve(_FromSender, frozen=True, kw_only=True):
    """Give me a slot for a prompt. Repeated until answered, and while waiting."""

    #: The life of the receiver that is meant; another one refuses.
    receiver: EngineId
    num_tokens: int
    num_blocks: int
    num_bytes: int
    deadline_seconds: float
    #: Hashes of the prompt's full blocks, 16 bytes each, from the first on (block_hash.py); as many as fit a frame.
    prefix: bytes = b""


class Heartbeat(_FromSender, frozen=True, kw_only=True):
    """I am alive and still writing into this slot."""

    slot: SlotName


class PartLanded(_FromSender, frozen=True, kw_only=True):
    """Every byte of this part has landed. Repeated until it is known to be taken."""

    slot: SlotName
    part: int
    #: Of the part; None: not asked for.
    digest: int | None = None


class Commit(_FromSender, frozen=True, kw_only=True):
    """Every byte of the slot has landed; I write no more. Repeated until answered."""

    slot: SlotName
    num_tokens: int
    #: That were sent, of all parts.
    num_bytes: int
    #: Of the whole slot; None: not asked for, or said of each part.
    digest: int | None = None


# From either side.


class Cancel(_Message, frozen=True, kw_only=True):
    """The transfer is over.

    From the sender: I have stopped and write no more. From the receiver: nobody wants it any more; stop,
    then say so.
    """

    #: None: no slot was known when it was sent.
    slot: SlotName | None
    reason: str
    #: The sender's id; None when it is the receiver who speaks.
    sender: EngineId | None = None


class Cancelled(_Message, frozen=True, kw_only=True):
    """Acknowledgement. From the sender: I write no more into this slot. From the receiver: your cancel is known."""

    slot: SlotName | None
    sender: EngineId | None = None


# From the receiver.


class Granted(_Message, frozen=True, kw_only=True):
    """The slot is yours until the lease lapses. How blocks lie in it: transfer/shape.py."""

    slot: SlotName
    #: Which of ``Welcome.regions``.
    region: int
    #: Bytes from the start of that region.
    offset: int
    num_bytes: int
    lease_seconds: float
    #: The prompt's blocks before it do not travel: they are here.
    first_block: int
    #: Blocks of one part; where that is all that travel, there are no parts.
    part_blocks: int
    #: What ``PartLanded`` and ``Commit`` must carry digests of.
    verify: Verify


class Wait(_Message, frozen=True, kw_only=True):
    """No room yet; you are in the queue. Ask again after so long, or the place in it is lost with the lease."""

    retry_after_seconds: float
    position: int


class Refused(_Message, frozen=True, kw_only=True):
    """There will be no slot. ``reason`` is of low cardinality."""

    reason: str
    detail: str


class Renewed(_Message, frozen=True, kw_only=True):
    """Your heartbeat was heard."""

    slot: SlotName


class PartsTaken(_Message, frozen=True, kw_only=True):
    """So many parts, from the first on, were read: their places may be written again."""

    slot: SlotName
    parts: int


class Committed(_Message, frozen=True, kw_only=True):
    """The KV is visible here."""

    slot: SlotName


class Expired(_Message, frozen=True, kw_only=True):
    """The lease or the deadline has passed. Stop, then say ``Cancel``."""

    #: None: no slot is known by this transfer's name.
    slot: SlotName | None
    reason: str


FromSender = Reserve | Heartbeat | PartLanded | Commit | Cancel | Cancelled
FromReceiver = Granted | Wait | Refused | Renewed | PartsTaken | Committed | Expired | Cancel | Cancelled
