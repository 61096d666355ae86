"""Blocks have any number of users; neighbours are preferred; the least recently used block goes first."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbelt.engine.blocks import BlockAllocator, OutOfBlocksError, _maxima
from kvbelt.engine.pool import is_run


def name(number: int) -> bytes:
    """A block hash."""
    return number.to_bytes(16, "little")


def published(allocator: BlockAllocator, count: int, start: int) -> list[int]:
    """A table of published blocks, already given back."""
    blocks = allocator.allocate(count)
    for i, block in enumerate(blocks):
        allocator.cache.publish(name(start + i), block)
    allocator.release(blocks)
    return blocks


@settings(deadline=None)
@given(data=st.data())
def test_blocks_have_their_users_whatever_happens(data: st.DataObject) -> None:
    """Any order of allocating, growing, publishing, sharing and releasing keeps the books in order."""
    allocator = BlockAllocator(24)
    tables: list[list[int]] = []
    names = 0
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["allocate", "grow", "publish", "match", "release"]))
        count = data.draw(st.integers(0, 8))
        if action == "allocate" and count <= allocator.num_free:
            tables.append(allocator.allocate(count, data.draw(st.integers(0, 30))))
        elif action == "grow" and tables and count <= allocator.num_free:
            allocator.grow(data.draw(st.sampled_from(tables)), count)
        elif action == "publish" and tables:
            for block in data.draw(st.sampled_from(tables)):
                if allocator.cache.used_at[block] == 0:
                    names += 1
                    allocator.cache.publish(name(names), block)
        elif action == "match":
            wanted = map(name, range(data.draw(st.integers(1, names + 1)), names + 1))
            tables.append(allocator.cache.match(wanted))
            allocator.share(tables[-1])
        elif action == "release" and tables:
            allocator.release(tables.pop(data.draw(st.integers(0, len(tables) - 1))))
        allocator.validate(tables)


def test_growing_requests_keep_their_neighbours() -> None:
    """Two requests that grow in turn each stay one run, because new requests leave room."""
    allocator = BlockAllocator(32)
    first = allocator.allocate(2, may_grow_to=8)
    second = allocator.allocate(2, may_grow_to=8)
    for _ in range(6):
        allocator.grow(first, 1)
        allocator.grow(second, 1)
    assert is_run(first)
    assert is_run(second)


def test_growing_requests_keep_their_neighbours_in_a_full_cache() -> None:
    """They also do where every block is cached, and no block is evicted before it is needed."""
    allocator = BlockAllocator(32)
    published(allocator, 32, start=1)
    first = allocator.allocate(2, may_grow_to=8)
    second = allocator.allocate(2, may_grow_to=8)
    assert len(allocator.cache) == 28
    for _ in range(6):
        allocator.grow(first, 1)
        allocator.grow(second, 1)
    assert is_run(first)
    assert is_run(second)


def test_claimed_blocks_are_given_away_in_need() -> None:
    """The last free blocks are given away although they are claimed."""
    allocator = BlockAllocator(8)
    allocator.allocate(1, may_grow_to=8)
    assert len(allocator.allocate(7)) == 7
    with pytest.raises(OutOfBlocksError):
        allocator.allocate(1)


def test_foreign_blocks_cannot_be_given_back() -> None:
    """A block cannot be given back more often than it was taken."""
    allocator = BlockAllocator(8)
    blocks = allocator.allocate(2)
    allocator.share(blocks)
    allocator.release(blocks)
    allocator.release(blocks)
    with pytest.raises(AssertionError):
        allocator.release(blocks)


def test_free_blocks_are_taken_before_cached_ones() -> None:
    """No cached block is evicted while an empty one is free."""
    allocator = BlockAllocator(12)
    published(allocator, 4, start=1)
    allocator.allocate(4)
    allocator.allocate(4)
    assert len(allocator.cache) == 4


def test_the_least_recently_used_goes_first() -> None:
    """A prefix that was found again outlives one that was not."""
    allocator = BlockAllocator(12)
    for start in (1, 11, 21):
        published(allocator, 4, start)
    assert allocator.cache.held([name(1 + i) for i in range(4)]) == 4
    allocator.allocate(4)
    assert [allocator.cache.held([name(start + i) for i in range(4)]) for start in (1, 11, 21)] == [4, 0, 4]


def test_the_tail_of_a_prefix_goes_before_its_head() -> None:
    """The rest of a prefix can still be found."""
    allocator = BlockAllocator(6)
    published(allocator, 6, start=1)
    allocator.allocate(2)
    assert allocator.cache.held([name(1 + i) for i in range(6)]) == 4


def test_blocks_in_use_are_not_evicted() -> None:
    """A found block stays with its user, however much memory is needed."""
    allocator = BlockAllocator(6)
    published(allocator, 3, start=1)
    found = allocator.cache.match([name(1), name(2), name(3)])
    allocator.share(found)
    allocator.allocate(3)
    assert allocator.num_free == 0
    assert allocator.cache.match([name(1), name(2), name(3)]) == found


def test_a_taken_block_has_lost_its_name() -> None:
    """A block that was given away is not found under its old hash, and can be published again."""
    allocator = BlockAllocator(2)
    published(allocator, 2, start=1)
    blocks = allocator.allocate(2)
    assert allocator.cache.match([name(1)]) == []
    allocator.cache.publish(name(9), blocks[0])
    assert allocator.cache.match([name(9)]) == blocks[:1]


def test_a_name_stays_with_its_first_block() -> None:
    """A second block with the same contents stays unpublished."""
    allocator = BlockAllocator(4)
    first, twin = allocator.allocate(1), allocator.allocate(1)
    allocator.cache.publish(name(1), first[0])
    allocator.cache.publish(name(1), twin[0])
    assert allocator.cache.match([name(1)]) == first
    allocator.release(twin)
    allocator.validate([first])


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(1, 12))
def test_maxima_of_windows(values: list[int], width: int) -> None:
    """Each place's maximum is that of its window; places with too short a window are excluded."""
    found = _maxima(np.array(values, dtype=np.int64), width)
    for at in range(len(values)):
        window = values[at : at + width]
        assert found[at] == (max(window) if len(window) == width else np.iinfo(np.int64).max)
