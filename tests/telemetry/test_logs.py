"""Log lines: one an event, with fields, for people or as JSON, and no more of them than somebody can read."""

import io
import json
import logging
import warnings

import pytest
import structlog

from kvbelt.telemetry import configure_logging, get_logger
from kvbelt.telemetry.repeats import REQUESTS, Kind, Repeats, SparingHandler


@pytest.fixture
def logged():
    """Configures logging into a text; everything is as it was afterwards."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    text = io.StringIO()

    def configure(**how):
        configure_logging(stream=text, **how)
        return text

    yield configure
    for handler in root.handlers:
        if isinstance(handler, SparingHandler):
            handler.close()
    root.handlers[:] = before
    root.setLevel(level)
    structlog.reset_defaults()
    logging.captureWarnings(False)


def logger_with(handler):
    """A logger of its own that has this handler alone."""
    log = logging.getLogger(f"apart.{id(handler)}")
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.INFO)
    return log


def lines(text):
    """What was written, as JSON."""
    return [json.loads(line) for line in text.getvalue().splitlines()]


def test_json_has_one_object_a_line_with_every_field(logged):
    """Whoever logs, structlog or the standard library's loggers with extra fields."""
    text = logged(json=True)
    get_logger("kvbelt.test").info("transfer sent", request_id="r1", transfer_id="t1", bytes=3)
    logging.getLogger("kvbelt.test").warning("no answer from %s", "d0", extra={"request_id": "r2"})
    first, second = lines(text)
    assert first.items() >= {"event": "transfer sent", "request_id": "r1", "transfer_id": "t1", "bytes": 3}.items()
    assert second.items() >= {"event": "no answer from d0", "level": "warning", "request_id": "r2"}.items()
    assert first["timestamp"].endswith("Z")


def test_warnings_are_events_like_others(logged):
    """Python writes them to standard error itself otherwise, in two lines."""
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
    """A line to read, without colours where nobody sees them."""
    text = logged()
    logging.getLogger("kvbelt.test").info("TTFT %.1f ms", 12.34, extra={"request_id": "r1"})
    assert "[info     ] TTFT 12.3 ms" in text.getvalue() or "[info] TTFT 12.3 ms" in text.getvalue()
    assert "request_id=r1" in text.getvalue()


@pytest.mark.parametrize("json_lines", [False, True])
def test_what_others_say_stays_in_its_line(logged, json_lines):
    """A body with line breaks and colours is shown, not obeyed; in fields as well."""
    text = logged(json=json_lines)
    said = "d0 answered 500: {\n12:00:00 [error] forged\x1b[31m}"
    logging.getLogger("kvbelt.test").warning("no answer: %s", said, extra={"detail": said, "word": "\x1b[31m"})
    assert len(text.getvalue().splitlines()) == 1
    assert "\x1b" not in text.getvalue()
    assert "forged" in text.getvalue()


def test_of_repeated_events_a_few_are_admitted_and_the_rest_counted():
    """Others are counted apart, and when the window has closed the count is told once."""
    repeats, kind, other = Repeats(allowed=2, window_seconds=10), Kind("a", 30, "x %s"), Kind("a", 30, "y")
    assert [repeats.admit(kind, now) for now in (0, 1, 2, 3)] == [True, True, False, False]
    assert repeats.admit(other, 3)
    assert repeats.closed(9.9) == []
    assert repeats.closed(10) == [(kind, 2)]
    assert repeats.closed(20) == []
    assert repeats.admit(kind, 20)


def test_what_was_not_said_is_said_of(logged):
    """Alike is what has the same text before its values are put in."""
    text = io.StringIO()
    now = [0.0]
    handler = SparingHandler(text, Repeats(allowed=3, window_seconds=10), clock=lambda: now[0])
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


def test_a_closing_log_says_what_it_owes(logged):
    """Without waiting for the window."""
    text = io.StringIO()
    handler = SparingHandler(text, Repeats(allowed=1, window_seconds=1000))
    log = logger_with(handler)
    for _ in range(3):
        log.warning("again")
    handler.close()
    assert text.getvalue().splitlines()[1:] == ["2 more like this within 1000 s: again"]


def test_nobody_need_log_again_for_the_count_to_be_said():
    """A timer says it when the window closes."""
    text = io.StringIO()
    handler = SparingHandler(text, Repeats(allowed=1, window_seconds=0.02))
    log = logger_with(handler)
    log.warning("again")
    log.warning("again")
    timer = handler._timer
    timer.join(10)
    handler.close()
    assert "1 more like this" in text.getvalue()


def test_request_lines_have_a_limit_of_their_own():
    """Here each is said."""
    text = io.StringIO()
    handler = SparingHandler(text, Repeats(allowed=1))
    for _ in range(5):
        handler.handle(logging.LogRecord(REQUESTS, logging.INFO, __file__, 1, "TTFT 1.0 ms", (), None))
    handler.close()
    assert len(text.getvalue().splitlines()) == 5
