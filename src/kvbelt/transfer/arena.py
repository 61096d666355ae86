"""Contiguous pieces of variable size from one buffer: first fit; free neighbours merge.

First fit from the low end reuses the piece that was freed last there, while its bytes are still in a cache.
"""

from bisect import bisect_left, insort

#: Pieces begin at a page, because RDMA cards and the kernel map whole pages.
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
        """Bytes in use, padding included."""
        return sum(self._used.values())

    def allocate(self, num_bytes: int) -> int | None:
        """The offset of a new piece, or None when no gap is large enough."""
        if num_bytes < 1:
            raise ValueError(f"a piece of {num_bytes} bytes")
        for index, (offset, free) in enumerate(self._free):
            # The buffer's end need not be aligned, so a piece that ends there is not rounded up.
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
        num_bytes = self._used.pop(offset)
        index = bisect_left(self._free, (offset, 0))
        if index < len(self._free) and self._free[index][0] == offset + num_bytes:
            num_bytes += self._free.pop(index)[1]
        if index > 0 and sum(self._free[index - 1]) == offset:
            offset, before = self._free.pop(index - 1)
            num_bytes += before
        insort(self._free, (offset, num_bytes))
