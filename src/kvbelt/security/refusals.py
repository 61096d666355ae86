"""Counts of what was refused on the control sockets, with a rate-limited log.

A flood of messages must become neither a flood of log lines nor a flood of metric labels.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable

log = logging.getLogger(__name__)

LOG_SECONDS = 10.0  #: between two log lines about one socket and reason
MAX_LABELS = 64  #: labels of one counter at most; the code has far fewer
_MAX_LABEL = 64


class Tally(Counter[str]):
    """Counts by label. Peers may choose labels, so further and longer ones are counted as ``other``."""

    def add(self, label: str) -> None:
        known = label in self or (len(self) < MAX_LABELS and len(label) <= _MAX_LABEL)
        self[label if known else "other"] += 1


class Refusals:
    """The refusals of one process. Belongs to one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._counts: dict[str, Tally] = {}
        # Time of the last log line, and how many were dropped since.
        self._told: dict[tuple[str, str], tuple[float, int]] = {}

    def add(self, socket: str, reason: str, detail: object = "") -> None:
        """Count a refused message or peer. ``reason`` has low cardinality; ``detail`` goes to the log."""
        self._counts.setdefault(socket, Tally()).add(reason)
        now = self._clock()
        told_at, silent = self._told.get((socket, reason), (float("-inf"), 0))
        if told_at + LOG_SECONDS > now:
            self._told[socket, reason] = (told_at, silent + 1)
            return
        self._told[socket, reason] = (now, 0)
        more = f" (and {silent} times before, since the last line)" if silent else ""
        # repr: a peer's text must not begin a new line of the log.
        log.warning("refused on the %s port: %s: %.300r%s", socket, reason, str(detail), more)

    def totals(self) -> dict[str, dict[str, int]]:
        """By socket and reason."""
        return {socket: dict(tally) for socket, tally in self._counts.items()}
