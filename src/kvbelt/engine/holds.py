"""Blocks of finished requests that somebody still reads."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from kvbelt.engine.blocks import BlockAllocator


@dataclass(eq=False)
class Hold:
    """Blocks of a finished request; see ``BlockHold``."""

    block_ids: tuple[int, ...]
    _give_back: Callable[["Hold"], None]
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _released: bool = False

    def release(self) -> None:
        """Give the blocks back; a second time does nothing."""
        with self._lock:
            if self._released:
                return
            self._released = True
        self._give_back(self)


class Holds:
    """The holds that are not released. Methods are the engine's thread's.

    Args:
        allocator: whose blocks are held.
        post: runs something on the engine's thread, soon.
    """

    def __init__(self, allocator: BlockAllocator, post: Callable[[Callable[[], None]], None]) -> None:
        self._allocator = allocator
        self._post = post
        self._open: set[Hold] = set()

    def take_over(self, block_ids: Sequence[int]) -> Hold:
        """A table's use of these blocks becomes a hold's."""
        hold = Hold(tuple(block_ids), lambda hold: self._post(partial(self._end, hold)))
        self._open.add(hold)
        return hold

    def block_ids(self) -> list[tuple[int, ...]]:
        """What is held."""
        return [hold.block_ids for hold in self._open]

    def _end(self, hold: Hold) -> None:
        self._open.remove(hold)
        self._allocator.release(hold.block_ids)
