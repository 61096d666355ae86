"""The receiving side of one transfer: a pure machine. ``handle(event, now)`` returns what is to be done.

The desk (desk.py) holds one of these for every transfer, owns the buffer and the queue, and does what
they ask for.
"""

from kvbelt.transfer.machine import Machine
from kvbelt.transfer.progress import Progress
from kvbelt.transfer.receiver_commands import (
    Answer,
    Break,
    Check,
    Deliver,
    Ended,
    Enqueue,
    Finish,
    FreeSlot,
    LeaveQueue,
    Lose,
    PartReady,
    ReceiverCommand,
)
from kvbelt.transfer.receiver_states import (
    FINAL,
    RECEIVER_TABLE,
    Claim,
    DeadlinePassed,
    LeaseLapsed,
    PartTaken,
    ReceiverEvent,
    ReceiverState,
    Release,
    ReminderDue,
    Room,
    Timed,
    Unclaim,
    Verified,
    WriterDead,
)
from kvbelt.transfer.shape import SlotShape
from kvbelt.transfer.slots import Slot
from kvbelt.wire import reservation as wire
from kvbelt.wire.digest import Verify
from kvbelt.wire.ids import EngineId, SlotName, TransferId

S = ReceiverState


#: States in which the writer may be writing, and its lease counts.
_WRITING = (S.RESERVED, S.STREAMING)


