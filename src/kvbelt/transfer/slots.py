"""Slots of a receive buffer, each named by (engine, slot, generation).

A slot holds N blocks of every layer, layer-major and contiguous: layer *l* begins at ``l * N * block_bytes``,
block *i* after it. So one layer of one chunk of a prompt is one span, and successive layers of a whole
prompt are adjacent.

A slot number is used again, a name never: the generation grows with every use.
"""

from dataclasses import dataclass

from kvbelt.transfer.arena import Arena
from kvbelt.wire.ids import EngineId, SlotName


@dataclass(frozen=True, slots=True)
class Slot:
    """One use of a piece of the receive buffer."""

    name: SlotName
    offset: int  #: bytes from the start of the region
    num_bytes: int


class SlotAllocator:
    """Allocates slots. Single-threaded."""

    def __init__(self, engine_id: EngineId, num_bytes: int) -> None:
        self._engine_id = engine_id
        self._arena = Arena(num_bytes)
        # Every number ever used is in exactly one of the two; its generation is that of its latest use.
        self._open: dict[int, Slot] = {}
        self._idle: list[int] = []
        self._generations: list[int] = []

    @property
    def num_bytes(self) -> int:
        """Size of the buffer."""
        return self._arena.num_bytes

    def allocate(self, num_bytes: int) -> Slot | None:
        """A new slot, or None when there is no gap of that size."""
        offset = self._arena.allocate(num_bytes)
        if offset is None:
            return None
        if self._idle:
            number = self._idle.pop()
        else:
            number = len(self._generations)
            self._generations.append(0)
        self._generations[number] += 1
        slot = Slot(SlotName(self._engine_id, number, self._generations[number]), offset, num_bytes)
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
        self._arena.free(slot.offset)

    def validate(self) -> None:
        """Check the invariants.

        Raises:
            AssertionError: slots overlap, leave the buffer, or a number is both open and idle.
        """
        self._arena.validate()
        if sorted([*self._open, *self._idle]) != list(range(len(self._generations))):
            raise AssertionError(f"open {sorted(self._open)} and idle {sorted(self._idle)} numbers")
        end = 0
        for slot in sorted(self._open.values(), key=lambda slot: slot.offset):
            if slot.offset < end:
                raise AssertionError(f"{slot} overlaps the one before it, which ends at {end}")
            end = slot.offset + slot.num_bytes
        if end > self.num_bytes:
            raise AssertionError(f"a slot ends at {end} of {self.num_bytes}")
