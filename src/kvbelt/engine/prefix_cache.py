"""Which blocks hold which prefixes, so that nobody computes, or sends, what is here already.

Rules:

1. A *full* block is published under a hash of its tokens and of all tokens before it, once its keys and values are
   final in every layer. From then on nobody writes into it.
2. A hash names one block at most. Who computes a prefix that somebody else has published meanwhile keeps a twin
   that is not published.
3. A published block that nobody uses any more stays until its memory is wanted (``BlockAllocator``). A table's first
   blocks count as used later than its last ones, for without them the last ones are not found.

The engine's thread publishes and evicts. ``held`` may be called from any thread: it promises nothing, for what is
here now may be gone when somebody comes for it.
"""

import threading
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt


class PrefixCache:
    """The index of one pool.

    Attributes:
        used_at: for each block when it was last used, in ticks of a counter; 0 if it is not published. While a
            block is in use, its tick is an old one.
    """

    def __init__(self, num_blocks: int) -> None:
        # Guards everything below; held for as long as it takes to look up a prompt.
        self._lock = threading.Lock()
        # One is the inverse of the other.
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self.used_at: npt.NDArray[np.int64] = np.zeros(num_blocks, dtype=np.int64)
        self._tick = 0

    def __len__(self) -> int:
        """Published blocks, used or not."""
        return len(self._block_of)

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks with these hashes, up to the first that is not here."""
        with self._lock:
            return self._match(hashes)

    def held(self, hashes: Sequence[bytes]) -> int:
        """How many blocks ``match`` would find; they count as used now. Any thread."""
        with self._lock:
            blocks = self._match(hashes)
            self._touch(blocks)
        return len(blocks)

    def publish(self, block_hash: bytes, block: int) -> None:
        """Rule 1 holds for ``block`` from now on. Does nothing where the hash is taken."""
        with self._lock:
            if block_hash not in self._block_of:
                assert block not in self._hash_of, f"block {block} is published under another hash"
                self._block_of[block_hash] = block
                self._hash_of[block] = block_hash
                self._touch((block,))

    def touch(self, blocks: Sequence[int]) -> None:
        """A table's blocks, in its order, were used until now."""
        with self._lock:
            self._touch([block for block in blocks if block in self._hash_of])

    def evict(self, blocks: Iterable[int]) -> None:
        """Their memory is somebody else's now. Those that are not published do not matter."""
        with self._lock:
            for block in blocks:
                block_hash = self._hash_of.pop(block, None)
                if block_hash is not None:
                    del self._block_of[block_hash]
                    self.used_at[block] = 0

    def validate(self) -> None:
        """Check rule 2.

        Raises:
            AssertionError: it does not hold.
        """
        assert {block: key for key, block in self._block_of.items()} == self._hash_of, "the index contradicts itself"
        assert set(np.flatnonzero(self.used_at)) == set(self._hash_of), "ticks of blocks that are not published"

    def _match(self, hashes: Iterable[bytes]) -> list[int]:
        found: list[int] = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def _touch(self, blocks: Sequence[int]) -> None:
        self._tick += len(blocks)
        for i, block in enumerate(blocks):
            self.used_at[block] = self._tick - i
