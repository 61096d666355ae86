"""The receiving side of one transfer: a pure machine, driven by the table in states.py."""

from collections.abc import Callable
from typing import get_args

from kvbelt.transfer.machine import Machine
from kvbelt.transfer.receive import states as s
from kvbelt.transfer.receive.commands import (
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
from kvbelt.transfer.receive.progress import Progress
from kvbelt.transfer.receive.slots import Slot
from kvbelt.transfer.shape import SlotShape
from kvbelt.wire import reservation as wire
from kvbelt.wire.handshake import Share
from kvbelt.wire.ids import EngineId, SlotName, TransferId

S = s.ReceiverState

Commands = list[ReceiverCommand]
_FROM_SENDER = frozenset(get_args(wire.FromSender))
AboutSlot = wire.Heartbeat | wire.PartLanded | wire.Commit


#: States that the sender's lease, the transfer's deadline and the consumer's deadline end.
_LEASED = frozenset({S.QUEUED, S.RESERVED, S.STREAMING, S.TAKEN})
_LIMITED = _LEASED | {S.VERIFYING, S.COMMITTED}
_AWAITED = frozenset({S.EXPECTED, S.QUEUED, S.RESERVED, S.STREAMING, S.VERIFYING})


class ReceiverSession(Machine[s.ReceiverState, s.ReceiverEvent, ReceiverCommand]):
    table = s.RECEIVER_TABLE
    final = s.FINAL

    def __init__(
        self, transfer_id: TransferId, lease_seconds: float, claim_seconds: float, verify: wire.Verify = "off"
    ) -> None:
        super().__init__(f"receive {transfer_id}", S.EXPECTED)
        self.transfer_id = transfer_id
        self._lease_seconds = lease_seconds
        self._claim_seconds = claim_seconds
        self._verify = verify
        self.reservation: wire.Reserve | None = None  #: None exactly while EXPECTED, or ended from there
        self.slot: Slot | None = None  #: exactly the states of HOLDING have one
        self.share: Share | None = None  #: what of every block comes; set with the reservation
        self.shape: SlotShape | None = None  #: set together with the first slot, and kept
        self.has_consumer = False  #: a consumer waits and was not told yet
        self.reason: str | None = None  #: set once, when it is over for consumers
        self._detail = ""
        self._last_slot: SlotName | None = None
        self._committed = False
        self._parts = Progress()
        self._end = S.EXPIRED  # where QUARANTINED leads
        self._lease_until = float("inf")
        self._deadline = float("inf")
        self._consumer_deadline = float("inf")
        self._claim_deadline = float("inf")  # what _consumer_deadline becomes once a sender is known
        self._remind_at = float("inf")

    def timers(self) -> list[tuple[float, type[s.ReceiverEvent]]]:
        timers: list[tuple[float, type[s.ReceiverEvent]]] = []
        if self.state is S.QUARANTINED:
            timers.append((self._remind_at, s.ReminderDue))
        if self.state in _LEASED:
            timers.append((self._lease_until, s.LeaseLapsed))
        if self.state in _LIMITED:
            timers.append((self._deadline, s.DeadlinePassed))
        if self.state in _AWAITED:
            timers.append((self._consumer_deadline, s.DeadlinePassed))
        return timers

    def handle(self, event: s.ReceiverEvent, now: float) -> Commands:
        if type(event) not in _FROM_SENDER:
            return super().handle(event, now)
        named = getattr(event, "slot", None)
        if self.slot is None or named in {None, self.slot.name}:
            commands = super().handle(event, now)
        else:  # about another use of the slot: nothing changes
            commands = self.say_expired(event) if isinstance(event, AboutSlot) else []
        if isinstance(event, wire.Cancel):
            commands.append(self._say(event.sender, wire.Cancelled, slot=event.slot))
        return commands

    # Choices between states.

    def whether_to_stream(self, event: s.SlotGranted | s.Claim) -> s.ReceiverState:
        shape = event.shape if isinstance(event, s.SlotGranted) else self._shape
        awaited = self.has_consumer or isinstance(event, s.Claim)
        return S.STREAMING if shape.in_parts and awaited else S.RESERVED

    def if_awaited(self, event: s.CancelRead) -> s.ReceiverState:
        if not self.has_consumer:
            return self.state
        return S.QUARANTINED if self.state is S.RESERVED else S.CANCELLED

    def judge_commit(self, message: wire.Commit) -> s.ReceiverState:
        if self._verify != "off" and self._wrong(message) is None:
            return S.VERIFYING
        return self.judge_slot(s.Verified(None, right=self._wrong(message) is None))

    def judge_slot(self, event: s.Verified) -> s.ReceiverState:
        return S.CANCELLED if not event.right else S.CLAIMED if self.has_consumer else S.COMMITTED

    def judge_part(self, event: s.Verified) -> s.ReceiverState:
        return S.QUARANTINED if event.part is not None and not event.right else self.state

    def whether_last(self, event: s.PartTaken) -> s.ReceiverState:
        return S.TAKEN if self._parts.taken + 1 == self._shape.num_parts else S.STREAMING

    def end_of_quarantine(self, event: object) -> s.ReceiverState:
        return self._end

    # What the sender's messages lead to.

    def enqueue(self, message: wire.Reserve) -> Commands:
        self.reservation = message
        self._consumer_deadline = self._claim_deadline
        self._deadline = self.now + message.deadline_seconds
        self.renew(message)
        return [Enqueue()]

    def renew(self, event: object) -> Commands:
        """The lease. In the queue ``IncomingTransfers`` answers, for it knows the place."""
        self._lease_until = self.now + self._lease_seconds
        return []

    def grant_again(self, message: wire.Reserve) -> Commands:
        self.renew(message)
        return [self._grant()]

    def renew_lease(self, message: wire.Heartbeat | wire.Commit) -> Commands:
        self.renew(message)
        return [self._say(message.sender, wire.Renewed, slot=message.slot)]

    def part_landed(self, message: wire.PartLanded) -> Commands:
        self.renew(message)
        part, shape = message.part, self._shape
        if part in self._parts.landed:
            return [self._say_parts_taken()]
        if not self._parts.expects(part, shape):
            detail = f"part {part} of {shape.num_parts}, {self._parts.taken} are taken"
            return [self._refuse(message, "out_of_order", detail)]
        if self._verify != "off" and message.digest is None:
            return [self._refuse(message, "no_digest", f"part {part} came without its digest")]
        self._parts.landed.add(part)
        if message.digest is None or self._verify == "off":
            return self._found_right(part)
        return [Check(self.transfer_id, self._slot, shape, part, message.digest)]

    def _wrong(self, message: wire.Commit) -> tuple[str, str] | None:
        """Why a commit is refused: reason and detail."""
        asked, shape = self._asked, self._shape
        if shape.in_parts:
            return "out_of_order", f"committed when {self._parts.taken} of {shape.num_parts} parts were taken"
        if (message.num_tokens, message.num_bytes) != (asked.num_tokens, shape.sent_bytes):
            return "wrong_size", (
                f"committed {message.num_tokens} tokens in {message.num_bytes} bytes, "
                f"granted {asked.num_tokens} tokens in {shape.sent_bytes} bytes"
            )
        if self._verify != "off" and message.digest is None:
            return "no_digest", "committed without the digest that was asked for"
        return None

    def refuse_commit(self, message: wire.Commit) -> Commands:
        problem = self._wrong(message)
        assert problem is not None  # judge_commit
        return [*self._over(S.CANCELLED, *problem), self._refuse(message, *problem)]

    def check_slot(self, message: wire.Commit) -> Commands:
        assert message.digest is not None  # judge_commit
        return [Check(self.transfer_id, self._slot, self._shape, None, message.digest)]

    def commit(self, event: object) -> Commands:
        self._committed = True
        self._deadline = min(self._deadline, self.now + self._claim_seconds)
        return [self._say(self._asked.sender, wire.Committed, slot=self._slot.name)]

    def commit_and_deliver(self, event: object) -> Commands:
        return [*self.commit(event), *self.deliver(event)]

    def commit_taken(self, message: wire.Commit) -> Commands:
        self._committed = True
        return self.free_and_answer(message)

    def free_and_answer(self, message: wire.Commit) -> Commands:
        return [*self.free(message), *self.say_committed(message)]

    def sender_ends(self, message: wire.Cancel | wire.Cancelled) -> Commands:
        reason = getattr(message, "reason", "cancelled")
        return self._over(S.CANCELLED, reason, "the prefill worker ended it", stop=False)

    def say_committed(self, message: wire.Commit) -> Commands:
        if not self._committed or message.slot != self._last_slot:
            return self.say_expired(message)
        return [self._say(message.sender, wire.Committed, slot=message.slot)]

    def say_expired(self, message: AboutSlot) -> Commands:
        return [self._say(message.sender, wire.Expired, slot=message.slot, reason=self.reason or "stale_slot")]

    def say_ended(self, message: wire.Reserve) -> Commands:
        return [self._refuse(message, "ended", self._how())]

    # What our own side leads to.

    def take_slot(self, event: s.SlotGranted) -> Commands:
        self.slot, self._last_slot, self.shape = event.slot, event.slot.name, event.shape
        self.renew(event)  # until now the sender has only been waiting
        return [self._grant()]

    def take_slot_and_stream(self, event: s.SlotGranted) -> Commands:
        return [*self.take_slot(event), *self._deliver_in_parts()]

    def expect(self, event: s.Claim) -> Commands:
        self.has_consumer = True
        self._consumer_deadline = self._claim_deadline = event.deadline
        if self.state is S.EXPECTED:
            self._consumer_deadline = min(event.deadline, event.until)
        return []

    def claim_and_stream(self, event: s.Claim) -> Commands:
        self._consumer_deadline = event.deadline
        return self._deliver_in_parts()

    def deliver(self, event: object) -> Commands:
        self.has_consumer = False
        return [Deliver(self.transfer_id, self._slot, self._asked.num_tokens, self._shape)]

    def _deliver_in_parts(self) -> Commands:
        ready = [PartReady(self.transfer_id, number) for number in range(self._parts.ready)]
        return [*self.deliver(None), *ready]

    def lose(self, event: s.Claim) -> Commands:
        return [Lose(self.transfer_id, self.reason or "", self._how())]

    def part_right(self, event: s.Verified) -> Commands:
        return [] if event.part is None else self._found_right(event.part)

    def _found_right(self, part: int) -> Commands:
        ready = self._parts.found_right(part)
        return [PartReady(self.transfer_id, number) for number in ready] if self.state is S.STREAMING else []

    def part_wrong(self, event: s.Verified) -> Commands:
        return self._over(S.CANCELLED, "digest", f"the bytes of part {event.part} are not those that were sent")

    def refuse_bytes(self, event: s.Verified) -> Commands:
        detail = "the bytes that have landed are not those that were sent"
        return [*self._over(S.CANCELLED, "digest", detail), self._refuse(self._asked, "digest", detail)]

    def part_taken(self, event: s.PartTaken) -> Commands:
        self._parts.taken += 1
        return [self._say_parts_taken()]

    def last_part_taken(self, event: s.PartTaken) -> Commands:
        return [*self.part_taken(event), Finish(self.transfer_id), self._ended("done")]

    def consumed(self, event: s.Release) -> Commands:
        return [*self.free(event), self._ended("done")]

    def consumer_ends(self, event: s.CancelRead | s.Release) -> Commands:
        return self._over(S.CANCELLED, "reader_gone", "the decode worker cancelled it")

    def sender_died(self, event: s.SenderDead) -> Commands:
        return self._over(S.EXPIRED, "peer_lost", "the prefill worker's process is gone", stop=False)

    # What time leads to.

    def never_heard(self, event: s.DeadlinePassed) -> Commands:
        return self._over(S.EXPIRED, "unknown_transfer", "no prefill worker has asked for a slot for it")

    def lease_lapsed(self, event: s.LeaseLapsed) -> Commands:
        detail = f"no message from the prefill worker for {self._lease_seconds:g} s while {self.was}"
        return self._out_of_time("lease", detail)

    def deadline_passed(self, event: s.DeadlinePassed) -> Commands:
        reason = "unclaimed" if self.was is S.COMMITTED else "deadline"
        return self._out_of_time(reason, f"the deadline passed while {self.was}")

    def _out_of_time(self, reason: str, detail: str) -> Commands:
        if self.was is S.TAKEN:
            # Its consumer has it all. Only the slot must wait until the sender is known to have stopped.
            return self._quarantine(S.RELEASED, reason)
        return self._over(S.EXPIRED, reason, detail)

    def remind(self, event: object) -> Commands:
        reason = self.reason if self._end is not S.RELEASED else None
        return self._quarantine(self._end, reason or "lease")

    # How it ends.

    def _over(self, end: s.ReceiverState, reason: str, detail: str, *, stop: bool = True) -> Commands:
        """It will not be delivered. Tells the consumer, and a sender that waits or writes (``stop``)."""
        commands: Commands = []
        if self.was is S.QUEUED:
            commands.append(LeaveQueue())
            if stop:
                commands.append(self._stop(end, reason))
        commands += self._quarantine(end, reason) if self.state is S.QUARANTINED else self.free(None)
        self._detail = detail
        commands.append(self._ended(reason))
        if self.was is S.STREAMING:
            commands.append(Break(self.transfer_id, reason, detail))
        if self.has_consumer:
            self.has_consumer = False
            commands.append(Lose(self.transfer_id, reason, detail))
        return commands

    def _quarantine(self, end: s.ReceiverState, reason: str) -> Commands:
        self._end = end
        self._remind_at = self.now + self._lease_seconds
        return [self._stop(end, reason)]

    def free(self, event: object) -> Commands:
        if self.slot is None:
            return []
        slot, self.slot = self.slot, None
        return [FreeSlot(slot)]

    def _ended(self, reason: str) -> Ended:
        self.reason = reason
        if self.shape is None or not (self._committed or self._parts.taken == self.shape.num_parts):
            return Ended(reason, 0, 0)
        return Ended(reason, self.shape.sent_bytes, self.shape.layout.slot_bytes(self.shape.first_block))

    # Messages.

    @property
    def _asked(self) -> wire.Reserve:
        assert self.reservation is not None  # there is a sender
        return self.reservation

    @property
    def _slot(self) -> Slot:
        assert self.slot is not None  # invariant of HOLDING
        return self.slot

    @property
    def _shape(self) -> SlotShape:
        assert self.shape is not None  # set with the slot
        return self.shape

    def _grant(self) -> Answer:
        slot, shape = self._slot, self._shape
        place = {"slot": slot.name, "region": slot.region, "offset": slot.offset, "num_bytes": slot.num_bytes}
        parts = {"first_block": shape.first_block, "part_blocks": shape.part_blocks}
        terms = {"lease_seconds": self._lease_seconds, "verify": self._verify}
        return self._say(self._asked.sender, wire.Granted, **place, **parts, **terms)

    def _stop(self, end: s.ReceiverState, reason: str) -> Answer:
        slot = self.slot.name if self.slot is not None else None
        kind = wire.Cancel if end is S.CANCELLED else wire.Expired
        return self._say(self._asked.sender, kind, slot=slot, reason=reason)

    def _say_parts_taken(self) -> Answer:
        return self._say(self._asked.sender, wire.PartsTaken, slot=self._slot.name, parts=self._parts.taken)

    def _refuse(self, message: wire.FromSender, reason: str, detail: str) -> Answer:
        return self._say(message.sender, wire.Refused, reason=reason, detail=detail)

    def _say(self, to: EngineId | None, kind: Callable[..., wire.FromReceiver], **about: object) -> Answer:
        return Answer(to or EngineId(""), kind(transfer_id=self.transfer_id, **about))

    def _how(self) -> str:
        return f"it has ended: {self.reason}" + (f" ({self._detail})" if self._detail else "")
