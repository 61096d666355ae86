"""How far a prompt that comes in parts has come."""

from kvbelt.transfer.shape import PLACES, SlotShape


class Progress:
    """Of one prompt. Invariant: ``taken <= ready <= taken + PLACES``; the first ``ready`` parts are right."""

    def __init__(self) -> None:
        self._heard: set[int] = set()
        self._right: set[int] = set()
        self.ready = 0  #: parts that a reader may take out, or has
        self.taken = 0

    def expects(self, part: int, shape: SlotShape) -> bool:
        """Whether this part may land now: it exists, and its place was free."""
        return shape.in_parts and 0 <= part < min(self.taken + PLACES, shape.num_parts)

    def heard(self, part: int) -> bool:
        """Whether it was said before that it has landed."""
        return part in self._heard

    def hear(self, part: int) -> None:
        """It has landed."""
        self._heard.add(part)

    def found_right(self, part: int) -> range:
        """It is what was sent, or nobody asks. Returns the parts that are ready because of it."""
        self._right.add(part)
        before = self.ready
        while self.ready in self._right:
            self.ready += 1
        return range(before, self.ready)

    def take(self) -> None:
        """The next part was taken out."""
        self.taken += 1
