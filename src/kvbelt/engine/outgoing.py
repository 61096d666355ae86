"""KV that leaves: which blocks of a prompt are final, and the blocks of finished requests that are still being read."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from kvbelt.engine.blocks import BlockAllocator
from kvbelt.engine.live import Live
from kvbelt.engine.pool import PoolLayout
from kvbelt.engine.scheduler import Chunk

_log = logging.getLogger("kvbelt.engine")


@dataclass(frozen=True, slots=True)
class Announcement:
    """The blocks of one prompt, from ``first`` on, that a step completes."""

    live: Live
    first: int
    block_ids: tuple[int, ...]

    def notify(self, layer: int, ready: object) -> None:
        """The layer was written. If the consumer fails, it gets no further layers, and the request goes on."""
        outgoing = self.live.request.outgoing
        if outgoing is None or self.live.outgoing_broken:
            return
        try:
            outgoing.blocks_written(layer, self.first, self.block_ids, ready)
        except Exception:  # noqa: BLE001 - the consumer is not the engine's code
            self.live.outgoing_broken = True
            _log.exception("request %s: outgoing KV failed in layer %d", self.live.request.request_id, layer)


def announcements(chunks: Iterable[tuple[Chunk, Live]], layout: PoolLayout) -> list[Announcement]:
    """The prompt blocks that a step completes, of requests whose KV leaves.

    A request's first chunk includes the blocks before it, which were cached or loaded.
    """
    found: list[Announcement] = []
    for chunk, live in chunks:
        sequence = live.sequence
        if sequence.request.outgoing is None or live.outgoing_broken:
            continue
        end = chunk.start + chunk.length
        whole = end // layout.block_size if end < sequence.prompt_len else layout.blocks(sequence.prompt_len)
        if whole > live.announced:
            found.append(Announcement(live, live.announced, tuple(sequence.block_ids[live.announced : whole])))
    return found


@dataclass(eq=False)
class Hold:
    """Implements ``api.BlockHold``."""

    block_ids: tuple[int, ...]
    _give_back: Callable[["Hold"], None]

    def release(self) -> None:
        self._give_back(self)


class Holds:
    """The holds that are not released. Belongs to the engine's thread, on which ``post`` runs a command, soon."""

    def __init__(self, allocator: BlockAllocator, post: Callable[[Callable[[], None]], None]) -> None:
        self._allocator = allocator
        self._post = post
        self._open: set[Hold] = set()

    def take_over(self, block_ids: Sequence[int]) -> Hold:
        """The hold becomes the user of these blocks in place of a table."""
        hold = Hold(tuple(block_ids), lambda hold: self._post(partial(self._end, hold)))
        self._open.add(hold)
        return hold

    def block_ids(self) -> list[tuple[int, ...]]:
        return [hold.block_ids for hold in self._open]

    def _end(self, hold: Hold) -> None:
        if hold in self._open:  # else it was released twice
            self._open.remove(hold)
            self._allocator.release(hold.block_ids)
