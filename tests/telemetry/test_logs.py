"""Log lines: one per event, with fields, as text or JSON, and rate-limited."""

import io
import json
import logging
import re
import warnings

import pytest
import structlog

from kvbelt.telemetry import configure_logging, get_logger
from kvbelt.telemetry.rate_limit import REQUESTS, EventKey, RateLimitedHandler, RepeatLimiter


@pytest.fixture
def logged():
    """Configure logging into a string; restore it afterwards."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    text = io.StringIO()

    def configure(**how):
        configure_logging(stream=text, **how)
        return text

    yield configure
    for handler in root.handlers:
        if isinstance(handler, RateLimitedHandler):
            handler.close()
    root.handlers[:] = before
    root.setLevel(level)
    structlog.reset_defaults()
    logging.captureWarnings(False)


def logger_with(handler):
    """A logger with only this handler."""
    log = logging.getLogger(f"apart.{id(handler)}")
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.INFO)
    return log


def lines(text):
    """What was written, as JSON."""
    return [json.loads(line) for line in text.getvalue().splitlines()]


def test_json_has_one_object_a_line_with_every_field(logged):
    """Structlog and the standard library's loggers with extra fields give the same JSON."""
    text = logged(json=True)
    get_logger("kvbelt.test").info("transfer sent", request_id="r1", transfer_id="t1", bytes=3)
    logging.getLogger("kvbelt.test").warning("no answer from %s", "d0", extra={"request_id": "r2"})
    first, second = lines(text)
    assert first.items() >= {"event": "transfer sent", "request_id": "r1", "transfer_id": "t1", "bytes": 3}.items()
    assert second.items() >= {"event": "no answer from d0", "level": "warning", "request_id": "r2"}.items()
    assert first["timestamp"].endswith("Z")


def test_warnings_are_events_like_others(logged):
    """Without this, Python writes warnings to standard error in two lines."""
    text = logged(json=True)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn_explicit("old ways", DeprecationWarning, "somewhere.py", 7)
    (line,) = lines(text)
    assert line["level"] == "warning"
    assert "somewhere.py:7: DeprecationWarning: old ways" in line["event"]


def test_an_exception_stays_in_its_events_line(logged):
    """A traceback of many lines is one field of JSON."""
    text = logged(json=True)
    try:
        int("broken\nin two lines")
    except ValueError:
        logging.getLogger("kvbelt.test").exception("it failed", extra={"request_id": "r1"})
    (line,) = lines(text)
    assert "ValueError: invalid literal" in line["exception"]


def test_people_get_fields_behind_the_text(logged):
    """Text lines end with the fields, and have no colours without a terminal."""
    text = logged()
    logging.getLogger("kvbelt.test").info("TTFT %.1f ms", 12.34, extra={"request_id": "r1"})
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3} \[info\] TTFT 12\.3 ms +request_id=r1\n", text.getvalue())


@pytest.mark.parametrize("json_lines", [False, True])
def test_fields_of_other_packages_are_left_out(logged, json_lines):
    """Uvicorn passes its text again with colours, for its own handler."""
    text = logged(json=json_lines)
    logging.getLogger("uvicorn.error").warning("up", extra={"color_message": "\x1b[36mup\x1b[0m"})
    assert "up" in text.getvalue()
    assert "color" not in text.getvalue()


def test_engine_ids_are_short_for_people(logged):
    """Twelve characters tell two of them apart; an id of the client stays as it is."""
    text, request_id = logged(), "ab" * 16
    engine_id = "93370347cd7cc2a2-6881515a11d9403e8e2ede0db89fe57b"
    logging.getLogger("kvbelt.test").info("engine %s", engine_id, extra={"sender": engine_id, "request_id": request_id})
    assert text.getvalue().count("6881515a11d9") == 2
    assert "6881515a11d94" not in text.getvalue()
    assert request_id in text.getvalue()


def test_a_requests_line_says_each_thing_once(logged):
    """Its fields are for JSON: the text has them already."""
    text = logged()
    logging.getLogger(REQUESTS).info("TTFT 1.0 ms", extra={"request_id": "r1", "ttft_ms": 1.0, "path": "local"})
    assert text.getvalue().split(maxsplit=1)[1].split() == ["[info]", "TTFT", "1.0", "ms", "request_id=r1"]


@pytest.mark.parametrize("json_lines", [False, True])
def test_values_of_other_processes_stay_in_one_line(logged, json_lines):
    """Line breaks and colour codes in a text or a field are escaped."""
    text = logged(json=json_lines)
    said = "d0 answered 500: {\n12:00:00 [error] forged\x1b[31m}"
    logging.getLogger("kvbelt.test").warning("no answer: %s", said, extra={"detail": said, "word": "\x1b[31m"})
    assert len(text.getvalue().splitlines()) == 1
    assert "\x1b" not in text.getvalue()
    assert "forged" in text.getvalue()


def test_of_repeated_events_a_few_are_admitted_and_the_rest_counted():
    """Events of other kinds are counted apart; a closed window is reported once."""
    repeats, kind, other = (
        RepeatLimiter(allowed=2, window_seconds=10),
        EventKey("a", 30, "x %s"),
        EventKey("a", 30, "y"),
    )
    assert [repeats.admit(kind, now) for now in (0, 1, 2, 3)] == [True, True, False, False]
    assert repeats.admit(other, 3)
    assert repeats.closed(9.9) == []
    assert repeats.closed(10) == [(kind, 2)]
    assert repeats.closed(20) == []
    assert repeats.admit(kind, 20)


def test_dropped_events_are_reported(logged):
    """Events with the same template count as the same, whatever their values."""
    text = io.StringIO()
    now = [0.0]
    handler = RateLimitedHandler(text, RepeatLimiter(allowed=3, window_seconds=10), clock=lambda: now[0])
    log = logger_with(handler)
    for number in range(8):
        log.warning("worker %d is lost", number)
    log.error("something else")
    now[0] = 10.0
    log.info("the next event")
    handler.close()
    assert text.getvalue().splitlines() == [
        "worker 0 is lost",
        "worker 1 is lost",
        "worker 2 is lost",
        "something else",
        "5 more like this within 10 s: worker %d is lost",
        "the next event",
    ]


def test_closing_reports_dropped_events(logged):
    """Closing the log reports dropped events at once."""
    text = io.StringIO()
    handler = RateLimitedHandler(text, RepeatLimiter(allowed=1, window_seconds=1000))
    log = logger_with(handler)
    for _ in range(3):
        log.warning("again")
    handler.close()
    assert text.getvalue().splitlines()[1:] == ["2 more like this within 1000 s: again"]


def test_dropped_events_are_reported_without_a_further_event():
    """A timer reports them when the window closes, without a further event."""
    text = io.StringIO()
    now = [0.0]
    handler = RateLimitedHandler(text, RepeatLimiter(allowed=1, window_seconds=0.02), clock=lambda: now[0])
    log = logger_with(handler)
    with handler.lock:  # the timer waits for it
        log.warning("again")
        log.warning("again")
        timer = handler._timer
        now[0] = 0.02
    timer.join(60)
    assert "1 more like this" in text.getvalue()
    handler.close()


def test_request_lines_have_a_limit_of_their_own():
    """The general limit does not apply to them."""
    text = io.StringIO()
    handler = RateLimitedHandler(text, RepeatLimiter(allowed=1))
    for _ in range(5):
        handler.handle(logging.LogRecord(REQUESTS, logging.INFO, __file__, 1, "TTFT 1.0 ms", (), None))
    handler.close()
    assert len(text.getvalue().splitlines()) == 5
