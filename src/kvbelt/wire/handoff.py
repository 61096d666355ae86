"""``kv_transfer_params``: what a proxy tells a worker about the transfer that goes with a request.

The proxy writes it into the request's body, the worker parses it once, at its wall. Times travel as
remaining seconds, because clocks of different hosts differ.
"""

from typing import Literal

import msgspec

from kvbelt.wire.hosts import is_host, is_port
from kvbelt.wire.ids import EngineId, TransferId


class RankAddress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of one more rank of a tensor-parallel decode worker, on the same host and with the same key as its first."""

    engine_id: EngineId
    init_port: int
    alloc_port: int

    def __post_init__(self) -> None:
        """Refuse what cannot be connected to, as ``ReceiverAddress`` does."""
        _require_ports(self)


class ReceiverAddress(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where a decode worker takes handshakes (init port) and reservations (alloc port)."""

    engine_id: EngineId
    host: str
    init_port: int
    alloc_port: int
    #: Its CURVE key in Z85, which a sender believes only if it trusts that key already. None: it asks for no keys.
    public_key: str | None = None
    #: Ranks 1, 2, … where the worker is tensor-parallel; the fields above are rank 0's.
    ranks: tuple[RankAddress, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be connected to.

        Raises:
            ValueError: which field it is, and its value; a decoder turns it into a ValidationError.
        """
        if not is_host(self.host):
            raise ValueError(f"host is {self.host[:64]!r}; it must be a host's name or address")
        _require_ports(self)

    def of_rank(self, rank: int) -> "ReceiverAddress | None":
        """The address of one rank by itself; None: the worker has no such rank."""
        if rank > len(self.ranks):
            return None
        if rank == 0:
            return msgspec.structs.replace(self, ranks=())
        other = self.ranks[rank - 1]
        return ReceiverAddress(other.engine_id, self.host, other.init_port, other.alloc_port, self.public_key)


def _require_ports(address: RankAddress | ReceiverAddress) -> None:
    for name in ("init_port", "alloc_port"):
        if not is_port(getattr(address, name)):
            raise ValueError(f"{name} is {getattr(address, name)}; it must be a port of 1 to 65535")


class PrefillHandoff(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """To a prefill worker: compute this prompt and send its KV to ``receiver``."""

    transfer_id: TransferId
    receiver: ReceiverAddress
    deadline_seconds: float


class DecodeHandoff(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """To a decode worker: the KV of this prompt comes, or has come, under this name."""

    transfer_id: TransferId
    deadline_seconds: float


class HandoffState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """In a prefill worker's answer: what became of the transfer so far.

    ``open``: it is under way or done, the decode worker will learn the end. ``failed``: it has ended,
    with this reason, and the decode worker need not wait.
    """

    transfer_id: TransferId
    state: Literal["open", "failed"]
    reason: str | None = None
    #: Tokens whose KV came from the prefill worker's host memory instead of being computed.
    loaded_tokens: int = 0


def prompt_transfer_id(base: TransferId, prompt_index: int) -> TransferId:
    """The transfer of one prompt of a request with several; the first keeps the request's own."""
    return base if prompt_index == 0 else TransferId(f"{base}.{prompt_index}")
