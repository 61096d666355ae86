"""Which requests are kept, and which attempt a transfer's end belongs to."""

import pytest

from kvbelt.proxy.observe.records import Record, Records
from kvbelt.proxy.observe.trace_context import Parent, Trace
from tests.proxy.support import done


@pytest.fixture
def records():
    """Records with room for three ended requests."""
    return Records(3)


def begun(records, name, transfer_id=""):
    """A request under way, with one leg."""
    record = Record(name, "/v1/completions", 0.0, 0.0)
    records.add(record)
    records.attempt(record, "prefill", "p:1", transfer_id)
    return record


def test_a_slow_request_is_there_however_many_others_come_and_go(records):
    """Its record is kept while it is under way, and after its end."""
    slow = begun(records, "slow")
    for number in range(10):
        records.end(begun(records, f"r{number}"))
    assert records.get("slow") is slow
    records.end(slow)
    assert [record.request_id for record in records.newest()] == ["slow", "r9", "r8"]


def test_those_under_way_come_first(records):
    """The latest comes first."""
    for name in ("a", "b", "c"):
        begun(records, name)
    records.end(records.get("b"))
    assert [record.request_id for record in records.newest()] == ["c", "a", "b"]


def test_the_newest_of_a_name_is_found(records):
    """Clients may give their requests the same id, one after the other."""
    records.end(begun(records, "same"))
    second = begun(records, "same")
    assert records.get("same") is second
    records.end(second)
    assert records.get("same").number == 2


def test_a_transfer_is_added_to_its_attempt_after_the_requests_end(records):
    """The notification may come before or after the record was read."""
    records.end(begun(records, "a", "t1"))
    records.end(begun(records, "b", "t2"))
    records.on_notification(done(transfer_id="t1"))
    assert records.get("a").attempts[0].transfer == done(transfer_id="t1")
    records.on_notification(done(transfer_id="t2"))
    assert records.get("b").attempts[0].transfer == done(transfer_id="t2")


def test_an_attempt_is_found_by_one_prompts_transfer_id(records):
    """The request may be under way or ended."""
    first, second = begun(records, "a", "t1"), begun(records, "b", "t2")
    records.on_notification(done(transfer_id="t1.0"))
    records.end(first)
    records.end(second)
    records.on_notification(done(transfer_id="t2.0"))
    assert [record.attempts[0].transfer.transfer_id for record in records.newest()] == ["t2.0", "t1.0"]


def test_notifications_of_unknown_transfers_do_not_pile_up(records):
    """Only the last ones are kept."""
    records.end(begun(records, "a", "t1"))
    assert records.get("a") is not None
    records.on_notification(done(transfer_id="t1"))
    for number in range(10):
        records.on_notification(done(transfer_id=f"x{number}"))
    assert records.get("a").attempts[0].transfer is None


def test_how_far_they_reach_back(records):
    """There is no limit until the first record is dropped."""
    for number in range(3):
        records.end(begun(records, f"r{number}"))
    assert records.reach(10) is None
    records.end(begun(records, "r3"))
    assert records.reach(10) == records.get("r1").ended
    assert records.reach(2) == records.get("r2").ended


def test_all_that_is_known_of_a_request_is_kept_with_it(records):
    """A record keeps its attempts and its trace."""
    record = begun(records, "a", "t1")
    record.trace = Trace(b"1" * 32, Parent(b"1" * 32, b"2" * 16, 1), b"3" * 16, recorded=True)
    record.path, record.after, record.errors = "first-token", ("prefill_lost",), ("gone",)
    records.on_notification(done(transfer_id="t1"))
    records.attempt(record, "decode", "d:1").end("decode_lost", "gone")
    records.end(record)
    assert records.get("a") == record
    assert records.get("a") is not record
