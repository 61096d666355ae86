"""What is said again and again is counted instead, and the count is said: a log must not drown what it is read for.

Events are alike when logger, level and text (before its values are put in) are the same. Of those, ``ALLOWED`` are
said in a window of ``WINDOW_SECONDS``, which the first one opens; how many more there were is said when it closes.
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

#: Bounds itself, by a rate of its own (``proxy/request_log.py``).
REQUESTS = "kvbelt.requests"


class Kind(NamedTuple):
    """What makes events alike."""

    logger: str
    level: int
    text: str


@dataclass(slots=True)
class _Window:
    closes: float
    seen: int = 0


class Repeats:
    """Counts by kind. Pure: time is given."""

    def __init__(self, allowed: int = ALLOWED, window_seconds: float = WINDOW_SECONDS) -> None:
        self.window_seconds = window_seconds
        self._allowed = allowed
        self._windows: dict[Kind, _Window] = {}  # in the order in which they close

    def admit(self, kind: Kind, now: float) -> bool:
        """Whether one more event of this kind is to be said. Ask ``closed`` first."""
        window = self._windows.get(kind)
        if window is None:
            window = self._windows[kind] = _Window(now + self.window_seconds)
        window.seen += 1
        return window.seen <= self._allowed

    def closed(self, now: float) -> list[tuple[Kind, int]]:
        """Windows that have closed, with how many events of each were not said; those with none are left out."""
        counts = []
        for kind, window in list(self._windows.items()):
            if window.closes > now:
                break
            del self._windows[kind]
            if window.seen > self._allowed:
                counts.append((kind, window.seen - self._allowed))
        return counts


class SparingHandler(logging.StreamHandler[TextIO]):
    """A stream handler that says what is repeated a few times only, and then how often."""

    def __init__(
        self, stream: TextIO, repeats: Repeats | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(stream)
        self._repeats = Repeats() if repeats is None else repeats
        self._clock = clock
        self._timer: threading.Timer | None = None  # runs while something has not been said; ended by ``close``

    def emit(self, record: logging.LogRecord) -> None:
        """Say it, or count it. The handler's lock is held."""
        if record.name == REQUESTS:
            super().emit(record)
            return
        self._tell()
        if self._repeats.admit(_kind_of(record), self._clock()):
            super().emit(record)
        elif self._timer is None:
            timer = threading.Timer(self._repeats.window_seconds, self._time_is_up)
            timer.daemon = True
            with contextlib.suppress(RuntimeError):  # the interpreter is ending, and ``close`` says what is owed
                timer.start()
                self._timer = timer

    def close(self) -> None:
        """Say what has not been said yet."""
        with self.lock if self.lock is not None else threading.RLock():
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            self._tell(float("inf"))
        super().close()

    def _time_is_up(self) -> None:
        with self.lock if self.lock is not None else threading.RLock():
            self._timer = None
            self._tell()

    def _tell(self, now: float | None = None) -> None:
        for kind, count in self._repeats.closed(self._clock() if now is None else now):
            told = {
                "name": kind.logger,
                "levelno": kind.level,
                "levelname": logging.getLevelName(kind.level),
                "msg": "%d more like this within %g s: %s",
                "args": (count, self._repeats.window_seconds, kind.text),
                "not_said": count,
            }
            super().emit(logging.makeLogRecord(told))


def _kind_of(record: logging.LogRecord) -> Kind:
    # structlog hands its events over as a dictionary.
    text = record.msg.get("event", "") if isinstance(record.msg, dict) else record.msg
    return Kind(record.name, record.levelno, str(text))
