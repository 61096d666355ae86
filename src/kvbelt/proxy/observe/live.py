"""Rates and percentiles of the last seconds, from the records. Pure.

Nothing is counted while requests run. The statistics are computed for each question, over a bounded number of records,
so that a question is cheap. The window is shorter where the records do not reach back far enough.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

from kvbelt.proxy.observe.records import Record, Records
from kvbelt.wire.console import LastError, LegRates, LinkRates, LiveStats, Percentiles
from kvbelt.wire.notification import TransferDone

MOST_RECORDS = 2000  #: records that one answer is computed from
_ERRORS = 8
_ERROR_LENGTH = 300


@dataclass(slots=True)
class _Link:
    done: int = 0
    failed: int = 0
    num_bytes: int = 0


@dataclass(slots=True)
class _Window:
    begin: float
    now: float
    arrived: int = 0
    tokens: float = 0.0
    refused: int = 0  #: answers with a status of 400 and above; 499, for a client that left, included
    first_token: list[float] = field(default_factory=list)
    between_tokens: list[float] = field(default_factory=list)
    transfer: list[float] = field(default_factory=list)
    exposed: list[float] = field(default_factory=list)
    speed: list[float] = field(default_factory=list)
    legs: Counter[tuple[str, str]] = field(default_factory=Counter)
    links: dict[tuple[str, str], _Link] = field(default_factory=dict)

    def add(self, record: Record) -> None:
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
            if told is None or attempt.transfer_at is None or attempt.transfer_at < self.begin:
                continue
            link = self.links.setdefault((attempt.worker, record.decode_worker or ""), _Link())
            if isinstance(told, TransferDone):
                link.done += 1
                link.num_bytes += told.num_bytes
                self.transfer.append(told.seconds)
                self.exposed.append(told.exposed_seconds)
                if told.seconds > 0:
                    self.speed.append(told.num_bytes / told.seconds)
            else:
                link.failed += 1

    def _share_of_tokens(self, record: Record) -> float:
        """As if a streamed answer's tokens had come evenly. Of other answers nothing is known."""
        if not record.pieces or record.first_token is None:
            return 0.0
        end = self.now if record.ended is None else record.ended
        within = end - max(record.first_token, self.begin)
        whole = end - record.first_token
        tokens = record.gaps + 1 if record.ended is not None else record.pieces
        return tokens * (within / whole if whole > 0 else 1.0)


def live_stats(records: Records, now: float, seconds: float) -> LiveStats:
    """The last ``seconds`` before ``now``, which is a moment of ``time.monotonic``."""
    begin = now - seconds
    reach = records.reach(MOST_RECORDS)
    if reach is not None:
        begin = max(begin, reach)
    covered = max(now - begin, 1e-3)
    window = _Window(begin, now)
    for record in records.newest():
        if record.ended is not None and record.ended < begin:
            break
        window.add(record)

    def rate(count: float) -> float:
        return round(count / covered, 3)

    legs = LegRates({}, {})
    for (leg, worker), count in window.legs.items():
        (legs.prefill if leg == "prefill" else legs.decode)[worker] = rate(count)
    links = window.links.values()
    return LiveStats(
        seconds=round(covered, 3),
        requests_per_second=rate(window.arrived),
        errors_per_second=rate(window.refused),
        tokens_per_second=round(window.tokens / covered, 1),
        transfers_per_second=rate(sum(link.done for link in links)),
        bytes_per_second=round(sum(link.num_bytes for link in links) / covered),
        first_token_ms=_percentiles(window.first_token, 1e3),
        between_tokens_ms=_percentiles(window.between_tokens, 1e3),
        transfer_ms=_percentiles(window.transfer, 1e3),
        transfer_gb_per_second=_percentiles(window.speed, 1e-9),
        legs=legs,
        links=[
            LinkRates(
                prefill=prefill,
                decode=decode,
                transfers_per_second=rate(link.done),
                failures_per_second=rate(link.failed),
                bytes_per_second=round(link.num_bytes / covered),
            )
            for (prefill, decode), link in sorted(window.links.items())
        ],
        transfer_exposed_ms=_percentiles(window.exposed, 1e3),
        last_errors=_last_errors(islice(records.newest(), MOST_RECORDS)),
    )


def _percentiles(values: list[float], scale: float) -> Percentiles:
    values.sort()
    count = len(values)

    def at(percent: int) -> float | None:
        return round(values[-(-count * percent // 100) - 1] * scale, 3) if count else None

    return Percentiles(count, at(50), at(99), at(90))


def _last_errors(recent: Iterable[Record]) -> list[LastError]:
    failed = (record for record in recent if record.errors)
    return [
        LastError(time=record.unix_time, request_id=record.request_id, error=record.errors[-1][:_ERROR_LENGTH])
        for record in islice(failed, _ERRORS)
    ]
