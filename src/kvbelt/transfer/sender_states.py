"""The sending side of one transfer: its states, what may happen in each, and what follows.

Rules:

1. The outcome is decided once and told at once, on entering STOPPING or a final state; nothing changes it.
2. Writes are posted in WRITING only. STOPPING lasts until none is in flight.
3. ``Cancel`` and ``Cancelled`` go to the receiver only when no write is in flight and none will be posted:
   they are what lets it use the slot again.
4. Whatever a peer says is defined in every state: messages come late, twice, or not at all.
   What our own driver does is defined only where it may happen.
"""

from dataclasses import dataclass
from enum import StrEnum

from kvbelt.transfer.machine import Table, to
from kvbelt.wire.reservation import Cancel, Cancelled, Committed, Expired, Granted, Refused, Renewed, Wait


class SenderState(StrEnum):
    """Where an outgoing transfer is."""

    HANDSHAKING = "handshaking"  # nothing was said about this transfer; slot is None
    RESERVING = "reserving"  # Reserve was said, no answer yet; slot is None
    WAITING = "waiting"  # the receiver has queued us; slot is None
    WRITING = "writing"  # slot is ours while the lease holds; writes may be in flight
    COMMITTING = "committing"  # every byte has landed, no write is in flight; Commit was said
    STOPPING = "stopping"  # outcome decided; writes may still be in flight, no new ones
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


@dataclass(frozen=True, slots=True)
class Written:
    """Everything has been handed over, and every byte of it has landed."""


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


FromPeer = Granted | Wait | Refused | Renewed | Committed | Expired | Cancel | Cancelled
Local = PeerReady | PeerFailed | Written | WriteFailed | Quiet | Abandon
Timed = BeatDue | PeerSilent | DeadlinePassed | StopOverdue
SenderEvent = FromPeer | Local | Timed

FROM_PEER: tuple[type, ...] = (Granted, Wait, Refused, Renewed, Committed, Expired, Cancel, Cancelled)

S = SenderState


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
        Expired: to(S.EXPIRED),
        Cancel: to(S.CANCELLED),
        PeerFailed: to(S.FAILED),
        PeerSilent: to(S.FAILED),
        WriteFailed: to(S.FAILED),
        Abandon: to(S.CANCELLED),
        DeadlinePassed: to(S.EXPIRED),
        BeatDue: to(S.RESERVING),
    },
    S.WAITING: {
        **_deaf(S.WAITING),
        Granted: to(S.WRITING),
        Refused: to(S.FAILED),
        Expired: to(S.EXPIRED),
        Cancel: to(S.CANCELLED),
        PeerFailed: to(S.FAILED),
        PeerSilent: to(S.FAILED),
        WriteFailed: to(S.FAILED),
        Abandon: to(S.CANCELLED),
        DeadlinePassed: to(S.EXPIRED),
        BeatDue: to(S.WAITING),
    },
    S.WRITING: {
        **_deaf(S.WRITING),
        Expired: to(S.STOPPING),
        Cancel: to(S.STOPPING),
        PeerFailed: to(S.STOPPING),
        PeerSilent: to(S.STOPPING),
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
        Expired: to(S.EXPIRED),
        Cancel: to(S.CANCELLED),
        PeerFailed: to(S.FAILED),
        PeerSilent: to(S.FAILED),
        Abandon: to(S.CANCELLED),
        DeadlinePassed: to(S.EXPIRED),
        BeatDue: to(S.COMMITTING),
    },
    S.STOPPING: {
        **_deaf(S.STOPPING),  # the acknowledgement follows once it is true
        Quiet: to(S.FAILED, S.CANCELLED, S.EXPIRED),
        PeerFailed: to(S.STOPPING),
        WriteFailed: to(S.STOPPING),
        Abandon: to(S.STOPPING),
        StopOverdue: to(S.STOPPING),
    },
    # A final state answers Expired and Cancel with Cancelled, and is otherwise deaf. The owner's cancel and
    # the loss of the peer may cross with the end.
    **{state: {**_deaf(state), Abandon: to(state), PeerFailed: to(state)} for state in FINAL},
}
