"""What was refused on the control sockets: counted always, logged seldom.

A flood must not become a flood of log lines, and what a peer writes into a message must not become a label of its own
for each message.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable

log = logging.getLogger(__name__)

#: Between two log lines about one socket and reason.
LOG_SECONDS = 10.0

#: Different labels of one counter; ours are far fewer.
MAX_LABELS = 64
_MAX_LABEL = 64


class Tally(Counter[str]):
    """Counts by label. Labels may come from peers: beyond a number of them, and of characters, it is ``other``."""

    def add(self, label: str) -> None:
        """One more."""
        known = label in self or (len(self) < MAX_LABELS and len(label) <= _MAX_LABEL)
        self[label if known else "other"] += 1


class Refusals:
    """Of one process. Belongs to one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._counts: dict[str, Tally] = {}
        # When a line was last written, and how many were not written since.
        self._told: dict[tuple[str, str], tuple[float, int]] = {}

    def add(self, socket: str, reason: str, detail: object = "") -> None:
        """A message or a peer was refused on a socket. ``reason`` is one of ours, of low cardinality."""
        self._counts.setdefault(socket, Tally()).add(reason)
        now = self._clock()
        told_at, silent = self._told.get((socket, reason), (float("-inf"), 0))
        if told_at + LOG_SECONDS > now:
            self._told[socket, reason] = (told_at, silent + 1)
            return
        self._told[socket, reason] = (now, 0)
        more = f" (and {silent} times before, since the last line)" if silent else ""
        # repr: what a peer has written must not end this line and begin another.
        log.warning("refused on the %s port: %s: %.300r%s", socket, reason, str(detail), more)

    def totals(self) -> dict[str, dict[str, int]]:
        """By socket and reason."""
        return {socket: dict(tally) for socket, tally in self._counts.items()}
