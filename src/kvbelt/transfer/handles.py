"""What an engine's side holds in its hands: one outgoing transfer, one received slot. Any thread may call."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from kvbelt.transfer.plan import Run
from kvbelt.transfer.ports import Fence, PagedCopy, SlotGoneError
from kvbelt.transfer.shape import Part, SlotShape
from kvbelt.transfer.slots import Slot
from kvbelt.wire.layout import KVLayout


class SendingHandle:
    """``Sending``: passes on to the belt's thread. The engine's calls come from one thread at a time."""

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        batch_bytes: int,
        *,
        hand_over: Callable[[Sequence[Run]], None],
        computed: Callable[[], None],
        abandon: Callable[[str], None],
    ) -> None:
        self._num_layers = layout.num_layers
        self._num_blocks = num_blocks
        self._batch_blocks = -(-batch_bytes // layout.block_bytes)
        self._batch: list[Run] = []
        self._batched = 0  # blocks in _batch
        self._next = [0] * layout.num_layers  # the block that each layer expects next
        self._hand_over = hand_over
        self._computed = computed
        self._abandon = abandon
        self._failure: str | None = None

    def blocks_written(self, layer: int, first: int, block_ids: Sequence[int], ready: Any) -> None:
        """These blocks of this layer are final.

        Raises:
            ValueError: they are not the next blocks of that layer, or beyond the prompt: the caller's mistake.
        """
        if not 0 <= layer < self._num_layers:
            raise ValueError(f"layer {layer} of {self._num_layers}")
        if first != self._next[layer] or first + len(block_ids) > self._num_blocks:
            raise ValueError(
                f"blocks {first} to {first + len(block_ids)} of layer {layer}; "
                f"expected from {self._next[layer]} to {self._num_blocks} at most"
            )
        if not block_ids:
            return
        self._next[layer] += len(block_ids)
        self._batch.append(Run(layer, first, tuple(block_ids), ready))
        self._batched += len(block_ids)
        if self._batched >= self._batch_blocks:
            self._pass_on()

    def _pass_on(self) -> None:
        batch, self._batch, self._batched = self._batch, [], 0
        self._hand_over(batch)

    def computed(self) -> None:
        """Every block of every layer has been handed over."""
        if self._batch:
            self._pass_on()
        self._computed()

    def cancel(self, reason: str) -> None:
        """The request is over without a complete prompt."""
        self._abandon(reason)

    @property
    def failure(self) -> str | None:
        """The reason, if it has failed."""
        return self._failure

    def failed(self, reason: str) -> None:
        """The belt's thread has seen it fail."""
        self._failure = reason


class ReceivedSlot:
    """``ReceivedKV``: a committed slot."""

    whole = True

    def __init__(
        self, slot: Slot, num_tokens: int, shape: SlotShape, copy: PagedCopy, release: Callable[[], None]
    ) -> None:
        self.num_tokens = num_tokens
        self.num_blocks = shape.num_blocks
        self.first_block = shape.first_block
        self._slot = slot
        self._shape = shape
        self._copy = copy
        self._release = release
        # Held while the slot is read, so that it cannot be released under a reader.
        self._lock = threading.Lock()
        self._gone = False

    def scatter(self, block_ids: Sequence[int], first: int | None = None) -> None:
        """Copy every layer's blocks, from the prompt's block ``first`` on, into these; returns when they are in place.

        Raises:
            SlotGoneError: it was released, or the belt was closed.
            ValueError: blocks that were not sent.
        """
        wanted = _wanted(self._shape, block_ids, first)
        with self._lock:
            if self._gone:
                raise SlotGoneError(f"slot {self._slot.name} was released")
            scatter_part(self._copy, self._slot, self._shape, self._shape.part(0), wanted)

    def release(self) -> None:
        """Free the slot. Waits for a scatter under way. Idempotent."""
        with self._lock:
            if self._gone:
                return
            self._gone = True
        self._release()


