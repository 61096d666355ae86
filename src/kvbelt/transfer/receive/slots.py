"""Slots of the receive buffers, each named by (engine, slot, generation). Their layout: shape.py.

Slot numbers are reused, names never: the generation grows with every use.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvbelt.transfer.arena import Arena
from kvbelt.wire.ids import EngineId, SlotName


@dataclass(frozen=True, slots=True)
class Slot:
    name: SlotName
    region: int  #: index of the buffer
    offset: int  #: bytes from the start of the region
    num_bytes: int


class SlotAllocator:
    """Allocates slots from several buffers, preferring the first. Single-threaded."""

    def __init__(self, engine_id: EngineId, sizes: Sequence[int]) -> None:
        self._engine_id = engine_id
        self._arenas = [Arena(num_bytes) for num_bytes in sizes]
        # Every number is in exactly one of the two. Its generation is that of its latest use.
        self._open: dict[int, Slot] = {}
        self._idle: list[int] = []
        self._generations: list[int] = []

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
        """Free a slot.

        Raises:
            KeyError: no open slot has this name: it was freed, or is of an older generation.
        """
        slot = self._open.get(name.slot)
        if slot is None or slot.name != name:
            raise KeyError(f"{name} is not an open slot")
        del self._open[name.slot]
        self._idle.append(name.slot)
        self._arenas[slot.region].free(slot.offset)
