"""The sending side of one transfer: a pure machine. ``handle(event, now)`` returns what is to be done.

It knows neither sockets nor memory nor clocks. Time comes in with every event, in seconds of any
monotonic clock; ``due`` says when ``tick`` wants to be called next.
"""

from dataclasses import dataclass

from kvbelt.transfer.machine import Machine
from kvbelt.transfer.sender_states import (
    FINAL,
    SENDER_TABLE,
    Abandon,
    BeatDue,
    DeadlinePassed,
    FromPeer,
    PartWritten,
    PeerFailed,
    PeerReady,
    PeerSilent,
    Quiet,
    SenderEvent,
    SenderState,
    StopOverdue,
    Timed,
    Unanswered,
    WriteFailed,
    Written,
)
from kvbelt.wire import reservation as wire
from kvbelt.wire.ids import EngineId, SlotName, TransferId

S = SenderState


@dataclass(frozen=True, slots=True)
class Say:
    """Send a message to the receiver."""

    message: wire.FromSender


@dataclass(frozen=True, slots=True)
class BeginWriting:
    """Gather and write what has been and will be handed over, as granted."""

    granted: wire.Granted


@dataclass(frozen=True, slots=True)
class GoOn:
    """So many parts were taken: their places may be written again."""

    taken: int


@dataclass(frozen=True, slots=True)
class StopWriting:
    """Gather and post nothing more; report Quiet when no write is in flight (at once, if none is)."""


@dataclass(frozen=True, slots=True)
class AbortWrites:
    """Do not wait any longer for writes in flight: abort them, if need be with the whole connection."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Tell the owner and the proxy how it ended. Exactly once."""

    state: SenderState
    reason: str
    detail: str


SenderCommand = Say | BeginWriting | GoOn | StopWriting | AbortWrites | Outcome


@dataclass(frozen=True, slots=True)
class SendPlan:
    """What one transfer is about."""

    transfer_id: TransferId
    sender: EngineId
    receiver: EngineId
    num_tokens: int
    num_blocks: int
    num_bytes: int
    deadline: float  #: on this machine's clock
    heartbeat_seconds: float
    lease_seconds: float
    memory_seconds: float = 120.0  #: how long an end is remembered on either side
    prefix: bytes = b""  #: hashes of its full blocks (wire/block_hash.py)

    def sent_bytes(self, first_block: int) -> int:
        """Of its blocks from this one on."""
        return self.num_bytes // self.num_blocks * (self.num_blocks - first_block)


