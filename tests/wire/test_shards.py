"""Which rank sends which heads and layers to which rank, for every pair of degrees and every number of heads."""

import itertools

import pytest

from kvbelt.wire.ids import TransferId
from kvbelt.wire.shards import Ranks, heads_of, pieces_for, pieces_from, ranks_of, transfer_of

RANKS = (1, 2, 3, 4, 6, 8, 16)
HEADS = (1, 2, 3, 4, 6, 8, 12, 16)


def dealt(kv_heads: int, ranks: int) -> bool:
    """Whether vLLM serves so many heads on so many ranks."""
    return kv_heads % ranks == 0 or ranks % kv_heads == 0


LAYERS = 8

EVERY = [
    (senders, receivers, heads)
    for senders, receivers, heads in itertools.product(RANKS, RANKS, HEADS)
    if dealt(heads, senders) and dealt(heads, receivers)
]


def test_ranks_have_all_heads_in_order() -> None:
    """Together they have each head, and all of them equally often."""
    for ranks, heads in {(senders, heads) for senders, _, heads in EVERY}:
        all_of_them = [head for rank in range(ranks) for head in heads_of(rank, ranks, heads)]
        assert all_of_them == sorted(all_of_them)
        assert {all_of_them.count(head) for head in range(heads)} == {max(1, ranks // heads)}


def test_each_receiver_gets_each_of_its_heads_once() -> None:
    """From ranks that have them; and both sides know of the same pieces."""
    for senders, receivers, heads in EVERY:
        got = {
            receiver: pieces_for(receiver, Ranks(senders), Ranks(receivers), heads, LAYERS)
            for receiver in range(receivers)
        }
        for receiver, pieces in got.items():
            came = [head for piece in pieces for head in piece.heads]
            assert came == list(heads_of(receiver, receivers, heads))
            assert all(set(piece.heads) <= set(heads_of(piece.sender, senders, heads)) for piece in pieces)
        sent = {
            piece
            for sender in range(senders)
            for piece in pieces_from(sender, Ranks(senders), Ranks(receivers), heads, LAYERS)
        }
        assert sent == {piece for pieces in got.values() for piece in pieces}


def test_no_process_has_two_transfers_of_one_name() -> None:
    """And rank 0 sends to rank 0 under the request's own name, which the proxy knows."""
    for senders, receivers, heads in EVERY:
        pieces = [
            piece
            for sender in range(senders)
            for piece in pieces_from(sender, Ranks(senders), Ranks(receivers), heads, LAYERS)
        ]
        for side in ("sender", "receiver"):
            names = [(getattr(piece, side), transfer_of(TransferId("t"), piece)) for piece in pieces]
            assert len(set(names)) == len(names)
        assert "t" in {transfer_of(TransferId("t"), piece) for piece in pieces if piece.sender == piece.receiver == 0}


def test_with_equal_degrees_each_rank_sends_to_its_own() -> None:
    """All that it has, also where it is not known how heads are dealt."""
    for ranks, heads in itertools.product(RANKS, (0, *HEADS)):
        for rank in range(ranks):
            (piece,) = pieces_from(rank, Ranks(ranks), Ranks(ranks), heads, LAYERS)
            assert (piece.sender, piece.receiver) == (rank, rank)


def test_senders_of_one_head_take_turns() -> None:
    """One head on two and on four ranks: each sender has two receivers."""
    assert [piece.sender for receiver in range(4) for piece in pieces_for(receiver, Ranks(2), Ranks(4), 1, LAYERS)] == [
        0,
        0,
        1,
        1,
    ]


@pytest.mark.parametrize(
    ("receiver", "senders", "receivers", "heads"),
    [(0, 2, 1, 0), (0, 2, 1, 3), (0, 0, 1, 4), (5, 4, 4, 8), (0, -1, 2, 4)],
)
def test_what_cannot_be_dealt_is_not_sent(receiver: int, senders: int, receivers: int, heads: int) -> None:
    """An unknown number of heads, one that does not divide, and ranks that do not exist."""
    assert pieces_for(receiver, Ranks(senders), Ranks(receivers), heads, LAYERS) == []


#: The first layers of stages.
STAGES = ((0,), (0, 4), (0, 3), (0, 2, 7), (0, 2, 4, 6))

TP_SIZES = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 2))


@pytest.mark.parametrize("sizes", TP_SIZES, ids=str)
def test_each_receiver_gets_each_head_of_each_of_its_layers_once(sizes: tuple[int, int]) -> None:
    """Between every two pipelines, from ranks that have them, and under names that no process has twice."""
    for here, there in itertools.product(STAGES, STAGES):
        senders, receivers = Ranks(sizes[0], here), Ranks(sizes[1], there)
        plans = [pieces_from(rank, senders, receivers, 4, LAYERS) for rank in range(senders.number)]
        for number, pieces in enumerate(plans):
            stage, rank = divmod(number, senders.tp_size)
            for piece in pieces:
                assert set(piece.layers) <= set(senders.layers_of(stage, LAYERS))
                assert set(piece.heads) <= set(heads_of(rank, senders.tp_size, 4))
        for receiver in range(receivers.number):
            pieces = [piece for plan in plans for piece in plan if piece.receiver == receiver]
            assert pieces == pieces_for(receiver, senders, receivers, 4, LAYERS)
            stage, rank = divmod(receiver, receivers.tp_size)
            came = sorted((layer, head) for piece in pieces for layer in piece.layers for head in piece.heads)
            wanted = itertools.product(receivers.layers_of(stage, LAYERS), heads_of(rank, receivers.tp_size, 4))
            assert came == sorted(wanted)
            names = [transfer_of(TransferId("t"), piece) for piece in pieces]
            assert len(set(names)) == len(names)
        assert any(piece[:2] == (0, 0) for plan in plans for piece in plan)


@pytest.mark.parametrize(
    ("number", "stages"),
    [(0, (0,)), (1, ()), (3, (0, 4)), (2, (1, 4)), (2, (0, 0)), (2, (4, 0)), (-2, (0, 4))],
    ids=str,
)
def test_ranks_that_cannot_be_are_told(number: int, stages: tuple[int, ...]) -> None:
    """Stages that do not ascend from 0, or do not have equally many ranks."""
    assert ranks_of(number, stages) is None


def test_stages_behind_the_model_get_nothing() -> None:
    """As of a server with more layers."""
    assert pieces_for(0, Ranks(1), Ranks(1, (0, LAYERS)), 4, LAYERS) == []
