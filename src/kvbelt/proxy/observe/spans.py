"""Where one request's time went: the parts of its record on one axis. Pure.

Workers tell how long a part took (``Server-Timing``), the proxy knows when each leg began and ended. So parts are laid
end to end from the beginning of their leg: the queue and the prompt's computation of a prefill leg; the wait for KV,
its scatter into blocks, and the first step of a decode leg. The transfer runs beside the prefill; it ends
``exposed_seconds`` after it. A leg that failed is one part.
"""

import math
from dataclasses import dataclass

from kvbelt.proxy.records import Attempt, Record
from kvbelt.wire.notification import TransferDone


@dataclass(frozen=True, slots=True)
class Span:
    """One part, in seconds from the request's arrival."""

    name: str
    start: float
    duration: float
    worker: str | None = None
    failed: str | None = None  #: why it failed, of ``wire/reasons.py``


def spans_of(record: Record) -> list[Span]:
    """The parts that are known, in the order in which a request walks through them; ``answer`` is the last."""
    if not record.attempts:
        return []
    began = record.began
    found = [Span("proxy", 0.0, max(0.0, record.attempts[0].began - began))]
    for attempt in record.attempts:
        start = attempt.began - began
        if attempt.reason is not None:
            found.append(_failed(attempt, start))
        elif attempt.leg == "prefill":
            found += _prefill(attempt, start)
        elif record.prefill_worker is None or record.path == "local":
            found += _computed(attempt, start)
        else:
            found += _decode(record, attempt, start)
    if record.first_token is not None and record.ended is not None:
        found.append(Span("answer", record.first_token - began, record.ended - record.first_token))
    return found


def timings(header: bytes) -> dict[str, float]:
    """``Server-Timing: queue;dur=1.5, prefill;dur=20`` → milliseconds by name. What does not parse is left out."""
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


def _failed(attempt: Attempt, start: float) -> Span:
    ended = attempt.ended if attempt.ended is not None else attempt.began
    return Span(f"{attempt.leg} leg", start, ended - attempt.began, attempt.worker, attempt.reason)


def _prefill(attempt: Attempt, start: float) -> list[Span]:
    found = _computed(attempt, start)
    told = attempt.transfer
    if told is not None:
        done = isinstance(told, TransferDone)
        computed = found[-1].start + found[-1].duration if found else start
        end = computed + (told.exposed_seconds if isinstance(told, TransferDone) else 0.0)
        failed = None if done else getattr(told, "reason", "failed")
        found.append(Span("transfer", max(0.0, end - told.seconds), told.seconds, attempt.worker, failed))
    return found


def _computed(attempt: Attempt, start: float) -> list[Span]:
    """A prompt's computation, on either kind of worker."""
    told = timings(attempt.timing)
    if "prefill" in told:
        queue = told.get("queue", 0.0) / 1e3
        return [
            Span("queue", start, queue, attempt.worker),
            Span("prefill", start + queue, told["prefill"] / 1e3, attempt.worker),
        ]
    if attempt.answered is None:
        return []
    return [Span(f"{attempt.leg} leg", start, attempt.answered - attempt.began, attempt.worker)]


def _decode(record: Record, attempt: Attempt, start: float) -> list[Span]:
    """A decode leg over transferred KV."""
    if attempt.answered is None:
        return []
    told, worker = timings(attempt.timing), attempt.worker
    headers = attempt.answered - attempt.began
    if not told:  # another's server, whose headers leave before its first output
        found = [Span("decode leg", start, headers, worker)]
        if record.decode_first is not None:
            step = max(0.0, record.decode_first - attempt.answered)
            found.append(Span("first decode step", start + headers, step, worker))
        return found
    waited, queued, loaded = (told.get(name, 0.0) / 1e3 for name in ("kv", "queue", "load"))
    before = waited + queued + loaded
    step = told["prefill"] / 1e3 if "prefill" in told else max(0.0, headers - before)
    return [
        Span("KV wait", start, waited, worker),
        Span("KV load", start + waited + queued, loaded, worker),
        Span("first decode step", start + before, step, worker),
    ]
