"""Where a request's time went, from its record."""

import itertools

import pytest

from kvbelt.proxy.observe.records import Attempt, Record
from kvbelt.proxy.observe.spans import spans_of
from tests.proxy.support import done, failed

PREFILL = b"queue;dur=2, prefill;dur=80"
DECODE = b"queue;dur=0.5, load;dur=1.5, kv;dur=3"


@pytest.fixture
def record():
    """A request that arrived at second 100 and went over the belt."""
    made = Record("r1", "/v1/completions", 100.0, 0.0, path="first-token", prefill_worker="p:1", decode_worker="d:1")
    made.attempts = [
        Attempt("prefill", "p:1", 100.001, "t", 100.085, 100.085, timing=PREFILL, transfer=done()),
        Attempt("decode", "d:1", 100.085, "", 100.13, 100.9, timing=DECODE),
    ]
    made.first_token, made.decode_first, made.ended, made.stream = 100.0852, 100.13, 100.9, True
    return made


def shown(record):
    """Name → start and duration in milliseconds."""
    return {
        span.name: (pytest.approx(span.start * 1e3, abs=1e-6), pytest.approx(span.duration * 1e3, abs=1e-6))
        for span in spans_of(record)
    }


def test_each_part_starts_where_the_one_before_it_ended(record):
    """The transfer ends its exposed time after the prefill."""
    assert shown(record) == {
        "proxy": (0, 1),
        "queue": (1, 2),
        "prefill": (3, 80),
        "transfer": (67, 20),
        "on the way": (83, 2),
        "KV wait": (85, 3),
        "decode queue": (88, 0.5),
        "KV load": (88.5, 1.5),
        "first decode step": (90, 40),
        "answer": (85.2, 814.8),
    }


def test_a_decode_workers_own_measure_is_preferred(record):
    """A first step that it measured itself is shown as it is."""
    record.attempts[1].timing = DECODE + b", prefill;dur=39"
    assert shown(record)["first decode step"] == (90, 39)


def test_a_failed_attempt_is_one_part_with_its_reason(record):
    """Later parts start at their own times."""
    lost = Attempt("prefill", "p:0", 99.9 + 0.1, "t0", None, 100.03, "prefill_lost")
    record.attempts[0].began = 100.031
    record.attempts.insert(0, lost)
    proxy, leg, _, queue, *_ = spans_of(record)
    assert (leg.name, leg.leg.worker, leg.failed) == ("prefill leg", "p:0", "prefill_lost")
    assert (proxy.duration, leg.start, queue.start) == pytest.approx((0, 0, 0.031), abs=1e-9)
    assert leg.duration == pytest.approx(0.03)


def test_a_failed_transfer_says_why(record):
    """It ends with the prefill, because later times are unknown."""
    record.attempts[0].transfer = failed()
    (transfer,) = [span for span in spans_of(record) if span.name == "transfer"]
    assert transfer.failed == "peer_lost"
    assert transfer.start + transfer.duration == pytest.approx(0.083)


def test_a_local_answer_shows_the_decode_workers_prefill(record):
    record.path, record.attempts = "local", [Attempt("decode", "d:1", 100.002, "", 100.09, 100.5, timing=PREFILL)]
    assert shown(record) == {
        "proxy": (0, 2),
        "queue": (2, 2),
        "prefill": (4, 80),
        "on the way": (84, 1.2),
        "answer": (85.2, 814.8),
    }
    assert {span.leg.worker if span.leg else None for span in spans_of(record)} == {None, "d:1"}


def test_a_server_without_timings_is_shown_by_its_legs(record):
    """The legs have the proxy's times."""
    record.attempts[0].timing = record.attempts[1].timing = b""
    seen = shown(record)
    assert seen["prefill leg"] == (1, 84)
    assert seen["decode leg"] == (85, 45)
    assert seen["first decode step"] == (130, 0)


def test_no_time_is_without_a_name(record):
    """From the arrival to the end each moment is in a part, but for half a millisecond between two."""
    for path, stream in itertools.product(("first-token", "re-derive", "local"), (True, False)):
        record.path, record.stream = path, stream
        reached = 0.0
        for span in sorted(spans_of(record), key=lambda one: one.start):
            assert span.start - reached < 0.00051, (path, span)
            reached = max(reached, span.start + span.duration)
        assert reached == pytest.approx(0.9)


def test_an_answer_in_one_piece_begins_with_its_first_token(record):
    """The prefill worker's token was known before the whole answer was handed over."""
    record.stream, record.prefill_answered, record.first_token = False, 100.085, 100.9
    assert shown(record)["answer"] == (85, 815)


def test_a_request_that_reached_no_worker_has_no_parts():
    assert spans_of(Record("r", "/v1/completions", 1.0, 0.0)) == []


@pytest.mark.parametrize(("first", "gaps"), [(1.0, 4), (2.0, 3)], ids=["the other worker's token", "its own"])
def test_gaps_are_counted_by_the_streams_pieces(record, first, gaps):
    """Five pieces are four tokens and the end; a token that the client had before makes one gap more."""
    record.first_token, record.decode_first, record.streamed, record.ended = first, 2.0, 5, first + gaps * 0.5
    assert record.gaps == gaps
    assert record.between_tokens == pytest.approx(0.5)


def test_an_answer_without_a_stream_has_no_gaps(record):
    record.decode_first = None
    assert (record.gaps, record.between_tokens) == (0, None)
