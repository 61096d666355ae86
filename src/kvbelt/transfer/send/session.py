"""The sending side of one transfer: a pure machine, driven by the table in states.py."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, get_args

from msgspec import Struct

from kvbelt.transfer.machine import Machine
from kvbelt.transfer.ports import TransferOutcome
from kvbelt.transfer.send import states as s
from kvbelt.transfer.send.load import Load
from kvbelt.transfer.send.peer import Peer
from kvbelt.wire import reservation as wire
from kvbelt.wire.handshake import Share
from kvbelt.wire.ids import EngineId, SlotName, TransferId
from kvbelt.wire.layout import KVLayout

S = s.SenderState

_FROM_RECEIVER = frozenset(get_args(wire.FromReceiver))


class Send(Struct, frozen=True):
    message: wire.FromSender


class BeginWriting(Struct, frozen=True):
    """Gather and write what has been and will be handed over, as granted."""

    granted: wire.Granted


class ContinueWriting(Struct, frozen=True):
    taken: int


class StopWriting(Struct, frozen=True):
    """Gather and post nothing more; report WritesDrained when no write is in flight (at once, if none is)."""


class AbortWrites(Struct, frozen=True):
    """Do not wait any longer for writes in flight: abort them, if need be with the whole connection."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Tell the owner and the proxy how it ended. Exactly once."""

    state: s.SenderState
    reason: str
    detail: str


SenderCommand = Send | BeginWriting | ContinueWriting | StopWriting | AbortWrites | Outcome
Commands = list[SenderCommand]


class SendTimes(NamedTuple):
    heartbeat_seconds: float
    lease_seconds: float
    memory_seconds: float = 120.0  #: how long an end is remembered on either side


def _ignore(*_: object) -> None:
    """There is no owner to tell."""


