"""What a prefill engine holds: blocks are passed on in batches."""

from types import SimpleNamespace

from kvbelt.transfer.send.handle import Sending
from kvbelt.transfer.send.session import SenderSession, SendTimes
from kvbelt.wire.ids import EngineId, TransferId
from tests.transfer.belts import LAYOUT


def handle_of(num_tokens, batch_bytes, asked):
    """A handle that puts its calls to the belt's thread into a list."""
    transfer = SenderSession(
        TransferId("t"), EngineId("p"), EngineId("d"), num_tokens, LAYOUT, 10.0, SendTimes(0.25, 2.0), 0.0
    )
    pipeline = SimpleNamespace(
        hand_over=lambda transfer, runs: asked.append([(run.layer, run.first, len(run.block_ids)) for run in runs]),
        computed=lambda transfer, at: asked.append("computed"),
    )
    sender = SimpleNamespace(pipeline=pipeline, now=lambda: 0.0)
    return Sending(transfer, LAYOUT, batch_bytes, lambda call, *arguments: call(*arguments), sender)


def test_small_layers_are_passed_on_together_and_the_rest_at_the_end():
    """The belt's thread wakes once for each batch, and once at the prompt's end."""
    asked = []
    handle = handle_of(3 * LAYOUT.block_size, 3 * LAYOUT.block_bytes, asked)
    handle.blocks_written(0, 0, [5, 6], None)
    assert asked == []
    handle.blocks_written(1, 0, [5, 6], None)
    assert asked == [[(0, 0, 2), (1, 0, 2)]]
    handle.blocks_written(0, 2, [7], None)
    handle.computed()
    assert asked[1:] == [[(0, 2, 1)], "computed"]


def test_nothing_is_left_behind_where_a_batch_was_just_full():
    """A full batch at the end is not followed by an empty one."""
    asked = []
    handle = handle_of(1, 1, asked)
    handle.blocks_written(0, 0, [1], None)
    handle.computed()
    assert asked == [[(0, 0, 1)], "computed"]
