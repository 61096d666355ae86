"""Which of several workers: filters take candidates out, scorers weigh them, a picker takes one.

A filter keeps or drops; a preference does so only as long as somebody is left; a scorer gives each candidate a number,
higher is better; the picker chooses among those with the best sum. Without scorers all are equal, and the round-robin
picker takes turns: the default.
"""

from collections.abc import Callable, Collection, Sequence

from kvbelt.routing.endpoint import Endpoint

Filter = Callable[[Endpoint], bool]
Scorer = Callable[[Endpoint], float]


class RoundRobin:
    """Takes turns. The turn is counted over picks, so that a worker that drops out costs nobody a turn.

    A retry takes no turn: or two workers, one of which fails, would take turns at the first try and the second.
    """

    def __init__(self) -> None:
        self._turn = 0

    def pick(self, candidates: Sequence[Endpoint], *, retry: bool = False) -> Endpoint:
        """One of at least one candidate."""
        chosen = candidates[self._turn % len(candidates)]
        self._turn += not retry
        return chosen


def is_ready(endpoint: Endpoint) -> bool:
    """The filter that every policy begins with."""
    return endpoint.ready


def is_settled(endpoint: Endpoint) -> bool:
    """A preference: who is slow to say how it is may have been stopped; who is just being connected is soon better."""
    return endpoint.settled


class Policy:
    """Picks an endpoint for one role. Prefill and decode have one each, so that their turns are independent."""

    def __init__(
        self,
        *,
        filters: Sequence[Filter] = (is_ready,),
        preferences: Sequence[Filter] = (is_settled,),
        scorers: Sequence[Scorer] = (),
        picker: RoundRobin | None = None,
    ) -> None:
        self._filters = tuple(filters)
        self._preferences = tuple(preferences)
        self._scorers = tuple(scorers)
        self._picker = picker or RoundRobin()

    def pick(
        self, endpoints: Sequence[Endpoint], *, exclude: Collection[str] = (), only: Filter | None = None
    ) -> Endpoint | None:
        """The endpoint to use, or None if none is left.

        Args:
            endpoints: the candidates.
            exclude: lives that were tried already; if there are any, this is a retry.
            only: one more filter, of this choice alone.
        """
        candidates = list(endpoints)
        for keeps in self._filters if only is None else (*self._filters, only):
            candidates = [endpoint for endpoint in candidates if keeps(endpoint)]
        if exclude:
            candidates = [endpoint for endpoint in candidates if endpoint.life not in exclude]
        if not candidates:
            return None
        if len(candidates) > 1:
            candidates = self._best(candidates)
        return self._picker.pick(candidates, retry=bool(exclude))

    def _best(self, candidates: list[Endpoint]) -> list[Endpoint]:
        """Those of at least one candidate that the preferences and the scorers leave."""
        for prefers in self._preferences:
            candidates = [endpoint for endpoint in candidates if prefers(endpoint)] or candidates
        if not self._scorers:
            return candidates
        scores = [sum(scorer(endpoint) for scorer in self._scorers) for endpoint in candidates]
        best = max(scores)
        return [endpoint for endpoint, score in zip(candidates, scores, strict=True) if score == best]
