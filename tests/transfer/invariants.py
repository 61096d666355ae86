"""Invariants of buffers, slots and incoming transfers."""

from collections import Counter

from kvbelt.transfer.arena import Arena
from kvbelt.transfer.receive.incoming import IncomingTransfers
from kvbelt.transfer.receive.slots import SlotAllocator
from kvbelt.transfer.receive.states import HOLDING
from kvbelt.transfer.receive.states import ReceiverState as S


def check_arena(arena: Arena) -> None:
    """Free and used pieces tile the buffer, and no two free pieces touch."""
    end = 0
    for offset, num_bytes in sorted([*arena._free, *arena._used.items()]):
        assert offset == end, f"piece at {offset} of {num_bytes} bytes after {end}"
        assert num_bytes > 0, f"piece at {offset} of {num_bytes} bytes"
        end = offset + num_bytes
    assert end == arena.num_bytes, f"pieces end at {end} of {arena.num_bytes}"
    for (offset, num_bytes), (following, _) in zip(arena._free, arena._free[1:], strict=False):
        assert offset + num_bytes < following, f"free pieces at {offset} and {following} touch"


def check_slots(slots: SlotAllocator) -> None:
    """Slots do not overlap and lie in their buffers; every number is either open or idle."""
    numbers = sorted([*slots._open, *slots._idle])
    assert numbers == list(range(len(slots._generations))), f"open {sorted(slots._open)}, idle {sorted(slots._idle)}"
    for region, arena in enumerate(slots._arenas):
        check_arena(arena)
        end = 0
        for slot in sorted(slots._open.values(), key=lambda slot: slot.offset):
            if slot.region == region:
                assert slot.offset >= end, f"{slot} overlaps the one before it, which ends at {end}"
                end = slot.offset + slot.num_bytes
        assert end <= arena.num_bytes, f"a slot ends at {end} of {arena.num_bytes}"


def check_incoming(incoming: IncomingTransfers) -> None:
    """The records, the queue and the slots agree."""
    check_slots(incoming._slots)
    live = incoming._live
    queued = {key for key, record in live.items() if record.state is S.QUEUED}
    assert queued == set(incoming._queue), f"queued {queued}, in the queue {list(incoming._queue)}"
    reserved = Counter(record.reservation.sender for record in live.values() if record.reservation)
    assert reserved == incoming._open, f"{reserved} transfers are open, counted {incoming._open}"
    for record in [*live.values(), *(record for _, record in incoming._ended.values())]:
        holds = f"{record.name} is {record.state} with slot {record.slot}; {record.story()}"
        assert (record.state in HOLDING) == (record.slot is not None), holds
        awaited = not record.has_consumer or record.state in (S.EXPECTED, S.QUEUED, S.RESERVED, S.VERIFYING)
        assert awaited, f"{record.name} is {record.state} and its reader was not told"
