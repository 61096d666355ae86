"""The comparison of two sides: the first difference, with both values."""

import msgspec
import pytest

from kvbelt.wire.handshake import Compatibility, Difference, Share, first_difference, share
from tests.wire.support import FIT, LAYOUT


def test_equal_sides_fit():
    assert first_difference(FIT, FIT) is None


def test_a_model_is_its_fingerprint():
    """One model under two names fits; two models under one name do not, and both are shown."""
    assert first_difference(FIT, msgspec.structs.replace(FIT, model="another/folder")) is None
    difference = first_difference(FIT, msgspec.structs.replace(FIT, fingerprint="g"))
    assert difference == ("model", "m (fingerprint f)", "m (fingerprint g)")


@pytest.mark.parametrize(
    ("field", "value"),
    [("protocol", 2), ("kv_heads", 4), ("hash_scheme", "sha"), ("channel", "mooncake")],
)
def test_every_field_is_compared(field, value):
    """The difference has both values."""
    difference = first_difference(FIT, msgspec.structs.replace(FIT, **{field: value}))
    assert difference == (field, str(getattr(FIT, field)), str(value))


#: The first is told before all others, and the others say only what may differ.
UNLIKE = ("dtype", "tokens_outside", "draft_layers", "drafter")


@pytest.mark.parametrize("field", [name for name in LAYOUT.__struct_fields__ if name not in UNLIKE])
def test_every_field_of_the_layout_is_compared(field):
    """The difference has the field's own name."""
    changed = msgspec.structs.replace(LAYOUT, **{field: "other" if field == "order" else 99})
    difference = first_difference(FIT, msgspec.structs.replace(FIT, layout=changed))
    assert difference.field == f"layout.{field}"


def test_a_dtype_is_named_before_what_follows_from_it():
    """A user sets the dtype, and not the block size in bytes."""
    changed = msgspec.structs.replace(LAYOUT, dtype="bfloat16", block_bytes=768)
    difference = first_difference(FIT, msgspec.structs.replace(FIT, layout=changed))
    assert str(difference) == "dtype: ours float32, theirs bfloat16"


