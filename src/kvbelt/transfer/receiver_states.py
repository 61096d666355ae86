"""The receiving side of one transfer: its states, what may happen in each, and what follows.

Rules:

1. A slot belongs to its writer from RESERVED until the writer is known to write no more: it has said
   ``Commit``, ``Cancel`` or ``Cancelled``, or it is dead. Only then may the slot go to somebody else.
2. A reader sees KV in CLAIMED only, and CLAIMED is entered from a commit only; where digests were asked for, only
   once they have been found right. The exception is a prompt in parts: its reader takes out each part that has
   landed and was found right (STREAMING), and may use none of it before it has all (TAKEN).
3. A reader is told exactly once: that the KV is there, or that it is lost and why. The reader of a prompt in parts is
   told that it begins, and exactly once that it is whole, or lost and why.
4. Every state but CLAIMED and QUARANTINED ends by time alone. CLAIMED ends when our own reader releases,
   QUARANTINED when the writer acknowledges or is dead.
"""

from dataclasses import dataclass
from enum import StrEnum

from kvbelt.transfer.machine import Table, to
from kvbelt.transfer.shape import SlotShape
from kvbelt.transfer.slots import Slot
from kvbelt.wire.reservation import Cancel, Cancelled, Commit, Heartbeat, PartLanded, Reserve


class ReceiverState(StrEnum):
    """Where an incoming transfer is."""

    EXPECTED = "expected"  # a reader waits; no writer has been heard of; no slot
    QUEUED = "queued"  # a writer waits for room; no slot; it is in the queue exactly once
    RESERVED = "reserved"  # the slot is the writer's while the lease holds; invisible to readers
    STREAMING = "streaming"  # likewise, and a reader takes out what has landed, part after part
    TAKEN = "taken"  # a reader has every part; the writer has not yet said that it is done
    VERIFYING = "verifying"  # every byte is said to have landed and is being checked; the writer has stopped
    COMMITTED = "committed"  # every byte has landed, and was found right where that was asked for; no reader yet
    CLAIMED = "claimed"  # a reader has it, and will release it
    QUARANTINED = "quarantined"  # over for everybody, but the writer may still be writing into the slot
    RELEASED = "released"  # over: a reader had it; no slot
    CANCELLED = "cancelled"  # over: one side wanted it no more, or the writer gave up; no slot
    EXPIRED = "expired"  # over: lease or deadline passed, or the writer died; no slot


FINAL = frozenset({ReceiverState.RELEASED, ReceiverState.CANCELLED, ReceiverState.EXPIRED})

#: Exactly in these a transfer has a slot.
HOLDING = frozenset(ReceiverState) - FINAL - {ReceiverState.EXPECTED, ReceiverState.QUEUED}


@dataclass(frozen=True, slots=True)
class Room:
    """There is a slot for it, of this shape."""

    slot: Slot
    shape: SlotShape


@dataclass(frozen=True, slots=True)
class Claim:
    """A reader wants it, until ``deadline``; ``until`` bounds how long an unknown writer is waited for."""

    deadline: float
    until: float


@dataclass(frozen=True, slots=True)
class Unclaim:
    """The reader wants it no more."""


@dataclass(frozen=True, slots=True)
class Verified:
    """The digest of a part, or of the whole slot (``part`` None), was compared."""

    part: int | None
    right: bool


@dataclass(frozen=True, slots=True)
class PartTaken:
    """The reader has read the next part."""


@dataclass(frozen=True, slots=True)
class Release:
    """The reader has read it, or reads no more of it."""


@dataclass(frozen=True, slots=True)
class WriterDead:
    """The writer's process is known to be gone."""


