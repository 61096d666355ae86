"""The receivers this process sends to: one connection each, made on first use.

A peer is connecting until it has answered the handshake, then ready until it is lost or unused for long. A lost peer
is forgotten at once, so that the next transfer begins afresh. Its sockets stay open until the transfers that still have
something to say to it have ended. What becomes of peers is returned as ``Change``; the caller decides what follows.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import zmq

from kvbelt.errors import ChannelError
from kvbelt.security.keys import speaks_for
from kvbelt.transfer.ports import Channel
from kvbelt.transfer.send.peer import Peer
from kvbelt.transfer.settings import BeltSettings
from kvbelt.transfer.sockets import Received, Sockets, endpoint, one
from kvbelt.wire import codec
from kvbelt.wire.handoff import ReceiverAddress
from kvbelt.wire.handshake import (
    Difference,
    HandshakeMessage,
    HandshakeRefused,
    Hello,
    Welcome,
    first_difference,
    share,
)
from kvbelt.wire.ids import EngineId
from kvbelt.wire.reservation import FromReceiver, FromSender

log = logging.getLogger(__name__)

#: Receivers at once. Each takes two of libzmq's sockets, of which a process has some thousand.
MAX_PEERS = 256

#: A field's name becomes part of a reason, and reasons label metrics: nothing longer than ours.
_MAX_FIELD = 64


class _Sockets(NamedTuple):
    init: zmq.Socket[bytes]
    alloc: zmq.Socket[bytes]


class Change(NamedTuple):
    """A peer is connected, or must be given up."""

    peer: Peer
    lost: tuple[str, str] | None = None  #: reason and detail


class Peers:
    def __init__(
        self, hello: Callable[[EngineId], Hello], settings: BeltSettings, sockets: Sockets, channel: Channel
    ) -> None:
        self._hello = hello
        self._settings = settings
        self._sockets = sockets
        self._channel = channel
        self._handshakes = codec.handshakes()
        self._reservations = codec.from_receiver()
        self.liveness = sockets.liveness_connections()
        self._changes: deque[Change] = deque()
        # Those that are not lost. The sockets of lost ones stay in the other two until they are closed.
        self._peers: dict[EngineId, Peer] = {}
        self._sockets_of: dict[Peer, _Sockets] = {}
        self._by_socket: dict[zmq.Socket[bytes], Peer] = {}

    def replaced_by(self, address: ReceiverAddress) -> list[Peer]:
        where = address.host, address.init_port
        others = [peer for peer in self._peers.values() if peer.address != address]
        return [peer for peer in others if (peer.address.host, peer.address.init_port) == where]

    def at(self, address: ReceiverAddress, now: float) -> Peer:
        peer = self._peers.get(address.engine_id)
        if peer is not None and peer.address == address:
            return peer
        peer = Peer(address, hello_at=now, give_up_at=now + self._settings.handshake_seconds, used_at=now)
        sockets = _Sockets(self._connect(address, address.init_port), self._connect(address, address.alloc_port))
        self._peers[address.engine_id] = peer
        self._sockets_of[peer] = sockets
        self._by_socket.update(dict.fromkeys(sockets, peer))
        self._greet(peer, now)
        return peer

    def _connect(self, address: ReceiverAddress, port: int) -> zmq.Socket[bytes]:
        return self._sockets.connect(zmq.DEALER, endpoint(address.host, port), address.public_key)

    def on_handshakes(self, ready: set[zmq.Socket[bytes]]) -> Iterator[Change]:
        """Handshakes have been answered on these sockets. A change must be followed before the next is asked for."""
        for peer, received in self._received(ready, "init"):
            try:
                self._on_answer(peer, self._handshakes.decode(one(received.frames)), received.address)
            except codec.VersionError as error:
                self._lost(peer, "refused_protocol", str(error))
            except codec.FrameError as error:
                self._sockets.refusals.add("init", error.reason, f"{peer.address.engine_id}: {error}")
            yield from self._changed()

    def _changed(self) -> Iterator[Change]:
        while self._changes:
            change = self._changes.popleft()
            if not change.peer.lost:
                yield change

    def messages(self, ready: set[zmq.Socket[bytes]]) -> Iterator[tuple[Peer, FromReceiver]]:
        for peer, received in self._received(ready, "alloc"):
            try:
                message = self._reservations.decode(one(received.frames))
            except codec.FrameError as error:
                self._sockets.refusals.add("alloc", error.reason, f"{peer.address.engine_id}: {error}")
            else:
                yield peer, message

    def _received(self, ready: set[zmq.Socket[bytes]], kind: str) -> Iterator[tuple[Peer, Received]]:
        for socket in ready:
            peer = self._by_socket.get(socket)
            if peer is not None and getattr(self._sockets_of[peer], kind) is socket:
                for received in self._sockets.received(socket):
                    yield peer, received

    def send(self, peer: Peer, message: FromSender) -> None:
        sockets = self._sockets_of.get(peer)
        if sockets is not None:  # a peer whose sockets are closed by now is told nothing
            Sockets.send(sockets.alloc, self._reservations.encode(message))

    def distrust(self, address: ReceiverAddress) -> tuple[str, str] | None:
        """Why nothing is sent to an address: reason and detail. None: nothing speaks against it."""
        if address.engine_id not in self._peers and len(self._sockets_of) >= MAX_PEERS:
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

    def tick(self, now: float) -> Iterator[Change]:
        """Let time pass. A change must be followed before the next is asked for."""
        self.liveness.work()
        for peer in list(self._peers.values()):
            if self._due(peer) > now:
                continue
            if peer.ready:
                self._lost(peer, "idle", "unused for long")
            elif peer.give_up_at <= now:
                self._lost(peer, "peer_unreachable", self._silence(peer))
            else:
                self._greet(peer, now)
        yield from self._changed()

    @property
    def due(self) -> float:
        return min((self._due(peer) for peer in self._peers.values()), default=float("inf"))

    def _due(self, peer: Peer) -> float:
        if not peer.ready:
            return min(peer.hello_at, peer.give_up_at)
        return float("inf") if peer.transfers else peer.used_at + self._settings.peer_idle_seconds

    def connected(self) -> Iterator[Peer]:
        return (peer for peer in self._peers.values() if peer.ready)

    def forget(self, peer: Peer) -> bool:
        """A peer is lost. False: it was before."""
        if peer.lost:
            return False
        peer.lost = True
        if self._peers.get(peer.address.engine_id) is peer:
            del self._peers[peer.address.engine_id]
        return True

    def disconnect(self, peer: Peer) -> None:
        assert peer.agent is not None
        try:
            self._channel.remove_peer(peer.agent)
        except ChannelError as error:
            log.warning("the channel cannot forget %s: %s", peer.address.engine_id, error)

    def close_if_done(self, peer: Peer) -> None:
        """Close a lost peer's sockets once no transfer has anything to say to it."""
        if peer.lost and not peer.transfers:
            for socket in self._sockets_of.pop(peer, ()):
                del self._by_socket[socket]
                self._sockets.close(socket)

    def _silence(self, peer: Peer) -> str:
        address, seconds = peer.address, self._settings.handshake_seconds
        detail = f"no answer from {address.host} port {address.init_port} within {seconds:g} s"
        if self._settings.keys is not None:
            detail += "; if it is up, it may not trust this worker's key"
        return detail

    def _greet(self, peer: Peer, now: float) -> None:
        peer.hello_at = now + self._settings.heartbeat_seconds
        hello = self._handshakes.encode(self._hello(peer.address.engine_id))
        Sockets.send(self._sockets_of[peer].init, hello)

    def _lost(self, peer: Peer, reason: str, detail: str) -> None:
        self._changes.append(Change(peer, (reason, detail)))

    def _on_answer(self, peer: Peer, message: HandshakeMessage, address: str) -> None:
        if peer.ready or peer.lost:
            return
        match message:
            case HandshakeRefused(field="engine_id", ours=there):
                self._lost(peer, "stale_engine", f"meant for {peer.address.engine_id}; there is {there} now")
            case HandshakeRefused(field=field, ours=there, theirs=here):
                detail = f"the decode worker refuses the handshake: {field} is {here} here and {there} there"
                self._lost(peer, _refused(field), detail)
            case Welcome(engine_id=there) if there != peer.address.engine_id:
                self._lost(peer, "stale_engine", f"meant for {peer.address.engine_id}; there is {there} now")
            case Welcome():
                self._welcomed(peer, message, address)

    def _welcomed(self, peer: Peer, message: Welcome, address: str) -> None:
        ours = self._hello(peer.address.engine_id).compatibility
        fits = first_difference(ours, message.compatibility) or share(ours, message.compatibility, sends=True)
        if isinstance(fits, Difference):
            self._lost(peer, _refused(fits.field), str(fits))
            return
        peer.share = fits
        self.liveness.open(
            message.engine_id,
            address,
            message.liveness_port,
            message.liveness_token,
            partial(self._liveness_opened, peer, message),
        )

    def _liveness_opened(self, peer: Peer, message: Welcome, problem: str | None) -> None:
        if peer.ready or peer.lost:
            return
        if problem is not None:
            log.warning(
                "cannot open the liveness connection to %s, port %d: %s. If this process is killed while it writes, "
                "the slot stays in quarantine until that decode worker restarts. Let prefill workers reach its "
                "pd_peer_liveness_port",
                peer.address.host,
                message.liveness_port,
                problem,
            )
        try:
            peer.agent = self._channel.add_peer(message.agent_metadata)
            self._channel.connect(peer.agent)
        except ChannelError as error:
            self._lost(peer, "channel", f"the channel cannot reach {peer.address.engine_id}: {error}")
            return
        peer.regions = message.regions
        self._changes.append(Change(peer))


def _refused(field: str) -> str:
    """A refusal's reason, of low cardinality whatever the peer says."""
    name = field.rpartition(".")[2]
    return f"refused_{name}" if name.isidentifier() and len(name) <= _MAX_FIELD else "refused_unnamed"
