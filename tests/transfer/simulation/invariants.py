"""What must hold after every event, and what may be left when all is over."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from kvbelt.transfer.receive.driver import SUSPICION_SECONDS
from kvbelt.transfer.receive.states import HOLDING, ReceiverState
from kvbelt.transfer.send.states import SenderState
from kvbelt.wire.ids import EngineId, TransferId
from tests.transfer.invariants import check_arena, check_incoming
from tests.transfer.simulation.lives import LEASE, DecodeWorker, Life, PrefillWorker, Reader, Send
from tests.transfer.simulation.memory import CELL, RECEIVE, Content

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.transfer.simulation.world import World

#: Whoever looks at a clock looks a little later.
SOON = 0.01


class Memo:
    """Earlier observations, as far as an invariant compares them."""

    def __init__(self) -> None:
        self.queues: dict[EngineId, list[TransferId]] = {}
        self.outcomes: dict[TransferId, object] = {}
        #: Of dead prefill workers: the time on each decode worker's clock from which on its silence counts.
        self.silent: dict[EngineId, dict[EngineId, float]] = {}

    def died(self, life: Life, others: Sequence[Life]) -> None:
        """The sender says nothing more, but its messages may still be under way."""
        self.silent[life.engine_id] = {other.engine_id: other.now for other in others}

    def heard(self, life: Life, speaker: str) -> None:
        """A message of a sender has arrived. The sender may be dead."""
        times = self.silent.get(EngineId(speaker))
        if times is not None:
            times[life.engine_id] = life.now


def check(world: World) -> None:
    """Check all invariants."""
    for there in world.decode.values():
        check_incoming(there.incoming)
        _queue_is_fair(world.memo, there)
        if there.running:
            _the_dead_hold_nothing(world, there)
    for worker in world.prefill.values():
        _staging_agrees(worker)
    for send in world.sends.values():
        _ends_once(world.memo, send)
    for reader in world.readers:
        _is_notified_once(world, reader)
    _writes_hit_their_own_slots(world)


def _queue_is_fair(memo: Memo, there: DecodeWorker) -> None:
    """Slots are granted in the order of the queue, and no transfer changes its place."""
    before, now = memo.queues.get(there.engine_id, []), list(there.incoming._queue)
    still = [transfer for transfer in before if transfer in there.incoming._queue]
    assert now[: len(still)] == still, "the queue was reordered"
    for index, transfer in enumerate(before):
        record = there.incoming._live.get(transfer)
        if transfer not in there.incoming._queue and record is not None and record.state in HOLDING:
            overtaken = [other for other in before[:index] if other in there.incoming._queue]
            assert not overtaken, f"{transfer} has overtaken {overtaken}"
    memo.queues[there.engine_id] = now


def _the_dead_hold_nothing(world: World, there: DecodeWorker) -> None:
    """A dead sender loses its place in the queue, or its slot, two leases after its last word and last byte at most.

    The first may pass in the queue, the second after a grant that was not taken.
    """
    if not world.sizes.reachable:
        return
    for sender, times in world.memo.silent.items():
        if world.network.is_cut(sender) or world.ether.writes(sender, there.engine_id):
            times[there.engine_id] = there.now
    for record in there.incoming._live.values():
        if record.reservation is None or record.state not in (
            ReceiverState.QUEUED,
            ReceiverState.RESERVED,
            ReceiverState.STREAMING,
            ReceiverState.QUARANTINED,
        ):
            continue
        silent = world.memo.silent.get(record.reservation.sender)
        if silent is not None:
            held = there.now - silent.get(there.engine_id, there.now)
            assert held <= 2 * LEASE + SUSPICION_SECONDS + SOON, f"{record.name}: {held} s; {record.story()}"


def _staging_agrees(worker: PrefillWorker) -> None:
    """Pieces tile the staging, and exactly the pieces under way use it."""
    pipeline = worker.pipeline
    check_arena(pipeline._staging)
    loads = [transfer.load for transfer in pipeline._transfers.values()]
    pieces = [(piece, load) for load in loads for piece in load.pieces]
    assert pipeline.staging_bytes_used >= sum(piece.num_blocks for piece, _ in pieces) * CELL
    held = Counter()
    for piece, load in pieces:
        held[load.target.agent] += piece.num_blocks * CELL
    assert held == pipeline._held


def _ends_once(memo: Memo, send: Send) -> None:
    """The owner is notified once, the outcome is decided once, and nothing goes on after the deadline."""
    assert send.outgoing is not None
    session = send.outgoing
    assert len(send.ends) <= 1
    assert send.frees <= 1
    over = session.ended or session.state in (SenderState.STOPPING, SenderState.LEAVING)
    assert bool(send.ends) == over, session.story()
    if session.outcome is not None:
        assert memo.outcomes.setdefault(send.transfer_id, session.outcome) is session.outcome, session.story()
    elif send.worker.running:
        assert send.worker.now <= send.deadline + SOON, f"after its deadline it is {session.state}; {session.story()}"


def _is_notified_once(world: World, reader: Reader) -> None:
    """A reader learns by its deadline, once, that KV has arrived or is lost. What it holds is right."""
    assert len(reader.arrivals) <= 1, reader
    late = reader.worker.running and reader.worker.now > reader.deadline + SOON
    if not reader.arrivals:
        assert not late, f"{reader.transfer_id} was not told by its deadline"
    elif reader.holds:
        assert reader.delivery is not None
        if not reader.finished and reader.broken is None:
            assert not late, f"{reader.transfer_id} is read in parts after its deadline"
        if reader.broken is None and not (reader.finished and reader.delivery.shape.in_parts):
            for part in range(reader.taken, reader.ready):
                part_is_right(world, reader, part)


def part_is_right(world: World, reader: Reader, number: int) -> None:
    """A slot has the bytes that its transfer's own sender has gathered, and no writer writes into it."""
    assert reader.delivery is not None
    slot, shape = reader.delivery.slot, reader.delivery.shape
    part = shape.part(number)
    base = RECEIVE[slot.region] + slot.offset
    memory = reader.worker.memory
    cells = set()
    for layer in range(shape.layout.num_layers):
        for block in range(part.first, part.first + part.num_blocks):
            cell = (base + shape.offset_of(part, layer, block)) // CELL
            cells.add(cell)
            expected = Content(reader.transfer_id, layer, block)
            assert memory.get(cell) == expected, f"{memory.get(cell)} instead of {expected}"
    for write in world.ether.flying:
        if write.agent == reader.worker.engine_id:
            assert cells.isdisjoint(write.cells()), f"{reader.transfer_id} is read, and {write.transfer} writes there"


