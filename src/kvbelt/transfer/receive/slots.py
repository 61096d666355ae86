"""Slots of the receive buffers, each named by (engine, slot, generation). How blocks lie in one: shape.py.

A slot number is used again, a name never: the generation grows with every use.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvbelt.transfer.arena import Arena
from kvbelt.wire.ids import EngineId, SlotName


@dataclass(frozen=True, slots=True)
class Slot:
    """One use of a piece of a receive buffer."""

    name: SlotName
    region: int  #: which buffer
    offset: int  #: bytes from the start of the region
    num_bytes: int


class SlotAllocator:
    """Allocates slots out of one or several buffers, the first one first. Single-threaded."""

    def __init__(self, engine_id: EngineId, sizes: Sequence[int]) -> None:
        self._engine_id = engine_id
        self._arenas = [Arena(num_bytes) for num_bytes in sizes]
        # Every number ever used is in exactly one of the two; its generation is that of its latest use.
        self._open: dict[int, Slot] = {}
        self._idle: list[int] = []
        self._generations: list[int] = []

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each buffer."""
        return tuple(arena.num_bytes for arena in self._arenas)

    def allocate(self, num_bytes: int) -> Slot | None:
        """A new slot, or None when no buffer has a gap of that size."""
        for region, arena in enumerate(self._arenas):
            offset = arena.allocate(num_bytes)
            if offset is not None:
                return self._named(region, offset, num_bytes)
        return None

    def _named(self, region: int, offset: int, num_bytes: int) -> Slot:
        if self._idle:
            number = self._idle.pop()
        else:
            number = len(self._generations)
            self._generations.append(0)
        self._generations[number] += 1
        slot = Slot(SlotName(self._engine_id, number, self._generations[number]), region, offset, num_bytes)
        self._open[number] = slot
        return slot

    def free(self, name: SlotName) -> None:
        """Take a slot back.

        Raises:
            KeyError: the name is not that of an open slot (freed before, or of an older generation).
        """
        slot = self._open.get(name.slot)
        if slot is None or slot.name != name:
            raise KeyError(f"{name} is not an open slot")
        del self._open[name.slot]
        self._idle.append(name.slot)
        self._arenas[slot.region].free(slot.offset)

    def validate(self) -> None:
        """Check the invariants.

        Raises:
            AssertionError: slots overlap, leave their buffer, or a number is both open and idle.
        """
        if sorted([*self._open, *self._idle]) != list(range(len(self._generations))):
            raise AssertionError(f"open {sorted(self._open)} and idle {sorted(self._idle)} numbers")
        for region, arena in enumerate(self._arenas):
            arena.validate()
            end = 0
            for slot in sorted(self._open.values(), key=lambda slot: slot.offset):
                if slot.region != region:
                    continue
                if slot.offset < end:
                    raise AssertionError(f"{slot} overlaps the one before it, which ends at {end}")
                end = slot.offset + slot.num_bytes
            if end > arena.num_bytes:
                raise AssertionError(f"a slot ends at {end} of {arena.num_bytes}")
