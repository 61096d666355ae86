"""The receiving side of one transfer: its states, the events, and the table that drives them.

Rules:

1. A slot belongs to its sender from RESERVED until the sender is known to write no more: it has said ``Commit``,
   ``Cancel`` or ``Cancelled``, or it is dead. Only then may the slot go to another transfer.
2. A consumer sees KV in CLAIMED only, and CLAIMED is entered from a commit only; where digests were asked for, only
   once they have been found right. The exception is a prompt in parts: its consumer takes out each part that has
   landed and was found right (STREAMING), and may use none of it before it has all (TAKEN).
3. A consumer is told exactly once: that the KV is there, or that it is lost and why. The consumer of a prompt in parts
   is told that it begins, and exactly once that it is whole, or lost and why.
4. Every state but CLAIMED and QUARANTINED ends by time alone. CLAIMED ends when our own consumer releases,
   QUARANTINED when the sender acknowledges or is dead.
5. Whatever a sender says is defined in every state. What this process does is defined only where it may happen.
"""

from enum import StrEnum

from msgspec import Struct

from kvbelt.transfer.machine import Row, Table, either, go, ignoring
from kvbelt.transfer.receive.slots import Slot
from kvbelt.transfer.shape import SlotShape
from kvbelt.wire.reservation import Cancel, Cancelled, Commit, FromSender, Heartbeat, PartLanded, Reserve


class ReceiverState(StrEnum):
    EXPECTED = "expected"  # a consumer waits; no sender has been heard; no slot
    QUEUED = "queued"  # a sender waits for a slot; it is in the queue exactly once
    RESERVED = "reserved"  # the slot is the sender's while the lease holds; invisible to consumers
    STREAMING = "streaming"  # likewise, and a consumer takes out what has landed, part after part
    TAKEN = "taken"  # a consumer has every part; the sender has not yet said that it is done
    VERIFYING = "verifying"  # every byte is said to have landed and is being checked; the sender has stopped
    COMMITTED = "committed"  # every byte has landed, and was found right where that was asked for; no consumer yet
    CLAIMED = "claimed"  # a consumer has it, and will release it
    QUARANTINED = "quarantined"  # over for everybody, but the sender may still be writing into the slot
    RELEASED = "released"  # over: a consumer had it; no slot
    CANCELLED = "cancelled"  # over: one side cancelled it, or the sender gave up; no slot
    EXPIRED = "expired"  # over: lease or deadline passed, or the sender died; no slot


FINAL = frozenset({ReceiverState.RELEASED, ReceiverState.CANCELLED, ReceiverState.EXPIRED})

#: Exactly in these a transfer has a slot.
HOLDING = frozenset(ReceiverState) - FINAL - {ReceiverState.EXPECTED, ReceiverState.QUEUED}


class SlotGranted(Struct, frozen=True):
    slot: Slot
    shape: SlotShape


class Claim(Struct, frozen=True):
    """A consumer wants it, until ``deadline``; ``until`` bounds how long an unknown sender is waited for."""

    deadline: float
    until: float


class CancelRead(Struct, frozen=True):
    """The consumer cancels before it was told."""


class Verified(Struct, frozen=True):
    part: int | None
    right: bool


class PartTaken(Struct, frozen=True):
    """The consumer has read the next part."""


class Release(Struct, frozen=True):
    """The consumer has read it, or reads no more of it."""


class SenderDead(Struct, frozen=True):
    """The sender's process is known to be gone."""


class LeaseLapsed(Struct, frozen=True):
    """No message of the sender has arrived for a lease."""


class DeadlinePassed(Struct, frozen=True):
    """The transfer's or the consumer's time is over."""


class ReminderDue(Struct, frozen=True):
    """Time to ask the sender again whether it has stopped."""


#: What the consumer and the checks report of a transfer.
FromOwner = CancelRead | Verified | PartTaken | Release
Local = SlotGranted | Claim | FromOwner | SenderDead
Timed = LeaseLapsed | DeadlinePassed | ReminderDue
ReceiverEvent = FromSender | Local | Timed

