"""What became of every request of a run, and everything that is needed to look into those that failed."""

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvbelt.ops.chaos.questions import Asking
from kvbelt.ops.chaos.reading import Answer
from kvbelt.ops.chaos.verdict import Seen, Verdict, Word, judge

#: Failures that are told in full; of more, only the number.
MOST_TOLD = 10

_MOST_BODY = 20_000


@dataclass(frozen=True, slots=True)
class Judged:
    """One request. Moments are seconds of one clock."""

    request_id: str
    word: Word
    began: float
    ended: float
    first_token: float | None  #: only of streams


@dataclass(frozen=True, slots=True)
class Failure:
    """One request that got what it must never get, and what tells why."""

    verdict: Verdict
    request_id: str
    began: float  #: seconds after the start of the run
    seconds: float
    stream: bool
    deadline: float
    route: str
    body: Mapping[str, Any]  #: what was asked
    given: str  #: what came, as it came
    right: Answer
    path: str
    record: str  #: from /kvbelt/requests
    faults: tuple[str, ...]  #: that were there meanwhile
    logs: Mapping[str, str]  #: the ends of the logs at that moment, by process


#: Gathers record, faults and logs for a failure.
Evidence = Callable[[Seen], Awaitable[tuple[str, tuple[str, ...], Mapping[str, str]]]]


class Ledger:
    """Judges requests as they end.

    Args:
        right: answers by number of question.
        was_away: whether the proxy was being started again at some moment of a span.
        evidence: asked for each of the first failures.
        start: of the run, on the clock of ``Seen``.

    Attributes:
        judged: every request.
        errors: honest errors by what they said.
        paths: right answers by the way that they took.
        failures: the first ``MOST_TOLD`` of them.
    """

    def __init__(
        self,
        right: Mapping[int, Answer],
        was_away: Callable[[float, float], bool],
        evidence: Evidence,
        start: float,
    ) -> None:
        self._right = right
        self._was_away = was_away
        self._evidence = evidence
        self._start = start
        self.judged: list[Judged] = []
        self.errors: Counter[str] = Counter()
        self.paths: Counter[str] = Counter()
        self.failures: list[Failure] = []

    @property
    def words(self) -> Counter[Word]:
        """How many requests got which verdict."""
        return Counter(judged.word for judged in self.judged)

    async def take(self, asking: Asking, seen: Seen) -> None:
        """One request has ended."""
        right = self._right[asking.question.number]
        verdict = judge(seen, right, proxy_away=self._was_away(seen.began, seen.ended))
        self.judged.append(Judged(seen.request_id, verdict.word, seen.began, seen.ended, seen.first_token))
        if verdict.word is Word.ERROR:
            self.errors[verdict.reason] += 1
        elif verdict.word is Word.RIGHT:
            self.paths[seen.path.partition(";")[0] or "unknown"] += 1
        elif verdict.failed and len(self.failures) < MOST_TOLD:
            await self._tell(asking, seen, verdict, right)

    async def _tell(self, asking: Asking, seen: Seen, verdict: Verdict, right: Answer) -> None:
        record, faults, logs = await self._evidence(seen)
        self.failures.append(
            Failure(
                verdict,
                seen.request_id,
                began=seen.began - self._start,
                seconds=seen.ended - seen.began,
                stream=seen.stream,
                deadline=seen.deadline,
                route=asking.question.route,
                body=asking.body(),
                given=seen.body[:_MOST_BODY].decode(errors="replace") or seen.detail,
                right=right,
                path=seen.path,
                record=record,
                faults=faults,
                logs=logs,
            )
        )
