"""Which rank sends which heads to which rank, for every pair of degrees and every number of heads."""

import itertools

import pytest

from kvbelt.wire.ids import TransferId
from kvbelt.wire.shards import heads_of, pieces_for, pieces_from, transfer_of

RANKS = (1, 2, 3, 4, 6, 8, 16)
HEADS = (1, 2, 3, 4, 6, 8, 12, 16)


def dealt(kv_heads: int, ranks: int) -> bool:
    """Whether vLLM serves so many heads on so many ranks."""
    return kv_heads % ranks == 0 or ranks % kv_heads == 0


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
        got = {receiver: pieces_for(receiver, senders, receivers, heads) for receiver in range(receivers)}
        for receiver, pieces in got.items():
            came = [head for piece in pieces for head in piece.heads]
            assert came == list(heads_of(receiver, receivers, heads))
            assert all(set(piece.heads) <= set(heads_of(piece.sender, senders, heads)) for piece in pieces)
        sent = {piece for sender in range(senders) for piece in pieces_from(sender, senders, receivers, heads)}
        assert sent == {piece for pieces in got.values() for piece in pieces}


def test_no_process_has_two_transfers_of_one_name() -> None:
    """And rank 0 sends to rank 0 under the request's own name, which the proxy knows."""
    for senders, receivers, heads in EVERY:
        pieces = [piece for sender in range(senders) for piece in pieces_from(sender, senders, receivers, heads)]
        for side in ("sender", "receiver"):
            names = [(getattr(piece, side), transfer_of(TransferId("t"), piece)) for piece in pieces]
            assert len(set(names)) == len(names)
        assert "t" in {transfer_of(TransferId("t"), piece) for piece in pieces if piece.sender == piece.receiver == 0}


def test_with_equal_degrees_each_rank_sends_to_its_own() -> None:
    """All that it has, also where it is not known how heads are dealt."""
    for ranks, heads in itertools.product(RANKS, (0, *HEADS)):
        for rank in range(ranks):
            (piece,) = pieces_from(rank, ranks, ranks, heads)
            assert (piece.sender, piece.receiver) == (rank, rank)


def test_senders_of_one_head_take_turns() -> None:
    """One head on two and on four ranks: each sender has two receivers."""
    assert [piece.sender for receiver in range(4) for piece in pieces_for(receiver, 2, 4, 1)] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("receiver", "senders", "receivers", "heads"),
    [(0, 2, 1, 0), (0, 2, 1, 3), (0, 0, 1, 4), (5, 4, 4, 8), (0, -1, 2, 4)],
)
def test_what_cannot_be_dealt_is_not_sent(receiver: int, senders: int, receivers: int, heads: int) -> None:
    """An unknown number of heads, one that does not divide, and ranks that do not exist."""
    assert pieces_for(receiver, senders, receivers, heads) == []
