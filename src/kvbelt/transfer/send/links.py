"""How fast bytes reach each peer. Time counts only while bytes are in flight, so a pause of the engine does not."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class LinkTally:
    """Of one peer. Invariant: ``in_flight`` writes are under way, since ``busy_since`` if there are any."""

    writes: int = 0  #: that have landed
    num_bytes: int = 0  #: that have landed
    busy_seconds: float = 0.0  #: with at least one write in flight, without the present span
    in_flight: int = 0
    bytes_in_flight: int = 0
    busy_since: float = 0.0

    def busy_until(self, now: float) -> float:
        """``busy_seconds`` with the present span."""
        return self.busy_seconds + (max(0.0, now - self.busy_since) if self.in_flight else 0.0)


class LinkTallies:
    """Of all peers, by the channel's name for them."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._links: dict[str, LinkTally] = {}

    def posting(self, agent: str, num_bytes: int) -> LinkTally:
        """A write is about to be posted: within one machine it may be done when that call returns."""
        link = self._links.setdefault(agent, LinkTally())
        if not link.in_flight:
            link.busy_since = self._clock()
        link.in_flight += 1
        link.bytes_in_flight += num_bytes
        return link

    def ended(self, link: LinkTally, num_bytes: int, *, landed: bool) -> None:
        """A write has landed, or will not. ``link`` is what ``posting`` returned: its peer may be forgotten by now."""
        link.in_flight -= 1
        link.bytes_in_flight -= num_bytes
        if landed:
            link.writes += 1
            link.num_bytes += num_bytes
        if not link.in_flight:
            link.busy_seconds += max(0.0, self._clock() - link.busy_since)

    def of(self, agent: str) -> LinkTally | None:
        return self._links.get(agent)

    def forget(self, agent: str) -> None:
        self._links.pop(agent, None)