class ReceivedParts:
    """``ReceivedKV``: a prompt that comes in parts. Its parts and its end are told by the belt's thread."""

    whole = False

    def __init__(  # noqa: PLR0917 -- its seams
        self,
        slot: Slot,
        num_tokens: int,
        shape: SlotShape,
        copy: PagedCopy,
        taken: Callable[[], None],
        release: Callable[[], None],
    ) -> None:
        self.num_tokens = num_tokens
        self.num_blocks = shape.num_blocks
        self.first_block = shape.first_block
        self._slot = slot
        self._shape = shape
        self._copy = copy
        self._taken = taken
        self._release = release
        # Guards what follows, and wakes the reader.
        self._told = threading.Condition()
        self._ready = 0  # parts that may be taken out
        self._finished = False
        self._broken: str | None = None
        self._begun = False
        self._released = False

    # The reader's thread.

    def scatter(self, block_ids: Sequence[int], first: int | None = None) -> None:
        """Copy the prompt's blocks as they come; returns when all are in place.

        It waits as long as the transfer may take: the belt ends it at its deadline, or when its writer is lost.

        Raises:
            SlotGoneError: a part did not come, it was released, or it is called for a second time.
            ValueError: blocks that were not sent.
        """
        wanted = _wanted(self._shape, block_ids, first)
        with self._told:
            if self._begun:
                raise SlotGoneError(f"slot {self._slot.name} comes in parts, and they can be taken out once")
            self._begun = True
        for part in self._shape.parts():
            self._wait(lambda part=part: self._ready > part.number)  # type: ignore[misc]
            scatter_part(self._copy, self._slot, self._shape, part, wanted)
            self._taken()
        # What was copied while the writer was being lost may be anything: only the belt knows that it is whole.
        self._wait(lambda: self._finished)

    def _wait(self, condition: Callable[[], bool]) -> None:
        with self._told:
            self._told.wait_for(lambda: condition() or self._broken is not None)
            if self._broken is not None:
                raise SlotGoneError(self._broken)

    def release(self) -> None:
        """Read no more of it. A scatter under way ends with SlotGoneError. Idempotent."""
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
        """The next part has landed, and is right."""
        with self._told:
            self._ready += 1
            self._told.notify_all()

    def finish(self) -> None:
        """Every part was taken while it was whole."""
        with self._told:
            self._finished = True
            self._told.notify_all()

    def fail(self, why: str) -> None:
        """No part follows."""
        with self._told:
            self._broken = self._broken or why
            self._told.notify_all()


class Wanted(NamedTuple):
    """Which of the engine's blocks the prompt's blocks ``first ..`` go into."""

    block_ids: tuple[int, ...]
    first: int


def _wanted(shape: SlotShape, block_ids: Sequence[int], first: int | None) -> Wanted:
    first = shape.first_block if first is None else first
    if first < shape.first_block or first + len(block_ids) > shape.num_blocks:
        raise ValueError(
            f"blocks {first} to {first + len(block_ids)} to fill; {shape.first_block} to {shape.num_blocks} were sent"
        )
    return Wanted(tuple(block_ids), first)


def scatter_part(copy: PagedCopy, slot: Slot, shape: SlotShape, part: Part, wanted: Wanted) -> None:
    """Copy what is wanted of one part, every layer; returns when it is in place."""
    start = max(part.first, wanted.first)
    end = min(part.first + part.num_blocks, wanted.first + len(wanted.block_ids))
    if start >= end:
        return
    blocks = wanted.block_ids[start - wanted.first : end - wanted.first]
    offset, stride = shape.offset_of(part, 0, start), part.num_blocks * shape.layout.block_bytes
    wait_for(copy.scatter(blocks, slot.offset + offset, stride, slot.region))


def wait_for(fences: Sequence[Fence]) -> None:
    """Until every copy has ended, a matter of milliseconds.

    Raises what the first failed one raised, but not earlier: what is still being copied must not be given back.
    """
    failure: Exception | None = None
    for fence in fences:
        try:
            while not fence.done():
                time.sleep(20e-6)
        except Exception as error:  # noqa: BLE001 -- raised below
            failure = failure or error
    if failure is not None:
        raise failure
