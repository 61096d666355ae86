"""Plans: every byte once, in as few spans as possible."""

from collections import deque

from hypothesis import given, settings, strategies

from kvbelt.transfer.send.plan import Run, Span, plan_writes, take_batch
from kvbelt.transfer.shape import SlotShape
from kvbelt.wire.layout import KVLayout

LAYOUT = KVLayout(num_layers=5, num_kv_heads=1, head_dim=1, block_size=1, dtype="x", order="x", block_bytes=16)


@settings(deadline=None)
@given(
    num_blocks=strategies.integers(1, 20),
    chunk=strategies.integers(1, 20),
    budget=strategies.integers(1, 50),
)
def test_every_block_of_every_layer_is_written_once(num_blocks, chunk, budget):
    """Batches of any size cover the slot exactly, and each block comes from its own place."""
    runs = deque(
        Run(layer, first, list(range(first, min(first + chunk, num_blocks))))
        for first in range(0, num_blocks, chunk)
        for layer in range(LAYOUT.num_layers)
    )
    shape = SlotShape(LAYOUT, num_blocks, 0, num_blocks)
    slot = {}
    while runs:
        batch = take_batch(runs, budget)
        assert 1 <= sum(len(run.block_ids) for run in batch) <= budget
        staged = [(run.layer, block) for run in batch for block in run.block_ids]
        spans = plan_writes(batch, shape, shape.part(0), 1000, 500_000)
        assert sum(span.num_bytes for span in spans) == len(staged) * 16
        for span in spans:
            for step in range(0, span.num_bytes, 16):
                at = span.remote + step - 500_000
                assert at not in slot
                slot[at] = staged[(span.local + step - 1000) // 16]
    expected = {
        (layer * num_blocks + block) * 16: (layer, block)
        for layer in range(LAYOUT.num_layers)
        for block in range(num_blocks)
    }
    assert slot == expected


def test_successive_layers_of_a_whole_prompt_are_one_span():
    """Successive layers of a whole prompt are merged into one span."""
    shape = SlotShape(LAYOUT, 3, 0, 3)
    batch = [Run(layer, 0, [7, 3, 9]) for layer in range(5)]
    assert plan_writes(batch, shape, shape.part(0), 0, 4096) == [Span(0, 4096, 5 * 3 * 16)]
