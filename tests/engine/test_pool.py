"""Blocks have one owner, neighbours are preferred, and both ways of reading see the same."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvbelt.engine.attention import Segment, Step
from kvbelt.engine.pool import BlockAllocator, KVPool, OutOfBlocksError, is_run, make_layout


@given(data=st.data())
def test_blocks_have_one_owner_whatever_happens(data: st.DataObject) -> None:
    """Any order of allocating, growing, freeing, holding and releasing keeps every block in exactly one place."""
    allocator = BlockAllocator(24)
    tables: list[list[int]] = []
    holds: list[list[int]] = []
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["allocate", "grow", "free", "hold", "release"]))
        count = data.draw(st.integers(0, 8))
        if action == "allocate" and count <= allocator.num_free:
            tables.append(allocator.allocate(count, data.draw(st.integers(0, 30))))
        elif action == "grow" and tables and count <= allocator.num_free:
            allocator.grow(data.draw(st.sampled_from(tables)), count)
        elif action in {"free", "hold"} and tables:
            table = tables.pop(data.draw(st.integers(0, len(tables) - 1)))
            if action == "free":
                allocator.free(table)
            else:
                allocator.hold(table)
                holds.append(table)
        elif action == "release" and holds:
            allocator.release(holds.pop())
        allocator.validate(tables, holds)
        assert allocator.num_held == sum(map(len, holds))


def test_growing_requests_keep_their_neighbours() -> None:
    """Two requests that grow in turn each stay one run, because newcomers leave room."""
    allocator = BlockAllocator(32)
    first = allocator.allocate(2, may_grow_to=8)
    second = allocator.allocate(2, may_grow_to=8)
    for _ in range(6):
        allocator.grow(first, 1)
        allocator.grow(second, 1)
    assert is_run(first)
    assert is_run(second)


def test_claimed_blocks_are_given_away_in_need() -> None:
    """A claim promises nothing: the last blocks go to whoever asks."""
    allocator = BlockAllocator(8)
    allocator.allocate(1, may_grow_to=8)
    assert len(allocator.allocate(7)) == 7
    with pytest.raises(OutOfBlocksError):
        allocator.allocate(1)


def test_foreign_blocks_cannot_be_given_back() -> None:
    """Freeing twice, or what is held, is a bug that is caught."""
    allocator = BlockAllocator(8)
    blocks = allocator.allocate(2)
    allocator.hold(blocks)
    with pytest.raises(AssertionError):
        allocator.free(blocks)
    allocator.release(blocks)
    with pytest.raises(AssertionError):
        allocator.release(blocks)


def test_a_block_is_contiguous_bytes() -> None:
    """The layout tells a block's size, and a block is one run of bytes."""
    layout = make_layout(num_layers=2, num_kv_heads=3, head_dim=8, block_size=4, dtype=torch.bfloat16)
    assert layout.block_bytes == 4 * 2 * 3 * 8 * 2
    assert layout.dtype == "bfloat16"
    pool = KVPool(layout, 5, torch.device("cpu"))
    block = pool.layers[1][3]
    assert block.is_contiguous()
    assert block.nbytes == layout.block_bytes
    assert block.data_ptr() == pool.storage.data_ptr() + (5 + 3) * layout.block_bytes


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("start", "length"), [(0, 9), (6, 5), (10, 1)])
def test_neighbours_and_scattered_blocks_attend_alike(start: int, length: int, window: int | None) -> None:
    """The view path and the gather path give the same numbers, and those of plain attention."""
    layout = make_layout(num_layers=1, num_kv_heads=2, head_dim=8, block_size=4, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    total = start + length
    keys = torch.randn(total, 2, 8, generator=generator)
    values = torch.randn(total, 2, 8, generator=generator)
    queries = torch.randn(1, 6, length, 8, generator=generator)
    results = []
    for blocks in ([1, 2, 3], [4, 0, 2]):
        pool = KVPool(layout, 5, torch.device("cpu"))
        pool.storage.fill_(float("nan"))  # nothing that was not written may be read
        for position in range(start):
            pool.layers[0][blocks[position // 4], position % 4] = torch.stack([keys[position], values[position]])
        step = Step(pool, [Segment(blocks, start, length)], None)
        step.write(0, keys[start:].transpose(0, 1).unsqueeze(0), values[start:].transpose(0, 1).unsqueeze(0))
        results.append(step.attend(0, queries, 0.5, window))
    rows = torch.arange(start, total).unsqueeze(1)
    columns = torch.arange(total)
    seen = columns <= rows
    if window is not None:
        seen &= columns > rows - window
    full_keys = keys.repeat_interleave(3, dim=1).transpose(0, 1)
    full_values = values.repeat_interleave(3, dim=1).transpose(0, 1)
    scores = (queries[0] @ full_keys.transpose(1, 2) * 0.5).masked_fill(~seen, float("-inf"))
    expected = (scores.softmax(-1) @ full_values).transpose(0, 1)
    for result in results:
        torch.testing.assert_close(result[0], expected)
