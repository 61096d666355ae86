"""Service levels that are not met, and what the time goes to instead."""

from collections.abc import Iterator, Sequence
from statistics import fmean, median

from kvbelt.metrics.thresholds import TTFT_P99_MS
from kvbelt.ops.doctor.evidence import Evidence, nearest
from kvbelt.ops.doctor.finding import Finding, FindingKind, Severity
from kvbelt.wire.request_record import Placing, RequestRecord

#: With a smaller share of requests within their levels, something is to be changed.
SHARE = 0.9

#: Fewer requests say nothing.
LEAST = 20

_Judged = Sequence[tuple[RequestRecord, Placing]]


def missed(evidence: Evidence) -> Iterator[Finding]:
    """Many of the last requests had their first token too late, or their tokens too slowly."""
    judged = [
        (record, record.placing)
        for record in evidence.records
        if record.placing is not None and record.timings_ms.first_token is not None
    ]
    late = [(record, placing) for record, placing in judged if _late(record, placing)]
    slow = [(record, placing) for record, placing in judged if _slow(record, placing)]
    within = sum(not (_late(*one) or _slow(*one)) for one in judged)
    if len(judged) < LEAST or within >= SHARE * len(judged):
        return
    cause, change = _of_late(late) if len(late) >= len(slow) else _OF_SLOW
    yield Finding(
        "levels_not_met",
        Severity.WARNING,
        f"{within / len(judged):.0%} of {len(judged)} requests were within their service levels",
        cause,
        change,
        (
            f"first token later than the level: {len(late)}",
            f"time between tokens above the level: {len(slow)}",
            *_figures(judged),
        ),
        FindingKind.SYMPTOM,
    )


def late_first_tokens(evidence: Evidence) -> Iterator[Finding]:
    """The slowest of the last first tokens are above the alert's threshold."""
    known = [record for record in evidence.records if record.timings_ms.first_token is not None]
    first = [record.timings_ms.first_token or 0.0 for record in known]
    if not first or (last := nearest(first, 99)) <= TTFT_P99_MS:
        return
    slow = [record for record in known if (record.timings_ms.first_token or 0.0) > TTFT_P99_MS]
    cause, change = _of_slow(slow, evidence)
    slowest = max(slow, key=lambda record: record.timings_ms.first_token or 0.0)
    yield Finding(
        "ttft_high",
        Severity.WARNING,
        f"time to first token: p99 {last:,.0f} ms, median {median(first):,.0f} ms",
        cause,
        change,
        (
            f"{len(slow)} of {len(first)} requests above {TTFT_P99_MS:g} ms: {_parts(slow)}",
            f"the slowest: kvbelt why {slowest.request_id}",
        ),
        FindingKind.SYMPTOM,
    )


#: Where the time to a first token goes, and what to do about each part.
_PARTS: dict[str, tuple[str, str]] = {
    "waited": (
        "requests wait in the proxy, because all workers are busy",
        "add workers: the finding prefill_workers has their number, kvbelt simulate tries others",
    ),
    "queue": ("prompts wait in the worker's queue", "add prefill workers (kvbelt workers add prefill HOST:7100)"),
    "prefill": (
        "computing the prompt takes longest: prompts are long, or the worker is slow",
        "faster workers or a GPU, shorter prompts, or a level that can be met (--slo-ttft-ms)",
    ),
    "kv_wait": ("the decode worker waits for KV", "see the links and buffers above"),
    "decode_queue": ("requests wait in the decode worker", "add decode workers (kvbelt workers add decode HOST:7200)"),
}


def _mean_parts(slow: Sequence[RequestRecord]) -> dict[str, float]:
    """Milliseconds of each part, on average."""
    re_derived = [record for record in slow if record.decision.path == "re-derive"]
    found = {"waited": fmean(record.placing.waited_ms if record.placing is not None else 0.0 for record in slow)}
    for name in ("queue", "prefill", "kv_wait", "decode_queue"):
        # After a first token of the prefill worker, what the decode worker does is not part of it.
        of = re_derived if name in ("kv_wait", "decode_queue") else slow
        found[name] = sum(getattr(record.timings_ms, name) or 0.0 for record in of) / len(slow)
    return found


def _parts(slow: Sequence[RequestRecord]) -> str:
    return "means in ms: " + ", ".join(f"{name} {value:,.0f}" for name, value in _mean_parts(slow).items())


def _of_slow(slow: Sequence[RequestRecord], evidence: Evidence) -> tuple[str, str]:
    parts = _mean_parts(slow)
    whole = fmean(record.timings_ms.first_token or 0.0 for record in slow)
    largest = max(parts, key=lambda name: parts[name])
    if sum(parts.values()) < whole / 2:
        return (
            "most of it is in no part that a worker reports: between the processes, in the proxy, or without a CPU",
            "kvbelt why of the slowest, and the findings cpu_full and proxy_busy",
        )
    cause, change = _PARTS[largest]
    if largest == "prefill" and evidence.host is not None and evidence.here():
        cause += f"; this host's CPU was {evidence.host.cpu_used:.0%} busy"
    return cause, change


def splitting_off(evidence: Evidence) -> Iterator[Finding]:
    """The proxy's shadow account says that splitting loses."""
    now = evidence.placement
    if now is None or now.mode == now.setting:
        return
    yield Finding(
        "splitting_off",
        Severity.NOTE,
        "the proxy splits no request for now, because splitting has lost",
        "in a replay of its last requests more were within their levels without splits; a slow link does that, or "
        "prefill workers that have more to do than decode workers",
        "nothing, if the load is so; else see the links above, and docs/placement.md",
        (f"kvbelt_placement_regret_ratio: {now.regret or 0.0:.2f}",),
    )


def _late(record: RequestRecord, placing: Placing) -> bool:
    return (record.timings_ms.first_token or 0.0) > placing.ttft_level_ms


def _slow(record: RequestRecord, placing: Placing) -> bool:
    level = placing.between_tokens_level_ms
    return level is not None and (record.timings_ms.between_tokens or 0.0) > level


def _of_late(late: _Judged) -> tuple[str, str]:
    alone = [placing for record, placing in late if (record.timings_ms.prefill or 0.0) > placing.ttft_level_ms]
    if 2 * len(alone) > len(late):
        return (
            "computing such a prompt takes longer than the level, even on a worker with nothing else to do",
            "raise --slo-ttft-ms, or send shorter prompts",
        )
    waits = [placing for _, placing in late if placing.waited_ms > placing.ttft_level_ms / 2]
    if 2 * len(waits) > len(late):
        return (
            "requests wait in the proxy, because all workers are busy with prompts",
            "add workers; kvbelt simulate says how many",
        )
    return (
        "requests wait at the workers: they were placed with expectations that were not met",
        "see kvbelt_ttft_prediction_error_seconds, and kvbelt why REQUEST_ID of a slow one",
    )


_OF_SLOW = (
    "workers generate more answers at once than they can at that pace",
    "add decode workers, or raise --slo-itl-ms",
)


def _figures(judged: _Judged) -> Iterator[str]:
    waited = median(placing.waited_ms for _, placing in judged)
    first = median(record.timings_ms.first_token or 0.0 for record, _ in judged)
    split = sum(placing.action == "split" for _, placing in judged) / len(judged)
    yield f"medians in ms: wait in the proxy {waited:,.1f}, first token {first:,.1f}; {split:.0%} were split"
