"""Which prompts' blocks a decode server holds, so that a prefill server need not send them again.

vLLM knows its blocks by hashes of its own, in its scheduler's process; a prefill server asks by ours, in the worker's.
``PrefixLedger`` keeps the two together on the scheduler's side: our hash of a block, and the block it was last seen in.
What changes goes to the workers with the next step, where ``HeldPrefixes`` answers the belt.

It is a guess, and may be too good: a block may be evicted between the answer and its use. Then vLLM's own prefix cache
finds less than the prefill server has left out, and the prompt is computed here (``prefix_evicted``).
"""

import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

#: Blocks looked at in every step. One that holds something else without having been given away says that the whole
#: cache was emptied: then all are looked at.
_PROBES = 8


class PrefixLedger:
    """The scheduler's side. Pure but for ``content_of``: what vLLM has cached in a block; None: nothing."""

    def __init__(self, content_of: Callable[[int], Any]) -> None:
        self._content_of = content_of
        # These two are each other's inverse, as far as hashes and blocks go.
        self._block_of: dict[bytes, int] = {}
        self._seen_in: dict[int, tuple[bytes, Any]] = {}
        self._changes: dict[bytes, bool] = {}

    def __len__(self) -> int:
        """Blocks that are held."""
        return len(self._block_of)

    def holds(self, hashes: Sequence[bytes], block_ids: Sequence[int]) -> None:
        """These blocks of a prompt lie in these blocks of vLLM's, as far as they are cached."""
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
        """A request has been given these blocks: what they held is gone, unless it is what the request wants."""
        for block_id in block_ids:
            self._look(block_id)

    def take_changes(self) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """Since the last call: (what is held now, what is no more)."""
        probes = list(itertools.islice(self._seen_in, _PROBES))
        if not all(self._look(block_id) for block_id in probes):
            self.look_at_all()
        changes, self._changes = self._changes, {}
        return (
            tuple(block_hash for block_hash, held in changes.items() if held),
            tuple(block_hash for block_hash, held in changes.items() if not held),
        )

    def look_at_all(self) -> None:
        """Something was not there that was thought to be."""
        self.taken(list(self._seen_in))

    def _look(self, block_id: int) -> bool:
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
    """The workers' side: ``PrefixIndex`` for the belt, whose thread asks while the model runner's tells."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hashes: set[bytes] = set()

    def update(self, held: Iterable[bytes], gone: Iterable[bytes]) -> None:
        """What has changed."""
        with self._lock:
            self._hashes.difference_update(gone)
            self._hashes.update(held)

    def held(self, hashes: Sequence[bytes]) -> int:
        """How many blocks, from the first on, are here."""
        with self._lock:
            for number, block_hash in enumerate(hashes):
                if block_hash not in self._hashes:
                    return number
            return len(hashes)
