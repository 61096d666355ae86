"""The deadlines of many keys, in a heap."""

import heapq
import itertools
from collections.abc import Hashable
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT", bound=Hashable)

NEVER = float("inf")


class Deadlines(Generic[KeyT]):
    """A heap with lazy deletion: an entry that was replaced is skipped when it comes up."""

    def __init__(self) -> None:
        self._due: dict[KeyT, float] = {}
        self._heap: list[tuple[float, int, KeyT]] = []
        self._order = itertools.count()

    @property
    def due(self) -> float:
        while self._heap:
            at, _, key = self._heap[0]
            if self._due.get(key) == at:
                return at
            heapq.heappop(self._heap)
        return NEVER

    def set(self, key: KeyT, due: float) -> None:
        """Replace the deadline of ``key``; infinity removes it."""
        if self._due.get(key) == due:
            return
        if due == NEVER:
            self._due.pop(key, None)
            return
        self._due[key] = due
        heapq.heappush(self._heap, (due, next(self._order), key))

    def pop_due(self, now: float) -> list[KeyT]:
        """Remove and return all keys that are due, earliest first."""
        keys: list[KeyT] = []
        while self.due <= now:
            _, _, key = heapq.heappop(self._heap)
            del self._due[key]
            keys.append(key)
        return keys