class ReceiverSession(Machine[ReceiverState]):
    """One incoming transfer."""

    def __init__(
        self, transfer_id: TransferId, lease_seconds: float, claim_seconds: float, verify: Verify = "off"
    ) -> None:
        super().__init__(f"receive {transfer_id}", RECEIVER_TABLE, S.EXPECTED)
        self.transfer_id = transfer_id
        self._lease_seconds = lease_seconds
        self._claim_seconds = claim_seconds
        self._verify = verify
        self.reservation: wire.Reserve | None = None  #: None exactly while EXPECTED, or ended from there
        self.slot: Slot | None = None  #: exactly the states of HOLDING have one
        self.shape: SlotShape | None = None  #: set together with the first slot, and kept
        self.has_reader = False  #: a reader waits and was not told yet
        self.reason: str | None = None  #: set once, when it is over for readers
        self._detail = ""
        self._last_slot: SlotName | None = None
        self._committed = False
        self._parts = Progress()
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
        lease, deadline, reader = self._lease_until, self._deadline, self._reader_deadline
        waited_for: dict[S, tuple[float, ...]] = {
            S.EXPECTED: (reader,),
            S.QUEUED: (lease, deadline, reader),
            S.RESERVED: (lease, deadline, reader),
            S.STREAMING: (lease, deadline, reader),
            S.TAKEN: (lease, deadline),
            S.VERIFYING: (deadline, reader),
            S.COMMITTED: (deadline,),
            S.QUARANTINED: (self._remind_at,),
        }
        return min(waited_for.get(self.state, ()), default=float("inf"))

    def tick(self, now: float) -> list[ReceiverCommand]:
        """Let time pass."""
        commands: list[ReceiverCommand] = []
        while self.due <= now:
            commands += self.handle(self._what_is_due(now), now)
        return commands

    def _what_is_due(self, now: float) -> Timed:
        if self.state is S.QUARANTINED:
            return ReminderDue()
        if self.state not in (S.VERIFYING, S.COMMITTED) and self._lease_until <= now:
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
            case wire.PartLanded():
                return self._part_landed(event, now)
            case wire.Commit():
                return self._commit(event, now)
            case wire.Cancel() | wire.Cancelled():
                return self._writer_stopped(event)
            case Room(slot, shape):
                return self._room(event, slot, shape, now)
            case Claim():
                return self._claim(event)
            case Verified(part, right):
                return self._verified(event, part, now, right=right)
            case PartTaken():
                return self._part_taken(event)
            case Release():
                return self._release(event, now)
            case WriterDead():
                return self._writer_dead(event)
            case Unclaim():
                return self._unclaim(event, now)
            case ReminderDue():
                return self._remind(now)
            case LeaseLapsed():
                return self._out_of_time(event, "lease", self._lapse_detail(), now)
            case DeadlinePassed():
                if self.state is S.EXPECTED:
                    detail = "no prefill worker has asked for room for it"
                    return self._over(event, S.EXPIRED, "unknown_transfer", detail, now)
                reason = "unclaimed" if self.state is S.COMMITTED else "deadline"
                return self._out_of_time(event, reason, f"the deadline passed while {self.state}", now)

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
            case S.RESERVED | S.STREAMING:
                self._renew(now)
                assert self.slot is not None  # invariant of the state
                return [self._grant(self.slot)]
            case S.TAKEN | S.VERIFYING | S.COMMITTED | S.CLAIMED:
                return []  # overtaken by what came after it
            case S.QUARANTINED:
                # It has not heard that it is over. Refused it would go, and nobody would say that it has stopped.
                return self._remind(now)
        return [self._refused(message, "ended", self._how())]

    def _heartbeat(self, message: wire.Heartbeat, now: float) -> list[ReceiverCommand]:
        if self.slot is None or message.slot != self.slot.name:
            return [self._expired(message.slot, message)]
        match self.state:
            case S.RESERVED | S.STREAMING | S.TAKEN:
                self._renew(now)
                return [self._answer(wire.Renewed(transfer_id=self.transfer_id, slot=message.slot), message)]
            case S.QUARANTINED:
                return [self._expired(message.slot, message)]
        return []  # overtaken by its own Commit

    def _part_landed(  # noqa: PLR0911 -- one case a reason
        self, message: wire.PartLanded, now: float
    ) -> list[ReceiverCommand]:
        if self.slot is None or message.slot != self.slot.name or self.state is S.QUARANTINED:
            return [self._expired(message.slot, message)]
        if self.state not in (*_WRITING, S.TAKEN):
            return []  # overtaken by its own Commit
        self._renew(now)
        part, shape = message.part, self._shape
        if self._parts.heard(part):
            return [self._parts_taken(message.sender)]
        if not self._parts.expects(part, shape):
            detail = f"part {part} of {shape.num_parts}, {self._parts.taken} are taken"
            return [self._refused(message, "out_of_order", detail)]
        if self._verify != "off":
            if message.digest is None:
                return [self._refused(message, "no_digest", f"part {part} came without its digest")]
            self._parts.hear(part)
            return [Check(self.transfer_id, self.slot, shape, part, message.digest)]
        self._parts.hear(part)
        return self._found_right(part)

    def _commit(  # noqa: PLR0911 -- one case a state
        self, message: wire.Commit, now: float
    ) -> list[ReceiverCommand]:
        if message.slot != self._last_slot:
            return [self._expired(message.slot, message)]
        if self._committed:
            return [self._committed_answer(message)]
        match self.state:
            case S.TAKEN:
                self._committed = True
                self.move(message, S.RELEASED)
                return [*self._let_go(), self._committed_answer(message)]
            case S.QUARANTINED:
                self._committed = self._end is S.RELEASED
                answer = self._committed_answer(message) if self._committed else self._expired(message.slot, message)
                return [*self._leave_quarantine(message), answer]
            case S.VERIFYING:
                # Answered when it is known; until then the writer hears that it was heard.
                return [self._answer(wire.Renewed(transfer_id=self.transfer_id, slot=message.slot), message)]
            case S.RESERVED | S.STREAMING:
                return self._commit_whole(message, now)
        return [self._expired(message.slot, message)]

    def _commit_whole(self, message: wire.Commit, now: float) -> list[ReceiverCommand]:
        """The writer has stopped; what it says to have written is taken, checked or refused."""
        asked, slot, shape = self.reservation, self.slot, self._shape
        assert asked is not None
        assert slot is not None  # invariants of both states
        problem: tuple[str, str] | None = None
        if shape.in_parts:
            problem = "out_of_order", f"committed when {self._parts.taken} of {shape.num_parts} parts were taken"
        elif (message.num_tokens, message.num_bytes) != (asked.num_tokens, shape.sent_bytes):
            problem = (
                "wrong_size",
                (
                    f"committed {message.num_tokens} tokens in {message.num_bytes} bytes, "
                    f"granted {asked.num_tokens} tokens in {shape.sent_bytes} bytes"
                ),
            )
        elif self._verify != "off" and message.digest is None:
            problem = "no_digest", "committed without the digest that was asked for"
        if problem is not None:
            return [*self._over(message, S.CANCELLED, *problem, now), self._refused(message, *problem)]
        if self._verify == "off":
            return self._visible(message, now)
        self.move(message, S.VERIFYING)
        assert message.digest is not None
        return [Check(self.transfer_id, slot, shape, None, message.digest)]

    def _visible(self, event: wire.Commit | Verified, now: float) -> list[ReceiverCommand]:
        """Every byte is there, and right."""
        assert self.reservation is not None
        assert self.slot is not None  # invariants of the states before
        self._committed = True
        committed = wire.Committed(transfer_id=self.transfer_id, slot=self.slot.name)
        commands: list[ReceiverCommand] = [Answer(self.reservation.sender, committed)]
        if not self.has_reader:
            self.move(event, S.COMMITTED)
            self._deadline = min(self._deadline, now + self._claim_seconds)
            return commands
        self.move(event, S.CLAIMED)
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
        if self.state is S.TAKEN:
            self.move(message, S.RELEASED)
            return [*self._let_go(), *answer]
        if isinstance(message, wire.Cancelled) and self.state in (S.EXPECTED, S.VERIFYING, S.COMMITTED):
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
        if self.state is S.RESERVED and self._shape.in_parts:
            self._reader_deadline = event.deadline
            self.move(event, S.STREAMING)
            return self._deliver_in_parts()
        self._reader_deadline = min(event.deadline, event.until) if self.state is S.EXPECTED else event.deadline
        self._claim_deadline = event.deadline
        return []

    def _unclaim(self, event: Unclaim, now: float) -> list[ReceiverCommand]:
        if not self.has_reader:
            return []
        return self._over(event, S.CANCELLED, "reader_gone", "the decode worker wants it no more", now)

    def _release(self, event: Release, now: float) -> list[ReceiverCommand]:
        if self.state is S.STREAMING:
            return self._over(event, S.CANCELLED, "reader_gone", "the decode worker reads no more of it", now)
        if self.state is not S.CLAIMED:
            return []
        self.move(event, S.RELEASED)
        return [*self._let_go(), self._ended("done")]

    def _part_taken(self, event: PartTaken) -> list[ReceiverCommand]:
        if self.state is not S.STREAMING:
            return []
        self._parts.take()
        assert self.reservation is not None  # there is a writer
        commands: list[ReceiverCommand] = [self._parts_taken(self.reservation.sender)]
        if self._parts.taken == self._shape.num_parts:
            self.move(event, S.TAKEN)
            commands += [Finish(self.transfer_id), self._ended("done")]
        return commands

    # We have looked.

    def _room(self, event: Room, slot: Slot, shape: SlotShape, now: float) -> list[ReceiverCommand]:
        self.slot, self._last_slot, self.shape = slot, slot.name, shape
        # The lease runs from the grant: until now the writer has only been waiting.
        self._renew(now)
        if shape.in_parts and self.has_reader:
            self.move(event, S.STREAMING)
            return [self._grant(slot), *self._deliver_in_parts()]
        self.move(event, S.RESERVED)
        return [self._grant(slot)]

    def _verified(self, event: Verified, part: int | None, now: float, *, right: bool) -> list[ReceiverCommand]:
        if self.state is S.VERIFYING:
            if right:
                return self._visible(event, now)
            assert self.reservation is not None  # there is a writer
            detail = "the bytes that have landed are not those that were sent"
            refused = wire.Refused(transfer_id=self.transfer_id, reason="digest", detail=detail)
            return [
                *self._over(event, S.CANCELLED, "digest", detail, now),
                Answer(self.reservation.sender, refused),
            ]
        if self.state not in _WRITING or part is None:
            return []
        if not right:
            detail = f"the bytes of part {part} are not those that were sent"
            return self._over(event, S.CANCELLED, "digest", detail, now)
        return self._found_right(part)

    def _found_right(self, part: int) -> list[ReceiverCommand]:
        ready = self._parts.found_right(part)
        if self.state is not S.STREAMING:
            return []
        return [PartReady(self.transfer_id, number) for number in ready]

    # It ends.

    def _writer_dead(self, event: WriterDead) -> list[ReceiverCommand]:
        if self.state is S.QUARANTINED:
            return self._leave_quarantine(event)
        if self.state is S.TAKEN:
            self.move(event, S.RELEASED)
            return self._let_go()
        if self.state in (S.QUEUED, *_WRITING):
            return self._over(event, S.EXPIRED, "peer_lost", "the prefill worker's process is gone", 0.0, dead=True)
        return []

    def _out_of_time(
        self, event: LeaseLapsed | DeadlinePassed, reason: str, detail: str, now: float
    ) -> list[ReceiverCommand]:
        if self.state is S.TAKEN:
            # Its reader has it all; only the slot must wait until the writer is known to have stopped.
            stop = self._stop(S.EXPIRED, reason)
            self._quarantine(event, S.RELEASED, now)
            return [stop]
        return self._over(event, S.EXPIRED, reason, detail, now)

    def _over(
        self, event: ReceiverEvent, end: ReceiverState, reason: str, detail: str, now: float, *, dead: bool = False
    ) -> list[ReceiverCommand]:
        """It will not be delivered. Tells the reader, and the writer unless it was the writer who said so."""
        before = self.state
        stopped = dead or isinstance(event, wire.Commit | wire.Cancel | wire.Cancelled)
        commands: list[ReceiverCommand] = []
        if before is S.QUEUED:
            commands.append(LeaveQueue())
        if before in (S.QUEUED, *_WRITING) and not stopped:
            commands.append(self._stop(end, reason))
        if before in _WRITING and not stopped:
            self._quarantine(event, end, now)
        else:
            self.move(event, end)
            commands += self._let_go()
        self._detail = detail
        commands.append(self._ended(reason))
        if before is S.STREAMING:
            commands.append(Break(self.transfer_id, reason, detail))
        if self.has_reader:
            self.has_reader = False
            commands.append(Lose(self.transfer_id, reason, detail))
        return commands

    def _quarantine(self, event: ReceiverEvent, end: ReceiverState, now: float) -> None:
        self.move(event, S.QUARANTINED)
        self._end = end
        self._remind_at = now + self._lease_seconds

    def _leave_quarantine(self, event: ReceiverEvent) -> list[ReceiverCommand]:
        self.move(event, self._end)
        return self._let_go()

    def _remind(self, now: float) -> list[ReceiverCommand]:
        self._remind_at = now + self._lease_seconds
        reason = self.reason if self._end is not S.RELEASED else None
        return [self._stop(self._end, reason or "lease")]

    # Small things.

    def _renew(self, now: float) -> None:
        self._lease_until = now + self._lease_seconds

    @property
    def _shape(self) -> SlotShape:
        assert self.shape is not None  # who has a slot has a shape
        return self.shape

    def _deliver(self) -> Deliver:
        asked, slot = self.reservation, self.slot
        assert asked is not None
        assert slot is not None  # invariants of CLAIMED and STREAMING
        self.has_reader = False
        return Deliver(self.transfer_id, slot, asked.num_tokens, self._shape)

    def _deliver_in_parts(self) -> list[ReceiverCommand]:
        return [self._deliver(), *(PartReady(self.transfer_id, number) for number in range(self._parts.ready))]

    def _let_go(self) -> list[ReceiverCommand]:
        if self.slot is None:
            return []
        slot, self.slot = self.slot, None
        return [FreeSlot(slot)]

    def _ended(self, reason: str) -> Ended:
        self.reason = reason
        if self.shape is None or not (self._committed or self._parts.taken == self.shape.num_parts):
            return Ended(reason, 0, 0)
        return Ended(reason, self.shape.sent_bytes, self.shape.layout.slot_bytes(self.shape.first_block))

    def _grant(self, slot: Slot) -> Answer:
        assert self.reservation is not None  # who has a slot has asked for it
        granted = wire.Granted(
            transfer_id=self.transfer_id,
            slot=slot.name,
            region=slot.region,
            offset=slot.offset,
            num_bytes=slot.num_bytes,
            lease_seconds=self._lease_seconds,
            first_block=self._shape.first_block,
            part_blocks=self._shape.part_blocks,
            verify=self._verify,
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

    def _parts_taken(self, writer: EngineId) -> Answer:
        assert self.slot is not None  # there are parts
        return Answer(
            writer, wire.PartsTaken(transfer_id=self.transfer_id, slot=self.slot.name, parts=self._parts.taken)
        )

    def _committed_answer(self, message: wire.Commit) -> Answer:
        return self._answer(wire.Committed(transfer_id=self.transfer_id, slot=message.slot), message)

    def _refused(self, message: wire.FromSender, reason: str, detail: str) -> Answer:
        return self._answer(wire.Refused(transfer_id=self.transfer_id, reason=reason, detail=detail), message)

    def _expired(self, slot: SlotName, message: wire.Heartbeat | wire.PartLanded | wire.Commit) -> Answer:
        return self._answer(
            wire.Expired(transfer_id=self.transfer_id, slot=slot, reason=self.reason or "stale_slot"), message
        )

    def _answer(self, answer: wire.FromReceiver, message: wire.FromSender) -> Answer:
        return Answer(message.sender or EngineId(""), answer)

    def _lapse_detail(self) -> str:
        return f"the prefill worker was not heard of for {self._lease_seconds:g} s while {self.state}"

    def _how(self) -> str:
        return f"it has ended: {self.reason}" + (f" ({self._detail})" if self._detail else "")
