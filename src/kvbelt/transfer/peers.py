"""The receivers this process sends to: one connection each, made on first use.

A peer is CONNECTING until it has answered the handshake, then READY until it is lost or unused for long.
A lost peer is forgotten at once, so that the next transfer begins afresh; its sockets live until the
transfers that still have something to say to it have ended.
"""

from dataclasses import dataclass, field

import zmq

from kvbelt.wire.handoff import ReceiverAddress
from kvbelt.wire.handshake import MemoryRegion
from kvbelt.wire.ids import TransferId


@dataclass(slots=True, eq=False)
class Peer:
    """One life of one receiver."""

    address: ReceiverAddress
    init_socket: zmq.Socket[bytes]
    alloc_socket: zmq.Socket[bytes]
    hello_at: float  #: when to say Hello next; infinity: it was answered
    give_up_at: float
    used_at: float
    agent: str | None = None  #: None: CONNECTING
    region: MemoryRegion | None = None  #: set together with ``agent``
    lost: bool = False
    transfers: set[TransferId] = field(default_factory=set)  #: that have not ended

    @property
    def ready(self) -> bool:
        """Whether the handshake has succeeded."""
        return self.agent is not None and not self.lost

    @property
    def due(self) -> float:
        """When it has something to do."""
        return float("inf") if self.lost or self.ready else min(self.hello_at, self.give_up_at)
