"""When the belt's buffers are taken, and what follows where a device has no memory for them."""

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from kvbelt.belt_setup import BeltOptions, channel_for, make_belt
from kvbelt.channels.factory import ChannelSettings
from kvbelt.errors import ChannelError
from kvbelt.security.keys import new_engine_id
from kvbelt.transfer.ports import Region, TransferOutcome
from kvbelt.transfer.settings import BeltIdentity
from kvbelt.wire.health import Role
from tests.channels.carriers import need
from tests.channels.memory import MemoryChannel, MemoryNetwork
from tests.transfer.belts import LAYOUT, Side, Told, begin, hand_over

BUFFER_BYTES = 2 << 30


def resident_bytes() -> int:
    """Of this process, in memory of its own."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))


@pytest.mark.parametrize("channel", ["nixl", "mooncake"])
def test_buffers_in_host_memory_take_none_before_the_first_transfer(channel: str) -> None:
    """Not when they are registered, nor when both sides are connected."""
    need(channel)
    before = resident_bytes()
    with ExitStack() as stack:
        belts = {}
        for role in (Role.PREFILL, Role.DECODE):
            options = BeltOptions(
                role=role,
                buffer_bytes=BUFFER_BYTES,
                buffer_device="cpu",
                host="127.0.0.1",
                channel=ChannelSettings(name=channel),
            )
            engine_id, pool = new_engine_id(None), torch.zeros((LAYOUT.num_layers, 4, LAYOUT.block_bytes))
            identity = BeltIdentity(engine_id, role, "tiny", "f1", LAYOUT)
            made = make_belt(options, identity, channel_for(options, engine_id, pool.device), list(pool.byte()))
            made.start()
            stack.callback(made.close)
            belts[role] = made
        address = belts[Role.DECODE].receiver_address()
        assert address is not None
        outcome = Told(lambda on_end: belts[Role.PREFILL].warm(address, on_end)).answer()
        assert outcome.ok, outcome
        assert resident_bytes() - before < BUFFER_BYTES // 16


class Late:
    """A buffer that counts how often it was asked for, and may not be had."""

    device = "cpu"

    def __init__(self, region: Region) -> None:
        self.region = region
        self.num_bytes = region.num_bytes
        self.asked = 0
        self.exhausted = False

    def take(self) -> Region:
        self.asked += 1
        if self.exhausted:
            raise ChannelError("out of memory")
        return self.region


@pytest.fixture
def sides():
    """A prefill and a decode belt with late buffers, not yet connected."""
    network = MemoryNetwork()
    with (
        Side("p", "prefill", MemoryChannel("p", network), buffer_of=Late) as prefill,
        Side("d", "decode", MemoryChannel("d", network), buffer_of=Late) as decode,
    ):
        yield prefill, decode


def sent(sides: tuple[Side, Side], name: str) -> TransferOutcome:
    """What became of one transfer."""
    prefill, decode = sides
    sending, fate = begin(prefill, decode.belt.receiver_address(), name, 40)
    hand_over(sending, LAYOUT, [0, 1, 2])
    return fate.outcome()


def test_a_belt_without_peers_takes_no_buffer(sides):
    """On a GPU it would be memory that the model's KV cannot have."""
    assert [side.buffer.asked for side in sides] == [0, 0]


def test_the_first_peer_takes_the_buffers_once(sides):
    """Two transfers are carried in the same memory."""
    assert sent(sides, "a").ok
    assert sent(sides, "b").ok
    assert [side.buffer.asked for side in sides] == [1, 1]


@pytest.mark.parametrize(("at", "reason"), [(0, "no_memory"), (1, "refused_memory")])
def test_a_buffer_that_cannot_be_had_fails_the_transfer_and_not_the_next(sides, at, reason):
    """Its prompt is computed where it is decoded; once there is memory, the next one is sent."""
    sides[at].buffer.exhausted = True
    outcome = sent(sides, "a")
    assert (outcome.ok, outcome.reason) == (False, reason)
    sides[at].buffer.exhausted = False
    assert sent(sides, "b").ok
