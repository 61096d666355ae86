"""The sending side of one transfer: its states, what may happen in each, and what follows.

Rules:

1. The outcome is decided once and told at once, on entering STOPPING, LEAVING or a final state; nothing changes it.
2. Writes are posted in WRITING only. STOPPING lasts until none is in flight. Of a prompt in parts, a part is written
   over an earlier one only once ``PartsTaken`` has said that this one was read.
3. ``Cancel`` and ``Cancelled`` go to the receiver only when no write is in flight and none will be posted:
   they are what lets it use the slot again.
4. ``Cancel`` is repeated until it is acknowledged (LEAVING): a slot is held until the receiver knows, and where a
   connection was lost in between it cannot ask. It is given up when nobody remembers any more, or when the receiver
   is known to be another one now.
5. Whatever a peer says is defined in every state: messages come late, twice, or not at all.
   What our own driver does is defined only where it may happen.
"""

from dataclasses import dataclass
from enum import StrEnum

from kvbelt.transfer.machine import Table, to
from kvbelt.wire.reservation import (
    Cancel,
    Cancelled,
    Committed,
    Expired,
    Granted,
    PartsTaken,
    Refused,
    Renewed,
    Wait,
)


class SenderState(StrEnum):
    """Where an outgoing transfer is."""

    HANDSHAKING = "handshaking"  # nothing was said about this transfer; slot is None
    RESERVING = "reserving"  # Reserve was said, no answer yet; slot is None
    WAITING = "waiting"  # the receiver has queued us; slot is None
    WRITING = "writing"  # slot is ours while the lease holds; writes may be in flight
    COMMITTING = "committing"  # every byte has landed, no write is in flight; Commit was said
    STOPPING = "stopping"  # outcome decided; writes may still be in flight, no new ones
    LEAVING = "leaving"  # outcome decided; no write is in flight; the receiver may not know it yet
    DONE = "done"  # Committed was heard
    FAILED = "failed"  # not committed as far as we know; no write in flight
    CANCELLED = "cancelled"  # likewise: either side wanted it no more
    EXPIRED = "expired"  # likewise: lease or deadline passed


FINAL = frozenset({SenderState.DONE, SenderState.FAILED, SenderState.CANCELLED, SenderState.EXPIRED})


@dataclass(frozen=True, slots=True)
class PeerReady:
    """The handshake has succeeded."""


@dataclass(frozen=True, slots=True)
class PeerFailed:
    """The handshake was refused or not answered, or the connection is lost."""

    reason: str
    detail: str
    gone: bool = False  #: that life of the receiver is over: nobody is there who would have to be told anything


@dataclass(frozen=True, slots=True)
class PartWritten:
    """Every byte of a part has landed; there are several."""

    part: int
    digest: int | None


@dataclass(frozen=True, slots=True)
class Written:
    """Everything has been handed over, and every byte of it has landed; where there are parts, all were taken."""

    digest: int | None = None  #: of the slot; None: not asked for, or said of each part


@dataclass(frozen=True, slots=True)
class WriteFailed:
    """A write failed, or what was handed over is not the whole prompt."""

    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Quiet:
    """No write of this transfer is in flight."""


@dataclass(frozen=True, slots=True)
class Abandon:
    """The owner wants it no more."""

    reason: str


@dataclass(frozen=True, slots=True)
class BeatDue:
    """Time to say again what we last said."""


@dataclass(frozen=True, slots=True)
class PeerSilent:
    """Nothing was heard for a lease."""


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The transfer's time is over."""


@dataclass(frozen=True, slots=True)
class StopOverdue:
    """Writes are still in flight a lease after they were to stop."""


@dataclass(frozen=True, slots=True)
class Unanswered:
    """The receiver has not acknowledged our end for as long as anybody remembers it."""


FromPeer = Granted | Wait | Refused | Renewed | PartsTaken | Committed | Expired | Cancel | Cancelled
Local = PeerReady | PeerFailed | PartWritten | Written | WriteFailed | Quiet | Abandon
Timed = BeatDue | PeerSilent | DeadlinePassed | StopOverdue | Unanswered
SenderEvent = FromPeer | Local | Timed

