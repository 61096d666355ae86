"""A histogram whose ``observe`` costs one or two additions."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence

#: Steps, transfers, first tokens: from a millisecond to a minute.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

#: Whole requests, whose deadline may be ten minutes.
LONG_SECONDS = (0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

#: What was expected less what came to pass.
SIGNED_SECONDS = (-10.0, -1.0, -0.3, -0.1, -0.03, -0.01, 0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 10.0)

#: The KV of one prompt: from 64 KiB to 8 GiB, doubling.
BYTES = tuple(float(1 << shift) for shift in range(16, 34))


class Histogram:
    """Counts by upper bound. Belongs to one thread.

    It costs a tenth of prometheus_client's histogram, which locks and looks labels up.
    """

    __slots__ = ("_bounds", "_counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self.total = 0.0  #: the sum of all values

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def observe_all(self, values: list[float]) -> None:
        """Add many values at once. Sorts the list."""
        values.sort()
        self.total += sum(values)
        below = 0
        for number, bound in enumerate(self._bounds):
            not_above = bisect_right(values, bound)
            self._counts[number] += not_above - below
            below = not_above
        self._counts[-1] += len(values) - below

    @property
    def count(self) -> int:
        return sum(self._counts)

    def cumulative(self) -> Iterator[tuple[float, int]]:
        """Each upper bound with the number of values not above it; infinity is last."""
        total = 0
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            yield bound, total
