"""Throwing rubbish at ports, over connections of every kind.

Bare TCP, and ZeroMQ without a key, with an unknown one, and with a trusted one.
"""

import asyncio
import contextlib
import json
import random
from collections import Counter

import zmq

from kvbelt.ops.chaos.client import Address, get
from kvbelt.ops.chaos.rubbish import Rubbish, frame_rubbish, http_rubbish, real_frames, zmtp_rubbish
from kvbelt.ops.chaos.site import Site
from kvbelt.security.keys import PROXY, KeyPair, Keys, new_engine_id, new_key_pair
from kvbelt.wire.ids import EngineId

#: Seconds between two connections of one fault.
_EVERY = 0.1

#: How long an answer to rubbish is listened to.
_LISTEN_SECONDS = 0.5

#: Frames of one connection.
_FRAMES = 20


class Thrower:
    """Throws rubbish. ``guest``: keys that the deployment trusts, so that frames get as far as its parsers."""

    def __init__(self, guest: Keys | None) -> None:
        self._guest = guest

    async def throw(self, site: Site, name: str, port: str, seconds: float, chance: random.Random) -> Counter[str]:
        """Throw at a process's port (``http``, ``init``, ``alloc``, ``notify``) for so long.

        Returns the forms that were thrown; none, if the process does not say where its port is.
        """
        thrown: Counter[str] = Counter()
        target = await self._target(site, name, port)
        if target is None:
            return thrown
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        async with asyncio.TaskGroup() as group:
            while (left := end - loop.time()) > 0:
                if port == "http" or chance.random() < 0.4:
                    rubbish = (http_rubbish if port == "http" else zmtp_rubbish)(chance, left)
                    thrown[rubbish.form] += 1
                    group.create_task(_over_tcp(target.address, rubbish, left))
                else:
                    frames, own = self._frames(target, port, chance)
                    thrown.update(form for form, _ in frames)
                    group.create_task(asyncio.to_thread(_over_zmq, target, port, own, [raw for _, raw in frames]))
                await asyncio.sleep(_EVERY)
        return thrown

    def _frames(
        self, target: "_Target", port: str, chance: random.Random
    ) -> tuple[list[tuple[str, bytes]], KeyPair | None]:
        """Frames, and the key to show (None: none)."""
        kind = chance.randrange(4)
        guest = self._guest if kind > 1 else None
        own = guest.own if guest is not None else new_key_pair() if kind and target.public_key else None
        real = real_frames(port, new_engine_id(guest), target.engine_id)
        return [frame_rubbish(chance, real) for _ in range(_FRAMES)], own

    async def _target(self, site: Site, name: str, port: str) -> "_Target | None":
        if port == "http":
            return _Target(site.address(name))
        if port == "notify":
            key = self._guest.public_key_of(PROXY) if self._guest is not None else None
            return _Target(site.notify, key) if site.notify is not None else None
        try:
            receiver = json.loads(await get(site.address(name), "/health") or b"")["receiver"]
            where = Address(receiver["host"], receiver[f"{port}_port"])
            return _Target(where, receiver.get("public_key"), receiver["engine_id"])
        except (ValueError, KeyError, TypeError):
            return None


class _Target:
    """A port, and who is behind it."""

    def __init__(self, address: Address, public_key: str | None = None, engine_id: str = "somebody") -> None:
        self.address = address
        self.public_key = public_key
        self.engine_id = EngineId(engine_id)


async def _over_tcp(address: Address, rubbish: Rubbish, seconds: float) -> None:
    """One connection's rubbish; whatever the other side does about it is right."""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(seconds + _LISTEN_SECONDS):
            reader, writer = await asyncio.open_connection(address.host, address.port)
            try:
                for piece in rubbish.pieces:
                    if writer.is_closing():  # the other side has had enough
                        return
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(rubbish.pause)
                while await reader.read(65_536):
                    pass
            finally:
                writer.transport.abort()


def _over_zmq(target: _Target, port: str, own: KeyPair | None, frames: list[bytes]) -> None:
    """Frames over one ZeroMQ connection; unread and unsent ones are dropped after a moment."""
    kind = zmq.PUSH if port == "notify" else zmq.DEALER
    with zmq.Context() as context, context.socket(kind) as socket:
        socket.linger = socket.sndtimeo = int(_LISTEN_SECONDS * 1000)
        if own is not None and target.public_key is not None:
            socket.curve_publickey, socket.curve_secretkey = own.public.encode(), own.secret.encode()
            socket.curve_serverkey = target.public_key.encode()
        socket.connect(f"tcp://{target.address}")
        with contextlib.suppress(zmq.Again):
            for frame in frames:
                socket.send(frame)
