"""The belt's sockets: how frames reach and leave the belt's thread. No frame is ever waited for.

What cannot be sent at once is dropped: every message is said again until it is answered.
"""

from collections.abc import Iterator
from typing import NamedTuple

import zmq

from kvbelt.errors import StartError
from kvbelt.security.gate import Gate, key_of, mechanism_of
from kvbelt.security.keys import Keys
from kvbelt.security.refusals import Refusals
from kvbelt.wire.codec import FrameError

#: More than any burst; beyond it frames are dropped.
QUEUE_FRAMES = 10_000
#: How long closing a socket waits for its last words.
LINGER_MS = 200
#: Messages taken from one socket before the others have their turn.
MESSAGES_A_TURN = 64
#: A handshake's answer carries an agent's metadata (wire/codec.py); what is larger ends the connection unread.
MAX_ANSWER_BYTES = (1 << 20) + 1024


def endpoint(host: str, port: int) -> str:
    """A TCP endpoint; an IPv6 address in brackets."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def one(frames: list[bytes]) -> bytes:
    """The only frame of a message.

    Raises:
        FrameError: there are more.
    """
    if len(frames) != 1:
        raise FrameError(f"{len(frames)} frames instead of one")
    return frames[0]


class Received(NamedTuple):
    """One message."""

    frames: list[bytes]
    key: str | None  #: the public key of whoever has sent it to a listening socket; None: no keys are asked for


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
        try:
            self._gate = Gate(self._context, keys, refusals)
        except StartError:
            self._context.term()
            raise
        # Those of the gate are polled like all others, and served before anybody is told of a message.
        self._gatekeepers: set[zmq.Socket[bytes]] = set()
        self._watch_gate()

    def bind(self, name: str, host: str, port: int, what: str, setting: str) -> tuple[zmq.Socket[bytes], int]:
        """A ROUTER on a port (0: any free one). Returns it and its port. ``name`` is what refusals call it.

        Raises:
            StartError: the port is taken or the address is not ours.
        """
        socket = self._socket(zmq.ROUTER)
        self._gate.guard(socket, name)
        self._watch_gate()
        try:
            socket.bind(endpoint(host, port))
        except zmq.ZMQError as error:
            raise StartError(
                f"{what} cannot listen on {host} port {port}: {error.strerror}; free the port or set {setting}"
            ) from None
        return socket, int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])

    def connect(self, kind: int, address: str, server_key: str | None) -> zmq.Socket[bytes]:
        """A DEALER or PUSH to whoever holds ``server_key`` at an address. Connecting goes on in the background."""
        socket = self._socket(kind)
        socket.maxmsgsize = MAX_ANSWER_BYTES
        self._gate.show_key(socket, server_key)
        socket.connect(address)
        return socket

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.linger = LINGER_MS
        socket.sndhwm = socket.rcvhwm = QUEUE_FRAMES
        socket.ipv6 = True
        # A peer that was away is found again soon after it is back.
        socket.reconnect_ivl, socket.reconnect_ivl_max = 50, 1000
        self._open.add(socket)
        if kind != zmq.PUSH:
            self._poller.register(socket, zmq.POLLIN)
        return socket

    def close(self, socket: zmq.Socket[bytes]) -> None:
        """Forget one. Idempotent."""
        if socket in self._open:
            self._open.remove(socket)
            self._gate.close(socket)
            self._watch_gate()
            if socket in self._poller:
                self._poller.unregister(socket)
            socket.close()

    def close_all(self) -> None:
        """Forget all; waits LINGER_MS at most."""
        for socket in list(self._open):
            self.close(socket)
        self._gate.close()
        self._context.term()

    def mechanism(self) -> str:
        """How listening sockets and connections are secured: ``CURVE`` or ``NULL``, as the sockets themselves say."""
        curve = self._keys is not None and all(mechanism_of(socket) == "CURVE" for socket in self._open)
        return "CURVE" if curve else "NULL"

    def _watch_gate(self) -> None:
        now = set(self._gate.sockets)
        for socket in self._gatekeepers - now:
            self._poller.unregister(socket)
        for socket in now - self._gatekeepers:
            self._poller.register(socket, zmq.POLLIN)
        self._gatekeepers = now

    def watch(self, fileno: int) -> None:
        """Also wake up for this file descriptor."""
        self._poller.register(fileno, zmq.POLLIN)

    def wait(self, milliseconds: int) -> set[zmq.Socket[bytes]]:
        """Sockets with messages, after at most so long (-1: for ever)."""
        ready = {ready for ready, _ in self._poller.poll(milliseconds) if isinstance(ready, zmq.Socket)}
        if ready & self._gatekeepers:
            self._gate.work()
        return ready - self._gatekeepers

    def received(self, socket: zmq.Socket[bytes]) -> Iterator[Received]:
        """The messages that have arrived, up to a turn's worth."""
        for _ in range(MESSAGES_A_TURN):
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.ZMQError:
                return  # none left, or closed while we looked
            key = key_of(frames[-1]) if self._keys is not None else None
            yield Received([frame.bytes for frame in frames], key)

    @staticmethod
    def say(socket: zmq.Socket[bytes], *frames: bytes) -> bool:
        """Send, or drop. False: dropped."""
        try:
            socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True
