"""Where one request's time went: the parts of its record on one axis. Pure.

Workers report how long a part took (``Server-Timing``), and the proxy knows when each leg began and ended. So the parts
of a leg are laid end to end from its beginning: the queue and the prompt's computation of a prefill leg; the wait for
KV, the queue, the scatter into blocks, and the first step of a decode leg. The transfer runs beside the prefill and
ends ``exposed_seconds`` after it. A failed leg is one part. What is left between the parts was spent on the way: in the
proxy, in HTTP, in a process that waited for a CPU.
"""

import math
from dataclasses import dataclass

from kvbelt.proxy.observe.records import Attempt, Record
from kvbelt.wire.notification import TransferDone

ON_THE_WAY = "on the way"  #: the name of the time between two parts

#: A shorter time between two parts is not worth a line.
_LEAST_GAP = 0.0005


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
    answer = _answer(record, found)
    return [*_without_gaps(found, answer), *answer]


def _answer(record: Record, before: list[Span]) -> list[Span]:
    """From the first token; where that is not known, from the end of all other parts."""
    if record.first_token is None or record.ended is None:
        return []
    start, ended = record.time_to_first_token, record.ended - record.began
    if start is None:
        start = min(ended, max(span.start + span.duration for span in before if span.name != "transfer"))
    return [Span("answer", start, ended - start)]


def _without_gaps(found: list[Span], answer: list[Span]) -> list[Span]:
    """With a part for each time in which no other one runs. A transfer is beside the way, not on it."""
    filled: list[Span] = []
    reached = 0.0
    for span in found:
        if span.name != "transfer":
            if span.start - reached > _LEAST_GAP:
                filled.append(Span(ON_THE_WAY, reached, span.start - reached))
            reached = max(reached, span.start + span.duration)
        filled.append(span)
    if answer and answer[0].start - reached > _LEAST_GAP:
        filled.append(Span(ON_THE_WAY, reached, answer[0].start - reached))
    return filled


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
        Span("decode queue", start + waited, queued, attempt),
        Span("KV load", start + waited + queued, loaded, attempt),
        Span("first decode step", start + before, step, attempt),
    ]
