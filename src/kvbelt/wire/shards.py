"""Parallel ranks on the two sides of a transfer: which rank sends which heads of which layers of the KV to which. Pure.

A model's layers are dealt to pipeline stages, and its KV heads to the tensor-parallel ranks of each stage, in order.
Ranks are counted through: those of the first stage come first. With fewer heads than ranks in a stage, neighbouring
ranks have the same one. Each receiving rank gets each of its heads once, of each of its layers. Of several ranks that
have it, receivers that want it take turns, so between equal servers rank *i* sends to rank *i*.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from kvbelt.wire.ids import TransferId

#: The first layers of the stages of a server without a pipeline.
ONE_STAGE: tuple[int, ...] = (0,)


class Piece(NamedTuple):
    """What one rank sends to one other."""

    sender: int
    receiver: int
    heads: range  #: of the model
    layers: range  #: of the model


class Ranks(NamedTuple):
    """All ranks of one server."""

    tp_size: int
    stages: tuple[int, ...] = ONE_STAGE  #: the first layer of each pipeline stage

    @property
    def number(self) -> int:
        return self.tp_size * len(self.stages)

    def layers_of(self, stage: int, model_layers: int) -> range:
        end = self.stages[stage + 1] if stage + 1 < len(self.stages) else model_layers
        return range(self.stages[stage], end)


def ranks_of(number: int, stages: tuple[int, ...]) -> Ranks | None:
    """So many ranks in these stages; None: there cannot be such."""
    ascending = all(one < other for one, other in pairwise(stages))
    if number <= 0 or stages[:1] != ONE_STAGE or number % len(stages) or not ascending:
        return None
    return Ranks(number // len(stages), stages)


def heads_of(rank: int, ranks: int, kv_heads: int) -> range:
    """The heads of the model that one of so many tensor-parallel ranks has."""
    if kv_heads < ranks:
        head = rank // (ranks // kv_heads)
        return range(head, head + 1)
    share = kv_heads // ranks
    return range(rank * share, (rank + 1) * share)


def pieces_for(receiver: int, senders: Ranks, receivers: Ranks, kv_heads: int, layers: int) -> list[Piece]:
    """All that one receiving rank gets, by sender.

    Empty: heads cannot be dealt to so many ranks (or, with ``kv_heads`` 0, it is not known how), and the degrees are
    not equal; or stages begin behind the model's ``layers``.
    """
    if not 0 <= receiver < receivers.number or max(*senders.stages, *receivers.stages, 0) >= layers:
        return []
    stage, rank = divmod(receiver, receivers.tp_size)
    wanted = receivers.layers_of(stage, layers)
    by_heads = list(_by_heads(rank, senders.tp_size, receivers.tp_size, kv_heads))
    found = []
    for number in range(len(senders.stages)):
        common = _common(senders.layers_of(number, layers), wanted)
        if common:
            first = number * senders.tp_size
            found += [Piece(first + sender, receiver, heads, common) for sender, heads in by_heads]
    return found


def _by_heads(receiver: int, senders: int, receivers: int, kv_heads: int) -> Iterator[tuple[int, range]]:
    """Which tensor-parallel ranks send to one, and which heads."""
    if not (_deals(kv_heads, senders) and _deals(kv_heads, receivers)):
        if senders == receivers:
            yield receiver, range(kv_heads)
        return
    counts: dict[int, int] = {}
    heads = heads_of(receiver, receivers, kv_heads)
    for head in heads:
        have, want = _ranks_with(head, senders, kv_heads), _ranks_with(head, receivers, kv_heads)
        sender = have[(receiver - want.start) * len(have) // len(want)]
        counts[sender] = counts.get(sender, 0) + 1
    first = heads.start
    for sender, count in counts.items():
        yield sender, range(first, first + count)
        first += count


def pieces_from(sender: int, senders: Ranks, receivers: Ranks, kv_heads: int, layers: int) -> list[Piece]:
    """All that one sending rank sends, by receiver. It may be nothing: others have its head, too."""
    found = (pieces_for(receiver, senders, receivers, kv_heads, layers) for receiver in range(receivers.number))
    return [piece for each in found for piece in each if piece.sender == sender]


def transfer_of(base: TransferId, piece: Piece) -> TransferId:
    """The transfer of one piece. No process sends or gets two of one name."""
    if piece.sender == piece.receiver:
        return base
    return TransferId(f"{base}/{piece.sender}-{piece.receiver}")


def _common(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))


def _deals(kv_heads: int, ranks: int) -> bool:
    return kv_heads > 0 and ranks > 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)


def _ranks_with(head: int, ranks: int, kv_heads: int) -> range:
    if kv_heads < ranks:
        copies = ranks // kv_heads
        return range(head * copies, (head + 1) * copies)
    rank = head // (kv_heads // ranks)
    return range(rank, rank + 1)
