"""The figures of one simulated load."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvbelt.simulate.load import Request


@dataclass(frozen=True, slots=True)
class Judged:
    """The levels that requests are judged by: A is TTFT and TPOT, B is TTFT and each request's own ITL p99. Seconds."""

    ttft: float = 0.5
    tpot: float = 0.025
    itl: float = 0.05


@dataclass(frozen=True, slots=True)
class Outcome:
    """Milliseconds and percent."""

    policy: str
    requests: int
    ttft_p50: float
    ttft_p99: float
    ttft_max: float
    tpot_p50: float
    tpot_p99: float
    itl_p50: float
    itl_p99: float
    within_a: float
    within_b: float
    tokens_per_second: float
    actions: dict[str, float]
    busiest: float  #: seconds that the busiest worker computed, over the mean of all


DEFAULT_JUDGED = Judged()


def outcome_of(
    policy: str, requests: Sequence[Request], judged: Judged = DEFAULT_JUDGED, busy: Sequence[float] = (1.0,)
) -> Outcome:
    """``busy``: the seconds that each worker computed."""
    if unanswered := sum(not request.ended for request in requests):
        raise RuntimeError(f"{unanswered} of {len(requests)} requests were never answered")
    ttfts, tpots, within_a, within_b = [], [], 0, 0
    gaps = Counter[float]()
    actions = Counter[str]()
    for request in requests:
        assert request.first_token is not None
        ttft = request.first_token - request.at
        tpot = (request.last_token - request.first_token) / max(1, request.output - 1)
        ttfts.append(ttft)
        tpots.append(tpot)
        within_a += ttft <= judged.ttft and tpot <= judged.tpot
        within_b += ttft <= judged.ttft and _percentile_of_gaps(request.gaps, 0.99) <= judged.itl
        for seconds, number in request.gaps:
            gaps[round(seconds, 4)] += number
        actions[request.action] += 1
    number = len(requests)
    span = max(request.last_token for request in requests) - min(request.at for request in requests)
    tokens = sum(request.prompt + request.output for request in requests)
    all_gaps = sorted(gaps.items())
    ttfts.sort()
    tpots.sort()
    return Outcome(
        policy=policy,
        requests=number,
        ttft_p50=1e3 * percentile(ttfts, 0.5),
        ttft_p99=1e3 * percentile(ttfts, 0.99),
        ttft_max=1e3 * ttfts[-1],
        tpot_p50=1e3 * percentile(tpots, 0.5),
        tpot_p99=1e3 * percentile(tpots, 0.99),
        itl_p50=1e3 * _percentile_of_gaps(all_gaps, 0.5),
        itl_p99=1e3 * _percentile_of_gaps(all_gaps, 0.99),
        within_a=100 * within_a / number,
        within_b=100 * within_b / number,
        tokens_per_second=tokens / span,
        actions={name: 100 * times / number for name, times in sorted(actions.items())},
        busiest=max(busy) * len(busy) / sum(busy),
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value at ``int(share * n)`` of sorted ones."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _percentile_of_gaps(gaps: Iterable[tuple[float, int]], share: float) -> float:
    ordered = sorted(gaps)
    number = sum(times for _, times in ordered)
    rank = min(number - 1, int(share * number))
    for seconds, times in ordered:
        rank -= times
        if rank < 0:
            return seconds
    return 0.0
