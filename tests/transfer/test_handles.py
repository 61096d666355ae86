"""What an engine's side holds: blocks are passed on in batches."""

from kvbelt.transfer.handles import SendingHandle
from tests.transfer.belts import LAYOUT


def test_small_layers_are_passed_on_together_and_the_rest_at_the_end():
    """The belt's thread is woken once a batch, and once more when the prompt is computed, before it is told so."""
    said = []
    handle = SendingHandle(
        LAYOUT,
        3,
        3 * LAYOUT.block_bytes,
        hand_over=lambda runs: said.append([(run.layer, run.first, len(run.block_ids)) for run in runs]),
        computed=lambda: said.append("computed"),
        abandon=said.append,
    )
    handle.blocks_written(0, 0, [5, 6], None)
    assert said == []
    handle.blocks_written(1, 0, [5, 6], None)
    assert said == [[(0, 0, 2), (1, 0, 2)]]
    handle.blocks_written(0, 2, [7], None)
    handle.computed()
    assert said[1:] == [[(0, 2, 1)], "computed"]


def test_nothing_is_left_behind_where_a_batch_was_just_full():
    """No empty batch at the end."""
    said = []
    handle = SendingHandle(
        LAYOUT,
        1,
        1,
        hand_over=lambda runs: said.append(len(runs)),
        computed=lambda: said.append("computed"),
        abandon=said.append,
    )
    handle.blocks_written(0, 0, [1], None)
    handle.computed()
    assert said == [1, "computed"]
