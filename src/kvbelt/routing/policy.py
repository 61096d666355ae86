"""Which of several workers: filters take candidates out, scorers weigh them, a picker takes one.

A filter keeps or drops; a scorer gives each candidate a number, higher is better; the picker chooses among
those with the best sum. Without scorers all are equal, and the round-robin picker takes turns: the default.
"""

from collections.abc import Callable, Sequence

from kvbelt.routing.endpoint import Endpoint

Filter = Callable[[Endpoint], bool]
Scorer = Callable[[Endpoint], float]


class RoundRobin:
    """Takes turns. The turn is counted over picks, so that a worker that drops out costs nobody a turn."""

    def __init__(self) -> None:
        self._turn = 0

    def pick(self, candidates: Sequence[Endpoint]) -> Endpoint:
        """One of at least one candidate."""
        chosen = candidates[self._turn % len(candidates)]
        self._turn += 1
        return chosen


def is_ready(endpoint: Endpoint) -> bool:
    """The filter that every policy begins with."""
    return endpoint.ready


class Policy:
    """Picks an endpoint for one role. Prefill and decode have one each, so that their turns are independent."""

    def __init__(
        self,
        *,
        filters: Sequence[Filter] = (is_ready,),
        scorers: Sequence[Scorer] = (),
        picker: RoundRobin | None = None,
    ) -> None:
        self._filters = tuple(filters)
        self._scorers = tuple(scorers)
        self._picker = picker or RoundRobin()

    def pick(self, endpoints: Sequence[Endpoint], *, exclude: frozenset[str] = frozenset()) -> Endpoint | None:
        """The endpoint to use, or None if none is left. ``exclude`` names those already tried."""
        candidates = [
            endpoint
            for endpoint in endpoints
            if endpoint.name not in exclude and all(keeps(endpoint) for keeps in self._filters)
        ]
        if not candidates:
            return None
        if self._scorers and len(candidates) > 1:
            scores = [sum(scorer(endpoint) for scorer in self._scorers) for endpoint in candidates]
            best = max(scores)
            candidates = [endpoint for endpoint, score in zip(candidates, scores, strict=True) if score == best]
        return self._picker.pick(candidates)
