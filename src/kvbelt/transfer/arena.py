"""Contiguous pieces of variable size out of one buffer: first fit, neighbours merge when freed.

First fit from the low end, on purpose: the piece freed last at the low end is handed out next, while its
bytes are still in a cache.
"""

from bisect import bisect_left, insort

#: Pieces begin at a page: what an RDMA card or the kernel maps is whole pages.
ALIGNMENT = 4096


class Arena:
    """Hands out ``[offset, offset + num_bytes)`` of a buffer of ``num_bytes``."""

    def __init__(self, num_bytes: int, alignment: int = ALIGNMENT) -> None:
        self.num_bytes = num_bytes
        self._alignment = alignment
        # Sorted by offset; no two touch, none is empty; with the used pieces they tile the buffer.
        self._free: list[tuple[int, int]] = [(0, num_bytes)] if num_bytes else []
        self._used: dict[int, int] = {}

    @property
    def used_bytes(self) -> int:
        """Handed out, with what alignment adds."""
        return sum(self._used.values())

    def allocate(self, num_bytes: int) -> int | None:
        """The offset of a new piece, or None when no gap is large enough."""
        if num_bytes < 1:
            raise ValueError(f"a piece of {num_bytes} bytes")
        for index, (offset, free) in enumerate(self._free):
            # The buffer's own end need not be aligned: a piece that ends there is not rounded up.
            if free < num_bytes:
                continue
            taken = min(free, -(-num_bytes // self._alignment) * self._alignment)
            if taken == free:
                del self._free[index]
            else:
                self._free[index] = (offset + taken, free - taken)
            self._used[offset] = taken
            return offset
        return None

    def free(self, offset: int) -> None:
        """Take back the piece that begins at ``offset``."""
        num_bytes = self._used.pop(offset)
        index = bisect_left(self._free, (offset, 0))
        if index < len(self._free) and self._free[index][0] == offset + num_bytes:
            num_bytes += self._free.pop(index)[1]
        if index > 0 and sum(self._free[index - 1]) == offset:
            offset, before = self._free.pop(index - 1)
            num_bytes += before
        insort(self._free, (offset, num_bytes))

    def validate(self) -> None:
        """Check the invariants.

        Raises:
            AssertionError: free and used pieces do not tile the buffer.
        """
        pieces = sorted([*self._free, *self._used.items()])
        end = 0
        for offset, num_bytes in pieces:
            if offset != end or num_bytes < 1:
                raise AssertionError(f"piece at {offset} of {num_bytes} bytes after {end}")
            end = offset + num_bytes
        if end != self.num_bytes:
            raise AssertionError(f"pieces end at {end} of {self.num_bytes}")
        for (offset, num_bytes), (following, _) in zip(self._free, self._free[1:], strict=False):
            if offset + num_bytes >= following:
                raise AssertionError(f"free pieces at {offset} and {following} touch")
