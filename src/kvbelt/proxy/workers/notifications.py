"""The notification port, to which workers push how their transfers ended and what their steps cost.

A socket is read when its file descriptor is ready, until it is empty: ZeroMQ's descriptor is edge-triggered, so a
message left behind would not be announced again.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import zmq

from kvbelt.errors import StartError
from kvbelt.security.authenticator import ZapAuthenticator, key_of, mechanism_of
from kvbelt.security.keys import Keys, fingerprint, speaks_for
from kvbelt.security.refusals import Refusals
from kvbelt.wire import notification
from kvbelt.wire.codec import FrameError

log = logging.getLogger("kvbelt.proxy")

_NAME = "notifications"  #: the socket's name in refusals
_BATCH = 256  #: messages read in one turn of the event loop


class Notifications:
    """Owns the socket. ``on_notification`` gets each notification; ``refusals`` counts all other messages."""

    def __init__(
        self, on_notification: Callable[[notification.Notification], None], keys: Keys | None, refusals: Refusals
    ) -> None:
        self._on_notification = on_notification
        self._keys = keys
        self._refusals = refusals
        self.mechanism = "NULL"  #: ``CURVE`` or ``NULL``; once started
        self._listening = False
        self._undo = ExitStack()  # what close does, the last first

    def start(self, host: str, port: int) -> int:
        """Listen. Returns the port. Raises StartError: it is taken, or there are keys and libzmq has no CURVE."""
        # Made here, not before: a context that is never closed blocks the exit of the process.
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._undo.callback(context.term)
        try:
            return self._listen(context, host, port)
        except StartError:
            self.close()
            raise

    def _listen(self, context: "zmq.Context[zmq.Socket[bytes]]", host: str, port: int) -> int:
        authenticator = ZapAuthenticator(context, self._keys, self._refusals)
        socket = context.socket(zmq.PULL)
        self._undo.callback(socket.close, 0)
        self._undo.callback(authenticator.close)
        socket.linger = 0
        authenticator.guard(socket, _NAME)
        host = f"[{host}]" if ":" in host else host
        if ":" in host:
            socket.setsockopt(zmq.IPV6, 1)
        try:
            socket.bind(f"tcp://{host}:{port or '*'}")
        except zmq.ZMQError as error:
            raise StartError(
                f"cannot listen for notifications on {host}:{port}: {error}; choose another --notify-port"
            ) from None
        self.mechanism = mechanism_of(socket)
        self._listening = True
        loop = asyncio.get_running_loop()
        read, guard = partial(self._read, socket), partial(self._guard, authenticator)
        for one, work in ((socket, read), *((keeper, guard) for keeper in authenticator.sockets)):
            descriptor = int(one.getsockopt(zmq.FD))
            loop.add_reader(descriptor, work)
            self._undo.callback(loop.remove_reader, descriptor)
        loop.call_soon(read)
        loop.call_soon(guard)
        return int(bytes(socket.getsockopt(zmq.LAST_ENDPOINT)).rstrip(b"\0").rpartition(b":")[2])

    def close(self) -> None:
        """Stop listening. Idempotent."""
        self._listening = False
        self._undo.close()

    def _guard(self, authenticator: ZapAuthenticator) -> None:
        if self._listening and authenticator.work():
            asyncio.get_running_loop().call_soon(self._guard, authenticator)

    def _read(self, socket: "zmq.Socket[bytes]") -> None:
        if not self._listening:
            return
        for _ in range(_BATCH):
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            except zmq.ZMQError as error:
                log.error("the notification port failed: %s", error)
                return
            self._on_frames(frames)
        asyncio.get_running_loop().call_soon(self._read, socket)

    def _on_frames(self, frames: list[zmq.Frame]) -> None:
        if len(frames) != 1:
            self._refusals.add(_NAME, "malformed", f"{len(frames)} frames instead of one")
            return
        try:
            message = notification.decode(frames[0].bytes)
        except FrameError as error:
            self._refusals.add(_NAME, error.reason, error)
        else:
            key = key_of(frames[0]) if self._keys is not None else None
            name = message.sender if isinstance(message, notification.TransferEnd) else message.engine
            if key is not None and not speaks_for(key, name):
                detail = f"the holder of key {fingerprint(key)} sent in the name of {name}"
                self._refusals.add(_NAME, "another_key", detail)
                return
            self._on_notification(message)
