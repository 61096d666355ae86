"""The waterfall of one request, from the proxy's record."""

import pytest

from kvbelt.ops.waterfall import bars, end_of, lines
from kvbelt.wire.request_record import REQUEST_RECORD


def parse(body):
    """The proxy's message."""
    return REQUEST_RECORD.convert(body, "the proxy")


@pytest.fixture
def body(record):
    """The record, to be changed by a test."""
    return record


def test_spans_stand_where_they_happened(body):
    """Bars are at the record's times; the axis ends with the second token."""
    assert [(bar.label, bar.start, bar.duration) for bar in bars(parse(body))] == [
        ("proxy", 0.0, 1.0),
        ("queue", 1.0, 2.0),
        ("prefill", 3.0, 80.0),
        ("transfer", 67.0, 20.0),
        ("KV wait", 85.0, 3.0),
        ("KV load", 88.5, 1.5),
        ("first decode step", 90.0, 40.0),
        ("rest of the answer", 85.2, 814.8),
    ]
    assert end_of(parse(body)) == 130.0


def test_a_bar_beyond_the_axis_has_a_sign(body):
    """The rest of the answer goes on; no other part does."""
    assert [line.split("  ")[1] for line in lines(parse(body)) if "▶" in line] == ["rest of the answer"]
    assert sum(">" in line for line in lines(parse(body), plain=True)[1:]) == 1


def test_an_unknown_first_token_is_said(body):
    """An answer in one piece is not shown as its first token."""
    body["stream"], body["timings_ms"]["first_token"] = False, None
    assert lines(parse(body))[-1] == "  first token unknown (not streamed), whole answer after 900 ms"


def test_a_failed_leg_is_a_bar_with_its_reason(body):
    """The bar's note names the reason and the worker."""
    body["spans"].insert(1, {"name": "prefill leg", "start_ms": 1.0, "duration_ms": 5.0, "worker": "w", "failed": "x"})
    (bar,) = [bar for bar in bars(parse(body)) if bar.note.startswith("x")]
    assert (bar.label, bar.note) == ("prefill leg failed", "x, w")


def test_time_between_tokens_is_shown_where_it_is_known(body):
    """The average is shown with its number of tokens."""
    body["timings_ms"]["between_tokens"] = 13.8
    body["tokens"] = 60
    assert lines(parse(body))[-1].endswith("whole answer after 900 ms: 60 tokens, 13.8 ms per token")


def test_lines_name_bytes_rate_and_times(body):
    """The title has path and workers; the transfer has bytes, rate and the time after the prefill."""
    shown = lines(parse(body), width=120)
    text = "\n".join(shown)
    assert shown[0] == "request r1: first-token, 127.0.0.1:7100 → 127.0.0.1:7200"
    assert "4.00 ms exposed, 16.0 ms beside the prefill; 46.1 MB in 30 writes over nixl" in text
    assert shown[-1] == "  first token after 85.2 ms, whole answer after 900 ms"
    assert [line.split("  ")[1] for line in shown[2:5]] == ["proxy", "queue", "prefill"]


def test_plain_lines_are_ascii(body):
    """The plain waterfall is readable without Unicode."""
    assert all(line.isascii() for line in lines(parse(body), plain=True))


def test_failed_transfer_says_why(body):
    """A transfer that failed is shown with its reason, and the record is not one that went over the belt."""
    body["transfer"] = {"state": "failed", "bytes": 10, "seconds": 0.001, "milliseconds": 1.0, "gb_per_second": None,
                        "reason": "peer_lost"}  # fmt: skip
    body["decision"] = {"path": "local", "reason": "peer_lost", "meaning": None}
    body["errors"] = ["decode worker lost"]
    record = parse(body)
    text = "\n".join(lines(record))
    assert "failed: peer_lost; 10 B" in text
    assert "request r1: local (peer_lost)" in text
    assert "error: decode worker lost" in text
    assert not record.over_belt


def test_aggregated_request_is_complete_without_a_transfer(body):
    """Without a prefill worker there is no transfer to wait for."""
    body["workers"]["prefill"] = None
    body["transfer"] = body["transfer_id"] = None
    record = parse(body)
    assert record.complete
    assert not record.over_belt


def test_record_is_incomplete_until_the_transfer_is_notified(body):
    """The transfer's notification may come after the answer's end."""
    body["transfer"] = None
    assert not parse(body).complete
