"""The sending side of one transfer: its states, the events, and the table that drives them.

Rules:

1. The outcome is decided once and reported at once, on entering STOPPING, LEAVING or a final state; nothing changes it.
2. Writes are posted in WRITING only. STOPPING lasts until none is in flight. Of a prompt in parts, a part is written
   over an earlier one only once ``PartsTaken`` has said that this one was read.
3. ``Cancel`` and ``Cancelled`` go to the receiver only when no write is in flight and none will be posted:
   they are what lets it use the slot again.
4. ``Cancel`` is repeated until it is acknowledged (LEAVING): a slot is held until the receiver knows, and where a
   connection was lost in between it cannot ask. It is given up when neither side remembers the transfer, or when the
   receiver is known to have been replaced.
5. Whatever a receiver says is defined in every state: messages come late, twice, or not at all. What this process does
   is defined only where it may happen.
"""

from enum import StrEnum
from typing import get_args

from msgspec import Struct

from kvbelt.transfer.machine import Row, Table, either, go, ignoring
from kvbelt.wire.reservation import (
    Cancel,
    Cancelled,
    Committed,
    Expired,
    FromReceiver,
    Granted,
    PartsTaken,
    Refused,
    Wait,
)


class SenderState(StrEnum):
    HANDSHAKING = "handshaking"  # nothing was said about this transfer; slot is None
    RESERVING = "reserving"  # Reserve was said, no answer yet; slot is None
    WAITING = "waiting"  # the receiver has queued us; slot is None
    WRITING = "writing"  # slot is ours while the lease holds; writes may be in flight
    COMMITTING = "committing"  # every byte has landed, no write is in flight; Commit was said
    STOPPING = "stopping"  # outcome decided; writes may still be in flight, no new ones
    LEAVING = "leaving"  # outcome decided; no write is in flight; the receiver may not know it yet
    DONE = "done"  # Committed was heard
    FAILED = "failed"  # not committed as far as we know; no write in flight
    CANCELLED = "cancelled"  # likewise: either side cancelled it
    EXPIRED = "expired"  # likewise: lease or deadline passed


FINAL = frozenset({SenderState.DONE, SenderState.FAILED, SenderState.CANCELLED, SenderState.EXPIRED})


class PeerReady(Struct, frozen=True):
    """The handshake has succeeded."""


class PeerFailed(Struct, frozen=True):
    reason: str
    detail: str
    gone: bool = False  #: that incarnation of the receiver is over: nothing needs to be said to it


class PartWritten(Struct, frozen=True):
    """Every byte of a part has landed; there are several."""

    part: int
    digest: int | None


class Written(Struct, frozen=True):
    """Everything has been handed over, and every byte of it has landed; where there are parts, all were taken."""

    digest: int | None = None  #: of the slot; None: not asked for, or said of each part


class WriteFailed(Struct, frozen=True):
    """A write failed, or what was handed over is not the whole prompt."""

    reason: str
    detail: str
    peer: bool = False  #: it is the peer's connection that failed


class WritesDrained(Struct, frozen=True):
    """No write of this transfer is in flight."""


class Abort(Struct, frozen=True):
    """The owner cancels it."""

    reason: str


class BeatDue(Struct, frozen=True):
    """Time to repeat the latest request."""


class PeerSilent(Struct, frozen=True):
    """No message of the receiver has arrived for a lease."""


class DeadlinePassed(Struct, frozen=True):
    """The transfer's time is over."""


class StopOverdue(Struct, frozen=True):
    """Writes are still in flight a lease after they were to stop."""


class Unanswered(Struct, frozen=True):
    """The receiver has not acknowledged the end for as long as either side remembers it."""


class BlocksFree(Struct, frozen=True):
    """None of the engine's blocks is read any more, nor will be. It concerns the owner only."""


#: What the write pipeline reports of a transfer.
Report = PartWritten | Written | WriteFailed | WritesDrained | BlocksFree

Local = PeerReady | PeerFailed | PartWritten | Written | WriteFailed | WritesDrained | Abort
Timed = BeatDue | PeerSilent | DeadlinePassed | StopOverdue | Unanswered
SenderEvent = FromReceiver | Local | Timed

