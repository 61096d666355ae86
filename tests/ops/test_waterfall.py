"""The waterfall of one request, from the proxy's record."""

import pytest

from kvbelt.ops.waterfall import bars, lines, parse


@pytest.fixture
def body(record):
    """The record, to be changed."""
    return record


def spans(body):
    """Label → (start, duration)."""
    return {bar.label: (bar.start, pytest.approx(bar.duration)) for bar in bars(parse(body))}


def test_spans_stand_where_they_happened(body):
    """Each part starts where the one before it ended; the transfer ends its exposed time after prefill."""
    assert spans(body) == {
        "proxy": (0.0, 1.0),
        "queue": (1.0, 2.0),
        "prefill": (3.0, 80.0),
        "transfer": (67.0, 20.0),
        "KV wait": (85.0, 3.0),
        "KV load": (88.5, 1.5),
        "first decode step": (90.0, 40.0),
    }


def test_decode_workers_own_measure_is_preferred(body):
    """A first step that D itself measured is shown as it is."""
    body["timings_ms"]["first_decode_step"] = 39.0
    assert spans(body)["first decode step"] == (90.0, 39.0)


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


def test_aggregated_request_has_three_spans(body):
    """Without a prefill worker there is nothing to hand over."""
    body["workers"]["prefill"] = None
    body["transfer"] = body["transfer_id"] = None
    record = parse(body)
    assert [bar.label for bar in bars(record)] == ["proxy", "queue", "prefill"]
    assert record.complete
    assert not record.over_belt


def test_prefill_only_ends_with_the_transfer(body):
    """Where D was never asked, nothing of D is shown."""
    body["timings_ms"] |= {"decode_headers": None, "kv_wait": None, "load": None, "decode_queue": None}
    assert [bar.label for bar in bars(parse(body))] == ["proxy", "queue", "prefill", "transfer"]


def test_record_is_incomplete_until_the_transfer_is_told(body):
    """The notification may come after the answer's end."""
    body["transfer"] = None
    assert not parse(body).complete


def test_what_is_no_record_is_refused():
    """Another document raises instead of drawing nonsense."""
    with pytest.raises(ValueError, match="request_id"):
        parse({"error": {"message": "not found"}})
