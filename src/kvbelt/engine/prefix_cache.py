"""Which blocks hold which prefixes, so that no KV is computed or sent twice.

Rules:

1. A *full* block is published under a hash of its tokens and of all tokens before it, once its keys and values are
   final in every layer. After that it is not written.
2. A hash names one block at most. A request that computes a prefix which another one has published meanwhile keeps its
   own block unpublished.
3. A published block without users stays until its memory is needed (``BlockAllocator``). A table's first blocks count
   as used later than its last ones, because the last ones cannot be found without them.

The engine's thread publishes and evicts. ``held`` may be called from any thread and promises nothing: a block that is
here now may be evicted before it is used.
"""

import threading
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt


class PrefixCache:
    """The index of one pool.

    Attributes:
        used_at: for each block the tick of its last use; 0 if it is not published. The tick of a block in use is an
            old one.
    """

    def __init__(self, num_blocks: int) -> None:
        # Guards everything below; held no longer than a prompt's look-up takes.
        self._lock = threading.Lock()
        # One is the inverse of the other.
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self.used_at: npt.NDArray[np.int64] = np.zeros(num_blocks, dtype=np.int64)
        self._tick = 0

    def __len__(self) -> int:
        return len(self._block_of)

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks with these hashes, up to the first that is not here."""
        with self._lock:
            return self._match(hashes)

    def held(self, hashes: Sequence[bytes]) -> int:
        """Any thread: how many blocks ``match`` would find; they count as used now."""
        with self._lock:
            blocks = self._match(hashes)
            self._touch(blocks)
        return len(blocks)

    def publish(self, block_hash: bytes, block: int) -> None:
        """Publish a block that will not be written again. Nothing happens if the hash names another block."""
        with self._lock:
            if block_hash not in self._block_of:
                assert block not in self._hash_of, f"block {block} is published under another hash"
                self._block_of[block_hash] = block
                self._hash_of[block] = block_hash
                self._touch((block,))

    def touch(self, blocks: Sequence[int]) -> None:
        """These blocks, in the order of their table, were used until now."""
        with self._lock:
            self._touch([block for block in blocks if block in self._hash_of])

    def evict(self, blocks: Iterable[int]) -> None:
        """Forget the blocks, published or not, because their memory is given away."""
        with self._lock:
            for block in blocks:
                block_hash = self._hash_of.pop(block, None)
                if block_hash is not None:
                    del self._block_of[block_hash]
                    self.used_at[block] = 0

    def validate(self) -> None:
        """Assert rule 2."""
        assert {block: key for key, block in self._block_of.items()} == self._hash_of, "the index contradicts itself"
        assert set(np.flatnonzero(self.used_at)) == set(self._hash_of), "unpublished blocks have ticks"

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