S = SenderState


def _ignoring_answers(state: SenderState) -> Row[SenderState]:
    """Messages of the receiver change nothing in this state, unless the row says otherwise."""
    return ignoring(state, *get_args(FromReceiver))


def _ending(state: SenderState, action: str) -> Row[SenderState]:
    """Events that end a transfer which must still tell the receiver or wait for writes."""
    return dict.fromkeys((Expired, Cancel, PeerSilent, Abort, DeadlinePassed), go(state, action))


#: A new process in the receiver's place holds nothing of this transfer: nothing needs to be said to it.
_LOST: Row[SenderState] = {PeerFailed: either("leave_or_end", {S.LEAVING: "leave", S.FAILED: "end"})}

_AS_DECIDED = {S.FAILED: "", S.CANCELLED: "", S.EXPIRED: ""}

SENDER_TABLE: Table[SenderState] = {
    S.HANDSHAKING: {
        **_ignoring_answers(S.HANDSHAKING),
        PeerReady: go(S.RESERVING, "begin_asking"),
        PeerFailed: go(S.FAILED, "end"),
        Abort: go(S.CANCELLED, "end"),
        DeadlinePassed: go(S.EXPIRED, "end"),
    },
    **{
        state: {
            **_ignoring_answers(state),
            **_ending(S.LEAVING, "leave"),
            **_LOST,
            Granted: go(S.WRITING, "begin_writing"),
            Wait: go(S.WAITING, "wait"),
            Refused: go(S.FAILED, "end"),
            BeatDue: go(state, "reserve"),
        }
        for state in (S.RESERVING, S.WAITING)
    },
    S.WRITING: {
        **_ignoring_answers(S.WRITING),
        **_ending(S.STOPPING, "stop"),
        PeerFailed: go(S.STOPPING, "stop"),
        WriteFailed: go(S.STOPPING, "stop"),
        PartsTaken: go(S.WRITING, "parts_taken"),
        PartWritten: go(S.WRITING, "part_written"),
        Written: go(S.COMMITTING, "written"),
        BeatDue: go(S.WRITING, "heartbeat"),
    },
    S.COMMITTING: {
        **_ignoring_answers(S.COMMITTING),
        **_ending(S.LEAVING, "leave"),
        **_LOST,
        Committed: go(S.DONE, "end"),
        Refused: go(S.FAILED, "end"),
        BeatDue: go(S.COMMITTING, "commit"),
    },
    S.STOPPING: {
        **_ignoring_answers(S.STOPPING),  # the end message follows once no write is in flight
        **ignoring(S.STOPPING, PartWritten, Written, WriteFailed, Abort),
        PeerFailed: go(S.STOPPING, "note_gone"),
        WritesDrained: either("leave_or_end", {S.LEAVING: "send_end", **_AS_DECIDED}),
        StopOverdue: go(S.STOPPING, "abort_writes"),
    },
    S.LEAVING: {
        **_ignoring_answers(S.LEAVING),
        **ignoring(S.LEAVING, PartWritten, Written, WriteFailed, WritesDrained, Abort),
        # What the receiver holds for us may be a grant that we never saw.
        Expired: go(S.LEAVING, "acknowledge"),
        Cancel: go(S.LEAVING, "acknowledge"),
        Cancelled: either("as_decided", _AS_DECIDED),
        PeerFailed: either("leave_or_end", {S.LEAVING: "", **_AS_DECIDED}),
        BeatDue: go(S.LEAVING, "repeat_end"),
        Unanswered: either("as_decided", _AS_DECIDED),
    },
    # The owner's cancel, the loss of the peer and the last reports of writes may cross with the end.
    **{
        state: {
            **_ignoring_answers(state),
            **ignoring(state, PartWritten, Written, WriteFailed, WritesDrained, Abort, PeerFailed),
            Expired: go(state, "acknowledge"),
            Cancel: go(state, "acknowledge"),
        }
        for state in FINAL
    },
}
