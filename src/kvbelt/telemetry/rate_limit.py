"""Rate-limits repeated log events and reports how many were dropped.

Two events are the same if logger, level and message template are equal. ``ALLOWED`` of them are logged in a window of
``WINDOW_SECONDS``, which the first one opens. The number of dropped ones is logged when the window closes.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TextIO

ALLOWED = 20
WINDOW_SECONDS = 10.0

#: This logger has its own rate limit (``proxy/observe/request_log.py``).
REQUESTS = "kvbelt.requests"


class EventKey(NamedTuple):
    logger: str
    level: int
    text: str


@dataclass(slots=True)
class _Window:
    closes: float
    seen: int = 0


class RepeatLimiter:
    """Counts events by key. Pure: the caller passes the time."""

    def __init__(self, allowed: int = ALLOWED, window_seconds: float = WINDOW_SECONDS) -> None:
        self.window_seconds = window_seconds
        self._allowed = allowed
        self._windows: dict[EventKey, _Window] = {}  # ordered by closing time

    def admit(self, kind: EventKey, now: float) -> bool:
        """Whether to log one more event of this kind. Call ``closed`` first."""
        window = self._windows.get(kind)
        if window is None:
            window = self._windows[kind] = _Window(now + self.window_seconds)
        window.seen += 1
        return window.seen <= self._allowed

    def closed(self, now: float) -> list[tuple[EventKey, int]]:
        """Remove the windows that have closed; return the keys of those that dropped events, with the number."""
        counts = []
        for kind, window in list(self._windows.items()):
            if window.closes > now:
                break
            del self._windows[kind]
            if window.seen > self._allowed:
                counts.append((kind, window.seen - self._allowed))
        return counts


class RateLimitedHandler(logging.StreamHandler[TextIO]):
    def __init__(
        self, stream: TextIO, repeats: RepeatLimiter | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(stream)
        self._repeats = RepeatLimiter() if repeats is None else repeats
        self._clock = clock
        self._timer: threading.Timer | None = None  # runs while dropped events are unreported; ended by ``close``

    def emit(self, record: logging.LogRecord) -> None:
        """Log or count one event. The caller holds the handler's lock."""
        if record.name == REQUESTS:
            super().emit(record)
            return
        self._report_dropped()
        if self._repeats.admit(_kind_of(record), self._clock()):
            super().emit(record)
        elif self._timer is None:
            timer = threading.Timer(self._repeats.window_seconds, self._window_closed)
            timer.daemon = True
            with contextlib.suppress(RuntimeError):  # the interpreter is exiting; ``close`` reports the rest
                timer.start()
                self._timer = timer

    def close(self) -> None:
        """Report what has been dropped."""
        with self.lock if self.lock is not None else threading.RLock():
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            self._report_dropped(float("inf"))
        super().close()

    def _window_closed(self) -> None:
        with self.lock if self.lock is not None else threading.RLock():
            self._timer = None
            self._report_dropped()

    def _report_dropped(self, now: float | None = None) -> None:
        for kind, count in self._repeats.closed(self._clock() if now is None else now):
            fields = {
                "name": kind.logger,
                "levelno": kind.level,
                "levelname": logging.getLevelName(kind.level),
                "msg": "%d more like this within %g s: %s",
                "args": (count, self._repeats.window_seconds, kind.text),
                "dropped": count,
            }
            super().emit(logging.makeLogRecord(fields))


def _kind_of(record: logging.LogRecord) -> EventKey:
    # structlog passes its events as a dictionary.
    text = record.msg.get("event", "") if isinstance(record.msg, dict) else record.msg
    return EventKey(record.name, record.levelno, str(text))
