"""A log line for each ended request: TTFT, whole answer, path, workers, transfer. It holds no text of the request.

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
from kvbelt.wire.notification import TransferDone

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
        self._unknown = 0  # requests without a line whose first token was not seen
        self._timer: asyncio.TimerHandle | None = None

    def ended(self, record: Record) -> None:
        if not self._per_second:
            return
        now = self._clock()
        self._credit = min(self._per_second, self._credit + (now - self._counted_at) * self._per_second)
        self._counted_at = now
        if self._credit >= 1.0:
            self._credit -= 1.0
            log.info("%s", _line(record), extra=fields_of(record))
        elif record.first_token is not None:
            if (seconds := record.time_to_first_token) is not None:
                self._more.append(seconds)
            else:
                self._unknown += 1
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(_SUMMARY_SECONDS, self._summary)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._summary()

    def _summary(self) -> None:
        self._timer = None
        if count := len(self._more):
            mean, longest = 1e3 * sum(self._more) / count, 1e3 * max(self._more)
            fields = {"requests": count, "mean_ms": round(mean, 3), "longest_ms": round(longest, 3)}
            log.info("TTFT of %d more: %.1f ms on average, %.1f ms at most", count, mean, longest, extra=fields)
        if self._unknown:
            log.info("TTFT unknown of %d more", self._unknown, extra={"requests": self._unknown})
        self._more.clear()
        self._unknown = 0


def _line(record: Record) -> str:
    """All that a person wants to read in one line."""
    if record.first_token is None:
        said = [f"no token: status {record.status}"]
    else:
        ttft, whole = record.time_to_first_token, (record.ended or record.first_token) - record.began
        said = [
            f"TTFT {1e3 * ttft:.1f} ms" if ttft is not None else "TTFT unknown",
            f"whole answer {1e3 * whole:.1f} ms",
        ]
    if record.path:
        said.append(record.path + (f" ({record.reason})" if record.reason else ""))
    if workers := " -> ".join(filter(None, (record.prefill_worker, record.decode_worker))):
        said.append(workers)
    sent = sent_attempt(record)
    if sent is not None and isinstance(sent.transfer, TransferDone):
        said.append(f"KV exposed {1e3 * sent.transfer.exposed_seconds:.1f} ms")
    return ", ".join(said)


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
        "ttft_ms": ms_between(0.0, record.time_to_first_token),
        "total_ms": ms_between(record.began, record.ended),
    }
    if (sent := sent_attempt(record)) is not None:
        fields["transfer_id"] = sent.transfer_id
        if sent.transfer is not None:
            if isinstance(sent.transfer, TransferDone):
                fields["exposed_ms"] = round(1e3 * sent.transfer.exposed_seconds, 3)
            fields["transfer_ms"] = round(1e3 * sent.transfer.seconds, 3)
            fields["transfer_bytes"] = sent.transfer.num_bytes
    return {name: value for name, value in fields.items() if value is not None}