def _writes_hit_their_own_slots(world: World) -> None:
    """Memory that a write may still reach belongs to the transfer of that write."""
    for there in world.decode.values():
        flying = [write for write in world.ether.flying if write.agent == there.engine_id and not write.reads]
        if not flying:
            continue
        owners: dict[int, TransferId] = {}
        for transfer, record in there.incoming._live.items():
            if record.slot is not None and record.state in (
                ReceiverState.RESERVED,
                ReceiverState.STREAMING,
                ReceiverState.QUARANTINED,
            ):
                first = (RECEIVE[record.slot.region] + record.slot.offset) // CELL
                owners.update(dict.fromkeys(range(first, first + record.slot.num_bytes // CELL), transfer))
        for write in flying:
            hit = {owners.get(cell) for cell in write.cells()}
            assert hit == {write.transfer}, f"a write of {write.transfer} goes to what belongs to {hit}"


def what_is_left(world: World, stay_stopped: Sequence[Life] = ()) -> dict[str, object]:
    """What is held or waited for; nothing, when all is over. What only stopped workers hold is not counted."""
    left: dict[str, object] = {}
    stopped = {life.engine_id for life in stay_stopped}
    hosts = {life.name for life in stay_stopped}
    for there in world.decode.values():
        if there in stay_stopped:
            continue
        records = {
            transfer: record.state
            for transfer, record in there.incoming._live.items()
            if not (
                record.state is ReceiverState.QUARANTINED
                and record.reservation is not None
                and _may_stay(world, record.reservation.sender, stopped)
            )
        }
        if records:
            left[there.engine_id] = records
    for worker in world.prefill.values():
        states = [
            transfer.state
            for transfer in worker.sender.transfers
            # While a peer is stopped, end messages may be repeated.
            if transfer.state is not SenderState.LEAVING or transfer.peer.address.host not in hosts
        ]
        if worker not in stay_stopped and (states or worker.pipeline.staging_bytes_used):
            left[worker.engine_id] = states
    sends = [
        send.transfer_id
        for send in world.sends.values()
        if send.worker not in stay_stopped and not (send.ends and send.frees)
    ]
    readers = [reader.transfer_id for reader in world.readers if reader.worker not in stay_stopped]
    if sends or readers:
        left["owners"] = (sends, readers)
    for what, asked, told in (
        ("warming", world.warmings, world.warmed),
        ("measuring", world.probing, world.probed),
    ):
        asked_of, told_of = Counter(map(id, asked)), Counter(map(id, told))
        for worker in world.prefill.values():
            if worker not in stay_stopped and asked_of[id(worker)] != told_of[id(worker)]:
                left[f"{what} {worker.engine_id}"] = (asked_of[id(worker)], told_of[id(worker)])
    return left


def _may_stay(world: World, writer: EngineId, stopped: set[EngineId]) -> bool:
    """A stopped sender may wake up, and without its connection its death cannot be seen."""
    return writer in stopped or (not world.sizes.reachable and writer in world.memo.silent)


def nothing_is_left(world: World, stay_stopped: Sequence[Life] = ()) -> None:
    """Check that nothing is left after enough time with a healthy network."""
    left = what_is_left(world, stay_stopped)
    assert not left, left