class SenderSession(Machine[SenderState]):
    """One outgoing transfer."""

    def __init__(self, plan: SendPlan, now: float) -> None:
        super().__init__(f"send {plan.transfer_id}", SENDER_TABLE, S.HANDSHAKING)
        self.plan = plan
        self.slot: SlotName | None = None  #: set by Granted, never changed after it
        self.outcome: Outcome | None = None  #: decided once
        self._first_block = 0  # as granted: those before it are there
        self._untaken: dict[int, int | None] = {}  # parts that have landed and are not known to be taken: digests
        self._digest: int | None = None  # of the slot; set by Written
        self._gone = False  # nobody is there who would have to be told
        self._heard = now
        self._beat_at = now
        self._stop_by = now
        self._leave_by = now

    @property
    def ended(self) -> bool:
        """Whether it is in a final state."""
        return self.state in FINAL

    @property
    def due(self) -> float:
        """When ``tick`` has something to do; infinity: never."""
        if self.state in FINAL:
            return float("inf")
        if self.state is S.STOPPING:
            return self._stop_by
        if self.state is S.LEAVING:
            return min(self._beat_at, self._leave_by)
        if self.state is S.HANDSHAKING:
            return self.plan.deadline
        return min(self.plan.deadline, self._beat_at, self._heard + self.plan.lease_seconds)

    def tick(self, now: float) -> list[SenderCommand]:
        """Let time pass."""
        commands: list[SenderCommand] = []
        while self.due <= now:
            commands += self.handle(self._what_is_due(now), now)
        return commands

    def _what_is_due(self, now: float) -> Timed:
        if self.state is S.STOPPING:
            return StopOverdue()
        if self.state is S.LEAVING:
            return Unanswered() if self._leave_by <= now else BeatDue()
        if self.plan.deadline <= now:
            return DeadlinePassed()
        if self._heard + self.plan.lease_seconds <= now:
            return PeerSilent()
        return BeatDue()

    def handle(  # noqa: C901, PLR0911, PLR0912 -- one case an event
        self, event: SenderEvent, now: float
    ) -> list[SenderCommand]:
        """One event. Returns commands in the order in which they are to be done.

        Raises:
            IllegalTransitionError: the driver did what this state does not allow.
        """
        self.check(event)
        if isinstance(event, FromPeer):
            return self._from_peer(event, now)
        match event:
            case PeerReady():
                return self._ask(event, S.RESERVING, now)
            case PartWritten(part, digest):
                self._untaken[part] = digest
                return [self._landed(part)]
            case Written(digest):
                self._digest = digest
                self.move(event, S.COMMITTING)
                return self._beat(now)
            case BeatDue():
                return self._beat(now)
            case Quiet():
                return self._leave(event, now)
            case Unanswered():
                return self._gone_for_good(event)
            case StopOverdue():
                self._stop_by = now + self.plan.lease_seconds
                return [AbortWrites()]
            case PeerFailed(reason, detail, gone):
                self._gone = self._gone or gone
                if self.state is S.LEAVING:
                    return self._gone_for_good(event) if gone else []
                return self._end(event, S.FAILED, reason, detail, now)
            case WriteFailed(reason, detail):
                return self._end(event, S.FAILED, reason, detail, now)
            case PeerSilent():
                silent = f"{self.plan.receiver} said nothing for {self.plan.lease_seconds:g} s while {self.state}"
                return self._end(event, S.FAILED, "peer_lost", silent, now)
            case Abandon(reason):
                return self._end(event, S.CANCELLED, reason, f"cancelled while {self.state}", now)
            case DeadlinePassed():
                return self._end(event, S.EXPIRED, self._late(), f"the deadline passed while {self.state}", now)

    def _from_peer(  # noqa: PLR0911 -- one case a message
        self, message: FromPeer, now: float
    ) -> list[SenderCommand]:
        named = getattr(message, "slot", None)
        if named is not None and not self._is_ours(named):
            return []
        self._heard = now
        match message:
            case wire.Granted(slot=slot, first_block=first) if self.state in (S.RESERVING, S.WAITING):
                self.move(message, S.WRITING)
                self.slot, self._first_block = slot, first
                self._beat_at = now + self.plan.heartbeat_seconds
                return [BeginWriting(message)]
            case wire.PartsTaken(parts=taken) if self.state is S.WRITING:
                for part in [part for part in self._untaken if part < taken]:
                    del self._untaken[part]
                return [GoOn(taken)]
            case wire.Wait(retry_after_seconds=retry) if self.state in (S.RESERVING, S.WAITING):
                self.move(message, S.WAITING)
                # Never later than our own beat: asking again is what keeps the place in the queue.
                self._beat_at = now + min(max(retry, 0.0), self.plan.heartbeat_seconds)
                return []
            case wire.Refused(reason=reason, detail=detail) if self.state in (S.RESERVING, S.WAITING, S.COMMITTING):
                return self._end(message, S.FAILED, reason, detail, now)
            case wire.Committed() if self.state is S.COMMITTING:
                return self._end(message, S.DONE, "done", "committed", now)
            case wire.Cancelled() if self.state is S.LEAVING:
                return self._gone_for_good(message)
            case wire.Expired(reason=reason):
                if reason == "deadline":  # the receiver's clock was first
                    reason = self._late()
                return self._stopped_by_receiver(message, S.EXPIRED, reason, now)
            case wire.Cancel(reason=reason):
                return self._stopped_by_receiver(message, S.CANCELLED, reason, now)
        return []  # an answer that comes late or twice

    def _late(self) -> str:
        """Why the deadline was missed."""
        return "receiver_full" if self.state is S.WAITING else "deadline"

    def _is_ours(self, slot: SlotName) -> bool:
        if self.slot is None:
            return slot.engine_id == self.plan.receiver
        return slot == self.slot

    def _stopped_by_receiver(
        self, message: wire.Expired | wire.Cancel, end: SenderState, reason: str, now: float
    ) -> list[SenderCommand]:
        if self.state in (S.HANDSHAKING, S.STOPPING):
            return []
        if self.outcome is not None:
            # What it holds for us may be a grant that we never saw: it is named as the receiver knows it.
            return [Say(self._cancelled(message.slot))]
        return self._end(message, end, reason, "the receiver ended it", now)

    def _ask(self, event: SenderEvent, state: SenderState, now: float) -> list[SenderCommand]:
        self.move(event, state)
        self._heard = now
        return self._beat(now)

    def _beat(self, now: float) -> list[SenderCommand]:
        """Say what this state keeps saying."""
        plan = self.plan
        if self.state is S.LEAVING:
            # Nothing is lost by patience here, and a receiver that is gone may have many to be told.
            self._beat_at = now + plan.lease_seconds
            return [self._farewell()]
        self._beat_at = now + plan.heartbeat_seconds
        if self.slot is None:
            return [
                Say(
                    wire.Reserve(
                        transfer_id=plan.transfer_id,
                        sender=plan.sender,
                        receiver=plan.receiver,
                        num_tokens=plan.num_tokens,
                        num_blocks=plan.num_blocks,
                        num_bytes=plan.num_bytes,
                        deadline_seconds=plan.deadline - now,
                        prefix=plan.prefix,
                    )
                )
            ]
        if self.state is S.COMMITTING:
            return [
                Say(
                    wire.Commit(
                        transfer_id=plan.transfer_id,
                        sender=plan.sender,
                        slot=self.slot,
                        num_tokens=plan.num_tokens,
                        num_bytes=plan.sent_bytes(self._first_block),
                        digest=self._digest,
                    )
                )
            ]
        beat = Say(wire.Heartbeat(transfer_id=plan.transfer_id, sender=plan.sender, slot=self.slot))
        return [beat, *(self._landed(part) for part in self._untaken)]

    def _landed(self, part: int) -> Say:
        assert self.slot is not None  # invariant of WRITING
        plan = self.plan
        return Say(
            wire.PartLanded(
                transfer_id=plan.transfer_id,
                sender=plan.sender,
                slot=self.slot,
                part=part,
                digest=self._untaken[part],
            )
        )

    def _end(self, event: SenderEvent, end: SenderState, reason: str, detail: str, now: float) -> list[SenderCommand]:
        """Decide the outcome, and stop what is in flight."""
        if self.outcome is not None:
            return []  # STOPPING, or the end has crossed with another cause of it
        before = self.state
        self.outcome = Outcome(end, reason, detail)
        if before is S.WRITING:
            self.move(event, S.STOPPING)
            self._stop_by = now + self.plan.lease_seconds
            return [self.outcome, StopWriting()]
        commands: list[SenderCommand] = [StopWriting(), self.outcome]
        # DONE needs no farewell; before the handshake nobody has heard of us; a refusal has ended it there too.
        if end is S.DONE or before is S.HANDSHAKING or isinstance(event, wire.Refused):
            self.move(event, end)
            return commands
        return [*commands, *self._leave(event, now)]

    def _leave(self, event: SenderEvent, now: float) -> list[SenderCommand]:
        """No write is in flight, and none follows: the receiver is told until it knows."""
        if self._gone:
            return self._gone_for_good(event)
        self.move(event, S.LEAVING)
        self._leave_by = now + self.plan.memory_seconds
        return self._beat(now)

    def _gone_for_good(self, event: SenderEvent) -> list[SenderCommand]:
        assert self.outcome is not None  # rule 1
        self.move(event, self.outcome.state)
        return []

    def _farewell(self) -> Say:
        assert self.outcome is not None  # said only after the outcome is decided
        return Say(
            wire.Cancel(
                transfer_id=self.plan.transfer_id,
                slot=self.slot,
                reason=self.outcome.reason,
                sender=self.plan.sender,
            )
        )

    def _cancelled(self, slot: SlotName | None) -> wire.Cancelled:
        return wire.Cancelled(transfer_id=self.plan.transfer_id, slot=slot, sender=self.plan.sender)
