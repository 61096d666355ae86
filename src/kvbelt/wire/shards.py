"""Tensor parallelism on the two sides of a transfer: which rank sends which heads of the KV to which rank. Pure.

A model's KV heads are dealt to its ranks in order. With fewer heads than ranks, neighbouring ranks have the same one.
Each receiving rank gets each of its heads once. Of several ranks that have it, receivers that want it take turns, so
with equal degrees rank *i* sends to rank *i*.
"""

from collections.abc import Iterator
from typing import NamedTuple

from kvbelt.wire.ids import TransferId


class Piece(NamedTuple):
    """What one rank sends to one other."""

    sender: int
    receiver: int
    heads: range  #: of the model


def heads_of(rank: int, ranks: int, kv_heads: int) -> range:
    """The heads of the model that one of so many ranks has."""
    if kv_heads < ranks:
        head = rank // (ranks // kv_heads)
        return range(head, head + 1)
    share = kv_heads // ranks
    return range(rank * share, (rank + 1) * share)


def pieces_for(receiver: int, senders: int, receivers: int, kv_heads: int) -> list[Piece]:
    """All that one receiving rank gets, by sender.

    Empty: heads cannot be dealt to so many ranks (or, with ``kv_heads`` 0, it is not known how), and the degrees are
    not equal.
    """
    if not 0 <= receiver < receivers:
        return []
    if not (_deals(kv_heads, senders) and _deals(kv_heads, receivers)):
        return [Piece(receiver, receiver, range(kv_heads))] if senders == receivers else []
    counts: dict[int, int] = {}
    heads = heads_of(receiver, receivers, kv_heads)
    for head in heads:
        have, want = _ranks_with(head, senders, kv_heads), _ranks_with(head, receivers, kv_heads)
        sender = have[(receiver - want.start) * len(have) // len(want)]
        counts[sender] = counts.get(sender, 0) + 1
    return list(_in_order(receiver, heads.start, counts))


def _in_order(receiver: int, first: int, counts: dict[int, int]) -> Iterator[Piece]:
    for sender, count in counts.items():
        yield Piece(sender, receiver, range(first, first + count))
        first += count


def pieces_from(sender: int, senders: int, receivers: int, kv_heads: int) -> list[Piece]:
    """All that one sending rank sends, by receiver. It may be nothing: others have its head, too."""
    found = (pieces_for(receiver, senders, receivers, kv_heads) for receiver in range(receivers))
    return [piece for each in found for piece in each if piece.sender == sender]


def transfer_of(base: TransferId, piece: Piece) -> TransferId:
    """The transfer of one piece. No process sends or gets two of one name."""
    if piece.sender == piece.receiver:
        return base
    return TransferId(f"{base}/{piece.sender}-{piece.receiver}")


def _deals(kv_heads: int, ranks: int) -> bool:
    return kv_heads > 0 and ranks > 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)


def _ranks_with(head: int, ranks: int, kv_heads: int) -> range:
    if kv_heads < ranks:
        copies = ranks // kv_heads
        return range(head * copies, (head + 1) * copies)
    rank = head // (kv_heads // ranks)
    return range(rank, rank + 1)
