"""A log line for each ended request: TTFT, path, workers, transfer. It never holds any text of the request.

``tail -f proxy.log | grep TTFT`` is what people watch. A line costs as much as a good part of a request, so at most
``per_second`` are written; the other requests are counted, and summed up in one line a second.
"""

import asyncio
import logging
from collections.abc import Callable
from time import monotonic
from typing import Any

from kvbelt.proxy.observe.record_view import ms_between, sent_attempt
from kvbelt.proxy.observe.records import Record
from kvbelt.telemetry.rate_limit import REQUESTS

log = logging.getLogger(REQUESTS)

_SUMMARY_SECONDS = 1.0


class RequestLog:
    """For the event loop's thread only."""

    def __init__(self, per_second: float, clock: Callable[[], float] = monotonic) -> None:
        self._per_second = per_second
        self._clock = clock
        self._credit = per_second  # lines that may be written now
        self._counted_at = clock()
        self._more: list[float] = []  # times to first token, in seconds, of requests without a line
        self._timer: asyncio.TimerHandle | None = None

    def ended(self, record: Record) -> None:
        if not self._per_second:
            return
        now = self._clock()
        self._credit = min(self._per_second, self._credit + (now - self._counted_at) * self._per_second)
        self._counted_at = now
        if self._credit >= 1.0:
            self._credit -= 1.0
            fields = fields_of(record)
            if record.first_token is None:
                log.info("no token: status %d", record.status, extra=fields)
            else:
                log.info("TTFT %.1f ms", 1e3 * (record.first_token - record.began), extra=fields)
        elif record.first_token is not None:
            self._more.append(record.first_token - record.began)
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(_SUMMARY_SECONDS, self._summary)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._summary()

    def _summary(self) -> None:
        self._timer = None
        count, mean, longest = len(self._more), 1e3 * sum(self._more) / len(self._more), 1e3 * max(self._more)
        fields = {"requests": count, "mean_ms": round(mean, 3), "longest_ms": round(longest, 3)}
        log.info("TTFT of %d more: %.1f ms on average, %.1f ms at most", count, mean, longest, extra=fields)
        self._more.clear()


def fields_of(record: Record) -> dict[str, Any]:
    """The fields of a request's line; unknown ones are left out."""
    fields: dict[str, Any] = {
        "request_id": record.request_id,
        "status": record.status,
        "path": record.path or None,
        "reason": record.reason,
        "after": ",".join(record.after) or None,
        "prefill": record.prefill_worker,
        "decode": record.decode_worker,
        "ttft_ms": ms_between(record.began, record.first_token),
        "total_ms": ms_between(record.began, record.ended),
    }
    if (sent := sent_attempt(record)) is not None:
        fields["transfer_id"] = sent.transfer_id
        if sent.transfer is not None:
            fields["transfer_ms"] = round(1e3 * sent.transfer.seconds, 3)
            fields["transfer_bytes"] = sent.transfer.num_bytes
    return {name: value for name, value in fields.items() if value is not None}
