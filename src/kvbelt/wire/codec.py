"""Frames: a magic, a version, and one msgpack message of a closed set.

Parsing never executes anything: msgspec builds the structs of one union, or raises. A frame is two bytes of
magic, one byte of protocol version, then msgpack. The version is readable whatever follows it, so two
versions can tell each other what they are.
"""

from typing import Generic, TypeVar

import msgspec

from kvbelt.wire.handshake import PROTOCOL_VERSION, HandshakeMessage
from kvbelt.wire.reservation import FromReceiver, FromSender

MAGIC = b"KB"

#: The answer to a handshake carries an agent's metadata (some KiB with UCX); everything else is far smaller.
MAX_HANDSHAKE_BYTES = 1 << 20
MAX_HELLO_BYTES = 1 << 14
#: A Reserve carries hashes of a prompt's blocks. Less than the limit of a socket (security/authenticator.py).
MAX_RESERVATION_BYTES = 60 * 1024

_HEADER_BYTES = len(MAGIC) + 1

MessageT = TypeVar("MessageT")


class FrameError(ValueError):
    """A frame that is not a message of this protocol."""

    reason = "malformed"  #: one word, for a counter


class OversizedError(FrameError):
    """A frame that is larger than any message of its kind, and was not parsed."""

    reason = "oversized"


class VersionError(FrameError):
    """A frame of another protocol version."""

    reason = "version"

    def __init__(self, theirs: int) -> None:
        super().__init__(f"protocol version {theirs}; this side speaks {PROTOCOL_VERSION}")
        self.theirs = theirs


class Codec(Generic[MessageT]):
    """Encodes any message of the protocol, and decodes those of one union, up to a size."""

    def __init__(self, union: object, max_bytes: int) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[MessageT] = msgspec.msgpack.Decoder(union)
        self._header = MAGIC + bytes([PROTOCOL_VERSION])
        self._max_bytes = max_bytes

    def encode(self, message: msgspec.Struct) -> bytes:
        return self._header + self._encoder.encode(message)

    def decode(self, frame: bytes) -> MessageT:
        """The message in a frame. Raises FrameError: it is too large, of another version, or not of this union."""
        if len(frame) > self._max_bytes:
            raise OversizedError(f"a frame of {len(frame)} bytes; at most {self._max_bytes} are accepted")
        if len(frame) < _HEADER_BYTES or frame[: len(MAGIC)] != MAGIC:
            raise FrameError(f"a frame that begins with {frame[:_HEADER_BYTES]!r} is not kvbelt's")
        version = frame[len(MAGIC)]
        if version != PROTOCOL_VERSION:
            raise VersionError(version)
        try:
            return self._decoder.decode(memoryview(frame)[_HEADER_BYTES:])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise FrameError(f"a malformed message: {error}") from None


def handshakes(max_bytes: int = MAX_HANDSHAKE_BYTES) -> Codec[HandshakeMessage]:
    """The codec of the init port, both directions."""
    return Codec(HandshakeMessage, max_bytes)


def from_sender() -> Codec[FromSender]:
    """Messages to a receiver's alloc port."""
    return Codec(FromSender, MAX_RESERVATION_BYTES)


def from_receiver() -> Codec[FromReceiver]:
    """Messages from a receiver's alloc port."""
    return Codec(FromReceiver, MAX_RESERVATION_BYTES)
