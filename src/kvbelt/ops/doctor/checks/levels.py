"""Service levels that are not met, and what the time goes to instead."""

from collections.abc import Iterator, Sequence
from statistics import median

from kvbelt.ops.doctor.evidence import Evidence
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
        Severity.NOTE,
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
