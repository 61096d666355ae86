"""Where one request's time went: the parts of its record on one axis. Pure.

Workers report how long a part took (``Server-Timing``), and the proxy knows when each leg began and ended. So the parts
of a leg are laid end to end from its beginning: the queue and the prompt's computation of a prefill leg; the wait for
KV, its scatter into blocks, and the first step of a decode leg. The transfer runs beside the prefill and ends
``exposed_seconds`` after it. A failed leg is one part.
"""

import math
from dataclasses import dataclass

from kvbelt.proxy.observe.records import Attempt, Record
from kvbelt.wire.notification import TransferDone


@dataclass(frozen=True, slots=True)
class Span:
    """One part, in seconds from the request's arrival."""

    name: str
    start: float
    duration: float
    leg: Attempt | None = None  #: that it is a part of
    failed: str | None = None  #: why it failed, of ``wire/reasons.py``


def spans_of(record: Record) -> list[Span]:
    """The known parts, in the order of a request's way; ``answer`` is the last."""
    if not record.attempts:
        return []
    began = record.began
    sent = max(0.0, record.attempts[0].began - began)
    waited = min(record.waited, sent)
    found = [Span("proxy", 0.0, sent - waited)]
    if waited:
        found.append(Span("wait for a worker", sent - waited, waited))
    for attempt in record.attempts:
        start = attempt.began - began
        if attempt.reason is not None:
            ended = attempt.ended if attempt.ended is not None else attempt.began
            found.append(Span(f"{attempt.leg} leg", start, ended - attempt.began, attempt, attempt.reason))
        elif attempt.leg == "prefill":
            found += _prefill(attempt, start)
        elif record.prefill_worker is None or record.path == "local":
            found += _computed(attempt, start)
        else:
            found += _decode(record, attempt, start)
    if record.first_token is not None and record.ended is not None:
        found.append(Span("answer", record.first_token - began, record.ended - record.first_token))
    return found


def parse_server_timing(header: bytes) -> dict[str, float]:
    """``Server-Timing: queue;dur=1.5, prefill;dur=20`` → milliseconds by name. Malformed entries are left out."""
    found: dict[str, float] = {}
    for entry in header.decode("latin-1").split(","):
        name, *params = (part.strip() for part in entry.split(";"))
        for param in params:
            label, _, value = param.partition("=")
            if label.strip().lower() == "dur":
                try:
                    duration = float(value.strip().strip('"'))
                except ValueError:
                    continue
                if math.isfinite(duration):
                    found[name] = duration
    return found


def _prefill(attempt: Attempt, start: float) -> list[Span]:
    found = _computed(attempt, start)
    told = attempt.transfer
    if told is not None:
        computed = found[-1].start + found[-1].duration if found else start
        exposed, failed = (told.exposed_seconds, None) if isinstance(told, TransferDone) else (0.0, told.reason)
        end = computed + exposed
        found.append(Span("transfer", max(0.0, end - told.seconds), told.seconds, attempt, failed))
    return found


def _computed(attempt: Attempt, start: float) -> list[Span]:
    told = parse_server_timing(attempt.timing)
    if "prefill" in told:
        queue = told.get("queue", 0.0) / 1e3
        return [
            Span("queue", start, queue, attempt),
            Span("prefill", start + queue, told["prefill"] / 1e3, attempt),
        ]
    if attempt.answered is None:
        return []
    return [Span(f"{attempt.leg} leg", start, attempt.answered - attempt.began, attempt)]


def _decode(record: Record, attempt: Attempt, start: float) -> list[Span]:
    """A decode leg over transferred KV."""
    if attempt.answered is None:
        return []
    told = parse_server_timing(attempt.timing)
    headers = attempt.answered - attempt.began
    if not told:  # not a server of ours: its headers leave before its first output
        found = [Span("decode leg", start, headers, attempt)]
        if record.decode_first is not None:
            step = max(0.0, record.decode_first - attempt.answered)
            found.append(Span("first decode step", start + headers, step, attempt))
        return found
    waited, queued, loaded = (told.get(name, 0.0) / 1e3 for name in ("kv", "queue", "load"))
    before = waited + queued + loaded
    step = told["prefill"] / 1e3 if "prefill" in told else max(0.0, headers - before)
    return [
        Span("KV wait", start, waited, attempt),
        Span("KV load", start + waited + queued, loaded, attempt),
        Span("first decode step", start + before, step, attempt),
    ]
