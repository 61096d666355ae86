"""The cost of a decision: what placement takes of the proxy's core for each request, by the number of workers.

    python -m benchmarks.placement [--requests 4000] [--rounds 5] [--json FILE]

Requests arrive as a Poisson process at a share of what the workers can do. A decision is ``submit`` and ``dispatch`` of
a request that arrives; the rest is its first token, its end, and the dispatches for requests that waited. Workers have
costs of their own, so that no two are alike. Medians over all decisions of a round, of the best round; CPU time.
"""

import heapq
import random
import statistics
import time
from dataclasses import dataclass, replace

from benchmarks._run import finish, note, parser, table, verdict

from kvbelt.routing.booking import Booking, Demand, WorkerBook
from kvbelt.routing.levels import ServiceLevels
from kvbelt.routing.placement import Placement
from kvbelt.simulate.model import learned_costs
from kvbelt.simulate.profiles import H200_LLAMA_8B
from kvbelt.wire.health import Role

#: Microseconds of a decision, by the number of workers.
TARGETS = {2: 15.0, 1000: 50.0}
#: What a pair of workers can do, in requests a second of 7,500 tokens in and 200 out.
CAPACITY = 7.0
ANSWER_SECONDS = 1.2
WARM_UP_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Cost:
    """Microseconds."""

    workers: int
    load: float
    decision: float
    request: float  #: all calls for a request, on average


def fleet(pairs: int, chance: random.Random) -> Placement:
    placement, costs = Placement(), learned_costs(H200_LLAMA_8B.engine)
    for number in range(2 * pairs):
        book = WorkerBook(f"w{number}", Role.PREFILL if number % 2 else Role.DECODE)
        book.costs = replace(costs, token=costs.token * chance.uniform(0.95, 1.05))
        book.most_requests, book.kv_capacity = 64, 780_000
        placement.join(book)
    return placement


def measure(pairs: int, load: float, requests: int, seed: int) -> Cost:
    """Run a fleet for so many requests, after some to warm it up."""
    chance, clock = random.Random(seed), time.process_time
    placement, levels, rate = fleet(pairs, chance), ServiceLevels(), CAPACITY * pairs * load
    warm_up = round(WARM_UP_SECONDS * rate) + 50
    events: list[tuple[float, int, bool, Booking]] = []  # first tokens and ends
    decisions: list[float] = []
    now, total, number = 0.0, 0.0, 0

    def place(at: float) -> None:
        nonlocal number
        for _, booking in placement.dispatch(at):
            assert booking is not None
            number += 1
            heapq.heappush(events, (booking.predicted, number, False, booking))

    for request in range(warm_up + requests):
        now += chance.expovariate(rate)
        while events and events[0][0] <= now:
            at, _, ended, booking = heapq.heappop(events)
            began = clock()
            if ended:
                placement.end(booking, at)
            else:
                placement.first_token(booking, at)
            if placement.waiting:
                place(at)
            if request >= warm_up:
                total += clock() - began
            if not ended:
                number += 1
                heapq.heappush(events, (at + ANSWER_SECONDS, number, True, booking))
        demand = Demand(7500, 200, now, levels)
        began = clock()
        placement.submit(demand)
        place(now)
        took = clock() - began
        if request >= warm_up:
            decisions.append(took)
            total += took
    return Cost(2 * pairs, load, 1e6 * statistics.median(decisions), 1e6 * total / requests)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--requests", type=int, default=4000, metavar="N", help="of a round (default: %(default)s)")
    arguments.add_argument("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    args = arguments.parse_args()
    costs = []
    for pairs in (1, 10, 100, 500):
        for load in (0.3, 0.7):
            rounds = [measure(pairs, load, args.requests, seed) for seed in range(args.rounds)]
            costs.append(min(rounds, key=lambda cost: cost.decision))
            note(f"{costs[-1]}")
    rows = [(f"{c.workers:,}", f"{c.load:.0%}", f"{c.decision:.1f}", f"{c.request:.1f}") for c in costs]
    lines = [table(("workers", "load", "a decision, µs", "a request, µs"), rows), ""]
    for workers, target in TARGETS.items():
        most = max(cost.decision for cost in costs if cost.workers == workers)
        lines.append(verdict(most <= target, f"{most:.1f} µs a decision with {workers:,} workers, target {target:g}"))
    finish("placement", "\n".join(lines), costs, args.json)


if __name__ == "__main__":
    main()
