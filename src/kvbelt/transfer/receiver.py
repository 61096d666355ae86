"""The receiving side of one transfer: a pure machine. ``handle(event, now)`` returns what is to be done.

The desk (desk.py) holds one of these for every transfer, owns the buffer and the queue, and does what
they ask for.
"""

from dataclasses import dataclass

from kvbelt.transfer.machine import Machine
from kvbelt.transfer.receiver_states import (
    FINAL,
    RECEIVER_TABLE,
    Claim,
    DeadlinePassed,
    LeaseLapsed,
    ReceiverEvent,
    ReceiverState,
    Release,
    ReminderDue,
    Room,
    Timed,
    Unclaim,
    WriterDead,
)
from kvbelt.transfer.slots import Slot
from kvbelt.wire import reservation as wire
from kvbelt.wire.ids import EngineId, SlotName, TransferId

S = ReceiverState


@dataclass(frozen=True, slots=True)
class Answer:
    """Send a message to the writer."""

    writer: EngineId
    message: wire.FromReceiver


@dataclass(frozen=True, slots=True)
class Enqueue:
    """Put it at the end of the queue for room."""


@dataclass(frozen=True, slots=True)
class LeaveQueue:
    """Take it out of the queue."""


@dataclass(frozen=True, slots=True)
class FreeSlot:
    """Nobody will touch this slot any more."""

    slot: Slot


@dataclass(frozen=True, slots=True)
class Deliver:
    """Give the slot to the reader. Exactly one of Deliver and Lose for every reader."""

    transfer_id: TransferId
    slot: Slot
    num_tokens: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Lose:
    """Tell the reader that nothing will come."""

    transfer_id: TransferId
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Ended:
    """It is over for readers and for the counters. Exactly once."""

    reason: str
    num_bytes: int  #: committed bytes; 0 where nothing was


ReceiverCommand = Answer | Enqueue | LeaveQueue | FreeSlot | Deliver | Lose | Ended


