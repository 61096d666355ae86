"""Sends rubbish to ports: over TCP, and over ZeroMQ without a key, with an unknown one, and with a trusted one."""

import asyncio
import contextlib
import random
from collections import Counter

import zmq

from kvbelt.ops.chaos.endpoints import Endpoints
from kvbelt.ops.chaos.rubbish import Rubbish, frame_rubbish, http_rubbish, real_frames, zmtp_rubbish
from kvbelt.ops.http_client import Address, get
from kvbelt.security.keys import PROXY, KeyPair, Keys, new_engine_id, new_key_pair
from kvbelt.wire.health import WORKER_HEALTH
from kvbelt.wire.ids import EngineId

#: Seconds between two connections of one fault.
_EVERY = 0.1

#: How long to read a response to rubbish.
_LISTEN_SECONDS = 0.5

#: Frames of one connection.
_FRAMES = 20


class RubbishSender:
    """``guest``: keys that the deployment trusts, so that frames reach its parsers."""

    def __init__(self, guest: Keys | None) -> None:
        self._guest = guest

    async def send(
        self, endpoints: Endpoints, name: str, port: str, seconds: float, chance: random.Random
    ) -> Counter[str]:
        """Send to a process's port (``http``, ``init``, ``alloc``, ``notify``) for ``seconds``.

        Returns the number of each form sent; empty if the process does not report its port.
        """
        sent: Counter[str] = Counter()
        target = await self._target(endpoints, name, port)
        if target is None:
            return sent
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        async with asyncio.TaskGroup() as group:
            while (left := end - loop.time()) > 0:
                if port == "http" or chance.random() < 0.4:
                    rubbish = (http_rubbish if port == "http" else zmtp_rubbish)(chance, left)
                    sent[rubbish.form] += 1
                    group.create_task(_over_tcp(target.address, rubbish, left))
                else:
                    frames, own = self._frames(target, port, chance)
                    sent.update(form for form, _ in frames)
                    group.create_task(asyncio.to_thread(_over_zmq, target, port, own, [raw for _, raw in frames]))
                await asyncio.sleep(_EVERY)
        return sent

    def _frames(
        self, target: "_Target", port: str, chance: random.Random
    ) -> tuple[list[tuple[str, bytes]], KeyPair | None]:
        """Frames, and the key to show (None: no key)."""
        kind = chance.randrange(4)
        guest = self._guest if kind > 1 else None
        own = guest.own if guest is not None else new_key_pair() if kind and target.public_key else None
        real = real_frames(port, new_engine_id(guest), target.engine_id)
        return [frame_rubbish(chance, real) for _ in range(_FRAMES)], own

    async def _target(self, endpoints: Endpoints, name: str, port: str) -> "_Target | None":
        if port == "http":
            return _Target(endpoints.address(name))
        if port == "notify":
            key = self._guest.public_key_of(PROXY) if self._guest is not None else None
            return _Target(endpoints.notify, key) if endpoints.notify is not None else None
        reply = await get(endpoints.address(name), "/health")
        if reply is None or not reply.body:  # a vLLM server's has no body
            return None
        receiver = reply.read(WORKER_HEALTH, name).receiver
        if receiver is None:
            return None
        where = Address(receiver.host, receiver.init_port if port == "init" else receiver.alloc_port)
        return _Target(where, receiver.public_key, receiver.engine_id)


class _Target:
    def __init__(self, address: Address, public_key: str | None = None, engine_id: str = "unknown") -> None:
        self.address = address
        self.public_key = public_key
        self.engine_id = EngineId(engine_id)


async def _over_tcp(address: Address, rubbish: Rubbish, seconds: float) -> None:
    """Send over one connection; any reaction is right."""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(seconds + _LISTEN_SECONDS):
            reader, writer = await asyncio.open_connection(address.host, address.port)
            try:
                for piece in rubbish.pieces:
                    if writer.is_closing():  # the other side has closed
                        return
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(rubbish.pause)
                while await reader.read(65_536):
                    pass
            finally:
                writer.transport.abort()


def _over_zmq(target: _Target, port: str, own: KeyPair | None, frames: list[bytes]) -> None:
    """Send frames over one ZeroMQ connection; unsent ones are dropped after a moment."""
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
