"""The receiving side of one transfer: its states, what may happen in each, and what follows.

Rules:

1. A slot belongs to its writer from RESERVED until the writer is known to write no more: it has said
   ``Commit``, ``Cancel`` or ``Cancelled``, or it is dead. Only then may the slot go to somebody else.
2. A reader sees KV in CLAIMED only, and CLAIMED is entered from a commit only.
3. A reader is told exactly once: that the KV is there, or that it is lost and why.
4. Every state but CLAIMED and QUARANTINED ends by time alone. CLAIMED ends when our own reader releases,
   QUARANTINED when the writer acknowledges or is dead.
"""

from dataclasses import dataclass
from enum import StrEnum

from kvbelt.transfer.machine import Table, to
from kvbelt.transfer.slots import Slot
from kvbelt.wire.reservation import Cancel, Cancelled, Commit, Heartbeat, Reserve


class ReceiverState(StrEnum):
    """Where an incoming transfer is."""

    EXPECTED = "expected"  # a reader waits; no writer has been heard of; no slot
    QUEUED = "queued"  # a writer waits for room; no slot; it is in the queue exactly once
    RESERVED = "reserved"  # the slot is the writer's while the lease holds; invisible to readers
    COMMITTED = "committed"  # every byte has landed; the writer has stopped; no reader yet
    CLAIMED = "claimed"  # a reader has it, and will release it
    QUARANTINED = "quarantined"  # over for everybody, but the writer may still be writing into the slot
    RELEASED = "released"  # over: a reader had it; no slot
    CANCELLED = "cancelled"  # over: one side wanted it no more, or the writer gave up; no slot
    EXPIRED = "expired"  # over: lease or deadline passed, or the writer died; no slot


FINAL = frozenset({ReceiverState.RELEASED, ReceiverState.CANCELLED, ReceiverState.EXPIRED})


@dataclass(frozen=True, slots=True)
class Room:
    """There is a slot for it."""

    slot: Slot


@dataclass(frozen=True, slots=True)
class Claim:
    """A reader wants it, until ``deadline``; ``until`` bounds how long an unknown writer is waited for."""

    deadline: float
    until: float


@dataclass(frozen=True, slots=True)
class Unclaim:
    """The reader wants it no more."""


@dataclass(frozen=True, slots=True)
class Release:
    """The reader has read it."""


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


FromWriter = Reserve | Heartbeat | Commit | Cancel | Cancelled
Local = Room | Claim | Unclaim | Release | WriterDead
Timed = LeaseLapsed | DeadlinePassed | ReminderDue
ReceiverEvent = FromWriter | Local | Timed

S = ReceiverState

RECEIVER_TABLE: Table[ReceiverState] = {
    S.EXPECTED: {
        Reserve: to(S.QUEUED),
        Heartbeat: to(S.EXPECTED),  # of a writer we have forgotten: it is told
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
        Commit: to(S.QUEUED),
        Cancel: to(S.CANCELLED),
        Cancelled: to(S.CANCELLED),
        Room: to(S.RESERVED),
        Claim: to(S.QUEUED),
        Unclaim: to(S.CANCELLED, S.QUEUED),  # QUEUED: there was no reader
        WriterDead: to(S.EXPIRED),
        LeaseLapsed: to(S.EXPIRED),
        DeadlinePassed: to(S.EXPIRED),
    },
    S.RESERVED: {
        Reserve: to(S.RESERVED),
        Heartbeat: to(S.RESERVED),
        Commit: to(S.COMMITTED, S.CLAIMED, S.CANCELLED),  # CANCELLED: what it commits is not what it reserved
        Cancel: to(S.CANCELLED),
        Cancelled: to(S.CANCELLED),
        Claim: to(S.RESERVED),
        Unclaim: to(S.QUARANTINED, S.RESERVED),  # RESERVED: there was no reader
        WriterDead: to(S.EXPIRED),
        LeaseLapsed: to(S.QUARANTINED),
        DeadlinePassed: to(S.QUARANTINED),
    },
    S.COMMITTED: {
        Reserve: to(S.COMMITTED),
        Heartbeat: to(S.COMMITTED),
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
        Commit: to(S.CLAIMED),
        Cancel: to(S.CLAIMED),  # too late: it is whole, and being read
        Cancelled: to(S.CLAIMED),
        Claim: to(S.CLAIMED),
        Unclaim: to(S.CLAIMED),  # crossed with the delivery: the reader has it and will release it
        Release: to(S.RELEASED),
        WriterDead: to(S.CLAIMED),
    },
    S.QUARANTINED: {
        Reserve: to(S.QUARANTINED),
        Heartbeat: to(S.QUARANTINED),
        Commit: to(S.CANCELLED, S.EXPIRED),  # it came too late, but it says that the writer has stopped
        Cancel: to(S.CANCELLED, S.EXPIRED),
        Cancelled: to(S.CANCELLED, S.EXPIRED),
        Claim: to(S.QUARANTINED),
        Unclaim: to(S.QUARANTINED, S.RESERVED),  # RESERVED: there was no reader
        WriterDead: to(S.CANCELLED, S.EXPIRED),
        ReminderDue: to(S.QUARANTINED),
    },
    # A final state remembers how it ended, and answers accordingly.
    **{
        state: {
            kind: to(state)
            for kind in (Reserve, Heartbeat, Commit, Cancel, Cancelled, Claim, Unclaim, Release, WriterDead)
        }
        for state in FINAL
    },
}
