"""The receiving side as a whole: every incoming transfer, the buffers, the queue for room. Pure.

Rules:

1. One record a transfer, from its first message until some time after its end, because messages may be late.
2. Slots are granted in the order of the reservations. The first one waits until it fits and is never overtaken, so
   small prompts do not starve a large one.
3. A transfer asks for a slot once: a prompt larger than every buffer gets a slot of two parts and streams through it.
   So no transfer that has a slot waits for a larger one.
4. A prompt of which not even two blocks fit, an unknown engine_id, or a size that does not follow from the layout is
   refused at once.
5. A sender's messages affect only its own transfers.
6. Blocks that the engine holds already are not sent. The engine is asked at the grant and promises nothing: if it has
   evicted a block when the prompt is read, the prompt is computed.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvbelt.security.refusals import Tally
from kvbelt.transfer.deadlines import Deadlines
from kvbelt.transfer.receive.commands import (
    Answer,
    Check,
    Ended,
    Enqueue,
    FreeSlot,
    LeaveQueue,
    Lose,
    ReceiverCommand,
    ToConsumer,
)
from kvbelt.transfer.receive.session import ReceiverSession
from kvbelt.transfer.receive.slots import SlotAllocator
from kvbelt.transfer.receive.states import Claim, FromOwner, ReceiverEvent, ReceiverState, SenderDead, SlotGranted
from kvbelt.transfer.shape import PLACES, SlotShape
from kvbelt.wire import reservation as wire
from kvbelt.wire.block_hash import unpacked
from kvbelt.wire.handshake import Share
from kvbelt.wire.ids import EngineId, TransferId
from kvbelt.wire.layout import KVLayout
from kvbelt.wire.reservation import Verify

S = ReceiverState

#: Ended transfers remembered at most; beyond it the oldest are forgotten early.
MAX_ENDED = 4096

#: Open transfers of one sender; more are refused. A prefill worker has some hundreds at most.
MAX_OPEN = 4096

#: A prompt in parts gets at most this share of a buffer, so that others fit beside it.
PARTS_SHARE = 2

IncomingCommand = Answer | Check | ToConsumer

#: Blocks, from the first on, with these hashes that this process's engine holds (ports.py: PrefixIndex).
Held = Callable[[Sequence[bytes]], int]


def nothing_held(hashes: Sequence[bytes]) -> int:  # noqa: ARG001
    return 0


class ReceiveTimes(NamedTuple):
    lease_seconds: float
    heartbeat_seconds: float
    claim_seconds: float
    memory_seconds: float


class IncomingTransfers:
    """Each event returns the commands for the driver. ``sizes``: bytes of the buffers, the first one used first."""

    def __init__(  # noqa: PLR0917 -- its seams
        self,
        engine_id: EngineId,
        layout: KVLayout,
        sizes: Sequence[int],
        times: ReceiveTimes,
        verify: Verify = "off",
        held: Held = nothing_held,
    ) -> None:
        self._engine_id = engine_id
        self._layout = layout
        self._times = times
        self._verify: Verify = verify
        self._held = held
        self.sizes = tuple(sizes)
        self._slots = SlotAllocator(engine_id, sizes)
        # Each transfer's record is in exactly one of the two. Ended ones, oldest first, until they are forgotten.
        self._live: dict[TransferId, ReceiverSession] = {}
        self._ended: OrderedDict[TransferId, tuple[float, ReceiverSession]] = OrderedDict()
        # Exactly the records in QUEUED, in order of arrival.
        self._queue: OrderedDict[TransferId, None] = OrderedDict()
        # Live records with a reservation, by sender; no zeros.
        self._open: Counter[EngineId] = Counter()
        self.deadlines: Deadlines[TransferId] = Deadlines()  #: forgetting is never urgent and has none
        self.ended_total = Tally()
        self.committed_bytes_total = 0
        self.reused_bytes_total = 0

    def on_message(self, message: wire.FromSender, now: float, share: Share | None = None) -> list[IncomingCommand]:
        """``share``: what of every block the sender's rank has for this one; None: all."""
        sender = message.sender
        if sender is None:
            return []
        record = self._find(message.transfer_id)
        if record is not None and record.reservation is not None and record.reservation.sender != sender:
            return [self._refuse(message, sender, "not_yours", "this transfer is another prefill worker's")]
        if isinstance(message, wire.Reserve):
            share = share or Share(self._layout)
            refusal = self._unacceptable(message, share.layout)
            if refusal is not None:
                return [self._refuse(message, sender, *refusal)]
            if (record is None or record.reservation is None) and self._open[sender] >= MAX_OPEN:
                detail = f"{MAX_OPEN} transfers of this prefill worker are open"
                return [self._refuse(message, sender, "too_many", detail)]
        if record is None:
            if not isinstance(message, wire.Reserve):
                return self._unknown(message, sender)
            record = self._new(message.transfer_id)
        record.share = record.share or share
        commands = self._handle(record, message, now)
        if isinstance(message, wire.Reserve) and record.state is S.QUEUED:
            position = list(self._queue).index(message.transfer_id)
            wait = wire.Wait(
                transfer_id=message.transfer_id, retry_after_seconds=self._times.heartbeat_seconds, position=position
            )
            commands.append(Answer(sender, wait))
        return commands

    def claim(self, transfer_id: TransferId, deadline: float, now: float) -> list[IncomingCommand]:
        """A consumer waits for this transfer until ``deadline``. At most one a transfer."""
        record = self._find(transfer_id) or self._new(transfer_id)
        if record.has_consumer or record.reason == "done" or record.state in (S.STREAMING, S.CLAIMED):
            return [Lose(transfer_id, "already_claimed", "another request reads this transfer")]
        return self._handle(record, Claim(deadline, now + self._times.lease_seconds), now)

    def handle(self, transfer_id: TransferId, event: FromOwner, now: float) -> list[IncomingCommand]:
        record = self._find(transfer_id)
        return [] if record is None else self._handle(record, event, now)

    def sender_dead(self, sender: EngineId, now: float) -> list[IncomingCommand]:
        commands: list[IncomingCommand] = []
        for record in list(self._live.values()):
            if record.reservation is not None and record.reservation.sender == sender:
                commands += self._handle(record, SenderDead(), now)
        return commands

    def tick(self, now: float) -> list[IncomingCommand]:
        commands: list[IncomingCommand] = []
        for transfer_id in self.deadlines.pop_due(now):
            record = self._live.get(transfer_id)
            if record is not None:
                commands += self._done(record, record.tick(now), now)
        while self._ended:
            transfer_id, (ended_at, _) = next(iter(self._ended.items()))
            if len(self._ended) <= MAX_ENDED and ended_at + self._times.memory_seconds > now:
                break
            del self._ended[transfer_id]
        return commands

    @property
    def expects_writes(self) -> bool:
        return any(record.state in (S.RESERVED, S.STREAMING) for record in self._live.values())

    def suspects(self) -> set[EngineId]:
        """Senders of quarantined slots: their deaths would free them."""
        return {
            record.reservation.sender
            for record in self._live.values()
            if record.state is S.QUARANTINED and record.reservation is not None
        }

    def senders(self) -> set[EngineId]:
        return {record.reservation.sender for record in self._live.values() if record.reservation is not None}

    def states(self) -> Counter[str]:
        return Counter(record.state.value for record in self._live.values())

    def bytes_by_state(self) -> Counter[ReceiverState]:
        total: Counter[ReceiverState] = Counter()
        for record in self._live.values():
            if record.slot is not None:
                total[record.state] += record.slot.num_bytes
        return total

    def overflow_bytes(self) -> int:
        return sum(record.slot.num_bytes for record in self._live.values() if record.slot and record.slot.region)

    def _find(self, transfer_id: TransferId) -> ReceiverSession | None:
        record = self._live.get(transfer_id)
        if record is None and transfer_id in self._ended:
            record = self._ended[transfer_id][1]
        return record

    def _new(self, transfer_id: TransferId) -> ReceiverSession:
        record = ReceiverSession(transfer_id, self._times.lease_seconds, self._times.claim_seconds, self._verify)
        self._live[transfer_id] = record
        return record

    def _handle(self, record: ReceiverSession, event: ReceiverEvent, now: float) -> list[IncomingCommand]:
        return self._done(record, record.handle(event, now), now)

    def _done(self, record: ReceiverSession, asked: list[ReceiverCommand], now: float) -> list[IncomingCommand]:
        """Perform the commands for the slots and the queue; return the others."""
        commands: list[IncomingCommand] = []
        look_for_room = False
        for command in asked:
            match command:
                case Enqueue():
                    assert record.reservation is not None  # it is what was asked for
                    self._open[record.reservation.sender] += 1
                    self._queue[record.transfer_id] = None
                    look_for_room = True
                case LeaveQueue():
                    del self._queue[record.transfer_id]
                    look_for_room = True
                case FreeSlot(slot):
                    self._slots.free(slot.name)
                    look_for_room = True
                case Ended(reason, num_bytes, reused_bytes):
                    self.ended_total.add(reason)
                    self.committed_bytes_total += num_bytes
                    self.reused_bytes_total += reused_bytes
                case _:
                    commands.append(command)
        self.deadlines.set(record.transfer_id, record.due)
        if record.ended and self._live.pop(record.transfer_id, None) is not None:
            self._ended[record.transfer_id] = (now, record)
            if record.reservation is not None:
                self._open[record.reservation.sender] -= 1
                self._open += Counter()  # drops the zeros
        if look_for_room:
            commands += self._give_room(now)
        return commands

    def _give_room(self, now: float) -> list[IncomingCommand]:
        commands: list[IncomingCommand] = []
        while self._queue:
            record = self._live[next(iter(self._queue))]
            assert record.reservation is not None  # invariant of QUEUED
            assert record.share is not None
            shape = self._shape_for(record.reservation, record.share)
            slot = self._slots.allocate(shape.slot_bytes)
            if slot is None:
                break
            self._queue.popitem(last=False)
            commands += self._handle(record, SlotGranted(slot, shape), now)
        return commands

    def _shape_for(self, asked: wire.Reserve, share: Share) -> SlotShape:
        """What of a prompt travels, and whether it does so in parts."""
        layout, heads, per_block, layers = share
        # A sender with other blocks has other hashes.
        comparable = asked.prefix and layout.block_size == self._layout.block_size
        # The last block always travels: a slot is never empty.
        first = min(self._held(unpacked(asked.prefix)), asked.num_blocks - 1) if comparable else 0
        travelling = asked.num_blocks - first
        if layout.slot_bytes(travelling) <= max(self.sizes):
            return SlotShape(layout, asked.num_blocks, first, travelling, heads, per_block, layers)
        window = layout.slot_bytes(PLACES)
        blocks = self.sizes[0] // PARTS_SHARE // window or max(self.sizes) // window
        return SlotShape(layout, asked.num_blocks, first, blocks, heads, per_block, layers)

    def _unacceptable(self, message: wire.Reserve, layout: KVLayout) -> tuple[str, str] | None:
        if message.receiver != self._engine_id:
            return "stale_engine", f"meant for engine {message.receiver}; this one is {self._engine_id}"
        blocks = layout.blocks(message.num_tokens) if message.num_tokens > 0 else 0
        num_bytes = layout.slot_bytes(blocks)
        if blocks < 1 or (blocks, num_bytes) != (message.num_blocks, message.num_bytes):
            return "wrong_size", (
                f"{message.num_blocks} blocks in {message.num_bytes} bytes for {message.num_tokens} tokens; "
                f"this layout needs {blocks} blocks in {num_bytes} bytes"
            )
        least = layout.slot_bytes(PLACES)
        if max(self.sizes) < min(num_bytes, least):
            return "too_large", (
                f"{message.num_tokens} tokens need {num_bytes} bytes, or {least} to stream through; "
                f"the receive buffer has {max(self.sizes)} (pd_buffer_size on the decode worker)"
            )
        if not 0 < message.deadline_seconds < float("inf"):
            return "deadline", f"{message.deadline_seconds} seconds are left"
        return None

    def _refuse(self, message: wire.FromSender, sender: EngineId, reason: str, detail: str) -> Answer:
        return Answer(sender, wire.Refused(transfer_id=message.transfer_id, reason=reason, detail=detail))

    def _unknown(self, message: wire.FromSender, sender: EngineId) -> list[IncomingCommand]:
        if isinstance(message, wire.Heartbeat | wire.PartLanded | wire.Commit):
            slot = message.slot
            return [Answer(sender, wire.Expired(transfer_id=message.transfer_id, slot=slot, reason="unknown_transfer"))]
        if isinstance(message, wire.Cancel):
            return [Answer(sender, wire.Cancelled(transfer_id=message.transfer_id, slot=message.slot))]
        return []
