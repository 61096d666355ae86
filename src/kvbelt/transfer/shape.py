"""The layout of a prompt's blocks in a slot. Both sides derive it from the reservation and the grant.

A slot holds the prompt's blocks from ``first_block`` on, of every layer, layer-major and contiguous: layer *l* begins
at ``l * N * block_bytes``, its blocks one after another. So one layer of one chunk of a prompt is one span, and
successive layers of a whole prompt are adjacent.

A prompt larger than every buffer is sent in parts. Its slot has room for two: part *k* lies in place ``k % 2``,
layer-major by itself. While the consumer reads one part, the other is written.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from kvbelt.wire.layout import KVLayout

#: Places for parts in a slot.
PLACES = 2


class Part(NamedTuple):
    """Some of a prompt's blocks, and where their first layer begins."""

    number: int
    first: int  #: block of the prompt
    num_blocks: int
    offset: int  #: bytes from the start of the slot


@dataclass(frozen=True, slots=True)
class SlotShape:
    """Which blocks are sent, and in how many parts.

    Raises:
        ValueError: no block is sent, or a part is empty.
    """

    layout: KVLayout
    num_blocks: int  #: of the prompt
    first_block: int  #: those before it do not travel
    part_blocks: int
    heads: range | None = None  #: of this process's blocks, which ``layout`` is of; None: all
    per_block: int = 1  #: blocks of ``layout`` in one of this process's; "block" means the former here
    layers: range | None = None  #: of this process's layers, which ``layout`` counts; None: all

    def __post_init__(self) -> None:
        if not 0 <= self.first_block < self.num_blocks or not 1 <= self.part_blocks <= self.travelling:
            raise ValueError(
                f"blocks {self.first_block} to {self.num_blocks} of a prompt, in parts of {self.part_blocks}"
            )

    @property
    def travelling(self) -> int:
        return self.num_blocks - self.first_block

    @property
    def num_parts(self) -> int:
        """1 if the slot holds all blocks at once."""
        return -(-self.travelling // self.part_blocks)

    @property
    def in_parts(self) -> bool:
        return self.num_parts > 1

    @property
    def sent_bytes(self) -> int:
        return self.layout.slot_bytes(self.travelling)

    @property
    def slot_bytes(self) -> int:
        return self.layout.slot_bytes(self.part_blocks * min(PLACES, self.num_parts))

    def part(self, number: int) -> Part:
        first = self.first_block + number * self.part_blocks
        place = (number % PLACES) * self.layout.slot_bytes(self.part_blocks)
        return Part(number, first, min(self.part_blocks, self.num_blocks - first), place)

    def part_of(self, block: int) -> int:
        return (block - self.first_block) // self.part_blocks

    def parts(self) -> Iterator[Part]:
        return (self.part(number) for number in range(self.num_parts))

    def offset_of(self, part: Part, layer: int, block: int) -> int:
        """The place of a block of a part, in bytes from the start of the slot."""
        return part.offset + (layer * part.num_blocks + block - part.first) * self.layout.block_bytes