FROM_PEER: tuple[type, ...] = (Granted, Wait, Refused, Renewed, PartsTaken, Committed, Expired, Cancel, Cancelled)

S = SenderState

_UNSUCCESSFUL = (S.FAILED, S.CANCELLED, S.EXPIRED)


def _deaf(state: SenderState) -> dict[type, frozenset[SenderState]]:
    """In this state, whatever a peer says changes nothing."""
    return {message: to(state) for message in FROM_PEER}


SENDER_TABLE: Table[SenderState] = {
    S.HANDSHAKING: {
        **_deaf(S.HANDSHAKING),
        PeerReady: to(S.RESERVING),
        PeerFailed: to(S.FAILED),
        Abandon: to(S.CANCELLED),
        DeadlinePassed: to(S.EXPIRED),
    },
    S.RESERVING: {
        **_deaf(S.RESERVING),
        Granted: to(S.WRITING),
        Wait: to(S.WAITING),
        Refused: to(S.FAILED),
        Expired: to(S.LEAVING),
        Cancel: to(S.LEAVING),
        PeerFailed: to(S.LEAVING, S.FAILED),
        PeerSilent: to(S.LEAVING),
        WriteFailed: to(S.LEAVING),
        Abandon: to(S.LEAVING),
        DeadlinePassed: to(S.LEAVING),
        BeatDue: to(S.RESERVING),
    },
    S.WAITING: {
        **_deaf(S.WAITING),
        Granted: to(S.WRITING),
        Refused: to(S.FAILED),
        Expired: to(S.LEAVING),
        Cancel: to(S.LEAVING),
        PeerFailed: to(S.LEAVING, S.FAILED),
        PeerSilent: to(S.LEAVING),
        WriteFailed: to(S.LEAVING),
        Abandon: to(S.LEAVING),
        DeadlinePassed: to(S.LEAVING),
        BeatDue: to(S.WAITING),
    },
    S.WRITING: {
        **_deaf(S.WRITING),
        Expired: to(S.STOPPING),
        Cancel: to(S.STOPPING),
        PeerFailed: to(S.STOPPING),
        PeerSilent: to(S.STOPPING),
        PartWritten: to(S.WRITING),
        Written: to(S.COMMITTING),
        WriteFailed: to(S.STOPPING),
        Abandon: to(S.STOPPING),
        DeadlinePassed: to(S.STOPPING),
        BeatDue: to(S.WRITING),
    },
    S.COMMITTING: {
        **_deaf(S.COMMITTING),
        Committed: to(S.DONE),
        Refused: to(S.FAILED),
        Expired: to(S.LEAVING),
        Cancel: to(S.LEAVING),
        PeerFailed: to(S.LEAVING, S.FAILED),
        PeerSilent: to(S.LEAVING),
        Abandon: to(S.LEAVING),
        DeadlinePassed: to(S.LEAVING),
        BeatDue: to(S.COMMITTING),
    },
    S.STOPPING: {
        **_deaf(S.STOPPING),  # the farewell follows once it is true
        Quiet: to(S.LEAVING, *_UNSUCCESSFUL),
        PeerFailed: to(S.STOPPING),
        WriteFailed: to(S.STOPPING),
        Abandon: to(S.STOPPING),
        StopOverdue: to(S.STOPPING),
    },
    S.LEAVING: {
        **_deaf(S.LEAVING),
        Cancelled: to(*_UNSUCCESSFUL),
        PeerFailed: to(S.LEAVING, *_UNSUCCESSFUL),
        Abandon: to(S.LEAVING),
        BeatDue: to(S.LEAVING),
        Unanswered: to(*_UNSUCCESSFUL),
    },
    # A final state answers Expired and Cancel with Cancelled, and is otherwise deaf. The owner's cancel and
    # the loss of the peer may cross with the end.
    **{state: {**_deaf(state), Abandon: to(state), PeerFailed: to(state)} for state in FINAL},
}
