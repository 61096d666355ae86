"""A line in the log for each request that has ended: TTFT, path, workers, transfer. Never any text of it.

``tail -f proxy.log | grep TTFT`` is what people watch. A line costs as much as a good part of a request, so there are
``per_second`` of them at most; the others are counted, and said of once a second.
"""

import asyncio
import logging
from collections.abc import Callable
from time import monotonic
from typing import Any

from kvbelt.proxy.records import Record
from kvbelt.telemetry.repeats import REQUESTS

log = logging.getLogger(REQUESTS)

_SUMMARY_SECONDS = 1.0


class RequestLog:
    """Touched from the event loop only."""

    def __init__(self, per_second: float, clock: Callable[[], float] = monotonic) -> None:
        self._per_second = per_second
        self._clock = clock
        self._credit = per_second  # lines that may be written now
        self._counted_at = clock()
        self._more = 0  # requests with a first token that got no line
        self._sum = 0.0  # of their times to first token, in seconds
        self._longest = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def ended(self, record: Record) -> None:
        """A request is over."""
        if not self._per_second:
            return
        now = self._clock()
        self._credit = min(self._per_second, self._credit + (now - self._counted_at) * self._per_second)
        self._counted_at = now
        if self._credit >= 1.0:
            self._credit -= 1.0
            _say(record)
        elif record.first_token is not None:
            self._count(record.first_token - record.began)

    def close(self) -> None:
        """Say what has not been said."""
        if self._timer is not None:
            self._timer.cancel()
            self._summary()

    def _count(self, seconds: float) -> None:
        self._more += 1
        self._sum += seconds
        self._longest = max(self._longest, seconds)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_SUMMARY_SECONDS, self._summary)

    def _summary(self) -> None:
        self._timer = None
        mean, longest = 1e3 * self._sum / self._more, 1e3 * self._longest
        fields = {"requests": self._more, "mean_ms": round(mean, 3), "longest_ms": round(longest, 3)}
        log.info("TTFT of %d more: %.1f ms on average, %.1f ms at most", self._more, mean, longest, extra=fields)
        self._more, self._sum, self._longest = 0, 0.0, 0.0


def _say(record: Record) -> None:
    fields = fields_of(record)
    if record.first_token is None:
        log.info("no token: status %d", record.status, extra=fields)
    else:
        log.info("TTFT %.1f ms", 1e3 * (record.first_token - record.began), extra=fields)


def fields_of(record: Record) -> dict[str, Any]:
    """What a line says of a request; what is not known is left out."""
    fields: dict[str, Any] = {
        "request_id": record.request_id,
        "status": record.status,
        "path": record.path or None,
        "reason": record.reason,
        "after": ",".join(record.after) or None,
        "prefill": record.prefill_worker,
        "decode": record.decode_worker,
        "ttft_ms": _milliseconds(record.began, record.first_token),
        "total_ms": _milliseconds(record.began, record.ended),
    }
    sent = next((attempt for attempt in reversed(record.attempts) if attempt.transfer_id), None)
    if sent is not None:
        fields["transfer_id"] = sent.transfer_id
        if sent.transfer is not None:
            fields["transfer_ms"] = round(1e3 * sent.transfer.seconds, 3)
            fields["transfer_bytes"] = sent.transfer.num_bytes
    return {name: value for name, value in fields.items() if value is not None}


def _milliseconds(began: float, moment: float | None) -> float | None:
    return None if moment is None else round(1e3 * (moment - began), 3)