S = ReceiverState


def _overtaken(state: ReceiverState) -> Row[ReceiverState]:
    """What a sender has said before the commit comes after it."""
    return ignoring(state, Reserve, Heartbeat, PartLanded, Cancelled)


def _crossing(state: ReceiverState) -> Row[ReceiverState]:
    """Our own consumer and our own check may cross with the end of what they are about."""
    return ignoring(state, Verified, PartTaken, Release, CancelRead)


def _no_slot(state: ReceiverState) -> Row[ReceiverState]:
    """A message about a slot that this transfer does not have, perhaps of a sender that we have forgotten."""
    return {event: go(state, "say_expired") for event in (Heartbeat, PartLanded, Commit)}


_OVER = either("end_of_quarantine", {S.CANCELLED: "free", S.EXPIRED: "free", S.RELEASED: "free"})

RECEIVER_TABLE: Table[ReceiverState] = {
    S.EXPECTED: {
        **_no_slot(S.EXPECTED),
        Reserve: go(S.QUEUED, "enqueue"),
        Cancel: go(S.CANCELLED, "sender_ends"),
        Cancelled: go(S.EXPECTED),
        Claim: go(S.EXPECTED, "expect"),
        CancelRead: go(S.CANCELLED, "consumer_ends"),
        DeadlinePassed: go(S.EXPIRED, "never_heard"),
    },
    S.QUEUED: {
        **_no_slot(S.QUEUED),
        Reserve: go(S.QUEUED, "renew"),
        Cancel: go(S.CANCELLED, "sender_ends"),
        Cancelled: go(S.CANCELLED, "sender_ends"),
        SlotGranted: either("whether_to_stream", {S.RESERVED: "take_slot", S.STREAMING: "take_slot_and_stream"}),
        Claim: go(S.QUEUED, "expect"),
        CancelRead: either("if_awaited", {S.CANCELLED: "consumer_ends", S.QUEUED: ""}),
        SenderDead: go(S.EXPIRED, "sender_died"),
        LeaseLapsed: go(S.EXPIRED, "lease_lapsed"),
        DeadlinePassed: go(S.EXPIRED, "deadline_passed"),
    },
    S.RESERVED: {
        Reserve: go(S.RESERVED, "grant_again"),
        Heartbeat: go(S.RESERVED, "renew_lease"),
        PartLanded: go(S.RESERVED, "part_landed"),
        Commit: either(
            "judge_commit",
            {
                S.VERIFYING: "check_slot",
                S.COMMITTED: "commit",
                S.CLAIMED: "commit_and_deliver",
                S.CANCELLED: "refuse_commit",  # what it commits is not what it reserved
            },
        ),
        Cancel: go(S.CANCELLED, "sender_ends"),
        Cancelled: go(S.CANCELLED, "sender_ends"),
        Claim: either("whether_to_stream", {S.RESERVED: "expect", S.STREAMING: "claim_and_stream"}),
        CancelRead: either("if_awaited", {S.QUARANTINED: "consumer_ends", S.RESERVED: ""}),
        Verified: either("judge_part", {S.RESERVED: "part_right", S.QUARANTINED: "part_wrong"}),
        SenderDead: go(S.EXPIRED, "sender_died"),
        LeaseLapsed: go(S.QUARANTINED, "lease_lapsed"),
        DeadlinePassed: go(S.QUARANTINED, "deadline_passed"),
    },
    S.STREAMING: {
        Reserve: go(S.STREAMING, "grant_again"),
        Heartbeat: go(S.STREAMING, "renew_lease"),
        PartLanded: go(S.STREAMING, "part_landed"),
        Commit: go(S.CANCELLED, "refuse_commit"),  # before its parts were taken
        Cancel: go(S.CANCELLED, "sender_ends"),
        Cancelled: go(S.CANCELLED, "sender_ends"),
        CancelRead: go(S.STREAMING),  # it has crossed with the delivery: the consumer will release it
        Verified: either("judge_part", {S.STREAMING: "part_right", S.QUARANTINED: "part_wrong"}),
        PartTaken: either("whether_last", {S.STREAMING: "part_taken", S.TAKEN: "last_part_taken"}),
        Release: go(S.QUARANTINED, "consumer_ends"),
        SenderDead: go(S.EXPIRED, "sender_died"),
        LeaseLapsed: go(S.QUARANTINED, "lease_lapsed"),
        DeadlinePassed: go(S.QUARANTINED, "deadline_passed"),
    },
    S.TAKEN: {
        **_crossing(S.TAKEN),
        Reserve: go(S.TAKEN),
        Heartbeat: go(S.TAKEN, "renew_lease"),
        PartLanded: go(S.TAKEN, "part_landed"),
        Commit: go(S.RELEASED, "commit_taken"),
        Cancel: go(S.RELEASED, "free"),
        Cancelled: go(S.RELEASED, "free"),
        SenderDead: go(S.RELEASED, "free"),
        LeaseLapsed: go(S.QUARANTINED, "lease_lapsed"),
        DeadlinePassed: go(S.QUARANTINED, "deadline_passed"),
    },
    S.VERIFYING: {
        **_overtaken(S.VERIFYING),
        Commit: go(S.VERIFYING, "renew_lease"),  # answered when it is known
        Cancel: go(S.CANCELLED, "sender_ends"),
        Claim: go(S.VERIFYING, "expect"),
        CancelRead: either("if_awaited", {S.CANCELLED: "consumer_ends", S.VERIFYING: ""}),
        Verified: either(
            "judge_slot", {S.COMMITTED: "commit", S.CLAIMED: "commit_and_deliver", S.CANCELLED: "refuse_bytes"}
        ),
        SenderDead: go(S.VERIFYING),
        DeadlinePassed: go(S.EXPIRED, "deadline_passed"),
    },
    S.COMMITTED: {
        **_overtaken(S.COMMITTED),
        Commit: go(S.COMMITTED, "say_committed"),
        Cancel: go(S.CANCELLED, "sender_ends"),
        Claim: go(S.CLAIMED, "deliver"),
        SenderDead: go(S.COMMITTED),
        DeadlinePassed: go(S.EXPIRED, "deadline_passed"),
    },
    S.CLAIMED: {
        **_overtaken(S.CLAIMED),
        Commit: go(S.CLAIMED, "say_committed"),
        Cancel: go(S.CLAIMED),  # too late: it is whole, and being read
        CancelRead: go(S.CLAIMED),  # it has crossed with the delivery: the consumer will release it
        Release: go(S.RELEASED, "consumed"),
        SenderDead: go(S.CLAIMED),
    },
    S.QUARANTINED: {
        **_crossing(S.QUARANTINED),
        # The sender does not know that the transfer has ended. A refusal would make it leave without saying that it
        # has stopped writing.
        Reserve: go(S.QUARANTINED, "remind"),
        Heartbeat: go(S.QUARANTINED, "say_expired"),
        PartLanded: go(S.QUARANTINED, "say_expired"),
        # It came too late, but it says that the sender has stopped. RELEASED: a consumer has had every part.
        Commit: either(
            "end_of_quarantine",
            {S.CANCELLED: "free_and_answer", S.EXPIRED: "free_and_answer", S.RELEASED: "commit_taken"},
        ),
        Cancel: _OVER,
        Cancelled: _OVER,
        SenderDead: _OVER,
        Claim: go(S.QUARANTINED, "lose"),
        ReminderDue: go(S.QUARANTINED, "remind"),
    },
    # A final state remembers how it ended, and answers accordingly.
    **{
        state: {
            **_crossing(state),
            Reserve: go(state, "say_ended"),
            Heartbeat: go(state, "say_expired"),
            PartLanded: go(state, "say_expired"),
            Commit: go(state, "say_committed"),
            Cancel: go(state),
            Cancelled: go(state),
            Claim: go(state, "lose"),
            SenderDead: go(state),
        }
        for state in FINAL
    },
}