class SenderSession(Machine[s.SenderState, s.SenderEvent, SenderCommand]):
    """One outgoing transfer: its only record, from ``Belt.send`` to its end.

    One that ``measures`` carries no prompt, and its end is reported neither to the proxy nor to the log.
    """

    table = s.SENDER_TABLE
    final = s.FINAL

    def __init__(  # noqa: PLR0917 -- what a transfer is about
        self,
        transfer_id: TransferId,
        sender: EngineId,
        receiver: EngineId,
        num_tokens: int,
        layout: KVLayout,
        deadline: float,
        times: SendTimes,
        now: float,
        prefix: bytes = b"",
        on_blocks_free: Callable[[], None] = _ignore,
        on_end: Callable[[TransferOutcome], None] = _ignore,
        *,
        measures: bool = False,
    ) -> None:
        super().__init__(f"send {transfer_id}", S.HANDSHAKING, now)
        self.transfer_id = transfer_id
        self.sender = sender
        self.receiver = receiver
        self.num_tokens = num_tokens
        self.engine_blocks = layout.blocks(num_tokens)
        self._layout = layout
        self.deadline = deadline
        self.prefix = prefix
        self.on_blocks_free = on_blocks_free
        self.on_end = on_end
        self.measures = measures
        self.peer: Peer | None = None  #: set when it begins
        self.slot: SlotName | None = None  #: set by Granted, never changed after it
        self.outcome: Outcome | None = None  #: decided once
        self.computed_at: float | None = None  #: when every block had been handed over
        self.load = Load()  #: its bytes: the write pipeline's
        self._heartbeat_seconds, self._lease_seconds, self._memory_seconds = times
        self._first_block = 0  # as granted: those before it are there
        self._untaken: dict[int, int | None] = {}  # parts that have landed and are not known to be taken: digests
        self._digest: int | None = None  # of the slot; set by Written
        self._gone = False  # the receiver's process is over: nothing needs to be said to it
        self._heard = now
        self._beat_at = now
        self._stop_by = now
        self._leave_by = now

    @property
    def share(self) -> Share:
        """What of every block travels; all of it as long as the peer is not known."""
        peer = self.peer
        return peer.share if peer is not None and peer.share is not None else Share(self._layout)

    @property
    def num_blocks(self) -> int:
        """Blocks that travel, or may."""
        return self.share.layout.blocks(self.num_tokens)

    @property
    def num_bytes(self) -> int:
        return self.share.layout.slot_bytes(self.num_blocks)

    @property
    def failure(self) -> str | None:
        outcome = self.outcome
        return None if outcome is None or outcome.state is S.DONE else outcome.reason

    def timers(self) -> list[tuple[float, type[s.SenderEvent]]]:
        if self.ended:
            return []
        if self.state is S.STOPPING:
            return [(self._stop_by, s.StopOverdue)]
        if self.state is S.LEAVING:
            return [(self._leave_by, s.Unanswered), (self._beat_at, s.BeatDue)]
        if self.state is S.HANDSHAKING:
            return [(self.deadline, s.DeadlinePassed)]
        silent_at = self._heard + self._lease_seconds
        return [(self.deadline, s.DeadlinePassed), (silent_at, s.PeerSilent), (self._beat_at, s.BeatDue)]

    def handle(self, event: s.SenderEvent, now: float) -> Commands:
        if type(event) in _FROM_RECEIVER:
            named: SlotName | None = getattr(event, "slot", None)
            ours = named == self.slot or (self.slot is None and named is not None and named.engine_id == self.receiver)
            if named is not None and not ours:
                return []  # about another use of the slot, or of another receiver's
            self._heard = now
        return super().handle(event, now)

    # Choices between states.

    def leave_or_end(self, event: s.PeerFailed | s.WritesDrained) -> s.SenderState:
        if not (event.gone if isinstance(event, s.PeerFailed) else self._gone):
            return S.LEAVING
        return self.outcome.state if self.outcome is not None else S.FAILED

    def as_decided(self, event: object) -> s.SenderState:
        assert self.outcome is not None  # rule 1
        return self.outcome.state

    def begin_asking(self, event: s.PeerReady) -> Commands:
        self._heard = self.now
        return self.reserve(event)

    def reserve(self, event: object) -> Commands:
        self._beat_at = self.now + self._heartbeat_seconds
        asked = {"receiver": self.receiver, "num_tokens": self.num_tokens, "prefix": self.prefix}
        size = {"num_blocks": self.num_blocks, "num_bytes": self.num_bytes}
        return [self._say(wire.Reserve, **asked, **size, deadline_seconds=self.deadline - self.now)]

    def wait(self, message: wire.Wait) -> Commands:
        # Never later than our own beat: asking again is what keeps the place in the queue.
        self._beat_at = self.now + min(max(message.retry_after_seconds, 0.0), self._heartbeat_seconds)
        return []

    def begin_writing(self, message: wire.Granted) -> Commands:
        self.slot, self._first_block = message.slot, message.first_block
        self._beat_at = self.now + self._heartbeat_seconds
        return [BeginWriting(message)]

    def heartbeat(self, event: object) -> Commands:
        self._beat_at = self.now + self._heartbeat_seconds
        landed = [
            self._say(wire.PartLanded, slot=self.slot, part=part, digest=digest)
            for part, digest in self._untaken.items()
        ]
        return [self._say(wire.Heartbeat, slot=self.slot), *landed]

    def part_written(self, event: s.PartWritten) -> Commands:
        self._untaken[event.part] = event.digest
        return [self._say(wire.PartLanded, slot=self.slot, part=event.part, digest=event.digest)]

    def parts_taken(self, message: wire.PartsTaken) -> Commands:
        for part in [part for part in self._untaken if part < message.parts]:
            del self._untaken[part]
        return [ContinueWriting(message.parts)]

    def written(self, event: s.Written) -> Commands:
        self._digest = event.digest
        return self.commit(event)

    def commit(self, event: object) -> Commands:
        self._beat_at = self.now + self._heartbeat_seconds
        sent = self.num_bytes // self.num_blocks * (self.num_blocks - self._first_block)
        size = {"num_tokens": self.num_tokens, "num_bytes": sent}
        return [self._say(wire.Commit, slot=self.slot, **size, digest=self._digest)]

    def end(self, event: s.SenderEvent) -> Commands:
        self.outcome = self._outcome_of(event)
        return [StopWriting(), self.outcome]

    def stop(self, event: s.SenderEvent) -> Commands:
        self.outcome = self._outcome_of(event)
        self._gone = isinstance(event, s.PeerFailed) and event.gone
        self._stop_by = self.now + self._lease_seconds
        return [self.outcome, StopWriting()]

    def leave(self, event: s.SenderEvent) -> Commands:
        return [*self.end(event), *self.send_end(event)]

    def note_gone(self, event: s.PeerFailed) -> Commands:
        self._gone = self._gone or event.gone
        return []

    def abort_writes(self, event: s.StopOverdue) -> Commands:
        self._stop_by = self.now + self._lease_seconds
        return [AbortWrites()]

    def send_end(self, event: object) -> Commands:
        self._leave_by = self.now + self._memory_seconds
        return self.repeat_end(event)

    def repeat_end(self, event: object) -> Commands:
        # Seldom: many transfers may report their end to a receiver that is gone, and a delay costs nothing.
        self._beat_at = self.now + self._lease_seconds
        assert self.outcome is not None  # rule 1
        return [self._say(wire.Cancel, slot=self.slot, reason=self.outcome.reason)]

    def acknowledge(self, message: wire.Expired | wire.Cancel) -> Commands:
        return [self._say(wire.Cancelled, slot=message.slot)]

    def _outcome_of(self, event: s.SenderEvent) -> Outcome:  # noqa: PLR0911 -- one case an event
        late = "receiver_full" if self.was is S.WAITING else "deadline"
        match event:
            case wire.Committed():
                return Outcome(S.DONE, "done", "committed")
            case s.DeadlinePassed():
                return Outcome(S.EXPIRED, late, f"the deadline passed while {self.was}")
            case wire.Expired(reason=reason):  # where it is the deadline, the receiver's clock was first
                return Outcome(S.EXPIRED, late if reason == "deadline" else reason, "the receiver ended it")
            case wire.Cancel(reason=reason):
                return Outcome(S.CANCELLED, reason, "the receiver ended it")
            case s.Abort(reason):
                return Outcome(S.CANCELLED, reason, f"cancelled while {self.was}")
            case s.PeerFailed(reason=reason, detail=detail) | s.WriteFailed(reason, detail):
                return Outcome(S.FAILED, reason, detail)
            case wire.Refused(reason=reason, detail=detail):
                return Outcome(S.FAILED, reason, detail)
        silent = f"{self.receiver} said nothing for {self._lease_seconds:g} s while {self.was}"
        return Outcome(S.FAILED, "peer_lost", silent)

    def _say(self, kind: Callable[..., wire.FromSender], **about: object) -> Send:
        return Send(kind(transfer_id=self.transfer_id, sender=self.sender, **about))
