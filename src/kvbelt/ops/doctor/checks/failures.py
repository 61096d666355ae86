"""Failures of the last minutes by reason, and where the time to first token goes."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from statistics import median

from kvbelt.metrics.thresholds import TRANSFER_EXPOSED_MS
from kvbelt.ops.doctor.checks.identity import DATA_PATH, of_data_path
from kvbelt.ops.doctor.evidence import Evidence, nearest
from kvbelt.ops.doctor.finding import Finding, FindingKind, Severity
from kvbelt.wire.reasons import Where, find
from kvbelt.wire.request_record import DoneTransfer, RequestRecord

#: Paths that are chosen without a fault.
_CHOSEN = {"first-token", "re-derive", "prefill-only"}

#: The parts of the time to first token, in their order.
_PARTS = ("proxy", "queue", "prefill", "kv_wait", "load", "decode_queue", "first_decode_step")

_MOST_REASONS = 6

#: Reasons for which one worker answers a request although nothing is wrong; the alert KVBeltLocalFallback leaves them
#: out as well.
ON_PURPOSE = frozenset({
    "calm", "prefill_busy", "probe", "placement_whole", "splitting_loses", "short_prompt", "many_prompts", "no_tokens",
    "may_be_refused", "no_prompt", "prompt_logprobs", "routed_experts", "decode_has_no_receiver",
})  # fmt: skip
LOCAL_SHARE = 0.1
_DAMAGED = {"digest", "no_digest"}
_LEAST = 10  #: fewer requests say nothing


def recent(evidence: Evidence) -> Iterator[Finding]:
    """Requests that failed, or took another path because of a fault."""
    if not evidence.records_shown and not evidence.proxy_answer:
        yield Finding(
            "no_records",
            Severity.NOTE,
            "the proxy does not show its records without its key",
            "the last requests are unknown; queues, links and workers were checked",
            "give its key: --admin-key-file FILE, or export KVBELT_ADMIN_KEY_FILE=FILE",
        )
    errors = [record for record in evidence.records if record.status >= 500]
    troubled = [record for record in evidence.records if _reasons(record) and record not in errors]
    if not errors and not troubled:
        return
    counts: Counter[str] = Counter()
    example: dict[str, str] = {}
    where: dict[str, set[str]] = defaultdict(set)
    for record in (*errors, *troubled):
        for reason, worker in _reasons(record):
            counts[reason] += 1
            example.setdefault(reason, record.request_id)
            where[reason].add(worker)
    lines = []
    for reason, count in counts.most_common(_MOST_REASONS):
        known = find(reason)
        meaning = f" ({known.meaning})" if known is not None else ""
        workers = ", ".join(sorted(filter(None, where[reason])))
        lines.append(f"{count} times {reason}{meaning}{f' at {workers}' if workers else ''}, such as {example[reason]}")
    said_by = (attempt.detail for record in (*errors, *troubled) for attempt in record.attempts if attempt.reason)
    data_path = any(map(of_data_path, said_by))
    total = len(evidence.records)
    said = f"{len(errors)} of {total} requests of the last minutes got an error" if errors else (
        f"{len(troubled)} of {total} requests of the last minutes took another path because of a fault"
    )  # fmt: skip
    yield Finding(
        "failures",
        Severity.ERROR if errors else Severity.WARNING,
        said + (f", {len(troubled)} more took another path" if errors and troubled else ""),
        "the findings above explain them; docs/failures.md explains every reason",
        DATA_PATH if data_path else f"kvbelt why {next(iter(example.values()), 'REQUEST_ID')}",
        tuple(lines),
        FindingKind.SYMPTOM,
    )


def damaged(evidence: Evidence) -> Iterator[Finding]:
    """KV whose digest was wrong when it had landed."""
    found = [
        (record.request_id, f"{attempt.worker} → {record.workers.decode}: {reason}")
        for record in evidence.records
        for attempt in record.attempts
        for reason in (attempt.reason or "", getattr(attempt.transfer, "reason", ""))
        if reason.removeprefix("transfer_") in _DAMAGED
    ]
    if found:
        yield Finding(
            "damaged_kv",
            Severity.ERROR,
            f"KV of {len(dict(found))} requests arrived damaged, and was not used",
            "memory, a card or the network between these two workers changes data",
            "remove both workers (kvbelt workers remove), test memory and network; pd_verify: always in every file "
            "meanwhile",
            tuple(dict.fromkeys(f"{where}, such as {request}" for request, where in found)),
        )


def local(evidence: Evidence) -> Iterator[Finding]:
    """Many requests were answered by one worker, and not because that was better."""
    known = [record for record in evidence.records if record.decision.path]
    reasons = Counter(
        record.decision.reason or "unknown"
        for record in known
        if record.decision.path == "local" and record.decision.reason not in ON_PURPOSE
    )
    if len(known) < _LEAST or sum(reasons.values()) <= LOCAL_SHARE * len(known):
        return
    yield Finding(
        "local_fallback",
        Severity.WARNING,
        f"{sum(reasons.values())} of {len(known)} requests of the last minutes were computed by one worker, "
        "although they were to be split",
        "prompts then compete with answers on the decode workers",
        "the findings above say why; docs/failures.md explains every reason",
        tuple(
            f"{count} times {reason}" + (f" ({found.meaning})" if (found := find(reason)) is not None else "")
            for reason, count in reasons.most_common(_MOST_REASONS)
        ),
        FindingKind.SYMPTOM,
    )


def late_transfers(evidence: Evidence) -> Iterator[Finding]:
    """A tenth of the transfers end long after their prompt's computation."""
    exposed = [record.transfer.exposed_ms for record in evidence.records if isinstance(record.transfer, DoneTransfer)]
    late = [value for value in exposed if value > TRANSFER_EXPOSED_MS]
    if not late or nearest(exposed, 90) <= TRANSFER_EXPOSED_MS:
        return
    yield Finding(
        "late_transfers",
        Severity.WARNING,
        f"{len(late)} of {len(exposed)} transfers ended more than {TRANSFER_EXPOSED_MS:g} ms after their prompt's "
        "computation",
        "the client waits for the second token that long; the first findings say why: a slow link, a full receive "
        "buffer, or no CPU",
        "with none of these above, see where the time went: kvbelt why REQUEST_ID",
        (f"exposed: median {median(exposed):,.0f} ms, p90 {nearest(exposed, 90):,.0f} ms",),
        FindingKind.SYMPTOM,
    )


