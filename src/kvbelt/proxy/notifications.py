"""The notification port: prefill workers push, this side pulls.

A socket is read when its file descriptor says so, until it is empty: ZeroMQ's descriptor is edge-triggered,
so a message left behind would not be announced again.
"""

import asyncio
import logging
from collections.abc import Callable

import zmq

from kvbelt.errors import StartError
from kvbelt.security.gate import Gate, key_of, mechanism_of
from kvbelt.security.keys import Keys, fingerprint, speaks_for
from kvbelt.security.refusals import Refusals
from kvbelt.wire import notification

log = logging.getLogger("kvbelt.proxy")

#: What refusals call the socket.
_NAME = "notifications"

#: Messages taken at once before others get their turn.
_BATCH = 256


class Notifications:
    """Owns the socket. ``on_notification`` gets each message that is one; ``refusals`` counts the others."""

    def __init__(
        self,
        on_notification: Callable[[notification.Notification], None],
        keys: Keys | None,
        refusals: Refusals,
    ) -> None:
        self._on_notification = on_notification
        self._keys = keys
        self._refusals = refusals
        self.mechanism = "NULL"  #: ``CURVE`` or ``NULL``; once started
        # Made in start: a context that is never closed blocks the process's end.
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._gate: Gate | None = None
        self._socket: zmq.Socket[bytes] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._descriptors: list[int] = []

    def start(self, host: str, port: int) -> int:
        """Listen. Returns the port, which matters if 0 was asked for.

        Raises:
            StartError: the port is taken, or there are keys and libzmq has no CURVE.
        """
        self._context = zmq.Context()
        try:
            return self._listen(self._context, host, port)
        except StartError:
            self.close()
            raise

    def _listen(self, context: "zmq.Context[zmq.Socket[bytes]]", host: str, port: int) -> int:
        self._gate = Gate(context, self._keys, self._refusals)
        self._socket = context.socket(zmq.PULL)
        self._socket.linger = 0
        self._gate.guard(self._socket, _NAME)
        host = f"[{host}]" if ":" in host else host
        if ":" in host:
            self._socket.setsockopt(zmq.IPV6, 1)
        try:
            self._socket.bind(f"tcp://{host}:{port or '*'}")
        except zmq.ZMQError as error:
            raise StartError(
                f"cannot listen for notifications on {host}:{port}: {error}; choose another port"
            ) from None
        self.mechanism = mechanism_of(self._socket)
        self._loop = asyncio.get_running_loop()
        for socket, read in ((self._socket, self._read), *((keeper, self._guard) for keeper in self._gate.sockets)):
            descriptor = int(socket.getsockopt(zmq.FD))
            self._descriptors.append(descriptor)
            self._loop.add_reader(descriptor, read)
        self._loop.call_soon(self._read)
        self._loop.call_soon(self._guard)
        return int(bytes(self._socket.getsockopt(zmq.LAST_ENDPOINT)).rstrip(b"\0").rpartition(b":")[2])

    def close(self) -> None:
        """Stop listening. Idempotent."""
        if self._loop is not None:
            for descriptor in self._descriptors:
                self._loop.remove_reader(descriptor)
            self._loop = None
        if self._gate is not None:
            self._gate.close()
            self._gate = None
        if self._socket is not None:
            self._socket.close(0)
            self._socket = None
        if self._context is not None:
            self._context.term()
            self._context = None

    def _guard(self) -> None:
        if self._loop is not None and self._gate is not None and self._gate.work():
            self._loop.call_soon(self._guard)

    def _read(self) -> None:
        if self._loop is None or self._socket is None:
            return
        for _ in range(_BATCH):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            except zmq.ZMQError as error:
                log.error("the notification port failed: %s", error)
                return
            self._take(frames)
        self._loop.call_soon(self._read)

    def _take(self, frames: list[zmq.Frame]) -> None:
        if len(frames) != 1:
            self._refusals.add(_NAME, "malformed", f"{len(frames)} frames instead of one")
            return
        try:
            message = notification.decode(frames[0].bytes)
        except notification.OversizedError as error:
            self._refusals.add(_NAME, "oversized", error)
        except ValueError as error:
            self._refusals.add(_NAME, "malformed", error)
        else:
            key = key_of(frames[0]) if self._keys is not None else None
            if key is not None and not speaks_for(key, message.sender):
                detail = f"whoever holds key {fingerprint(key)} speaks in the name of {message.sender}"
                self._refusals.add(_NAME, "another_key", detail)
                return
            self._on_notification(message)
