"""The belt's sockets: how frames reach and leave the belt's thread. No frame is ever waited for.

What cannot be sent at once is dropped: every message is said again until it is answered.
"""

from collections.abc import Iterator

import zmq

from kvbelt.errors import StartError

#: More than any burst; beyond it frames are dropped.
QUEUE_FRAMES = 10_000
#: How long closing a socket waits for its last words.
LINGER_MS = 200
#: Frames taken from one socket before the others have their turn.
FRAMES_A_TURN = 64


def endpoint(host: str, port: int) -> str:
    """A TCP endpoint; an IPv6 address in brackets."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


class Sockets:
    """All sockets of one belt. Belongs to one thread."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._open: set[zmq.Socket[bytes]] = set()

    def bind(self, host: str, port: int, what: str, setting: str) -> tuple[zmq.Socket[bytes], int]:
        """A ROUTER on a port (0: any free one). Returns it and its port.

        Raises:
            StartError: the port is taken or the address is not ours.
        """
        socket = self._socket(zmq.ROUTER)
        try:
            socket.bind(endpoint(host, port))
        except zmq.ZMQError as error:
            raise StartError(
                f"{what} cannot listen on {host} port {port}: {error.strerror}; free the port or set {setting}"
            ) from None
        return socket, int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])

    def connect(self, kind: int, address: str) -> zmq.Socket[bytes]:
        """A DEALER or PUSH to an address. Connecting goes on in the background."""
        socket = self._socket(kind)
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
            if socket in self._poller:
                self._poller.unregister(socket)
            socket.close()

    def close_all(self) -> None:
        """Forget all; waits LINGER_MS at most."""
        for socket in list(self._open):
            self.close(socket)
        self._context.term()

    def watch(self, fileno: int) -> None:
        """Also wake up for this file descriptor."""
        self._poller.register(fileno, zmq.POLLIN)

    def wait(self, milliseconds: int) -> set[zmq.Socket[bytes]]:
        """Sockets with frames, after at most so long (-1: for ever)."""
        return {ready for ready, _ in self._poller.poll(milliseconds) if isinstance(ready, zmq.Socket)}

    @staticmethod
    def frames(socket: zmq.Socket[bytes]) -> Iterator[list[bytes]]:
        """The messages that have arrived, up to a turn's worth."""
        for _ in range(FRAMES_A_TURN):
            try:
                yield socket.recv_multipart(zmq.NOBLOCK)
            except zmq.ZMQError:
                return  # none left, or closed while we looked

    @staticmethod
    def say(socket: zmq.Socket[bytes], *frames: bytes) -> bool:
        """Send, or drop. False: dropped."""
        try:
            socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True
