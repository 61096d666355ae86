"""Everything that a run found, and the invariants that it proves or breaks. Pure."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from kvbelt.ops.chaos.effect import Effect
from kvbelt.ops.chaos.holdings import Holdings
from kvbelt.ops.chaos.ledger import Failure
from kvbelt.ops.chaos.memory import Growth
from kvbelt.ops.chaos.recovery import Injected, Skipped
from kvbelt.ops.chaos.verdict import Word
from kvbelt.ops.chaos.watch import Death

#: After the load has ended, nothing may be held for longer.
HOLD_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Result:
    """One run."""

    deployment: str  #: ``2p2d`` or a URL
    model: str
    seed: int
    seconds: float  #: of load
    rate: float  #: requests a second
    reference: str  #: who said what is right
    questions: int
    ambiguous: int  #: questions that the reference does not answer the same way twice
    impossible: Mapping[str, str]  #: kinds of faults that could not be done here, and why
    injected: tuple[Injected, ...]
    skipped: tuple[Skipped, ...]
    recovered: Mapping[int, float]  #: seconds, by the fault's number
    words: Counter[Word]
    errors: Counter[str]
    paths: Counter[str]
    not_sent: int
    failures: tuple[Failure, ...]
    holdings: Mapping[str, Holdings]  #: when nothing was held any more, or after ``HOLD_SECONDS``
    held_seconds: float  #: after the load, until nothing was held any more
    quarantined_most: int
    queued: int
    growths: tuple[Growth, ...]
    deaths: tuple[Death, ...]
    idle: tuple[str, ...]  #: workers that had no part in a right answer after the last fault
    not_back: Mapping[str, str]
    effect: Effect | None
    lag: float
    interrupted: bool

    @property
    def requests(self) -> int:
        """That were sent."""
        return sum(self.words.values())


@dataclass(frozen=True, slots=True)
class Invariant:
    """One thing that must hold: ``found`` of what must be ``wanted``."""

    name: str
    found: int
    held: bool
    detail: str = ""


def invariants(result: Result) -> list[Invariant]:
    """All of them, in the order of the report."""
    words, holdings = result.words, result.holdings
    silent = [name for name, held in holdings.items() if held.state != "ready"]
    staging = sum(held.staging_bytes + held.quarantined_bytes for held in holdings.values())
    blocks = sum(held.blocks for held in holdings.values())
    open_ones = sum(held.transfers + held.requests for held in holdings.values())
    growing = [f"{g.process} (pid {g.pid})" for g in result.growths if g.unbounded]
    absent = sorted({*silent, *result.not_back, *result.idle})
    return [
        _none("answers that differ from the aggregated server's", words[Word.WRONG]),
        _none("requests without an answer or an error 2 s after their deadline", words[Word.HANG]),
        _none("answers cut off without an error", words[Word.TRUNCATED] + words[Word.DROPPED]),
        _none("answers in no shape of OpenAI's, or refused without cause", words[Word.MALFORMED] + words[Word.REFUSED]),
        _none("errors of kvbelt's own making (status 500)", words[Word.INTERNAL]),
        _none(f"staging bytes held {HOLD_SECONDS:g} s after the load", staging),
        _none("KV blocks of the engines held by nobody", blocks),
        _none("transfers and requests still open", open_ones),
        _none("processes that ended by themselves", len(result.deaths), ", ".join(d.process for d in result.deaths)),
        _none("workers that do not serve again", len(absent), ", ".join(absent)),
        _none("processes whose memory grows", len(growing), ", ".join(growing)),
        Invariant("right answers", words[Word.RIGHT], words[Word.RIGHT] > 0),
    ]


def _none(name: str, found: int, detail: str = "") -> Invariant:
    return Invariant(name, found, found == 0, detail)
