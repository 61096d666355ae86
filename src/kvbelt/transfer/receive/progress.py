"""The progress of a prompt that arrives in parts."""

from kvbelt.transfer.shape import PLACES, SlotShape


class Progress:
    """The parts of one prompt. Invariant: ``taken <= ready <= taken + PLACES``; the first ``ready`` parts are right."""

    def __init__(self) -> None:
        self.landed: set[int] = set()
        self._right: set[int] = set()
        self.ready = 0  #: parts that the consumer may read, or has read
        self.taken = 0

    def expects(self, part: int, shape: SlotShape) -> bool:
        """Whether this part may land now: it exists, and its place was free."""
        return shape.in_parts and 0 <= part < min(self.taken + PLACES, shape.num_parts)

    def found_right(self, part: int) -> range:
        """Its digest is right, or none is compared. Returns the parts that become ready."""
        self._right.add(part)
        before = self.ready
        while self.ready in self._right:
            self.ready += 1
        return range(before, self.ready)