def _reasons(record: RequestRecord) -> list[tuple[str, str]]:
    """Reasons, each with the worker concerned."""
    found = [(attempt.reason, attempt.worker) for attempt in record.attempts if attempt.reason]
    chosen = record.decision.reason
    known = find(chosen) if chosen else None
    if (
        not found
        and chosen
        and record.decision.path not in _CHOSEN
        and chosen in ("no_prefill_worker", "pairs_refused", "decode_has_no_receiver")
    ):
        found.append((chosen, record.workers.decode or ""))
    if not found and record.kv is not None and record.kv.startswith("recomputed"):
        found.append((record.kv.partition("reason=")[2] or "kv_lost", record.workers.decode or ""))
    if not found and record.status >= 500:
        word = chosen if chosen and known is not None and Where.ERROR in known.where else f"status_{record.status}"
        found.append((word, record.workers.decode or ""))
    return found


def where_time_goes(evidence: Evidence) -> Iterator[Finding]:
    """Medians of the parts of the time to first token."""
    first = [value for record in evidence.records if (value := record.timings_ms.first_token) is not None]
    if len(first) < 5:
        return
    last = nearest(first, 99)
    parts = []
    for name in _PARTS:
        values = [value for record in evidence.records if (value := getattr(record.timings_ms, name)) is not None]
        if values:
            parts.append(f"{name} {median(values):,.1f}")
    yield Finding(
        "ttft",
        Severity.NOTE,
        f"time to first token: median {median(first):,.0f} ms, p99 {last:,.0f} ms, of {len(first)} requests",
        "for a single request: kvbelt why REQUEST_ID",
        "",
        ("medians in ms: " + ", ".join(parts),),
    )
