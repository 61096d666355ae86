"""One receiver, as the sending side knows it. Its sockets are in peers.py."""

from dataclasses import dataclass, field

from kvbelt.wire.handoff import ReceiverAddress
from kvbelt.wire.handshake import MemoryRegion, Share
from kvbelt.wire.ids import TransferId


@dataclass(slots=True, eq=False)
class Peer:
    """One incarnation of one receiver: connecting until the handshake has succeeded, then ready until it is lost."""

    address: ReceiverAddress
    hello_at: float  #: when to say Hello next, while connecting
    give_up_at: float
    used_at: float
    agent: str | None = None  #: None: connecting
    regions: tuple[MemoryRegion, ...] = ()  #: set together with ``agent``
    share: Share | None = None  #: likewise
    lost: bool = False
    transfers: set[TransferId] = field(default_factory=set)  #: that have not ended

    @property
    def ready(self) -> bool:
        return self.agent is not None and not self.lost

    def is_of(self, address: ReceiverAddress) -> bool:
        """Whether it is the same engine, known by the same key, wherever it is reached."""
        ours = self.address
        return (ours.engine_id, ours.public_key) == (address.engine_id, address.public_key)
