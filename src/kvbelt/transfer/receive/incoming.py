"""The receiving side as a whole: every incoming transfer, the buffers, the queue for room. Pure.

Rules:

1. One record a transfer, from its first mention until some time after its end (messages come late).
2. Room is given in the order in which it was asked for. Who is at the head waits until it fits; nobody
   overtakes, so a large prompt is never starved by small ones.
3. Room is asked for once: a prompt that is larger than every buffer gets a slot of two parts, and streams through it.
   So nobody who has room waits for more of it.
4. A prompt of which not even two blocks fit, an unknown engine_id, a size that does not follow from the layout:
   refused at once, because waiting would not help.
5. A writer speaks for its own transfers only.
6. What the engine holds of a prompt already need not travel. It is asked at the moment of the grant, and promises
   nothing: should it have lost a block by the time the prompt is read, the prompt is computed.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvbelt.security.refusals import Tally
from kvbelt.transfer.deadlines import Deadlines
from kvbelt.transfer.receiver import ReceiverSession
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
    ToReader,
)
from kvbelt.transfer.receiver_states import (
    HOLDING,
    Claim,
    PartTaken,
    ReceiverEvent,
    ReceiverState,
    Release,
    Room,
    Unclaim,
    Verified,
    WriterDead,
)
from kvbelt.transfer.shape import PLACES, SlotShape
from kvbelt.transfer.slots import SlotAllocator
from kvbelt.wire import reservation as wire
from kvbelt.wire.block_hash import unpacked
from kvbelt.wire.digest import Verify
from kvbelt.wire.ids import EngineId, TransferId
from kvbelt.wire.layout import KVLayout

S = ReceiverState

#: Ends remembered at most; beyond it the oldest are forgotten early.
MAX_ENDED = 4096

#: Transfers of one writer that are not over; more are refused. A prefill worker has some hundreds at most.
MAX_OPEN = 4096

#: A prompt in parts gets at most this share of a buffer, so that others find room beside it.
PARTS_SHARE = 2

DeskCommand = Answer | Check | ToReader

#: Blocks, from the first on, with these hashes that this process's engine holds (ports.py: PrefixIndex).
Held = Callable[[Sequence[bytes]], int]


def nothing_held(hashes: Sequence[bytes]) -> int:  # noqa: ARG001
    """Of an engine that shares no prefixes."""
    return 0


@dataclass(frozen=True, slots=True)
class DeskTimes:
    """The times of settings.py that matter here."""

    lease_seconds: float
    heartbeat_seconds: float
    claim_seconds: float
    memory_seconds: float


class Desk:
    """Takes what writers and readers say; returns what to answer them.

    Args:
        engine_id: of this process.
        layout: of its KV.
        sizes: bytes of its buffers, the first one used first.
        times: of leases and memory.
        verify: which digests writers are asked for.
        held: what the engine has of a prompt.
    """

    def __init__(  # noqa: PLR0917 -- its seams
        self,
        engine_id: EngineId,
        layout: KVLayout,
        sizes: Sequence[int],
        times: DeskTimes,
        verify: Verify = "off",
        held: Held = nothing_held,
    ) -> None:
        self._engine_id = engine_id
        self._layout = layout
        self._times = times
        self._verify: Verify = verify
        self._held = held
        self._slots = SlotAllocator(engine_id, sizes)
        # One record a transfer, in exactly one of the two. Ended ones, oldest first, until they are forgotten.
        self._live: dict[TransferId, ReceiverSession] = {}
        self._ended: OrderedDict[TransferId, tuple[float, ReceiverSession]] = OrderedDict()
        # Exactly the records in QUEUED, in order of arrival.
        self._queue: OrderedDict[TransferId, None] = OrderedDict()
        # How many of the live records each writer has reserved for; no zeros.
        self._open: Counter[EngineId] = Counter()
        self._deadlines: Deadlines[TransferId] = Deadlines()
        self.ended_total = Tally()
        self.committed_bytes_total = 0
        self.reused_bytes_total = 0

    # What happens.

    def hear(self, message: wire.FromSender, now: float) -> list[DeskCommand]:
        """A writer speaks."""
        sender = message.sender
        if sender is None:
            return []
        record = self._find(message.transfer_id)
        if record is not None and record.reservation is not None and record.reservation.sender != sender:
            return [self._refuse(message, sender, "not_yours", "this transfer is another prefill worker's")]
        if isinstance(message, wire.Reserve):
            refusal = self._unacceptable(message)
            if refusal is not None:
                return [self._refuse(message, sender, *refusal)]
            if (record is None or record.reservation is None) and self._open[sender] >= MAX_OPEN:
                detail = f"{MAX_OPEN} transfers of this prefill worker are open"
                return [self._refuse(message, sender, "too_many", detail)]
        if record is None:
            if not isinstance(message, wire.Reserve):
                return self._unknown(message, sender)
            record = self._new(message.transfer_id)
        commands = self._handle(record, message, now)
        if isinstance(message, wire.Reserve) and record.state is S.QUEUED:
            position = list(self._queue).index(message.transfer_id)
            wait = wire.Wait(
                transfer_id=message.transfer_id,
                retry_after_seconds=self._times.heartbeat_seconds,
                position=position,
            )
            commands.append(Answer(sender, wait))
        return commands

    def claim(self, transfer_id: TransferId, deadline: float, now: float) -> list[DeskCommand]:
        """A reader wants this transfer, until ``deadline``. At most one a transfer."""
        record = self._find(transfer_id) or self._new(transfer_id)
        if record.has_reader or record.reason == "done" or record.state in (S.STREAMING, S.CLAIMED):
            return [Lose(transfer_id, "already_claimed", "another request reads this transfer")]
        return self._handle(record, Claim(deadline, now + self._times.lease_seconds), now)

    def unclaim(self, transfer_id: TransferId, now: float) -> list[DeskCommand]:
        """The reader wants it no more."""
        return self._if_known(transfer_id, Unclaim(), now)

    def verified(self, transfer_id: TransferId, part: int | None, now: float, *, right: bool) -> list[DeskCommand]:
        """The digest of a part, or of the whole slot, was compared."""
        return self._if_known(transfer_id, Verified(part, right), now)

    def part_taken(self, transfer_id: TransferId, now: float) -> list[DeskCommand]:
        """The reader has read the next part."""
        return self._if_known(transfer_id, PartTaken(), now)

    def release(self, transfer_id: TransferId, now: float) -> list[DeskCommand]:
        """The reader has read it, or reads no more of it."""
        return self._if_known(transfer_id, Release(), now)

    def writer_dead(self, writer: EngineId, now: float) -> list[DeskCommand]:
        """This life of a prefill worker is known to be over."""
        commands: list[DeskCommand] = []
        for record in list(self._live.values()):
            if record.reservation is not None and record.reservation.sender == writer:
                commands += self._handle(record, WriterDead(), now)
        return commands

    def tick(self, now: float) -> list[DeskCommand]:
        """Let time pass."""
        commands: list[DeskCommand] = []
        for transfer_id in self._deadlines.pop_due(now):
            record = self._live.get(transfer_id)
            if record is not None:
                commands += self._done(record, record.tick(now), now)
        while self._ended:
            transfer_id, (ended_at, _) = next(iter(self._ended.items()))
            if len(self._ended) <= MAX_ENDED and ended_at + self._times.memory_seconds > now:
                break
            del self._ended[transfer_id]
        return commands

    # What it looks like.

    @property
    def due(self) -> float:
        """When ``tick`` has something to do. Forgetting is done in passing: it is never urgent."""
        return self._deadlines.due

    @property
    def expects_writes(self) -> bool:
        """Whether a peer may be writing: then the channel must be given a chance to work."""
        return any(record.state in (S.RESERVED, S.STREAMING) for record in self._live.values())

    def suspects(self) -> set[EngineId]:
        """Writers that hold a slot without a valid lease: whose death would free it."""
        return {
            record.reservation.sender
            for record in self._live.values()
            if record.state is S.QUARANTINED and record.reservation is not None
        }

    def writers(self) -> set[EngineId]:
        """Writers of transfers that are not over."""
        return {record.reservation.sender for record in self._live.values() if record.reservation is not None}

    def states(self) -> Counter[str]:
        """Transfers that are not over, by state."""
        return Counter(record.state.value for record in self._live.values())

    def bytes_by_state(self) -> Counter[ReceiverState]:
        """Bytes of slots, by the state of their transfer."""
        total: Counter[ReceiverState] = Counter()
        for record in self._live.values():
            if record.slot is not None:
                total[record.state] += record.slot.num_bytes
        return total

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each buffer."""
        return self._slots.sizes

    def overflow_bytes(self) -> int:
        """Bytes of slots in other buffers than the first."""
        return sum(record.slot.num_bytes for record in self._live.values() if record.slot and record.slot.region)

    def validate(self) -> None:
        """Check the invariants.

        Raises:
            AssertionError: a record, the queue and the slots do not agree.
        """
        self._slots.validate()
        queued = {key for key, record in self._live.items() if record.state is S.QUEUED}
        if queued != set(self._queue):
            raise AssertionError(f"queued {queued}, in the queue {list(self._queue)}")
        reserved = Counter(record.reservation.sender for record in self._live.values() if record.reservation)
        if reserved != self._open:
            raise AssertionError(f"{reserved} transfers are open, counted {self._open}")
        for record in [*self._live.values(), *(record for _, record in self._ended.values())]:
            if (record.state in HOLDING) != (record.slot is not None):
                raise AssertionError(f"{record.name} is {record.state} with slot {record.slot}; {record.story()}")
            if record.has_reader and record.state not in (S.EXPECTED, S.QUEUED, S.RESERVED, S.VERIFYING):
                raise AssertionError(f"{record.name} is {record.state} and its reader was not told")

    # How it is done.

    def _find(self, transfer_id: TransferId) -> ReceiverSession | None:
        record = self._live.get(transfer_id)
        if record is None and transfer_id in self._ended:
            record = self._ended[transfer_id][1]
        return record

    def _new(self, transfer_id: TransferId) -> ReceiverSession:
        record = ReceiverSession(transfer_id, self._times.lease_seconds, self._times.claim_seconds, self._verify)
        self._live[transfer_id] = record
        return record

    def _if_known(self, transfer_id: TransferId, event: ReceiverEvent, now: float) -> list[DeskCommand]:
        record = self._find(transfer_id)
        return [] if record is None else self._handle(record, event, now)

    def _handle(self, record: ReceiverSession, event: ReceiverEvent, now: float) -> list[DeskCommand]:
        return self._done(record, record.handle(event, now), now)

    def _done(self, record: ReceiverSession, asked: list[ReceiverCommand], now: float) -> list[DeskCommand]:
        """Do what concerns the buffer and the queue; hand on the rest."""
        commands: list[DeskCommand] = []
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
                case Answer() | Check() | Deliver() | PartReady() | Finish() | Break() | Lose():
                    commands.append(command)
        self._deadlines.set(record.transfer_id, record.due)
        if record.ended and self._live.pop(record.transfer_id, None) is not None:
            self._ended[record.transfer_id] = (now, record)
            if record.reservation is not None:
                self._open[record.reservation.sender] -= 1
                self._open += Counter()  # drops the zeros
        if look_for_room:
            commands += self._give_room(now)
        return commands

    def _give_room(self, now: float) -> list[DeskCommand]:
        commands: list[DeskCommand] = []
        while self._queue:
            record = self._live[next(iter(self._queue))]
            assert record.reservation is not None  # invariant of QUEUED
            shape = self._shape_for(record.reservation)
            slot = self._slots.allocate(shape.slot_bytes)
            if slot is None:
                break
            self._queue.popitem(last=False)
            commands += self._handle(record, Room(slot, shape), now)
        return commands

    def _shape_for(self, asked: wire.Reserve) -> SlotShape:
        """What of a prompt travels, and whether it does so in parts."""
        # The last block always travels: a slot is never empty.
        first = min(self._held(unpacked(asked.prefix)), asked.num_blocks - 1) if asked.prefix else 0
        travelling = asked.num_blocks - first
        if self._layout.slot_bytes(travelling) <= max(self.sizes):
            return SlotShape(self._layout, asked.num_blocks, first, travelling)
        window = self._layout.slot_bytes(PLACES)
        blocks = self.sizes[0] // PARTS_SHARE // window or max(self.sizes) // window
        return SlotShape(self._layout, asked.num_blocks, first, blocks)

    def _unacceptable(self, message: wire.Reserve) -> tuple[str, str] | None:
        if message.receiver != self._engine_id:
            return "stale_engine", f"meant for engine {message.receiver}; this one is {self._engine_id}"
        blocks = self._layout.blocks(message.num_tokens) if message.num_tokens > 0 else 0
        num_bytes = self._layout.slot_bytes(blocks)
        if blocks < 1 or (blocks, num_bytes) != (message.num_blocks, message.num_bytes):
            return "wrong_size", (
                f"{message.num_blocks} blocks in {message.num_bytes} bytes for {message.num_tokens} tokens; "
                f"this layout needs {blocks} blocks in {num_bytes} bytes"
            )
        least = self._layout.slot_bytes(PLACES)
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

    def _unknown(self, message: wire.FromSender, sender: EngineId) -> list[DeskCommand]:
        """A transfer nobody here remembers."""
        if isinstance(message, wire.Heartbeat | wire.PartLanded | wire.Commit):
            slot = message.slot
            return [Answer(sender, wire.Expired(transfer_id=message.transfer_id, slot=slot, reason="unknown_transfer"))]
        if isinstance(message, wire.Cancel):
            return [Answer(sender, wire.Cancelled(transfer_id=message.transfer_id, slot=message.slot))]
        return []
