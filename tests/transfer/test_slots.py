"""Pieces of buffers: they tile, never overlap, merge again, and their names are never used twice."""

import pytest
from hypothesis import given, settings, strategies

from kvbelt.transfer.arena import Arena
from kvbelt.transfer.receive.slots import SlotAllocator
from kvbelt.wire.ids import EngineId, SlotName
from tests.transfer.invariants import check_arena, check_slots

SIZES = strategies.lists(strategies.tuples(strategies.booleans(), strategies.integers(1, 5 * 4096)), max_size=60)


@settings(deadline=None)
@given(total=strategies.integers(1, 40 * 4096), steps=SIZES)
def test_an_arena_tiles_its_buffer(total, steps):
    """Pieces are disjoint after any sequence, and at the end the buffer is one free piece."""
    arena = Arena(total)
    taken = []
    for take, size in steps:
        if take:
            offset = arena.allocate(size)
            if offset is not None:
                assert offset + size <= total
                assert all(offset + size <= o or o + s <= offset for o, s in taken)
                taken.append((offset, size))
        elif taken:
            offset, _ = taken.pop(size % len(taken))
            arena.free(offset)
        check_arena(arena)
    for offset, _ in taken:
        arena.free(offset)
    check_arena(arena)
    assert arena.allocate(total) == 0


@settings(deadline=None)
@given(steps=SIZES)
def test_slot_names_are_never_used_twice(steps):
    """A slot's number is used again, but with another generation."""
    slots = SlotAllocator(EngineId("d"), [16 * 4096, 4 * 4096])
    seen, taken = set(), []
    for take, size in steps:
        if take:
            slot = slots.allocate(size)
            if slot is not None:
                assert slot.name not in seen
                seen.add(slot.name)
                taken.append(slot)
        elif taken:
            slots.free(taken.pop(size % len(taken)).name)
        check_slots(slots)


def test_an_older_generation_frees_nothing():
    """It is refused."""
    slots = SlotAllocator(EngineId("d"), [4096])
    first = slots.allocate(4096)
    slots.free(first.name)
    second = slots.allocate(4096)
    assert second.name == SlotName(EngineId("d"), 0, 2)
    with pytest.raises(KeyError):
        slots.free(first.name)
    check_slots(slots)


def test_a_full_buffer_gives_nothing():
    """The result is None and no exception, because waiting helps."""
    slots = SlotAllocator(EngineId("d"), [2 * 4096])
    assert slots.allocate(2 * 4096) is not None
    assert slots.allocate(1) is None
