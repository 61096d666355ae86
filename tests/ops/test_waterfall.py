"""The waterfall of one request, from the proxy's record."""

import pytest

from kvbelt.ops.waterfall import bars, lines, parse


@pytest.fixture
def body(record):
    """The record, to be changed."""
    return record


def test_spans_stand_where_they_happened(body):
    """As the proxy says; what comes behind the second token is left out."""
    assert [(bar.label, bar.start, bar.duration) for bar in bars(parse(body))] == [
        ("proxy", 0.0, 1.0),
        ("queue", 1.0, 2.0),
        ("prefill", 3.0, 80.0),
        ("transfer", 67.0, 20.0),
        ("KV wait", 85.0, 3.0),
        ("KV load", 88.5, 1.5),
        ("first decode step", 90.0, 40.0),
    ]


def test_a_failed_leg_is_a_bar_with_its_reason(body):
    """And with its worker, so that it is seen who was asked in vain."""
    body["spans"].insert(1, {"name": "prefill leg", "start_ms": 1.0, "duration_ms": 5.0, "worker": "w", "failed": "x"})
    (bar,) = [bar for bar in bars(parse(body)) if bar.note.startswith("x")]
    assert (bar.label, bar.note) == ("prefill leg failed", "x, w")


def test_time_between_tokens_is_told_where_it_is_known(body):
    """With the number of tokens that it is the average of."""
    body["timings_ms"]["between_tokens"] = 13.8
    body["tokens"] = 60
    assert lines(parse(body))[-1].endswith("whole answer after 900 ms: 60 tokens, 13.8 ms between two")


def test_lines_name_bytes_rate_and_times(body):
    """The title names path and workers; the transfer its bytes, rate and what was not hidden."""
    shown = lines(parse(body), width=120)
    text = "\n".join(shown)
    assert shown[0] == "request r1: first-token, 127.0.0.1:7100 → 127.0.0.1:7200"
    assert "46.1 MB in 30 writes over nixl, 2.3 GB/s at prefill's pace; 4.00 ms after prefill" in text
    assert shown[-1] == "  first token after 85.2 ms, whole answer after 900 ms"
    assert [line.split("  ")[1] for line in shown[1:4]] == ["proxy", "queue", "prefill"]


def test_plain_lines_are_ascii(body):
    """Without Unicode the waterfall is readable all the same."""
    assert all(line.isascii() for line in lines(parse(body), plain=True))


def test_failed_transfer_says_why(body):
    """A transfer that failed is shown with its reason, and the record is not one that went over the belt."""
    body["transfer"] = {"state": "failed", "bytes": 10, "seconds": 0.001, "milliseconds": 1.0, "reason": "peer_lost"}
    body["decision"] = {"path": "local", "reason": "peer_lost"}
    body["errors"] = ["decode worker lost"]
    record = parse(body)
    text = "\n".join(lines(record))
    assert "failed: peer_lost; 10 B" in text
    assert "request r1: local (peer_lost)" in text
    assert "error: decode worker lost" in text
    assert not record.over_belt


def test_aggregated_request_is_complete_without_a_transfer(body):
    """Without a prefill worker there is nothing to hand over."""
    body["workers"]["prefill"] = None
    body["transfer"] = body["transfer_id"] = None
    record = parse(body)
    assert record.complete
    assert not record.over_belt


def test_record_is_incomplete_until_the_transfer_is_told(body):
    """The notification may come after the answer's end."""
    body["transfer"] = None
    assert not parse(body).complete


def test_what_is_no_record_is_refused():
    """Another document raises instead of drawing nonsense."""
    with pytest.raises(ValueError, match="request_id"):
        parse({"error": {"message": "not found"}})
