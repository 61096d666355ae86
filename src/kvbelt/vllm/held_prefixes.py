"""Which prompt blocks a decode server holds, so that a prefill server need not send them again.

vLLM knows its blocks by its own hashes, in the scheduler's process; a prefill server asks by ours, in the worker's.
``PrefixLedger``, on the scheduler's side, maps our hash of a block to the block in which it was last seen. Changes go
to the workers with the next step, where ``HeldPrefixes`` answers the belt.

An answer may be out of date: a block may be evicted before it is used. Then vLLM's prefix cache finds less than the
prefill server has left out, and the prompt is computed here (``prefix_evicted``).
"""

import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

#: Blocks that every step checks. If one has other contents although it was not given away, the whole cache has been
#: emptied, and all blocks are checked.
_PROBES = 8


class PrefixLedger:
    """The scheduler's side. Pure but for ``content_of``: what vLLM has cached in a block (None: nothing)."""

    def __init__(self, content_of: Callable[[int], Any]) -> None:
        self._content_of = content_of
        # Of hashes and blocks, one is the inverse of the other.
        self._block_of: dict[bytes, int] = {}
        self._seen_in: dict[int, tuple[bytes, Any]] = {}
        self._changes: dict[bytes, bool] = {}

    def __len__(self) -> int:
        return len(self._block_of)

    def holds(self, hashes: Sequence[bytes], block_ids: Sequence[int]) -> None:
        """A prompt's blocks with these hashes lie in these blocks of vLLM's, as far as vLLM has cached them."""
        for block_hash, block_id in zip(hashes, block_ids, strict=False):
            content = self._content_of(block_id)
            if content is None or self._block_of.get(block_hash) == block_id:
                continue
            self._drop(block_id)
            if (other := self._block_of.get(block_hash)) is not None:
                self._drop(other)
            self._block_of[block_hash] = block_id
            self._seen_in[block_id] = (block_hash, content)
            self._changes[block_hash] = True

    def taken(self, block_ids: Iterable[int]) -> None:
        """A request was given these blocks, so their contents are gone, unless the request shares them."""
        for block_id in block_ids:
            self._check(block_id)

    def take_changes(self) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """Since the last call: (hashes that are held now, hashes that are held no longer)."""
        probes = list(itertools.islice(self._seen_in, _PROBES))
        if not all(self._check(block_id) for block_id in probes):
            self.check_all()
        changes, self._changes = self._changes, {}
        return (
            tuple(block_hash for block_hash, held in changes.items() if held),
            tuple(block_hash for block_hash, held in changes.items() if not held),
        )

    def check_all(self) -> None:
        """Check every block, because one was found not to be held."""
        self.taken(list(self._seen_in))

    def _check(self, block_id: int) -> bool:
        seen = self._seen_in.get(block_id)
        if seen is None or self._content_of(block_id) == seen[1]:
            return True
        self._drop(block_id)
        return False

    def _drop(self, block_id: int) -> None:
        seen = self._seen_in.pop(block_id, None)
        if seen is not None:
            del self._block_of[seen[0]]
            self._changes[seen[0]] = False


class HeldPrefixes:
    """The worker's side: the belt's ``PrefixIndex``. The belt's thread reads, and the model runner's writes.

    ``unused``: how many of the held blocks, from the last one on, vLLM computes again all the same.
    """

    def __init__(self, unused: int = 0) -> None:
        self._unused = unused
        self._lock = threading.Lock()
        self._hashes: set[bytes] = set()

    def update(self, held: Iterable[bytes], gone: Iterable[bytes]) -> None:
        with self._lock:
            self._hashes.difference_update(gone)
            self._hashes.update(held)

    def held(self, hashes: Sequence[bytes]) -> int:
        """How many blocks, from the first on, are held and used."""
        with self._lock:
            held = sum(1 for _ in itertools.takewhile(self._hashes.__contains__, hashes))
        return max(held - self._unused, 0)