@dataclass(frozen=True, slots=True)
class LeaseLapsed:
    """The writer has not been heard for a lease."""


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The transfer's or the reader's time is over."""


@dataclass(frozen=True, slots=True)
class ReminderDue:
    """Time to ask the writer again whether it has stopped."""


FromWriter = Reserve | Heartbeat | PartLanded | Commit | Cancel | Cancelled
Local = Room | Claim | Unclaim | Verified | PartTaken | Release | WriterDead
Timed = LeaseLapsed | DeadlinePassed | ReminderDue
ReceiverEvent = FromWriter | Local | Timed

S = ReceiverState

#: Our own reader and our own check may cross with the end of what they are about.
_CROSSING = (Verified, PartTaken, Release)


def _late(state: ReceiverState) -> dict[type, frozenset[ReceiverState]]:
    """In this state it is too late for them."""
    return {event: to(state) for event in _CROSSING}


RECEIVER_TABLE: Table[ReceiverState] = {
    S.EXPECTED: {
        Reserve: to(S.QUEUED),
        Heartbeat: to(S.EXPECTED),  # of a writer we have forgotten: it is told
        PartLanded: to(S.EXPECTED),
        Commit: to(S.EXPECTED),
        Cancel: to(S.CANCELLED),
        Cancelled: to(S.EXPECTED),
        Claim: to(S.EXPECTED),
        Unclaim: to(S.CANCELLED),
        DeadlinePassed: to(S.EXPIRED),
    },
    S.QUEUED: {
        Reserve: to(S.QUEUED),
        Heartbeat: to(S.QUEUED),
        PartLanded: to(S.QUEUED),
        Commit: to(S.QUEUED),
        Cancel: to(S.CANCELLED),
        Cancelled: to(S.CANCELLED),
        Room: to(S.RESERVED, S.STREAMING),  # STREAMING: it comes in parts, and there is a reader
        Claim: to(S.QUEUED),
        Unclaim: to(S.CANCELLED, S.QUEUED),  # QUEUED: there was no reader
        WriterDead: to(S.EXPIRED),
        LeaseLapsed: to(S.EXPIRED),
        DeadlinePassed: to(S.EXPIRED),
    },
    S.RESERVED: {
        Reserve: to(S.RESERVED),
        Heartbeat: to(S.RESERVED),
        PartLanded: to(S.RESERVED),
        # CANCELLED: what it commits is not what it reserved
        Commit: to(S.VERIFYING, S.COMMITTED, S.CLAIMED, S.CANCELLED),
        Cancel: to(S.CANCELLED),
        Cancelled: to(S.CANCELLED),
        Claim: to(S.RESERVED, S.STREAMING),  # STREAMING: it comes in parts
        Unclaim: to(S.QUARANTINED, S.RESERVED),  # RESERVED: there was no reader
        Verified: to(S.RESERVED, S.QUARANTINED),  # QUARANTINED: a part is not what was sent
        WriterDead: to(S.EXPIRED),
        LeaseLapsed: to(S.QUARANTINED),
        DeadlinePassed: to(S.QUARANTINED),
    },
    S.STREAMING: {
        Reserve: to(S.STREAMING),
        Heartbeat: to(S.STREAMING),
        PartLanded: to(S.STREAMING),
        Commit: to(S.CANCELLED),  # before its parts were taken: not what it reserved
        Cancel: to(S.CANCELLED),
        Cancelled: to(S.CANCELLED),
        Claim: to(S.STREAMING),
        Unclaim: to(S.STREAMING),  # crossed with the delivery, as in CLAIMED
        Verified: to(S.STREAMING, S.QUARANTINED),  # QUARANTINED: a part is not what was sent
        PartTaken: to(S.STREAMING, S.TAKEN),
        Release: to(S.QUARANTINED),
        WriterDead: to(S.EXPIRED),
        LeaseLapsed: to(S.QUARANTINED),
        DeadlinePassed: to(S.QUARANTINED),
    },
    S.TAKEN: {
        **_late(S.TAKEN),
        Reserve: to(S.TAKEN),
        Heartbeat: to(S.TAKEN),
        PartLanded: to(S.TAKEN),
        Commit: to(S.RELEASED),
        Cancel: to(S.RELEASED),
        Cancelled: to(S.RELEASED),
        Claim: to(S.TAKEN),
        Unclaim: to(S.TAKEN),
        WriterDead: to(S.RELEASED),
        LeaseLapsed: to(S.QUARANTINED),
        DeadlinePassed: to(S.QUARANTINED),
    },
    S.VERIFYING: {
        Reserve: to(S.VERIFYING),
        Heartbeat: to(S.VERIFYING),
        PartLanded: to(S.VERIFYING),
        Commit: to(S.VERIFYING),  # answered when it is known
        Cancel: to(S.CANCELLED),
        Cancelled: to(S.VERIFYING),
        Claim: to(S.VERIFYING),
        Unclaim: to(S.CANCELLED, S.VERIFYING),  # VERIFYING: there was no reader
        Verified: to(S.COMMITTED, S.CLAIMED, S.CANCELLED),  # CANCELLED: it is not what was sent
        WriterDead: to(S.VERIFYING),
        DeadlinePassed: to(S.EXPIRED),
    },
    S.COMMITTED: {
        Reserve: to(S.COMMITTED),
        Heartbeat: to(S.COMMITTED),
        PartLanded: to(S.COMMITTED),
        Commit: to(S.COMMITTED),
        Cancel: to(S.CANCELLED),
        Cancelled: to(S.COMMITTED),
        Claim: to(S.CLAIMED),
        WriterDead: to(S.COMMITTED),
        DeadlinePassed: to(S.EXPIRED),
    },
    S.CLAIMED: {
        Reserve: to(S.CLAIMED),
        Heartbeat: to(S.CLAIMED),
        PartLanded: to(S.CLAIMED),
        Commit: to(S.CLAIMED),
        Cancel: to(S.CLAIMED),  # too late: it is whole, and being read
        Cancelled: to(S.CLAIMED),
        Claim: to(S.CLAIMED),
        Unclaim: to(S.CLAIMED),  # crossed with the delivery: the reader has it and will release it
        Release: to(S.RELEASED),
        WriterDead: to(S.CLAIMED),
    },
    S.QUARANTINED: {
        **_late(S.QUARANTINED),
        Reserve: to(S.QUARANTINED),
        Heartbeat: to(S.QUARANTINED),
        PartLanded: to(S.QUARANTINED),
        # It came too late, but it says that the writer has stopped. RELEASED: a reader has had every part.
        Commit: to(S.CANCELLED, S.EXPIRED, S.RELEASED),
        Cancel: to(S.CANCELLED, S.EXPIRED, S.RELEASED),
        Cancelled: to(S.CANCELLED, S.EXPIRED, S.RELEASED),
        Claim: to(S.QUARANTINED),
        Unclaim: to(S.QUARANTINED),  # crossed with the end: the reader was told already
        WriterDead: to(S.CANCELLED, S.EXPIRED, S.RELEASED),
        ReminderDue: to(S.QUARANTINED),
    },
    # A final state remembers how it ended, and answers accordingly.
    **{
        state: {
            **_late(state),
            **{
                kind: to(state)
                for kind in (Reserve, Heartbeat, PartLanded, Commit, Cancel, Cancelled, Claim, Unclaim, WriterDead)
            },
        }
        for state in FINAL
    },
}
