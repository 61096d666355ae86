"""Who a server is: what each tensor-parallel rank says of itself, and all of them together."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from kvbelt.errors import StartError
from kvbelt.wire.about import About
from kvbelt.wire.handoff import RankAddress, ReceiverAddress
from kvbelt.wire.ids import EngineId


@dataclass(frozen=True, slots=True)
class RankIdentity:
    """Of one rank, once its belt runs."""

    engine_id: EngineId
    receiver: ReceiverAddress | None
    host_places: int  #: blocks that fit into its host memory; 0: it keeps none there
    about: About  #: what stays as it is of its process and belt


def together(ranks: Sequence[RankIdentity]) -> RankIdentity:
    """The whole server, by the name of its rank 0.

    Raises:
        StartError: some ranks receive and others do not.
    """
    first = ranks[0]
    others = [rank.receiver for rank in ranks[1:] if rank.receiver is not None]
    if len(others) != (len(ranks) - 1 if first.receiver is not None else 0):
        raise StartError(f"of {len(ranks)} tensor-parallel ranks only some receive: {ranks}")
    receiver = first.receiver
    if receiver is not None:
        addresses = tuple(RankAddress(other.engine_id, other.init_port, other.alloc_port) for other in others)
        receiver = msgspec.structs.replace(receiver, ranks=addresses)
    # A block lies at the same place on every rank.
    return RankIdentity(first.engine_id, receiver, min(rank.host_places for rank in ranks), first.about)
