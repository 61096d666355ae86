"""The notification port: prefill workers push, this side pulls.

The socket is read when its file descriptor says so, until it is empty: ZeroMQ's descriptor is edge-triggered,
so a message left behind would not be announced again.
"""

import asyncio
import logging
from collections.abc import Callable

import zmq

from kvbelt.errors import StartError
from kvbelt.wire import notification

log = logging.getLogger("kvbelt.proxy")

#: Messages taken at once before others get their turn.
_BATCH = 256


class Notifications:
    """Owns the socket. ``on_notification`` gets each message; a malformed one goes to ``on_malformed``."""

    def __init__(
        self, on_notification: Callable[[notification.Notification], None], on_malformed: Callable[[], None]
    ) -> None:
        self._on_notification = on_notification
        self._on_malformed = on_malformed
        # Made in start: a context that is never closed blocks the process's end.
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._socket: zmq.Socket[bytes]
        self._loop: asyncio.AbstractEventLoop | None = None
        self._descriptor = -1

    def start(self, host: str, port: int) -> int:
        """Listen. Returns the port, which matters if 0 was asked for.

        Raises:
            StartError: the port is taken.
        """
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.MAXMSGSIZE, 64 * 1024)
        self._socket.setsockopt(zmq.LINGER, 0)
        host = f"[{host}]" if ":" in host else host
        if ":" in host:
            self._socket.setsockopt(zmq.IPV6, 1)
        try:
            self._socket.bind(f"tcp://{host}:{port or '*'}")
        except zmq.ZMQError as error:
            self.close()
            raise StartError(
                f"cannot listen for notifications on {host}:{port}: {error}; choose another port"
            ) from None
        self._descriptor = int(self._socket.getsockopt(zmq.FD))
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._descriptor, self._read)
        self._loop.call_soon(self._read)
        return int(bytes(self._socket.getsockopt(zmq.LAST_ENDPOINT)).rstrip(b"\0").rpartition(b":")[2])

    def close(self) -> None:
        """Stop listening. Idempotent."""
        if self._loop is not None:
            self._loop.remove_reader(self._descriptor)
            self._loop = None
        if self._context is not None:
            self._socket.close(0)
            self._context.term()
            self._context = None

    def _read(self) -> None:
        if self._loop is None:
            return
        for _ in range(_BATCH):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            except zmq.ZMQError as error:
                log.error("the notification port failed: %s", error)
                return
            self._take(frames)
        self._loop.call_soon(self._read)

    def _take(self, frames: list[bytes]) -> None:
        try:
            if len(frames) != 1:
                raise ValueError(f"{len(frames)} frames instead of one")  # noqa: TRY301
            message = notification.decode(frames[0])
        except ValueError as error:
            self._on_malformed()
            log.warning("a malformed notification was dropped: %s", error)
        else:
            self._on_notification(message)