class ReceiverSession(Machine[ReceiverState]):
    """One incoming transfer."""

    def __init__(
        self, transfer_id: TransferId, lease_seconds: float, heartbeat_seconds: float, claim_seconds: float
    ) -> None:
        super().__init__(f"receive {transfer_id}", RECEIVER_TABLE, S.EXPECTED)
        self.transfer_id = transfer_id
        self._lease_seconds = lease_seconds
        self._heartbeat_seconds = heartbeat_seconds
        self._claim_seconds = claim_seconds
        self.reservation: wire.Reserve | None = None  #: None exactly while EXPECTED, or ended from there
        self.slot: Slot | None = None  #: RESERVED, COMMITTED, CLAIMED and QUARANTINED have one, no other state
        self.has_reader = False  #: a reader waits and was not told yet
        self.reason: str | None = None  #: set once, when it is over for readers
        self._detail = ""
        self._last_slot: SlotName | None = None
        self._committed = False
        self._end = S.EXPIRED  # where QUARANTINED leads
        self._lease_until = float("inf")
        self._deadline = float("inf")
        self._reader_deadline = float("inf")
        self._claim_deadline = float("inf")  # what _reader_deadline becomes once a writer is known
        self._remind_at = float("inf")

    @property
    def ended(self) -> bool:
        """Whether it is in a final state."""
        return self.state in FINAL

    @property
    def due(self) -> float:
        """When ``tick`` has something to do; infinity: never."""
        match self.state:
            case S.EXPECTED:
                return self._reader_deadline
            case S.QUEUED | S.RESERVED:
                return min(self._lease_until, self._deadline, self._reader_deadline)
            case S.COMMITTED:
                return self._deadline
            case S.QUARANTINED:
                return self._remind_at
        return float("inf")

    def tick(self, now: float) -> list[ReceiverCommand]:
        """Let time pass."""
        commands: list[ReceiverCommand] = []
        while self.due <= now:
            commands += self.handle(self._what_is_due(now), now)
        return commands

    def _what_is_due(self, now: float) -> Timed:
        if self.state is S.QUARANTINED:
            return ReminderDue()
        if self.state in (S.QUEUED, S.RESERVED) and self._lease_until <= now:
            return LeaseLapsed()
        return DeadlinePassed()

    def handle(  # noqa: C901, PLR0911, PLR0912 -- one case an event
        self, event: ReceiverEvent, now: float
    ) -> list[ReceiverCommand]:
        """One event. Returns commands in the order in which they are to be done.

        Raises:
            IllegalTransitionError: the driver did what this state does not allow.
        """
        self.check(event)
        match event:
            case wire.Reserve():
                return self._reserve(event, now)
            case wire.Heartbeat():
                return self._heartbeat(event, now)
            case wire.Commit():
                return self._commit(event, now)
            case wire.Cancel() | wire.Cancelled():
                return self._writer_stopped(event)
            case Room(slot):
                self.move(event, S.RESERVED)
                self.slot, self._last_slot = slot, slot.name
                # The lease runs from the grant: until now the writer has only been waiting.
                self._lease_until = now + self._lease_seconds
                return [self._grant(slot)]
            case Claim():
                return self._claim(event)
            case Release():
                return self._release(event)
            case WriterDead():
                return self._writer_dead(event)
            case Unclaim():
                return self._unclaim(event, now)
            case ReminderDue():
                return self._remind(now)
            case LeaseLapsed():
                return self._over(event, S.EXPIRED, "lease", self._lapse_detail(), now)
            case DeadlinePassed():
                if self.state is S.EXPECTED:
                    detail = "no prefill worker has asked for room for it"
                    return self._over(event, S.EXPIRED, "unknown_transfer", detail, now)
                reason = "unclaimed" if self.state is S.COMMITTED else "deadline"
                return self._over(event, S.EXPIRED, reason, f"the deadline passed while {self.state}", now)

    # The writer speaks.

    def _reserve(self, message: wire.Reserve, now: float) -> list[ReceiverCommand]:
        match self.state:
            case S.EXPECTED:
                self.move(message, S.QUEUED)
                self.reservation = message
                self._reader_deadline = self._claim_deadline
                self._renew(now)
                self._deadline = now + message.deadline_seconds
                return [Enqueue()]
            case S.QUEUED:
                self._renew(now)
                return []  # the desk knows the place in the queue, and answers Wait
            case S.RESERVED:
                self._renew(now)
                assert self.slot is not None  # invariant of the state
                return [self._grant(self.slot)]
            case S.COMMITTED | S.CLAIMED:
                return []  # overtaken by its own Commit
        return [self._answer(wire.Refused(transfer_id=self.transfer_id, reason="ended", detail=self._how()), message)]

    def _heartbeat(self, message: wire.Heartbeat, now: float) -> list[ReceiverCommand]:
        if self.slot is None or message.slot != self.slot.name:
            return [self._expired(message.slot, message)]
        match self.state:
            case S.RESERVED:
                self._renew(now)
                return [self._answer(wire.Renewed(transfer_id=self.transfer_id, slot=message.slot), message)]
            case S.QUARANTINED:
                return [self._expired(message.slot, message)]
        return []  # overtaken by its own Commit

    def _commit(  # noqa: PLR0911 -- one case a state
        self, message: wire.Commit, now: float
    ) -> list[ReceiverCommand]:
        if message.slot != self._last_slot:
            return [self._expired(message.slot, message)]
        if self._committed:
            return [self._answer(wire.Committed(transfer_id=self.transfer_id, slot=message.slot), message)]
        if self.state is S.QUARANTINED:
            return [*self._leave_quarantine(message), self._expired(message.slot, message)]
        if self.state is not S.RESERVED:
            return [self._expired(message.slot, message)]
        asked = self.reservation
        assert asked is not None
        assert self.slot is not None  # invariants of RESERVED
        if (message.num_tokens, message.num_bytes) != (asked.num_tokens, asked.num_bytes):
            detail = (
                f"committed {message.num_tokens} tokens in {message.num_bytes} bytes, "
                f"reserved {asked.num_tokens} tokens in {asked.num_bytes} bytes"
            )
            refusal = self._answer(
                wire.Refused(transfer_id=self.transfer_id, reason="wrong_size", detail=detail), message
            )
            return [*self._over(message, S.CANCELLED, "wrong_size", detail, now), refusal]
        self._committed = True
        commands: list[ReceiverCommand] = [
            self._answer(wire.Committed(transfer_id=self.transfer_id, slot=message.slot), message)
        ]
        if not self.has_reader:
            self.move(message, S.COMMITTED)
            self._deadline = min(self._deadline, now + self._claim_seconds)
            return commands
        self.move(message, S.CLAIMED)
        return [*commands, self._deliver()]

    def _writer_stopped(self, message: wire.Cancel | wire.Cancelled) -> list[ReceiverCommand]:
        answer: list[ReceiverCommand] = []
        if isinstance(message, wire.Cancel):
            answer = [self._answer(wire.Cancelled(transfer_id=self.transfer_id, slot=message.slot), message)]
        names_another = None not in {message.slot, self._last_slot} and message.slot != self._last_slot
        if self.state in FINAL or self.state is S.CLAIMED or names_another:
            return answer
        if self.state is S.QUARANTINED:
            return [*self._leave_quarantine(message), *answer]
        if isinstance(message, wire.Cancelled) and self.state in (S.EXPECTED, S.COMMITTED):
            return answer
        reason = message.reason if isinstance(message, wire.Cancel) else "cancelled"
        return [*self._over(message, S.CANCELLED, reason, "the prefill worker ended it", 0.0), *answer]

    # The reader speaks.

    def _claim(self, event: Claim) -> list[ReceiverCommand]:
        if self.reason is not None:
            return [Lose(self.transfer_id, self.reason, self._how())]
        self.has_reader = True
        if self.state is S.COMMITTED:
            self.move(event, S.CLAIMED)
            return [self._deliver()]
        self._reader_deadline = min(event.deadline, event.until) if self.state is S.EXPECTED else event.deadline
        self._claim_deadline = event.deadline
        return []

    def _unclaim(self, event: Unclaim, now: float) -> list[ReceiverCommand]:
        if not self.has_reader:
            return []
        return self._over(event, S.CANCELLED, "reader_gone", "the decode worker wants it no more", now)

    def _release(self, event: Release) -> list[ReceiverCommand]:
        if self.state in FINAL:
            return []
        self.move(event, S.RELEASED)
        return [*self._let_go(), self._ended("done")]

    # It ends.

    def _writer_dead(self, event: WriterDead) -> list[ReceiverCommand]:
        if self.state is S.QUARANTINED:
            return self._leave_quarantine(event)
        if self.state in (S.QUEUED, S.RESERVED):
            return self._over(event, S.EXPIRED, "peer_lost", "the prefill worker's process is gone", 0.0, dead=True)
        return []

    def _over(
        self, event: ReceiverEvent, end: ReceiverState, reason: str, detail: str, now: float, *, dead: bool = False
    ) -> list[ReceiverCommand]:
        """It will not be delivered. Tells the reader, and the writer unless it was the writer who said so."""
        before = self.state
        stopped = dead or isinstance(event, wire.Commit | wire.Cancel | wire.Cancelled)
        commands: list[ReceiverCommand] = []
        if before is S.QUEUED:
            commands.append(LeaveQueue())
        if before in (S.QUEUED, S.RESERVED) and not stopped:
            commands.append(self._stop(end, reason))
        if before is S.RESERVED and not stopped:
            self.move(event, S.QUARANTINED)
            self._end = end
            self._remind_at = now + self._lease_seconds
        else:
            self.move(event, end)
            commands += self._let_go()
        self._detail = detail
        commands.append(self._ended(reason))
        if self.has_reader:
            self.has_reader = False
            commands.append(Lose(self.transfer_id, reason, detail))
        return commands

    def _leave_quarantine(self, event: ReceiverEvent) -> list[ReceiverCommand]:
        self.move(event, self._end)
        return self._let_go()

    def _remind(self, now: float) -> list[ReceiverCommand]:
        self._remind_at = now + self._lease_seconds
        return [self._stop(self._end, self.reason or "lease")]

    # Small things.

    def _renew(self, now: float) -> None:
        self._lease_until = now + self._lease_seconds

    def _deliver(self) -> Deliver:
        asked, slot = self.reservation, self.slot
        assert asked is not None
        assert slot is not None  # invariants of CLAIMED
        self.has_reader = False
        return Deliver(self.transfer_id, slot, asked.num_tokens, asked.num_blocks)

    def _let_go(self) -> list[ReceiverCommand]:
        if self.slot is None:
            return []
        slot, self.slot = self.slot, None
        return [FreeSlot(slot)]

    def _ended(self, reason: str) -> Ended:
        self.reason = reason
        committed = self.reservation.num_bytes if self._committed and self.reservation else 0
        return Ended(reason, committed)

    def _grant(self, slot: Slot) -> Answer:
        assert self.reservation is not None  # who has a slot has asked for it
        granted = wire.Granted(
            transfer_id=self.transfer_id,
            slot=slot.name,
            offset=slot.offset,
            num_bytes=slot.num_bytes,
            lease_seconds=self._lease_seconds,
        )
        return Answer(self.reservation.sender, granted)

    def _stop(self, end: ReceiverState, reason: str) -> Answer:
        """Tell the writer to stop and to say that it has."""
        assert self.reservation is not None  # there is a writer
        slot = self.slot.name if self.slot is not None else None
        message: wire.FromReceiver
        if end is S.CANCELLED:
            message = wire.Cancel(transfer_id=self.transfer_id, slot=slot, reason=reason)
        else:
            message = wire.Expired(transfer_id=self.transfer_id, slot=slot, reason=reason)
        return Answer(self.reservation.sender, message)

    def _expired(self, slot: SlotName, message: wire.Heartbeat | wire.Commit) -> Answer:
        return self._answer(
            wire.Expired(transfer_id=self.transfer_id, slot=slot, reason=self.reason or "stale_slot"), message
        )

    def _answer(self, answer: wire.FromReceiver, message: wire.FromSender) -> Answer:
        return Answer(message.sender or EngineId(""), answer)

    def _lapse_detail(self) -> str:
        return f"the prefill worker was not heard of for {self._lease_seconds:g} s while {self.state}"

    def _how(self) -> str:
        return f"it has ended: {self.reason}" + (f" ({self._detail})" if self._detail else "")
