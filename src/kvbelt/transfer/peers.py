"""The receivers this process sends to: one connection each, made on first use.

A peer is connecting until it has answered the handshake, then ready until it is lost or unused for long.
A lost peer is forgotten at once, so that the next transfer begins afresh; its sockets live until the
transfers that still have something to say to it have ended.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import zmq

from kvbelt.errors import ChannelError
from kvbelt.security.keys import speaks_for
from kvbelt.transfer.ports import Channel
from kvbelt.transfer.settings import BeltSettings
from kvbelt.transfer.sockets import Sockets, endpoint, one
from kvbelt.wire import codec
from kvbelt.wire.handoff import ReceiverAddress
from kvbelt.wire.handshake import (
    HandshakeMessage,
    HandshakeRefused,
    Hello,
    MemoryRegion,
    Welcome,
    first_difference,
)
from kvbelt.wire.ids import EngineId, TransferId

log = logging.getLogger(__name__)

#: Receivers at once. Each takes two of libzmq's sockets, of which a process has some thousand.
MAX_PEERS = 256

#: A field's name becomes part of a reason, and reasons label metrics: nothing longer than ours.
_MAX_FIELD = 64


@dataclass(slots=True, eq=False)
class Peer:
    """One life of one receiver."""

    address: ReceiverAddress
    init_socket: zmq.Socket[bytes]
    alloc_socket: zmq.Socket[bytes]
    hello_at: float  #: when to say Hello next, while connecting
    give_up_at: float
    used_at: float
    agent: str | None = None  #: None: connecting
    regions: tuple[MemoryRegion, ...] = ()  #: set together with ``agent``
    lost: bool = False
    transfers: set[TransferId] = field(default_factory=set)  #: that have not ended

    @property
    def ready(self) -> bool:
        """Whether the handshake has succeeded."""
        return self.agent is not None and not self.lost

    def is_of(self, address: ReceiverAddress) -> bool:
        """Whether it is the same engine, known by the same key, wherever it is reached."""
        ours = self.address
        return (ours.engine_id, ours.public_key) == (address.engine_id, address.public_key)


@dataclass(frozen=True, slots=True)
class PeerEvents:
    """Whom to tell."""

    ready: Callable[[Peer], None]
    lost: Callable[[Peer, str, str], None]
    #: The channel has closed its connection: what was in flight on it is not any more.
    disconnected: Callable[[Peer], None]


class Peers:
    """All receivers of one sending process, and the handshakes with them."""

    def __init__(
        self,
        hello: Callable[[EngineId], Hello],
        settings: BeltSettings,
        sockets: Sockets,
        channel: Channel,
        events: PeerEvents,
    ) -> None:
        self._hello = hello
        self._settings = settings
        self._sockets = sockets
        self._channel = channel
        self._events = events
        self._codec = codec.handshakes()
        # Those that are not lost. The sockets of lost ones stay in the other two until they are closed.
        self._peers: dict[EngineId, Peer] = {}
        self._by_init: dict[zmq.Socket[bytes], Peer] = {}
        self._by_alloc: dict[zmq.Socket[bytes], Peer] = {}

    def of(self, address: ReceiverAddress, now: float) -> Peer:
        """The peer at an address, connected to if need be."""
        peer = self._peers.get(address.engine_id)
        if peer is not None and peer.address == address:
            return peer
        for other in list(self._peers.values()):
            # A new life at an address proves the old one over: what is held for it is freed at once.
            if (other.address.host, other.address.init_port) == (address.host, address.init_port):
                self.lose(other, "stale_engine", f"{address.engine_id} has taken its place")
        peer = Peer(
            address=address,
            init_socket=self._connect(address, address.init_port),
            alloc_socket=self._connect(address, address.alloc_port),
            hello_at=now,
            give_up_at=now + self._settings.handshake_seconds,
            used_at=now,
        )
        self._peers[address.engine_id] = peer
        self._by_init[peer.init_socket] = self._by_alloc[peer.alloc_socket] = peer
        self._greet(peer, now)
        return peer

    def _connect(self, address: ReceiverAddress, port: int) -> zmq.Socket[bytes]:
        return self._sockets.connect(zmq.DEALER, endpoint(address.host, port), address.public_key)

    def at_alloc_socket(self, socket: zmq.Socket[bytes]) -> Peer | None:
        """Whose reservations come over this socket."""
        return self._by_alloc.get(socket)

    def hear(self, ready: set[zmq.Socket[bytes]]) -> None:
        """Handshakes have been answered on these sockets; those of others are left alone."""
        for socket in ready:
            peer = self._by_init.get(socket)
            if peer is None:
                continue
            for frames, _ in self._sockets.received(socket):
                try:
                    self._on_answer(peer, self._codec.decode(one(frames)))
                except codec.VersionError as error:
                    self.lose(peer, "refused_protocol", str(error))
                except codec.FrameError as error:
                    self._sockets.refusals.add("init", error.reason, f"{peer.address.engine_id}: {error}")

    def distrust(self, address: ReceiverAddress) -> tuple[str, str] | None:
        """Why nothing is sent to an address: reason and detail. None: nothing speaks against it."""
        if address.engine_id not in self._peers and len(self._by_init) >= MAX_PEERS:
            return "too_many_peers", f"{MAX_PEERS} decode workers are connected to, or being connected to"
        return self._distrust_key(address)

    def _distrust_key(self, address: ReceiverAddress) -> tuple[str, str] | None:
        keys, theirs = self._settings.keys, address.public_key
        if keys is None and theirs is None:
            return None
        if keys is None:
            return "no_key", f"{address.engine_id} asks for a key, and this worker has none; set pd_key_file"
        if theirs is None:
            return "no_key", f"{address.engine_id} has no key, and this worker asks for one; set pd_key_file there"
        if not keys.trusts(theirs):
            return "untrusted_key", f"the key of {address.engine_id}, {theirs}, is not in pd_trusted_keys_dir"
        if not speaks_for(theirs, address.engine_id):
            return "another_key", f"{address.engine_id} is not a name that goes with the key {theirs}"
        return None

    def tick(self, now: float) -> None:
        """Let time pass."""
        for peer in list(self._peers.values()):
            if self._due(peer) > now:
                continue
            if peer.ready:
                self.lose(peer, "idle", "unused for long")
            else:
                self._greet(peer, now)

    @property
    def due(self) -> float:
        """When ``tick`` has something to do."""
        return min((self._due(peer) for peer in self._peers.values()), default=float("inf"))

    def _due(self, peer: Peer) -> float:
        if not peer.ready:
            return min(peer.hello_at, peer.give_up_at)
        return float("inf") if peer.transfers else peer.used_at + self._settings.peer_idle_seconds

    def connected(self) -> Iterator[Peer]:
        """Receivers connected to."""
        return (peer for peer in self._peers.values() if peer.ready)

    @property
    def num_ready(self) -> int:
        """Receivers connected to."""
        return sum(peer.ready for peer in self._peers.values())

    def lose(self, peer: Peer, reason: str, detail: str) -> None:
        """Forget a peer, and tell."""
        if peer.lost:
            return
        peer.lost = True
        if self._peers.get(peer.address.engine_id) is peer:
            del self._peers[peer.address.engine_id]
        self._events.lost(peer, reason, detail)
        if peer.agent is not None:
            try:
                self._channel.remove_peer(peer.agent)
            except ChannelError as error:
                log.warning("the channel cannot forget %s: %s", peer.address.engine_id, error)
            self._events.disconnected(peer)
        self.close_if_done(peer)

    def close_if_done(self, peer: Peer) -> None:
        """Close a lost peer's sockets once nobody has anything to say to it."""
        if peer.lost and not peer.transfers:
            self._by_init.pop(peer.init_socket, None)
            self._by_alloc.pop(peer.alloc_socket, None)
            self._sockets.close(peer.init_socket)
            self._sockets.close(peer.alloc_socket)

    def _greet(self, peer: Peer, now: float) -> None:
        if peer.give_up_at <= now:
            detail = (
                f"no answer from {peer.address.host} port {peer.address.init_port} "
                f"within {self._settings.handshake_seconds:g} s"
            )
            if self._settings.keys is not None:
                detail += "; if it is up, it may not trust this worker's key"
            self.lose(peer, "peer_unreachable", detail)
            return
        peer.hello_at = now + self._settings.heartbeat_seconds
        Sockets.say(peer.init_socket, self._codec.encode(self._hello(peer.address.engine_id)))

    def _on_answer(self, peer: Peer, message: HandshakeMessage) -> None:
        if peer.ready or peer.lost:
            return
        match message:
            case HandshakeRefused(field="engine_id", ours=there):
                self.lose(peer, "stale_engine", f"meant for {peer.address.engine_id}; there is {there} now")
            case HandshakeRefused(field=field, ours=there, theirs=here):
                detail = f"the decode worker refuses the handshake: {field} is {here} here and {there} there"
                self.lose(peer, _refused(field), detail)
            case Welcome(engine_id=engine_id) if engine_id != peer.address.engine_id:
                self.lose(peer, "stale_engine", f"meant for {peer.address.engine_id}; there is {engine_id} now")
            case Welcome():
                self._welcomed(peer, message)

    def _welcomed(self, peer: Peer, message: Welcome) -> None:
        ours = self._hello(peer.address.engine_id).compatibility
        difference = first_difference(ours, message.compatibility)
        if difference is not None:
            self.lose(peer, _refused(difference.field), str(difference))
            return
        try:
            peer.agent = self._channel.add_peer(message.agent_metadata)
            self._channel.connect(peer.agent)
        except ChannelError as error:
            self.lose(peer, "channel", f"the channel cannot reach {peer.address.engine_id}: {error}")
            return
        peer.regions = message.regions
        self._events.ready(peer)


def _refused(field: str) -> str:
    """A refusal's reason, of low cardinality whatever the peer says."""
    name = field.rpartition(".")[2]
    return f"refused_{name}" if name.isidentifier() and len(name) <= _MAX_FIELD else "refused_unnamed"
