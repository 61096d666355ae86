"""Rubbish for ports: bytes of many kinds that the protocol there does not expect. Pure but for the given random source.

Mutated and truncated real messages get furthest, because they pass a parser's first checks. No message asks for
anything costly, and the belt's frames come from a sender without a handshake.
"""

import json
import random
from dataclasses import dataclass

from kvbelt.wire import codec, notification
from kvbelt.wire import handshake as h
from kvbelt.wire import reservation as w
from kvbelt.wire.handshake import PROTOCOL_VERSION
from kvbelt.wire.ids import EngineId, SlotName, TransferId
from kvbelt.wire.layout import KVLayout

#: The start of a ZeroMQ connection (ZMTP 3.1), without its mechanism.
_ZMTP = b"\xff" + bytes(8) + b"\x7f\x03\x01"

#: Magic and version of a belt frame.
_HEADER_BYTES = 3


@dataclass(frozen=True, slots=True)
class Rubbish:
    """The bytes for one connection: pieces, and the seconds between them."""

    form: str
    pieces: tuple[bytes, ...]
    pause: float = 0.0


def http_rubbish(chance: random.Random, seconds: float) -> Rubbish:
    """For an HTTP port. A slow one takes ``seconds``."""
    body = json.dumps({"prompt": "a lantern by the river", "max_tokens": 4, "temperature": 0}).encode()
    post = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    request = post % len(body) + body
    forms = {
        "random": (chance.randbytes(chance.randrange(1, 4096)),),
        "random behind a head": (post % 4096, chance.randbytes(4096)),
        "truncated": (request[: chance.randrange(1, len(request))],),
        "mutated": (mutated(chance, request),),
        "mutated body": (post % len(body) + mutated(chance, body),),
        "long head": (b"GET /health HTTP/1.1\r\nx: " + b"y" * 200_000 + b"\r\n\r\n",),
        "many heads": (b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",),
        "huge length": (post % (1 << 60), body),
        "negative length": (post.replace(b"%d", b"-1") + body,),
        "chunks of nonsense": (
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n" + body,
        ),
        "nested": (post % 100_000 + b"[" * 100_000,),
        "zeros": (bytes(10_000),),
        "tls": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + chance.randbytes(500),),
        "http2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + chance.randbytes(100),),
    }
    if chance.random() < 0.25:
        return slow(chance, request, seconds)
    form = chance.choice(list(forms))
    return Rubbish(form, forms[form])


def zmtp_rubbish(chance: random.Random, seconds: float) -> Rubbish:
    """For a control port, before any key is shown."""
    greeting = _ZMTP + chance.choice((b"NULL", b"CURVE", b"PLAIN")).ljust(20, b"\0") + b"\0" + bytes(31)
    forms = {
        "random": (chance.randbytes(chance.randrange(1, 4096)),),
        "greeting, then random": (greeting, chance.randbytes(2048)),
        "greeting, then a huge command": (greeting, b"\x06" + (1 << 40).to_bytes(8, "big") + chance.randbytes(4096)),
        "greeting, then a command": (greeting, b"\x04\x06\x05HELLO"),
        "truncated greeting": (greeting[: chance.randrange(1, len(greeting))],),
        "mutated greeting": (mutated(chance, greeting),),
        "http": (b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",),
        "zeros": (bytes(10_000),),
    }
    if chance.random() < 0.25:
        return slow(chance, greeting + chance.randbytes(64), seconds)
    form = chance.choice(list(forms))
    return Rubbish(form, forms[form])


def slow(chance: random.Random, message: bytes, seconds: float) -> Rubbish:
    """A message in small pieces over ``seconds``, without its end."""
    cut = message[: max(2, chance.randrange(len(message)))]
    count = min(20, len(cut))
    size = -(-len(cut) // count)
    pieces = tuple(cut[at : at + size] for at in range(0, len(cut), size))
    return Rubbish("slow", pieces, seconds / len(pieces))


def mutated(chance: random.Random, message: bytes) -> bytes:
    """With some bytes changed, removed, repeated or inserted."""
    raw = bytearray(message)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        at = chance.randrange(len(raw)) if raw else 0
        match chance.randrange(4):
            case 0 if raw:
                raw[at] = chance.randrange(256)
            case 1 if raw:
                del raw[at : at + chance.randrange(1, 9)]
            case 2:
                raw[at:at] = raw[at : at + 8]
            case _:
                raw[at:at] = chance.randbytes(chance.randrange(1, 9))
    return bytes(raw)


def frame_rubbish(chance: random.Random, real: list[bytes]) -> tuple[str, bytes]:
    """The form and the bytes of a frame made from one of ``real``."""
    frame = chance.choice(real)
    forms = {
        "random": chance.randbytes(chance.randrange(1, 2048)),
        "random behind a header": frame[:_HEADER_BYTES] + chance.randbytes(chance.randrange(1, 512)),
        "truncated": frame[: chance.randrange(len(frame))],
        "mutated": mutated(chance, frame),
        "real": frame,
        "oversized": frame + bytes(2 << 20),
        "another version": frame[:2] + bytes([chance.randrange(PROTOCOL_VERSION + 1, 256)]) + frame[3:],
        "empty": b"",
    }
    form = chance.choice(list(forms))
    return form, forms[form]


def real_frames(port: str, sender: EngineId, receiver: EngineId) -> list[bytes]:
    """Valid messages for a control port (``init``, ``alloc``, ``notify``) from a sender without a handshake."""
    if port == "init":
        return [codec.handshakes().encode(_hello(sender, receiver))]
    if port == "alloc":
        return [codec.from_sender().encode(message) for message in _reservations(sender, receiver)]
    return [notification.encode(message) for message in _notifications(sender, receiver)]


def _hello(sender: EngineId, receiver: EngineId) -> h.Hello:
    layout = KVLayout(num_layers=1, num_kv_heads=1, head_dim=1, block_size=1, dtype="x", order="x", block_bytes=1)
    fit = h.Compatibility(
        protocol=PROTOCOL_VERSION,
        model="x",
        fingerprint="x",
        layout=layout,
        tp_size=1,
        tp_rank=0,
        hash_scheme="x",
        channel="x",
        kv_heads=1,
    )
    return h.Hello(engine_id=sender, receiver=receiver, role="prefill", compatibility=fit)


def _reservations(sender: EngineId, receiver: EngineId) -> list[w.FromSender]:
    none, slot = TransferId("none"), SlotName(receiver, 0, 0)
    return [
        w.Reserve(
            transfer_id=none,
            sender=sender,
            receiver=receiver,
            num_tokens=1,
            num_blocks=1,
            num_bytes=1,
            deadline_seconds=1.0,
        ),
        w.Heartbeat(transfer_id=none, sender=sender, slot=slot),
        w.PartLanded(transfer_id=none, sender=sender, slot=slot, part=0),
        w.Commit(transfer_id=none, sender=sender, slot=slot, num_tokens=1, num_bytes=1),
        w.Cancelled(transfer_id=none, sender=sender, slot=slot),
    ]


def _notifications(sender: EngineId, receiver: EngineId) -> list[notification.Notification]:
    none = TransferId("none")
    return [
        notification.TransferDone(
            transfer_id=none,
            sender=sender,
            receiver=receiver,
            num_bytes=1,
            seconds=1.0,
            channel="nixl",
            num_tokens=1,
            num_writes=1,
            exposed_seconds=0.0,
        ),
        notification.TransferFailed(
            transfer_id=none, sender=sender, receiver=receiver, num_bytes=1, seconds=1.0, reason="x"
        ),
    ]
