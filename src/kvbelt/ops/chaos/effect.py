"""The time to first token of other requests while one decode worker is stopped. Pure."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kvbelt.ops.chaos.ledger import Judged
from kvbelt.ops.chaos.participants import Participants
from kvbelt.ops.chaos.verdict import Outcome


@dataclass(frozen=True, slots=True)
class Effect:
    """Seconds to the first token of streamed requests to other workers, before and while one is stopped."""

    worker: str
    before: tuple[float, ...]
    during: tuple[float, ...]

    @property
    def ratio(self) -> float | None:
        """Ratio of the 99th percentiles; None if one side has no request."""
        if not self.before or not self.during:
            return None
        return percentile(self.during, 99) / percentile(self.before, 99)


def percentile(values: Iterable[float], percent: float) -> float:
    """The nearest-rank percentile of at least one value."""
    in_order = sorted(values)
    return in_order[max(0, math.ceil(len(in_order) * percent / 100) - 1)]


def seconds_to_first_token(
    judged: Sequence[Judged], participants: Mapping[str, Participants], begin: float, end: float, *, without: str
) -> tuple[float, ...]:
    """Of right streamed answers that began in ``[begin, end)`` and never used the worker ``without``."""
    found = []
    for one in judged:
        trace = participants.get(one.request_id)
        if one.outcome is not Outcome.RIGHT or one.first_token is None or trace is None or not begin <= one.began < end:
            continue
        if without not in trace.used | trace.troubled:
            found.append(one.first_token - one.began)
    return tuple(found)