def rank(number: int, size: int, kv_heads: int = 4, *, runs: int = 16) -> Compatibility:
    """A rank of a model whose blocks have 64 bytes of each head."""
    heads = max(1, kv_heads // size)
    layout = msgspec.structs.replace(LAYOUT, num_kv_heads=heads, block_bytes=64 * heads, head_runs=runs)
    return msgspec.structs.replace(FIT, layout=layout, tp_rank=number, tp_size=size, kv_heads=kv_heads)


def test_servers_of_different_degrees_fit():
    """Their blocks of as many heads are equal. One head may lie in its block in any way."""
    assert first_difference(rank(0, 2), rank(0, 1)) is None
    assert first_difference(rank(0, 4, runs=1), rank(1, 2)) is None
    assert first_difference(rank(0, 2, runs=1), rank(0, 1)).field == "layout.head_runs"


def test_degrees_without_known_heads_do_not_fit():
    """Neither the model's heads are known, nor can a block be cut."""
    two, one = (msgspec.structs.replace(each, kv_heads=0) for each in (rank(0, 2), rank(0, 1)))
    assert first_difference(two, one) == ("tp_size", "2", "1")
    difference = first_difference(rank(0, 2, runs=0), rank(0, 1, runs=0))
    assert difference == ("layout.num_kv_heads", "2", "4")


def test_two_ranks_share_what_both_have():
    """Each says which of its own heads travel; all of them is no cut."""
    one, second = rank(0, 1), rank(1, 2)
    half = msgspec.structs.replace(second.layout)
    assert share(one, second, sends=True) == Share(half, range(2, 4))
    assert share(second, one, sends=False) == Share(half, None)
    assert share(one, second, sends=False) == Share(half, range(2, 4))
    assert share(second, second, sends=True) == Share(second.layout)


def test_two_ranks_without_a_common_head_are_refused():
    """Both are named."""
    assert share(rank(1, 2), rank(0, 4), sends=True) == Difference("tp_rank", "1 of 2", "0 of 4")
    assert share(rank(0, 2), rank(1, 2), sends=True) == Difference("tp_rank", "0 of 2", "1 of 2")


def sized(block_size: int, rank: Compatibility, *, apart: bool = True) -> Compatibility:
    """The same with other blocks, in which each token has its heads together."""
    times = block_size // rank.layout.block_size
    layout = msgspec.structs.replace(
        rank.layout,
        block_size=block_size,
        block_bytes=times * rank.layout.block_bytes,
        head_runs=block_size,
        tokens_outside=apart,
    )
    return msgspec.structs.replace(rank, layout=layout)


def test_blocks_that_are_multiples_fit():
    """Blocks of the smaller size travel, and each side knows how many of them make one of its own."""
    large, small = sized(64, rank(0, 1)), sized(16, rank(0, 1))
    assert first_difference(large, small) is None
    assert share(large, small, sends=True).per_block == 4
    assert share(small, large, sends=False) == Share(small.layout, None, 1)
    assert share(large, small, sends=True).layout == small.layout


def test_blocks_of_some_heads_and_some_tokens_are_cut_twice():
    """Two ranks with blocks of 16 tokens, and one with 64."""
    large, small = sized(64, rank(0, 1)), sized(16, rank(1, 2))
    assert first_difference(large, small) is None
    assert share(large, small, sends=False) == Share(share(small, large, sends=True).layout, range(2, 4), 4)


def test_blocks_that_cannot_be_cut_differ_in_their_size():
    """Tokens lie apart, or the sizes are no multiples."""
    small = sized(16, rank(0, 1))
    assert first_difference(sized(64, rank(0, 1), apart=False), small) == ("layout.block_size", "64", "16")
    assert first_difference(sized(48, rank(0, 1)), sized(32, rank(0, 1))) == ("layout.block_size", "48", "32")


def drafting(drafter: str, layers: int = 2) -> Compatibility:
    """The same with a drafter's layers behind the model's."""
    one = rank(0, 1)
    layout = msgspec.structs.replace(
        one.layout, num_layers=one.layout.num_layers + layers, draft_layers=layers, drafter=drafter
    )
    return msgspec.structs.replace(one, layout=layout)


def test_the_layers_of_one_drafter_travel():
    """Both sides have it."""
    assert first_difference(drafting("a"), drafting("a")) is None
    assert share(drafting("a"), drafting("a"), sends=True) == Share(drafting("a").layout)


@pytest.mark.parametrize("other", [rank(0, 1), drafting("b"), drafting("b", 1)])
def test_without_a_common_drafter_the_model_s_layers_travel(other: Compatibility):
    """One side has none, or another one."""
    for ours, theirs in ((drafting("a"), other), (other, drafting("a"))):
        assert first_difference(ours, theirs) is None
        layers = range(LAYOUT.num_layers) if ours.layout.draft_layers else None
        assert share(ours, theirs, sends=True) == Share(rank(0, 1).layout, layers=layers)


def test_a_drafter_changes_nothing_else():
    """Models with other layers still differ, and ranks may have half of the heads."""
    fewer = drafting("a")
    fewer = msgspec.structs.replace(fewer, layout=msgspec.structs.replace(fewer.layout, draft_layers=1))
    assert first_difference(fewer, rank(0, 1)).field == "layout.num_layers"
    layers = range(LAYOUT.num_layers)
    assert share(drafting("a"), rank(1, 2), sends=True) == Share(rank(1, 2).layout, range(2, 4), layers=layers)


def stage(number: int, firsts: tuple[int, ...], of: Compatibility) -> Compatibility:
    """A pipeline stage of a model with eight layers."""
    layers = (*firsts, 8)[number + 1] - firsts[number]
    layout = msgspec.structs.replace(of.layout, num_layers=layers)
    return msgspec.structs.replace(of, layout=layout, layers=8, stages=firsts, stage=number)


def test_two_stages_share_the_layers_that_both_have():
    """Each says which of its own layers travel."""
    one, last = stage(0, (0,), rank(0, 1)), stage(1, (0, 3), rank(0, 1))
    assert first_difference(one, last) is None
    assert share(one, last, sends=True) == Share(last.layout, layers=range(3, 8))
    assert share(last, one, sends=False) == Share(last.layout)
    middle = stage(1, (0, 2, 4), rank(1, 2))
    assert share(middle, last, sends=True).layers == range(1, 2)
    assert share(last, middle, sends=False) == Share(share(middle, last, sends=True).layout, range(2, 4), 1, range(1))


def test_two_stages_without_a_common_layer_are_refused():
    """Both are named by their numbers among all ranks."""
    first, last = stage(0, (0, 3), rank(0, 1)), stage(1, (0, 3), rank(0, 1))
    assert share(first, last, sends=True) == Difference("tp_rank", "0 of 2", "1 of 2")


def test_models_with_other_numbers_of_layers_differ():
    """However many of them a stage has."""
    three = msgspec.structs.replace(rank(0, 1), layout=msgspec.structs.replace(LAYOUT, num_layers=3))
    assert first_difference(three, stage(0, (0, 3), rank(0, 1))) == ("layout.num_layers", "3", "8")
