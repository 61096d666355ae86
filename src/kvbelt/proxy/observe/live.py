"""What has happened in the last seconds, from the records: rates, percentiles, and who sent what to whom. Pure.

Nothing is counted for it while requests run: it is worked out when somebody looks, over so many records that a look is
cheap. Where the records do not reach back far enough, the window is what they cover.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from kvbelt.proxy.records import Record, Records
from kvbelt.wire.notification import TransferDone

#: Records that one look goes through.
MOST_RECORDS = 2000
_ERRORS = 8
_ERROR_LENGTH = 300


@dataclass(slots=True)
class _Link:
    """One prefill worker's transfers to one decode worker."""

    done: int = 0
    failed: int = 0
    num_bytes: int = 0


@dataclass(slots=True)
class _Window:
    begin: float
    now: float
    arrived: int = 0
    tokens: float = 0.0
    refused: int = 0  #: answers with a status of 400 and above, the client's own leaving included
    first_token: list[float] = field(default_factory=list)
    between_tokens: list[float] = field(default_factory=list)
    transfer: list[float] = field(default_factory=list)
    speed: list[float] = field(default_factory=list)
    legs: Counter[tuple[str, str]] = field(default_factory=Counter)
    links: dict[tuple[str, str], _Link] = field(default_factory=dict)

    def take(self, record: Record) -> None:
        """Count what of a record lies within."""
        self.arrived += record.began >= self.begin
        first = record.time_to_first_token
        if first is not None and record.began + first >= self.begin:
            self.first_token.append(first)
        if record.ended is not None:
            self.refused += record.status >= 400
            between = record.between_tokens
            if between is not None:
                self.between_tokens.append(between)
        self.tokens += self._share_of_tokens(record)
        for attempt in record.attempts:
            if attempt.began >= self.begin:
                self.legs[attempt.leg, attempt.worker] += 1
            told = attempt.transfer
            if told is None or attempt.told is None or attempt.told < self.begin:
                continue
            link = self.links.setdefault((attempt.worker, record.decode_worker or ""), _Link())
            if isinstance(told, TransferDone):
                link.done += 1
                link.num_bytes += told.num_bytes
                self.transfer.append(told.seconds)
                if told.seconds > 0:
                    self.speed.append(told.num_bytes / told.seconds)
            else:
                link.failed += 1

    def _share_of_tokens(self, record: Record) -> float:
        """As if an answer's tokens had come evenly; of answers that are not streamed nothing is known."""
        if not record.pieces or record.first_token is None:
            return 0.0
        end = self.now if record.ended is None else record.ended
        within = end - max(record.first_token, self.begin)
        whole = end - record.first_token
        tokens = record.gaps + 1 if record.ended is not None else record.pieces
        return tokens * (within / whole if whole > 0 else 1.0)


def live_json(records: Records, now: float, seconds: float) -> dict[str, Any]:
    """The last ``seconds`` before ``now`` (both by ``time.monotonic``)."""
    begin = now - seconds
    reach = records.reach(MOST_RECORDS)
    if reach is not None:
        begin = max(begin, reach)
    covered = max(now - begin, 1e-3)
    window = _Window(begin, now)
    for record in records.newest():
        if record.ended is not None and record.ended < begin:
            break
        window.take(record)
    links = [
        {
            "prefill": prefill,
            "decode": decode,
            "transfers_per_second": round(link.done / covered, 3),
            "failures_per_second": round(link.failed / covered, 3),
            "bytes_per_second": round(link.num_bytes / covered),
        }
        for (prefill, decode), link in sorted(window.links.items())
    ]
    legs: dict[str, dict[str, float]] = {"prefill": {}, "decode": {}}
    for (leg, worker), count in window.legs.items():
        legs[leg][worker] = round(count / covered, 3)
    done = sum(link.done for link in window.links.values())
    return {
        "seconds": round(covered, 3),
        "requests_per_second": round(window.arrived / covered, 3),
        "errors_per_second": round(window.refused / covered, 3),
        "tokens_per_second": round(window.tokens / covered, 1),
        "transfers_per_second": round(done / covered, 3),
        "bytes_per_second": round(sum(link.num_bytes for link in window.links.values()) / covered),
        "first_token_ms": _percentiles(window.first_token, 1e3),
        "between_tokens_ms": _percentiles(window.between_tokens, 1e3),
        "transfer_ms": _percentiles(window.transfer, 1e3),
        "transfer_gb_per_second": _percentiles(window.speed, 1e-9),
        "legs": legs,
        "links": links,
        "last_errors": _last_errors(islice(records.newest(), MOST_RECORDS)),
    }


def _percentiles(values: list[float], scale: float) -> dict[str, Any]:
    """By nearest rank; None where there is no value."""
    values.sort()
    count = len(values)

    def at(percent: int) -> float | None:
        return round(values[-(-count * percent // 100) - 1] * scale, 3) if count else None

    return {"count": count, "p50": at(50), "p99": at(99)}


def _last_errors(recent: Iterable[Record]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for record in recent:
        if record.errors:
            error = record.errors[-1][:_ERROR_LENGTH]
            found.append({"time": record.unix_time, "request_id": record.request_id, "error": error})
            if len(found) == _ERRORS:
                break
    return found
