"""What the belt's buffers cost a worker that neither sends nor receives."""

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from kvbelt.belt_setup import BeltOptions, channel_for, make_belt
from kvbelt.channels.factory import ChannelSettings
from kvbelt.security.keys import new_engine_id
from kvbelt.transfer.settings import BeltIdentity
from kvbelt.wire.health import Role
from tests.channels.carriers import need
from tests.transfer.belts import LAYOUT, Told

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
