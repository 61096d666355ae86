"""What a decode engine holds of one received transfer. Any thread may call."""

import threading
import time
from collections.abc import Callable, Sequence

from kvbelt.transfer.ports import Fence, PagedCopy, SlotGoneError
from kvbelt.transfer.receive.slots import Slot
from kvbelt.transfer.shape import Part, SlotShape


class _Received:
    def __init__(
        self, slot: Slot, num_tokens: int, shape: SlotShape, copy: PagedCopy, release: Callable[[], object]
    ) -> None:
        self.num_tokens = num_tokens
        self.num_blocks = -(-shape.num_blocks // shape.per_block)
        self.first_block = shape.first_block // shape.per_block
        self.heads, self.layers = shape.heads, shape.layers
        self._slot = slot
        self._shape = shape
        self._copy = copy
        self._release = release
        self._released = False
        # Held while a committed slot is read, so that it cannot be released meanwhile. Wakes the thread that waits
        # for parts.
        self._told = threading.Condition()

    def _check(self, block_ids: Sequence[int], first: int | None) -> tuple[Sequence[int], int]:
        """These blocks, and the prompt's block that goes into the first of them, both as they have travelled."""
        shape, times = self._shape, self._shape.per_block
        first = self.first_block if first is None else first
        end = first + len(block_ids)
        if first < self.first_block or end > self.num_blocks:
            raise ValueError(f"blocks {first} to {end} to fill; {self.first_block} to {self.num_blocks} were sent")
        if times == 1:
            return block_ids, first
        parts = [block * times + part for block in block_ids for part in range(times)]
        return parts[: shape.num_blocks - first * times], first * times

    def _scatter(self, part: Part, block_ids: Sequence[int], first: int) -> None:
        """Copy what these blocks want of one part, every layer; returns when it is in place."""
        start, end = max(part.first, first), min(part.first + part.num_blocks, first + len(block_ids))
        if start < end:
            offset = self._slot.offset + self._shape.offset_of(part, 0, start)
            stride = part.num_blocks * self._shape.layout.block_bytes
            blocks = tuple(block_ids[start - first : end - first])
            wait_for(self._copy.scatter(blocks, offset, stride, self._slot.region))


class ReceivedSlot(_Received):
    """``ReceivedKV``: a committed slot."""

    whole = True

    def scatter(self, block_ids: Sequence[int], first: int | None = None) -> None:
        block_ids, first = self._check(block_ids, first)
        with self._told:
            if self._released:
                raise SlotGoneError(f"slot {self._slot.name} was released")
            self._scatter(self._shape.part(0), block_ids, first)

    def release(self) -> None:
        """Waits for a scatter under way."""
        with self._told:
            if self._released:
                return
            self._released = True
        self._release()


class ReceivedParts(_Received):
    """``ReceivedKV``: a prompt that comes in parts. The belt's thread says when a part or the end has come."""

    whole = False

    def __init__(  # noqa: PLR0917 -- its seams
        self,
        slot: Slot,
        num_tokens: int,
        shape: SlotShape,
        copy: PagedCopy,
        taken: Callable[[], object],
        release: Callable[[], object],
    ) -> None:
        super().__init__(slot, num_tokens, shape, copy, release)
        self._taken = taken
        self._ready = 0  # parts that may be taken out
        self._finished = False
        self._broken: str | None = None
        self._begun = False

    # The consumer's thread.

    def scatter(self, block_ids: Sequence[int], first: int | None = None) -> None:
        """Wait for part after part. The belt ends it at the transfer's deadline, or when its sender is lost."""
        block_ids, first = self._check(tuple(block_ids), first)
        with self._told:
            if self._begun:
                raise SlotGoneError(f"slot {self._slot.name} comes in parts, and they can be taken out once")
            self._begun = True
        for part in self._shape.parts():
            self._wait(lambda part=part: self._ready > part.number)  # type: ignore[misc]
            self._scatter(part, block_ids, first)
            self._taken()
        # What was copied while the sender was being lost may be anything: only the belt knows that it is whole.
        self._wait(lambda: self._finished)

    def _wait(self, condition: Callable[[], bool]) -> None:
        with self._told:
            self._told.wait_for(lambda: condition() or self._broken is not None)
            if self._broken is not None:
                raise SlotGoneError(self._broken)

    def release(self) -> None:
        """A scatter under way ends with SlotGoneError."""
        with self._told:
            if self._released:
                return
            self._released = True
            if not self._finished:
                self._broken = self._broken or f"slot {self._slot.name} was released"
            self._told.notify_all()
        self._release()

    # The belt's thread.

    def part_ready(self) -> None:
        with self._told:
            self._ready += 1
            self._told.notify_all()

    def finish(self) -> None:
        with self._told:
            self._finished = True
            self._told.notify_all()

    def fail(self, why: str) -> None:
        with self._told:
            self._broken = self._broken or why
            self._told.notify_all()


def wait_for(fences: Sequence[Fence]) -> None:
    """Raises what the first failed copy raised, after all have ended: memory under a copy must not be released."""
    failure: Exception | None = None
    for fence in fences:
        try:
            while not fence.done():
                time.sleep(20e-6)
        except Exception as error:  # noqa: BLE001 -- raised below
            failure = failure or error
    if failure is not None:
        raise failure
