"""Rates and percentiles of the last seconds, from the records."""

import msgspec
import pytest

from kvbelt.proxy.observe.live import live_stats
from kvbelt.proxy.observe.records import Record, Records
from tests.proxy.support import done, failed

NOW = 1000.0


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self):
        """As ``time.monotonic``."""
        return self.now


@pytest.fixture
def records(clock):
    """Room for a hundred."""
    return Records(100, clock)


@pytest.fixture
def clock():
    """Stands still until it is set."""
    return Clock()


def ended(records, at, *, took=1.0, first=0.5, pieces=0, status=200, transfer=None, errors=()):
    """A request that ended at some second."""
    record = Record(
        f"r{len(records)}", "/v1/completions", at - took, 0.0, stream=True, status=status, decode_worker="d:1"
    )
    records.add(record)
    attempt = records.attempt(record, "prefill", "p:1", f"t{len(records)}")
    attempt.began, attempt.transfer, attempt.transfer_at = record.began, transfer, at - took / 2
    record.first_token = record.began + first
    record.decode_first, record.streamed = at - took / 4, pieces
    record.errors += tuple(errors)
    records.clock.now = at
    records.end(record)
    return record


def seen(records):
    """The console's statistics of the last ten seconds."""
    return msgspec.to_builtins(live_stats(records, NOW, 10.0))


def test_what_lies_within_the_window_is_counted(records):
    """Earlier requests are left out."""
    ended(records, NOW - 50, first=0.9)
    for first in (0.1, 0.2, 0.3):
        ended(records, NOW - 1, first=first, transfer=done(seconds=0.01))
    live = seen(records)
    assert (live["requests_per_second"], live["transfers_per_second"]) == (0.3, 0.3)
    assert live["first_token_ms"] == {"count": 3, "p50": 200, "p90": 300, "p99": 300}
    assert live["transfer_ms"] == {"count": 3, "p50": 10, "p90": 10, "p99": 10}
    assert live["transfer_exposed_ms"] == {"count": 3, "p50": 4, "p90": 4, "p99": 4}
    assert live["legs"] == {"prefill": {"p:1": 0.3}, "decode": {}}
    assert live["links"] == [
        {
            "prefill": "p:1",
            "decode": "d:1",
            "transfers_per_second": 0.3,
            "failures_per_second": 0,
            "bytes_per_second": 300,
        }
    ]


def test_tokens_are_spread_over_their_answer(records):
    """An answer that began before the window counts for its share."""
    ended(records, NOW, took=21.0, first=1.0, pieces=41)  # 41 tokens in the 20 s behind the first one
    assert seen(records)["tokens_per_second"] == pytest.approx(41 * 0.5 / 10, abs=0.1)


def test_failures_are_apart_from_transfers(records):
    """Failed transfers are counted apart, and the last errors are listed."""
    ended(records, NOW - 1, transfer=failed(), status=502, errors=["transfer_peer_lost: gone"])
    live = seen(records)
    assert (live["links"][0]["failures_per_second"], live["transfers_per_second"]) == (0.1, 0)
    assert live["errors_per_second"] == 0.1
    assert [error["error"] for error in live["last_errors"]] == ["transfer_peer_lost: gone"]


def test_the_window_is_no_longer_than_the_records_reach(records):
    """A full list that covers two seconds gives the rate of these two."""
    for number in range(200):
        ended(records, NOW - 4 + number / 50, took=0.001, first=0.0005)
    live = seen(records)
    assert live["seconds"] == pytest.approx(2.0, abs=0.05)
    assert live["requests_per_second"] == pytest.approx(50, rel=0.05)


def test_nothing_has_no_percentiles(records):
    live = seen(records)
    assert live["first_token_ms"] == {"count": 0, "p50": None, "p90": None, "p99": None}
    assert live["requests_per_second"] == 0
