"""The outcome of every request of a run, with the context of those that failed."""

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvbelt.ops.chaos.completion import Completion
from kvbelt.ops.chaos.questions import ClientRequest
from kvbelt.ops.chaos.verdict import Observation, Outcome, Verdict, judge

#: Failures with full context; of more, only the number is kept.
MOST_FAILURES = 10

_MOST_BODY = 20_000


@dataclass(frozen=True, slots=True)
class Judged:
    """One request. Moments are seconds of one clock."""

    request_id: str
    outcome: Outcome
    began: float
    ended: float
    first_token: float | None  #: of streams only


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that broke an invariant, with its context."""

    verdict: Verdict
    request_id: str
    began: float  #: seconds after the start of the run
    seconds: float
    stream: bool
    deadline: float
    route: str
    body: Mapping[str, Any]  #: the request
    given: str  #: the response as it came
    right: Completion
    path: str
    record: str  #: from /kvbelt/requests
    faults: tuple[str, ...]  #: during the request
    logs: Mapping[str, str]  #: the ends of the logs at that moment, by process


#: Gathers record, faults and logs of a failure.
FailureContext = Callable[[Observation], Awaitable[tuple[str, tuple[str, ...], Mapping[str, str]]]]


class Ledger:
    """Judges requests as they end.

    Args:
        right: reference answers by question number.
        was_away: whether the proxy was restarting at some moment of a span.
        evidence: gathers the context of a failure.
        start: of the run, on the clock of ``Observation``.

    Attributes:
        judged: every request.
        errors: honest errors by their text.
        paths: right answers by path.
        failures: the first ``MOST_FAILURES`` of them.
    """

    def __init__(
        self,
        right: Mapping[int, Completion],
        was_away: Callable[[float, float], bool],
        evidence: FailureContext,
        start: float,
    ) -> None:
        self._right = right
        self._was_away = was_away
        self._failure_context = evidence
        self._start = start
        self.judged: list[Judged] = []
        self.errors: Counter[str] = Counter()
        self.paths: Counter[str] = Counter()
        self.failures: list[Failure] = []

    @property
    def outcomes(self) -> Counter[Outcome]:
        """How many requests had each outcome."""
        return Counter(judged.outcome for judged in self.judged)

    async def on_observation(self, request: ClientRequest, seen: Observation) -> None:
        """Judge a request that has ended."""
        right = self._right[request.question.number]
        verdict = judge(seen, right, proxy_away=self._was_away(seen.began, seen.ended))
        self.judged.append(Judged(seen.request_id, verdict.outcome, seen.began, seen.ended, seen.first_token))
        if verdict.outcome is Outcome.ERROR:
            self.errors[verdict.reason] += 1
        elif verdict.outcome is Outcome.RIGHT:
            self.paths[seen.path.partition(";")[0] or "unknown"] += 1
        elif verdict.failed and len(self.failures) < MOST_FAILURES:
            await self._add_failure(request, seen, verdict, right)

    async def _add_failure(
        self, request: ClientRequest, seen: Observation, verdict: Verdict, right: Completion
    ) -> None:
        record, faults, logs = await self._failure_context(seen)
        self.failures.append(
            Failure(
                verdict,
                seen.request_id,
                began=seen.began - self._start,
                seconds=seen.ended - seen.began,
                stream=seen.stream,
                deadline=seen.deadline,
                route=request.question.route,
                body=request.body(),
                given=seen.body[:_MOST_BODY].decode(errors="replace") or seen.detail,
                right=right,
                path=seen.path,
                record=record,
                faults=faults,
                logs=logs,
            )
        )
