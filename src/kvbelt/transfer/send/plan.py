"""What to gather where, and what to write: data, computed without touching memory.

A run is what an engine hands over: consecutive blocks of one layer. A batch is what is gathered and
written in one go: parts of runs laid side by side in one piece of staging. Posting costs by the
descriptor, not by the byte, so neighbours on both sides are merged into one span.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from kvbelt.transfer.shape import Part, SlotShape


@dataclass(frozen=True, slots=True)
class Run:
    """Blocks ``first .. first + len(block_ids)`` of a prompt, in one layer, final after ``ready``."""

    layer: int
    first: int
    block_ids: Sequence[int]
    ready: Any = None

    def cut(self, start: int, end: int) -> "Run":
        """Its blocks from the prompt's block ``start`` up to ``end``, as far as it has them."""
        skipped = max(start - self.first, 0)
        return Run(self.layer, self.first + skipped, self.block_ids[skipped : max(end - self.first, 0)], self.ready)

    def of_layers(self, shape: SlotShape) -> "Run | None":
        """Counted in the layers that travel; None: this one does not."""
        layers = shape.layers
        if layers is None:
            return self
        if self.layer not in layers:
            return None
        return Run(self.layer - layers.start, self.first, self.block_ids, self.ready)

    def in_blocks_of(self, shape: SlotShape) -> "Run":
        """In the blocks that travel, if each of the engine's is several of them; without those behind the prompt."""
        times = shape.per_block
        if times == 1:
            return self
        first = self.first * times
        ids = [block * times + part for block in self.block_ids for part in range(times)]
        return Run(self.layer, first, tuple(ids[: shape.num_blocks - first]), self.ready)


class Span(NamedTuple):
    """One descriptor: bytes here to bytes there."""

    local: int
    remote: int
    num_bytes: int


def by_part(run: Run, shape: SlotShape) -> Iterator[tuple[int, Run]]:
    """A run cut at the borders of parts, each piece with its part. Blocks that do not travel are left out."""
    first, end = max(run.first, shape.first_block), run.first + len(run.block_ids)
    if end - first == len(run.block_ids) and not shape.in_parts:
        yield 0, run
        return
    while first < end:
        number = shape.part_of(first)
        following = shape.first_block + (number + 1) * shape.part_blocks
        yield number, run.cut(first, following)
        first = following


def take_batch(runs: deque[Run], max_blocks: int) -> list[Run]:
    """Take up to ``max_blocks`` blocks from the front, splitting the run that does not fit."""
    batch: list[Run] = []
    room = max_blocks
    while runs and room > 0:
        run = runs.popleft()
        if len(run.block_ids) > room:
            runs.appendleft(run.cut(run.first + room, run.first + len(run.block_ids)))
            run = run.cut(run.first, run.first + room)
        batch.append(run)
        room -= len(run.block_ids)
    return batch


def plan_writes(
    batch: Sequence[Run], shape: SlotShape, part: Part, staging_address: int, slot_address: int
) -> list[Span]:
    """The fewest spans from a batch of one part, staged contiguously at ``staging_address``, to a slot."""
    spans: list[Span] = []
    local = staging_address
    for run in batch:
        remote = slot_address + shape.offset_of(part, run.layer, run.first)
        num_bytes = len(run.block_ids) * shape.layout.block_bytes
        if spans and spans[-1].remote + spans[-1].num_bytes == remote:
            spans[-1] = Span(spans[-1].local, spans[-1].remote, spans[-1].num_bytes + num_bytes)
        else:
            spans.append(Span(local, remote, num_bytes))
        local += num_bytes
    return spans
