"""What an engine's side holds in its hands: one outgoing transfer, one received slot. Any thread may call."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from kvbelt.transfer.plan import Run
from kvbelt.transfer.ports import Fence, PagedCopy, SlotGoneError
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

    def __init__(  # noqa: PLR0917 -- its seams
        self,
        slot: Slot,
        num_tokens: int,
        num_blocks: int,
        layout: KVLayout,
        copy: PagedCopy,
        release: Callable[[], None],
    ) -> None:
        self.num_tokens = num_tokens
        self.num_blocks = num_blocks
        self._slot = slot
        self._layout = layout
        self._copy = copy
        self._release = release
        # Held while the slot is read, so that it cannot be released under a reader.
        self._lock = threading.Lock()
        self._gone = False

    def scatter(self, block_ids: Sequence[int], first: int = 0) -> None:
        """Copy every layer's blocks, from the prompt's block ``first`` on, into these; returns when they are in place.

        Raises:
            SlotGoneError: it was released, or the belt was closed.
            ValueError: more blocks than there are.
        """
        if first < 0 or first + len(block_ids) > self.num_blocks:
            raise ValueError(f"blocks {first} to {first + len(block_ids)} to fill, the slot holds {self.num_blocks}")
        with self._lock:
            if self._gone:
                raise SlotGoneError(f"slot {self._slot.name} was released")
            stride = self.num_blocks * self._layout.block_bytes
            offset = self._slot.offset + first * self._layout.block_bytes
            blocks = tuple(block_ids)
            fences: list[Fence] = []
            for layer in range(self._layout.num_layers):
                fences.append(self._copy.scatter(layer, blocks, offset + layer * stride))
                # A copy may keep the interpreter to itself; who waits for it need not wait for all layers.
                time.sleep(0)
            wait_for(fences)

    def release(self) -> None:
        """Free the slot. Waits for a scatter under way. Idempotent."""
        with self._lock:
            if self._gone:
                return
            self._gone = True
        self._release()


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
