"""The belt's sockets: how frames reach and leave the belt's thread. Sending never blocks.

A frame that cannot be sent at once is dropped, because every message is repeated until it is answered.
"""

from collections.abc import Iterator
from typing import NamedTuple

import zmq

from kvbelt.errors import StartError
from kvbelt.security.authenticator import ZapAuthenticator, address_of, key_of, mechanism_of
from kvbelt.security.keys import Keys
from kvbelt.security.refusals import Refusals
from kvbelt.transfer.fencing import ControlEnds, listening_ports
from kvbelt.transfer.liveness import LivenessConnections, LivenessListener
from kvbelt.wire.codec import FrameError

#: Larger than any burst; beyond it frames are dropped.
QUEUE_FRAMES = 10_000
#: How long closing a socket waits for frames that are still to be sent.
LINGER_MS = 200
#: Messages taken from one socket before the other sockets are served.
MESSAGES_A_TURN = 64
#: A handshake's answer carries an agent's metadata (wire/codec.py); a larger frame ends the connection unread.
MAX_ANSWER_BYTES = (1 << 20) + 1024


def endpoint(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def one(frames: list[bytes]) -> bytes:
    if len(frames) != 1:
        raise FrameError(f"{len(frames)} frames instead of one")
    return frames[0]


class Received(NamedTuple):
    frames: list[bytes]
    key: str | None  #: the sender's public key, on a listening socket; None: there are no keys
    address: str  #: numeric, of the other end


class Sockets:
    """All sockets of one belt. Belongs to one thread.

    Raises:
        StartError: there are keys, but libzmq has no CURVE.
    """

    def __init__(self, keys: Keys | None, refusals: Refusals) -> None:
        self.refusals = refusals
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._open: set[zmq.Socket[bytes]] = set()
        self._keys = keys
        self._listener: LivenessListener | None = None
        # The channel has not started, so that no port which accepts connections now is its.
        self._control = ControlEnds(set(listening_ports()))
        try:
            self._authenticator = ZapAuthenticator(self._context, keys, refusals)
        except StartError:
            self._context.term()
            raise
        # They are polled like all others, and served first.
        self._zap_sockets: set[zmq.Socket[bytes]] = set()
        self._watch_authenticator()

    def bind(self, name: str, host: str, port: int, what: str, setting: str) -> tuple[zmq.Socket[bytes], int]:
        """A ROUTER on a port (0: any free one). Returns it and its port. ``name`` appears in refusals.

        Raises:
            StartError: the port is taken or the address is not ours.
        """
        socket = self._socket(zmq.ROUTER)
        self._authenticator.guard(socket, name)
        self._watch_authenticator()
        try:
            socket.bind(endpoint(host, port))
        except zmq.ZMQError as error:
            raise StartError(
                f"{what} cannot listen on {host} port {port}: {error.strerror}; free the port or set {setting}"
            ) from None
        bound = int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        self._control.accepting.add(bound)
        return socket, bound

    def connect(
        self, kind: int, address: str, server_key: str | None, *, newest_only: bool = False
    ) -> zmq.Socket[bytes]:
        """A DEALER or PUSH to an address, whose server must hold ``server_key``. Connects in the background.

        ``newest_only``: a frame that has not left is replaced by the next one.
        """
        socket = self._socket(kind)
        socket.conflate = newest_only
        socket.maxmsgsize = MAX_ANSWER_BYTES
        self._authenticator.show_key(socket, server_key)
        socket.connect(address)
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        self._control.dial(host.strip("[]"), int(port))
        return socket

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.linger = LINGER_MS
        socket.sndhwm = socket.rcvhwm = QUEUE_FRAMES
        socket.ipv6 = True
        # Reconnect soon after a peer is back.
        socket.reconnect_ivl, socket.reconnect_ivl_max = 50, 1000
        self._open.add(socket)
        if kind != zmq.PUSH:
            self._poller.register(socket, zmq.POLLIN)
        return socket

    def close(self, socket: zmq.Socket[bytes]) -> None:
        if socket in self._open:
            self._open.remove(socket)
            self._authenticator.close(socket)
            self._watch_authenticator()
            if socket in self._poller:
                self._poller.unregister(socket)
            socket.close()

    def close_all(self) -> None:
        """Close all sockets; waits LINGER_MS at most."""
        for socket in list(self._open):
            self.close(socket)
        if self._listener is not None:
            self._listener.close()
        self._authenticator.close()
        self._context.term()

    def mechanism(self) -> str:
        """``CURVE`` if every socket reports it, else ``NULL``."""
        curve = self._keys is not None and all(mechanism_of(socket) == "CURVE" for socket in self._open)
        return "CURVE" if curve else "NULL"

    def _watch_authenticator(self) -> None:
        now = set(self._authenticator.sockets)
        for socket in self._zap_sockets - now:
            self._poller.unregister(socket)
        for socket in now - self._zap_sockets:
            self._poller.register(socket, zmq.POLLIN)
        self._zap_sockets = now

    def listen_for_liveness(self, host: str, port: int) -> LivenessListener:
        self._listener = LivenessListener(host, port, self.refusals, self._control)
        self._control.accepting.add(self._listener.port)
        self.watch(self._listener.fileno)
        return self._listener

    def liveness_connections(self) -> LivenessConnections:
        """The sending ends. Their owner closes them: only it knows whether a write is in flight."""
        connections = LivenessConnections(self._control)
        self.watch(connections.fileno)
        return connections

    def watch(self, fileno: int) -> None:
        self._poller.register(fileno, zmq.POLLIN)

    def wait(self, milliseconds: int) -> set[zmq.Socket[bytes]]:
        """Wait for messages, at most so long (-1: no limit). Returns the sockets that have some."""
        ready = {ready for ready, _ in self._poller.poll(milliseconds) if isinstance(ready, zmq.Socket)}
        if ready & self._zap_sockets:
            self._authenticator.work()
        return ready - self._zap_sockets

    def received(self, socket: zmq.Socket[bytes]) -> Iterator[Received]:
        """The messages that have arrived, up to ``MESSAGES_A_TURN``."""
        for _ in range(MESSAGES_A_TURN):
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.ZMQError:
                return  # none left, or the socket was closed meanwhile
            key = key_of(frames[-1]) if self._keys is not None else None
            yield Received([frame.bytes for frame in frames], key, address_of(frames[-1]))

    @staticmethod
    def send(socket: zmq.Socket[bytes], *frames: bytes) -> bool:
        """Send, or drop. False: dropped."""
        try:
            socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True
