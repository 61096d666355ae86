"""What is held at the end, and whether memory grows."""

import json
import os

import pytest

from kvbelt.ops.chaos.holdings import Holdings, holdings_of
from kvbelt.ops.chaos.memory import MIB, growths, resident_bytes

HEALTH = {
    "state": "ready",
    "load": {"running": 1, "waiting": 2, "blocks_total": 10, "blocks_free": 7},
    "belt": {
        "bytes_reserved": 1,
        "bytes_committed": 2,
        "bytes_quarantined": 4,
        "overflow_bytes_used": 8,
        "staging_bytes_used": 16,
        "arrivals": {"queued": 3, "reserved": 1},
        "sends": {"writing": 2},
        "refused_total": {"init": {"malformed": 5}},
        "something_new": 1,
    },
}


def test_everything_that_a_worker_says_it_holds_is_seen():
    """Both sides of the belt, the overflow, the engine; what is unknown is passed over."""
    held = holdings_of(json.dumps(HEALTH).encode())
    assert held == Holdings("ready", staging_bytes=27, quarantined_bytes=4, blocks=3, requests=3, transfers=6,
                            queued=3, refused=5)  # fmt: skip
    assert not held.nothing
    assert str(held) == "27 bytes of staging, 4 bytes in quarantine, 3 KV blocks, 3 requests, 6 transfers"


def test_a_worker_without_a_belt_can_hold_nothing():
    """And one that does not serve is not said to."""
    empty = b'{"state": "ready", "load": {"blocks_total": 4, "blocks_free": 4}}'
    assert holdings_of(empty).nothing
    assert str(holdings_of(empty)) == "nothing"
    assert not holdings_of(empty.replace(b"ready", b"loading")).nothing
    with pytest.raises(ValueError, match="JSON"):
        holdings_of(b"nonsense")


def life(*sizes, seconds=30.0):
    """Looks at one process, so many seconds apart."""
    return {("decode-0", 1): [(seconds * n, size * MIB) for n, size in enumerate(sizes)]}


def test_memory_that_is_filled_once_is_no_growth():
    """What is touched in the first third of a life, and small growth later."""
    (growth,) = growths(life(100, 500, 510, 520))
    assert not growth.unbounded
    assert (growth.first, growth.settled, growth.last) == (100 * MIB, 500 * MIB, 520 * MIB)


def test_memory_that_grows_on_is_growth():
    """In the last two thirds of a life that is long enough to tell."""
    assert growths(life(100, 500, 600, 700))[0].unbounded
    assert not growths(life(100, 500, 600, 700, seconds=5.0))[0].unbounded
    assert growths({("decode-0", 1): [(0.0, 5)]}) == []


def test_resident_bytes_of_a_process():
    """Of this one some; of none none."""
    assert resident_bytes(os.getpid()) > MIB
    assert resident_bytes(1 << 30) is None
