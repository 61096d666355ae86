"""All findings of a run, and the invariants that it checks. Pure."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from kvbelt.ops.chaos.effect import Effect
from kvbelt.ops.chaos.holdings import Holdings
from kvbelt.ops.chaos.ledger import Failure
from kvbelt.ops.chaos.memory import Growth
from kvbelt.ops.chaos.monitor import UnexpectedExit
from kvbelt.ops.chaos.recovery import Injected, Skipped
from kvbelt.ops.chaos.verdict import Outcome

#: After the load has ended, nothing may be held for longer than this.
HOLD_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Result:
    deployment: str  #: ``2p2d`` or a URL
    model: str
    seed: int
    seconds: float  #: of load
    rate: float  #: requests/s
    reference: str  #: the server that gave the reference answers
    questions: int
    ambiguous: int  #: questions left out because the reference server answered them in two ways
    impossible: Mapping[str, str]  #: kinds of faults that could not be done here, and why
    injected: tuple[Injected, ...]
    skipped: tuple[Skipped, ...]
    recovered: Mapping[int, float]  #: seconds, by the fault's number
    outcomes: Counter[Outcome]
    errors: Counter[str]
    paths: Counter[str]
    not_sent: int
    failures: tuple[Failure, ...]
    holdings: Mapping[str, Holdings]  #: when nothing was held any more, or after ``HOLD_SECONDS``
    held_seconds: float  #: after the load, until nothing was held any more
    quarantined_most: int
    queued: int
    growths: tuple[Growth, ...]
    deaths: tuple[UnexpectedExit, ...]
    idle: tuple[str, ...]  #: workers without a part in a right answer after the last fault
    not_back: Mapping[str, str]
    effect: Effect | None
    lag: float
    interrupted: bool

    @property
    def requests(self) -> int:
        return sum(self.outcomes.values())


@dataclass(frozen=True, slots=True)
class Invariant:
    """A condition that must hold; ``found`` counts violations, or right answers."""

    name: str
    found: int
    held: bool
    detail: str = ""


def invariants(result: Result) -> list[Invariant]:
    """All invariants, in the report's order."""
    outcomes, holdings = result.outcomes, result.holdings
    silent = [name for name, held in holdings.items() if held.state != "ready"]
    staging = sum(held.staging_bytes + held.quarantined_bytes for held in holdings.values())
    blocks = sum(held.blocks for held in holdings.values())
    open_ones = sum(held.transfers + held.requests for held in holdings.values())
    growing = [f"{g.process} (pid {g.pid})" for g in result.growths if g.unbounded]
    absent = sorted({*silent, *result.not_back, *result.idle})
    return [
        _none("answers that differ from the aggregated server's", outcomes[Outcome.WRONG]),
        _none("requests without an answer or an error 2 s after their deadline", outcomes[Outcome.HANG]),
        _none("answers cut off without an error", outcomes[Outcome.TRUNCATED] + outcomes[Outcome.DROPPED]),
        _none(
            "answers in no shape of OpenAI's, or refused without cause",
            outcomes[Outcome.MALFORMED] + outcomes[Outcome.REFUSED],
        ),
        _none("internal errors (status 500)", outcomes[Outcome.INTERNAL]),
        _none(f"staging bytes held {HOLD_SECONDS:g} s after the load", staging),
        _none("leaked KV blocks of the engines", blocks),
        _none("transfers and requests still open", open_ones),
        _none("processes that exited unexpectedly", len(result.deaths), ", ".join(d.process for d in result.deaths)),
        _none("workers that do not serve after the faults", len(absent), ", ".join(absent)),
        _none("processes whose memory grows", len(growing), ", ".join(growing)),
        Invariant("right answers", outcomes[Outcome.RIGHT], outcomes[Outcome.RIGHT] > 0),
    ]


def _none(name: str, found: int, detail: str = "") -> Invariant:
    return Invariant(name, found, found == 0, detail)
