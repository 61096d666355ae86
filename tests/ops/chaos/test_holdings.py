"""What workers hold at the end, and whether memory grows."""

import os

from kvbelt.ops.chaos.holdings import Holdings, holdings_of
from kvbelt.ops.chaos.memory import MIB, growths, resident_bytes
from kvbelt.wire.health import Role, WorkerHealth
from kvbelt.wire.ids import EngineId
from kvbelt.wire.load import BeltSnapshot, Load, Sum

BELT = BeltSnapshot(
    receive_bytes=64, bytes_reserved=1, bytes_committed=2, bytes_quarantined=4, overflow_bytes=8,
    overflow_bytes_used=8, staging_bytes=16, staging_bytes_used=16, arrivals={"queued": 3, "reserved": 1},
    received_total={}, received_bytes_total=0, reused_bytes_total=0, sends={"writing": 2}, sent_total={},
    sent_bytes_total=0, writes_total=0, write_seconds=Sum(), exposed_seconds=Sum(), peers=1, mechanism="NULL",
    refused_total={"init": {"malformed": 5}},
)  # fmt: skip


def health(state="ready", running=0, waiting=0, free=7, belt=None):
    """What a worker with ten blocks says."""
    load = Load(running=running, waiting=waiting, blocks_total=10, blocks_free=free, blocks_cached=0)
    return WorkerHealth(status="ok", state=state, role=Role.DECODE, model="m", engine_id=EngineId("d0"),
                        engine="embedded", hash_seed="", receiver=None, max_model_len=100,
                        load=load, belt=belt)  # fmt: skip


def test_everything_that_a_worker_says_it_holds_is_seen():
    """Both sides of the belt, the overflow, the engine."""
    held = holdings_of(health(running=1, waiting=2, belt=BELT))
    assert held == Holdings("ready", staging_bytes=27, quarantined_bytes=4, blocks=3, requests=3, transfers=6,
                            queued=3, refused=5)  # fmt: skip
    assert not held.nothing
    assert str(held) == "27 bytes of staging, 4 bytes in quarantine, 3 KV blocks, 3 requests, 6 transfers"


def test_a_worker_without_a_belt_can_hold_nothing():
    """A worker without a belt holds nothing; one that is not ready never counts as empty."""
    empty = holdings_of(health(free=10))
    assert empty.nothing
    assert str(empty) == "nothing"
    assert not holdings_of(health("loading", free=10)).nothing


def life(*sizes, seconds=30.0):
    """Samples of one process, ``seconds`` apart."""
    return {("decode-0", 1): [(seconds * n, size * MIB) for n, size in enumerate(sizes)]}


def test_memory_that_is_filled_once_is_no_growth():
    """Growth in the first third of a lifetime, and small growth later, are allowed."""
    (growth,) = growths(life(100, 500, 510, 520))
    assert not growth.unbounded
    assert (growth.first, growth.settled, growth.last) == (100 * MIB, 500 * MIB, 520 * MIB)


def test_memory_that_grows_on_is_growth():
    """Large growth in the last two thirds of a long lifetime is found."""
    assert growths(life(100, 500, 600, 700))[0].unbounded
    assert not growths(life(100, 500, 600, 700, seconds=5.0))[0].unbounded
    assert growths({("decode-0", 1): [(0.0, 5)]}) == []


def test_resident_bytes_of_a_process():
    """This process has some; an unknown pid has None."""
    assert resident_bytes(os.getpid()) > MIB
    assert resident_bytes(1 << 30) is None
