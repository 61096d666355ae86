"""How often requests arrive. Pure."""

from math import inf


class ArrivalRate:
    def __init__(self) -> None:
        self._last: float | None = None
        self._gap = inf

    def count(self, now: float) -> None:
        if self._last is not None:
            gap = max(0.0, now - self._last)
            self._gap = gap if self._gap == inf else self._gap + 0.2 * (gap - self._gap)
        self._last = now

    def gap(self, now: float) -> float:
        """Present mean seconds between two requests."""
        return max(self._gap, now - self._last) if self._last is not None else inf
