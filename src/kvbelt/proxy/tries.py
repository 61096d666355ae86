"""What one request has tried, and what it may still try. Pure.

Rules:

1. A worker that has failed a request is not asked again by it, unless it has become another process meanwhile.
2. The number of legs of one kind is bounded: a request that kills whoever takes it must not kill them all.
3. What is retried was never answered: nothing of a failed attempt has reached the client.
"""

from kvbelt.proxy.records import Leg


class Tries:
    """Of one request. ``most``: legs of one kind that it may have."""

    __slots__ = ("_failed", "_made", "_most")

    def __init__(self, most: int) -> None:
        self._most = most
        self._made: dict[Leg, int] = {"prefill": 0, "decode": 0}
        self._failed: dict[Leg, frozenset[str]] = {"prefill": frozenset(), "decode": frozenset()}

    def made(self, leg: Leg) -> None:
        """One more leg."""
        self._made[leg] += 1

    def failed(self, leg: Leg, life: str) -> None:
        """This life of a worker did not answer it."""
        self._failed[leg] |= {life}

    def excluded(self, leg: Leg) -> frozenset[str]:
        """Lives that are not asked again."""
        return self._failed[leg]

    def may_go_on(self, leg: Leg) -> bool:
        """Whether one more leg is allowed."""
        return self._made[leg] < self._most
