"""What a stopped decode worker costs requests that have nothing to do with it: their time to first token. Pure."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kvbelt.ops.chaos.ledger import Judged
from kvbelt.ops.chaos.trace import Trace
from kvbelt.ops.chaos.verdict import Word


@dataclass(frozen=True, slots=True)
class Effect:
    """Seconds to the first token of streamed requests to the other workers, before and while one was stopped."""

    worker: str
    before: tuple[float, ...]
    during: tuple[float, ...]

    @property
    def ratio(self) -> float | None:
        """Of the 99th percentiles; None: one side has no request."""
        if not self.before or not self.during:
            return None
        return percentile(self.during, 99) / percentile(self.before, 99)


def percentile(values: Iterable[float], percent: float) -> float:
    """The nearest-rank percentile of at least one value."""
    in_order = sorted(values)
    return in_order[max(0, math.ceil(len(in_order) * percent / 100) - 1)]


def seconds_to_first_token(
    judged: Sequence[Judged], traces: Mapping[str, Trace], begin: float, end: float, *, without: str
) -> tuple[float, ...]:
    """Of right streamed answers that began between two moments and never touched the worker ``without``."""
    found = []
    for one in judged:
        trace = traces.get(one.request_id)
        if one.word is not Word.RIGHT or one.first_token is None or trace is None or not begin <= one.began < end:
            continue
        if without not in trace.used | trace.troubled:
            found.append(one.first_token - one.began)
    return tuple(found)
