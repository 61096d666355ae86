"""How many workers the load of the last minutes needs."""

import math
from collections.abc import Iterator
from statistics import fmean

from kvbelt.ops.doctor.evidence import Evidence
from kvbelt.ops.doctor.finding import Finding, Severity

#: Of a worker's time. Arrivals are uneven, and above it queues grow long.
BUSY_ENOUGH = 0.7
#: Fewer prompts, or in a shorter time, say nothing.
LEAST = 20
LEAST_SECONDS = 5.0


def prefill_workers(evidence: Evidence) -> tuple[int, str] | None:
    """The number of prefill workers that the last prompts needed, and how it follows. None: too few prompts."""
    times = [one.time for one in evidence.records]
    prompts = [one.timings_ms.prefill for one in evidence.records if one.timings_ms.prefill is not None]
    seconds = max(times, default=0.0) - min(times, default=0.0)
    if len(prompts) < LEAST or seconds < LEAST_SECONDS:
        return None
    # Those that still wait will be computed as well.
    rate, each = len(evidence.records) / seconds, fmean(prompts) / 1000
    wanted = max(1, math.ceil(rate * each / BUSY_ENOUGH))
    return wanted, (
        f"{rate:.3g} prompts a second, each computed in {each * 1000:,.0f} ms, are {rate * each:.2f} workers at work; "
        f"at {BUSY_ENOUGH:.0%} each that is {wanted}"
    )


def prefill(evidence: Evidence) -> Iterator[Finding]:
    """The number of prefill workers against the prompts of the last minutes."""
    found = prefill_workers(evidence)
    have = len([worker for worker in evidence.of("prefill") if worker.state == "ready"])
    if found is None or not have:
        return
    wanted, how = found
    short = wanted > have
    yield Finding(
        "prefill_workers",
        Severity.WARNING if short else Severity.NOTE,
        f"the prompts of the last minutes need {wanted} prefill workers; there {'is' if have == 1 else 'are'} {have}",
        "with fewer, prompts queue, or decode workers compute them beside their answers"
        if short
        else "by the time that prompts took, without their waits",
        f"add {wanted - have}: kvbelt workers add prefill HOST:7100" if short else "",
        (how,),
    )
