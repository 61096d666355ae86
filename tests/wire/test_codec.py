"""Frames: what is encoded comes back, and whatever else comes raises FrameError and nothing else."""

import contextlib

import msgspec
import pytest
from hypothesis import given, settings, strategies

from kvbelt.wire import codec
from kvbelt.wire import handshake as h
from kvbelt.wire import reservation as w
from tests.wire.support import FIT, FROM_SENDER, NAME, D, P, T

REGIONS = (h.MemoryRegion(1 << 63, 2, "cuda", 1), h.MemoryRegion(1, 2, "cpu", 0))

HEADER = codec.MAGIC + bytes([h.PROTOCOL_VERSION])

HANDSHAKES = [
    h.Hello(engine_id=P, receiver=D, role="prefill", compatibility=FIT),
    h.Welcome(
        engine_id=D,
        compatibility=FIT,
        agent_metadata=b"\x00\xff",
        regions=REGIONS,
        liveness_port=1,
        liveness_token=b"\xff",
    ),
    h.HandshakeRefused(engine_id=D, field="dtype", ours="float32", theirs="bfloat16"),
]
FROM_RECEIVER = [
    w.Granted(
        transfer_id=T,
        slot=NAME,
        region=0,
        offset=0,
        num_bytes=1,
        lease_seconds=2.0,
        first_block=0,
        part_blocks=1,
        verify="sample",
    ),
    w.Wait(transfer_id=T, retry_after_seconds=0.25, position=3),
    w.Refused(transfer_id=T, reason="too_large", detail="9 > 8"),
    w.Renewed(transfer_id=T, slot=NAME),
    w.PartsTaken(transfer_id=T, slot=NAME, parts=2),
    w.Committed(transfer_id=T, slot=NAME),
    w.Expired(transfer_id=T, slot=None, reason="lease"),
    w.Cancel(transfer_id=T, slot=NAME, reason="reader_gone"),
    w.Cancelled(transfer_id=T, slot=None),
]
CODECS = [
    (codec.handshakes, HANDSHAKES),
    (codec.from_sender, FROM_SENDER),
    (codec.from_receiver, FROM_RECEIVER),
]
EVERY = [(make, message) for make, messages in CODECS for message in messages]


@pytest.mark.parametrize(("make", "message"), EVERY)
def test_every_message_comes_back(make, message):
    assert make().decode(make().encode(message)) == message


def test_every_message_of_the_protocol_is_tried():
    """A message that is added to a union is added here."""
    for union, messages in (
        (h.HandshakeMessage, HANDSHAKES),
        (w.FromSender, FROM_SENDER),
        (w.FromReceiver, FROM_RECEIVER),
    ):
        assert {type(message) for message in messages} == set(union.__args__)


@pytest.mark.parametrize(("make", "message"), EVERY)
def test_every_truncation_is_refused(make, message):
    """A frame cut anywhere is malformed."""
    frame = make().encode(message)
    for end in range(len(frame)):
        with pytest.raises(codec.FrameError):
            make().decode(frame[:end])


@settings(deadline=None)
@given(noise=strategies.binary(max_size=200))
@pytest.mark.parametrize("make", [make for make, _ in CODECS])
def test_noise_is_refused(make, noise):
    """Random bytes, with and without a good header, raise FrameError only."""
    for frame in (noise, HEADER + noise):
        with pytest.raises(codec.FrameError):
            make().decode(frame)


@settings(deadline=None)
@given(data=strategies.data())
@pytest.mark.parametrize(("make", "message"), EVERY)
def test_a_flipped_byte_never_raises_anything_else(make, message, data):
    """A damaged frame is either refused or still a message of the union."""
    frame = bytearray(make().encode(message))
    frame[data.draw(strategies.integers(0, len(frame) - 1))] ^= data.draw(strategies.integers(1, 255))
    with contextlib.suppress(codec.FrameError):
        assert isinstance(make().decode(bytes(frame)), msgspec.Struct)


def test_another_version_is_named():
    """The version is readable whatever follows it."""
    with pytest.raises(codec.VersionError, match="version 9; this side speaks 6") as caught:
        codec.handshakes().decode(b"KB\x09whatever follows")
    assert caught.value.theirs == 9


def test_an_oversized_frame_is_refused_unread():
    """The limit is checked first."""
    with pytest.raises(codec.FrameError, match="at most 61440"):
        codec.from_sender().decode(HEADER + bytes(codec.MAX_RESERVATION_BYTES))


def test_a_message_of_the_other_direction_is_refused():
    """A receiver takes no Granted."""
    with pytest.raises(codec.FrameError):
        codec.from_sender().decode(codec.from_receiver().encode(FROM_RECEIVER[0]))


def test_deep_nesting_is_refused():
    """A frame built to exhaust the stack is a malformed frame."""
    with pytest.raises(codec.FrameError):
        codec.from_sender().decode(HEADER + b"\x91" * 10_000 + b"\xc0")
