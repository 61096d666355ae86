"""Which blocks a prefill server keeps in host memory: an index by block hash, least recently used first out. Pure.

A *place* is room for one block of every layer. The index decides in the scheduler's process; the bytes lie in each
worker's (``host_memory``), at the same places on every tensor-parallel rank.

Rules:

1. A worker copies in the order in which it was decided here. So a block may be looked up the moment it has a place: the
   copy out of that place comes after the copy into it.
2. A prompt's last block leaves before its first: hashes are chains, and a chain without its head is worth nothing.
3. ``places`` and ``free`` together are every place there is, each once.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class HostCounts:
    """Since the start."""

    tokens_asked: int = 0  #: of prompts that came, whole blocks only
    tokens_loaded: int = 0  #: taken from host memory instead of being computed
    blocks_kept: int = 0
    blocks_evicted: int = 0


class HostIndex:
    """Block hashes and the places of their blocks."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"room for {capacity} blocks")
        self.capacity = capacity
        self.evicted = 0
        self._places: OrderedDict[bytes, int] = OrderedDict()  # the least recently used first
        self._free: deque[int] = deque(range(capacity))

    def __len__(self) -> int:
        """Blocks that have a place."""
        return len(self._places)

    def find(self, hashes: Sequence[bytes]) -> tuple[int, ...]:
        """The places of the longest run of blocks from the prompt's start on."""
        places: list[int] = []
        for block_hash in hashes:
            place = self._places.get(block_hash)
            if place is None:
                break
            places.append(place)
        self._touch(hashes[: len(places)])
        return tuple(places)

    def keep(self, hashes: Sequence[bytes]) -> list[tuple[int, int]]:
        """Give each of a prompt's blocks a place.

        Of a prompt larger than all the room only the head is kept.

        Args:
            hashes: of the prompt's blocks from its first on.

        Returns:
            (block of the prompt, place) of those that had none.
        """
        hashes = hashes[: self.capacity]
        # First, so that no block of this prompt leaves for another of it.
        self._touch(hashes)
        placed: list[tuple[int, int]] = []
        for number, block_hash in enumerate(hashes):
            if block_hash not in self._places:
                place = self._free.popleft() if self._free else self._evict()
                self._places[block_hash] = place
                placed.append((number, place))
        if placed:
            self._touch(hashes)
        return placed

    def forget(self, places: Iterable[int]) -> None:
        """What was to lie there does not."""
        spoiled = set(places)
        for block_hash, place in list(self._places.items()):
            if place in spoiled:
                del self._places[block_hash]
                self._free.append(place)

    def clear(self) -> None:
        """Forget every block."""
        self._places.clear()
        self._free = deque(range(self.capacity))

    def check(self) -> None:
        """Rule 3, for tests.

        Raises:
            AssertionError: a place is lost, or taken twice.
        """
        assert sorted([*self._places.values(), *self._free]) == list(range(self.capacity))

    def _touch(self, hashes: Sequence[bytes]) -> None:
        for block_hash in reversed(hashes):
            if block_hash in self._places:
                self._places.move_to_end(block_hash)

    def _evict(self) -> int:
        _, place = self._places.popitem(last=False)
        self.evicted += 1
        return place
