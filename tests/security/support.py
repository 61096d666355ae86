"""Keys for tests, and peers that speak with and without them."""

import contextlib
from collections.abc import Iterator
from typing import Any

import zmq

from kvbelt.security.keys import KeyPair, Keys, new_key_pair
from kvbelt.transfer.settings import BeltSettings


def deployment(*names: str) -> dict[str, Keys]:
    """The keys of processes that trust each other."""
    pairs = {name: new_key_pair() for name in names}
    trusted = {pair.public: name for name, pair in pairs.items()}
    return {name: Keys(pair, trusted) for name, pair in pairs.items()}


def belts(keys: Keys | None, **changes: Any) -> BeltSettings:
    """Settings of a belt that loses no peer while the machine stalls for some seconds."""
    given = {"lease_seconds": 20.0, "heartbeat_seconds": 0.1, "handshake_seconds": 20.0, "claim_seconds": 30.0}
    return BeltSettings(keys=keys, **(given | changes))


@contextlib.contextmanager
def peer(
    port: int, kind: int = zmq.DEALER, *, own: KeyPair | None = None, server: str | None = None, wait_ms: int = 60_000
) -> Iterator["zmq.Socket[bytes]"]:
    """A socket connected to a port; with ``own`` it shows a key, and expects ``server`` at the other end."""
    with zmq.Context() as context, context.socket(kind) as socket:
        socket.linger = 0
        socket.rcvtimeo = socket.sndtimeo = wait_ms
        if own is not None:
            assert server is not None
            socket.curve_publickey, socket.curve_secretkey = own.public.encode(), own.secret.encode()
            socket.curve_serverkey = server.encode()
        socket.connect(f"tcp://127.0.0.1:{port}")
        yield socket


def knock(socket: "zmq.Socket[bytes]", frame: bytes) -> None:
    """Send to a peer that may have closed the connection already."""
    with contextlib.suppress(zmq.Again):
        socket.send(frame, zmq.NOBLOCK)
