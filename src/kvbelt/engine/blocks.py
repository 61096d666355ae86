"""Allocates the pool's blocks. Knows nothing about their contents.

Rules:

1. A block has as many *users* as there are tables, holds and loads that name it. At most one of them writes it, and
   only while it is not published (``PrefixCache``).
2. A block without users is free. If it is published, it is also cached: it can be found and used again until its memory
   is needed. The least recently used block is given away first.

Attention reads a run of neighbouring blocks in place. So a new request *claims* the run that it may grow into. A claim
promises nothing: when no other block is free, claimed blocks are given away, and the request that claimed them goes on
in scattered blocks, which attention gathers by copying.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from kvbelt.engine.prefix_cache import PrefixCache

_NO_CLAIM = 0
#: Later than every tick: the block cannot be taken.
_NEVER = np.iinfo(np.int64).max

Mask = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


class OutOfBlocksError(Exception):
    """More blocks were requested than are free. Callers check ``num_free`` first, so this is a bug."""


class BlockAllocator:
    """Belongs to the engine's thread; its ``cache`` may be asked from any thread."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.cache = PrefixCache(num_blocks)
        self._users = np.zeros(num_blocks, dtype=np.int32)
        self.num_free = num_blocks  #: blocks without users, cached or not
        self._claim = np.zeros(num_blocks, dtype=np.int64)
        self._last_claim = _NO_CLAIM

    def num_used(self, block_ids: Sequence[int]) -> int:
        return int(np.count_nonzero(self._users[_array(block_ids)]))

    def allocate(self, count: int, may_grow_to: int = 0) -> list[int]:
        """Blocks for a new request: neighbours where possible, with room to grow to ``may_grow_to`` blocks."""
        self._require(count)
        if count == 0:
            return []
        want = max(count, may_grow_to)
        free = self._users == 0
        start = self._best_start(free & (self._claim == _NO_CLAIM), count, want)
        if start is None:
            start = self._best_start(free, count, want)
        if start is None:
            return self._take(self._least_recently_used(np.flatnonzero(free), count))
        used = np.flatnonzero(~free[start : start + want])
        self._last_claim += 1
        self._claim[start : start + (int(used[0]) if len(used) else want)] = self._last_claim
        return self._take(np.arange(start, start + count))

    def grow(self, block_ids: list[int], count: int) -> None:
        """Append ``count`` blocks to a table; a run gets its next neighbour, if that is free."""
        self._require(count)
        for _ in range(count):
            following = block_ids[-1] + 1 if block_ids else self.num_blocks
            may_be_run = block_ids and following - block_ids[0] == len(block_ids)
            if may_be_run and following < self.num_blocks and self._users[following] == 0:
                block_ids.extend(self._take(np.array([following])))
            else:
                block_ids.extend(self.allocate(1))

    def share(self, block_ids: Sequence[int]) -> None:
        self.num_free -= len(block_ids) - self.num_used(block_ids)
        self._users[_array(block_ids)] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """Remove a user from each block, in the order of the user's table."""
        ids = _array(block_ids)
        assert (self._users[ids] > 0).all(), "blocks were given back that were not in use"
        self._users[ids] -= 1
        freed = ids[self._users[ids] == 0]
        self.num_free += len(freed)
        self.cache.touch(block_ids)
        # A claim ends with its owner, including the part that was never used.
        claims = np.unique(self._claim[freed])
        self._claim[np.isin(self._claim, claims[claims != _NO_CLAIM])] = _NO_CLAIM

    def validate(self, users: Iterable[Sequence[int]]) -> None:
        """Assert rule 1 against all tables, holds and loads."""
        expected = np.zeros(self.num_blocks, dtype=np.int32)
        for blocks in users:
            assert len(set(blocks)) == len(blocks), "a block twice in one table"
            expected[list(blocks)] += 1
        assert (expected == self._users).all(), f"blocks leaked: {np.flatnonzero(expected != self._users)}"
        assert self.num_free == int((self._users == 0).sum()), "free count is wrong"
        self.cache.validate()

    def _require(self, count: int) -> None:
        if count > self.num_free:
            raise OutOfBlocksError(f"{count} blocks wanted, {self.num_free} free of {self.num_blocks}")

    def _best_start(self, usable: Mask, count: int, want: int) -> int | None:
        """The best place for ``count`` neighbours; None if there is none.

        Of all places with enough room to grow, the one whose blocks were used least recently; among equals the smallest
        run of at least ``want`` blocks, else the longest.
        """
        edges = np.flatnonzero(np.diff(np.concatenate(([False], usable, [False])).astype(np.int8)))
        starts, lengths = edges[::2], edges[1::2] - edges[::2]
        if len(starts) == 0 or lengths.max() < count:
            return None
        longest = int(lengths.max())
        used_at = np.where(usable, self.cache.used_at, _NEVER)
        if not used_at[usable].any():
            # Nothing is cached there, so the first place of a run is as good as any.
            roomy = np.flatnonzero(lengths >= min(want, longest))
            return int(starts[roomy[lengths[roomy].argmin()]])
        # If no run has room for all of it, half of the longest must do. Otherwise the one place with the most room
        # would be taken again and again, however recently it was used.
        enough = want if longest >= want else max(count, longest // 2)
        room_used_at = _maxima(used_at, enough)
        places = np.flatnonzero(room_used_at < _NEVER)
        places = _least(places, _maxima(used_at, count))
        places = _least(places, room_used_at)
        run = np.searchsorted(starts, places, side="right") - 1
        room = np.minimum(starts[run] + lengths[run] - places, want)
        best = np.flatnonzero(room == room.max())
        return int(places[best[lengths[run[best]].argmin()]])

    def _least_recently_used(self, ids: Ints, count: int) -> Ints:
        if count == len(ids):
            return ids
        return np.sort(ids[np.argpartition(self.cache.used_at[ids], count)[:count]])

    def _take(self, ids: Ints) -> list[int]:
        blocks = [int(block) for block in ids]
        if self.cache.used_at[ids].any():
            self.cache.evict(blocks)
        self._users[ids] = 1
        self.num_free -= len(blocks)
        return blocks


def _array(block_ids: Sequence[int]) -> Ints:
    return np.asarray(block_ids, dtype=np.int64)


def _least(places: Ints, cost: Ints) -> Ints:
    """The places with the lowest cost."""
    costs = cost[places]
    cheapest: Ints = places[costs == costs.min()]
    return cheapest


def _maxima(values: Ints, width: int) -> Ints:
    """For each place the largest of the ``width`` values from it on; ``_NEVER`` where there are fewer.

    The work does not depend on the width (van Herk, 1992): maxima are taken from the left and from the right within
    stretches of that width; every window is the end of one stretch and the beginning of the next.
    """
    padded = np.full(-(-len(values) // width) * width + width, _NEVER)
    padded[: len(values)] = values
    stretches = padded.reshape(-1, width)
    from_left = np.maximum.accumulate(stretches, axis=1).ravel()
    from_right = np.maximum.accumulate(stretches[:, ::-1], axis=1)[:, ::-1].ravel()
    at = np.arange(len(values))
    return np.maximum(from_right[at], from_left[at + width - 1])
