"""A block is a run of bytes, and both ways of reading give the same result."""

import pytest
import torch

from kvbelt.engine.attention import Segment, Step
from kvbelt.engine.pool import KVPool, PoolLayout


def test_a_block_is_contiguous_bytes() -> None:
    """The layout has a block's size, and a block is one run of bytes."""
    layout = PoolLayout(num_layers=2, num_kv_heads=3, head_dim=8, block_size=4, dtype="bfloat16")
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
    layout = PoolLayout(num_layers=1, num_kv_heads=2, head_dim=8, block_size=4, dtype="float32")
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
