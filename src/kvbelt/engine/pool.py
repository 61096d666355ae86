"""The paged KV pool: where the keys and values of all requests lie.

Rules:

1. A block holds ``block_size`` tokens of one layer as one contiguous run of bytes, in the order "T2HD": token,
   K or V, head, element. So a block can travel as it is, and a run of neighbouring blocks *is* a tensor of tokens,
   whose keys and values are strided views: attention reads them where they lie.
2. A block id means the same place in every layer.
3. Every block is in exactly one state: free, in one request's block table, or held for somebody who still reads it.

Neighbouring blocks are worth having (rule 1), so a newcomer *claims* the run that it may grow into. A claim
promises nothing: when nothing else is free, claimed blocks are given away, and the request that wanted them goes
on in scattered blocks, which attention gathers by copying.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

_FREE, _TABLE, _HELD = 0, 1, 2
_NO_CLAIM = 0


@dataclass(frozen=True, slots=True)
class PoolLayout:
    """The shape of the pool; field for field what a peer must agree on."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str  #: ``"float32"`` or ``"bfloat16"``
    order: str
    block_bytes: int  #: bytes of one block of one layer

    def blocks(self, num_tokens: int) -> int:
        """How many blocks hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)


def make_layout(
    *, num_layers: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> PoolLayout:
    """Layout of a pool in this module's order."""
    return PoolLayout(
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=str(dtype).removeprefix("torch."),
        order="T2HD",
        block_bytes=block_size * 2 * num_kv_heads * head_dim * dtype.itemsize,
    )


class OutOfBlocksError(Exception):
    """More blocks were asked for than are free. Callers check ``num_free`` first, so this is a bug."""


class BlockAllocator:
    """Who has which block. Not thread-safe: the engine's thread owns it."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        # _num_free == count of _FREE in _state; _num_held == count of _HELD.
        self._state = np.zeros(num_blocks, dtype=np.uint8)
        self._claim = np.zeros(num_blocks, dtype=np.int64)
        self._num_free = num_blocks
        self._num_held = 0
        self._last_claim = _NO_CLAIM

    @property
    def num_free(self) -> int:
        """Blocks that nobody has."""
        return self._num_free

    @property
    def num_held(self) -> int:
        """Blocks of finished requests that are still being read."""
        return self._num_held

    def allocate(self, count: int, may_grow_to: int = 0) -> list[int]:
        """Blocks for a newcomer: neighbours where possible, with room to grow to ``may_grow_to``.

        Raises:
            OutOfBlocksError: fewer are free.
        """
        self._require(count)
        if count == 0:
            return []
        want = max(count, may_grow_to)
        run = self._best_run((self._state == _FREE) & (self._claim == _NO_CLAIM), count, want)
        if run is None:
            run = self._best_run(self._state == _FREE, count, want)
        if run is None:
            return self._take(np.flatnonzero(self._state == _FREE)[:count])
        start, length = run
        blocks = self._take(np.arange(start, start + count))
        self._last_claim += 1
        self._claim[start : start + min(want, length)] = self._last_claim
        return blocks

    def grow(self, block_ids: list[int], count: int) -> None:
        """Append ``count`` blocks to a table, the next neighbour where it is free.

        Raises:
            OutOfBlocksError: fewer are free.
        """
        self._require(count)
        for _ in range(count):
            following = block_ids[-1] + 1 if block_ids else self.num_blocks
            if following < self.num_blocks and self._state[following] == _FREE:
                block_ids.extend(self._take(np.array([following])))
            else:
                block_ids.extend(self.allocate(1))

    def free(self, block_ids: Sequence[int]) -> None:
        """Give a table's blocks back."""
        self._give_back(block_ids, _TABLE)

    def hold(self, block_ids: Sequence[int]) -> None:
        """A table's blocks become held: the request is over, a reader is not."""
        ids = np.asarray(block_ids, dtype=np.int64)
        assert (self._state[ids] == _TABLE).all(), "only a table's blocks can be held"
        self._state[ids] = _HELD
        self._num_held += len(ids)

    def release(self, block_ids: Sequence[int]) -> None:
        """Give held blocks back."""
        self._give_back(block_ids, _HELD)
        self._num_held -= len(block_ids)

    def validate(self, tables: Sequence[Sequence[int]], holds: Sequence[Sequence[int]]) -> None:
        """Check rule 3 against everybody who has blocks.

        Raises:
            AssertionError: somebody's blocks are not theirs, or a block has leaked.
        """
        expected = np.zeros(self.num_blocks, dtype=np.uint8)
        for state, owners in ((_TABLE, tables), (_HELD, holds)):
            for owner in owners:
                for block in owner:
                    assert expected[block] == _FREE, f"block {block} has two owners"
                    expected[block] = state
        assert (expected == self._state).all(), f"blocks leaked: {np.flatnonzero(expected != self._state)}"
        assert self._num_free == int((self._state == _FREE).sum()), "free count is wrong"
        assert self._num_held == int((self._state == _HELD).sum()), "held count is wrong"

    def _require(self, count: int) -> None:
        if count > self._num_free:
            raise OutOfBlocksError(f"{count} blocks wanted, {self._num_free} free of {self.num_blocks}")

    @staticmethod
    def _best_run(
        usable: "np.ndarray[tuple[int], np.dtype[np.bool_]]", count: int, want: int
    ) -> tuple[int, int] | None:
        """The smallest run of at least ``want``, else the longest, as (start, length); None if below ``count``."""
        edges = np.flatnonzero(np.diff(np.concatenate(([False], usable, [False])).astype(np.int8)))
        starts, lengths = edges[::2], edges[1::2] - edges[::2]
        if len(starts) == 0 or lengths.max() < count:
            return None
        roomy = np.flatnonzero(lengths >= want)
        best = roomy[lengths[roomy].argmin()] if len(roomy) else lengths.argmax()
        return int(starts[best]), int(lengths[best])

    def _take(self, ids: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> list[int]:
        self._state[ids] = _TABLE
        self._num_free -= len(ids)
        return [int(block) for block in ids]

    def _give_back(self, block_ids: Sequence[int], state: int) -> None:
        if not block_ids:
            return
        ids = np.asarray(block_ids, dtype=np.int64)
        assert (self._state[ids] == state).all(), "blocks given back by somebody who does not have them"
        self._state[ids] = _FREE
        self._num_free += len(ids)
        # The claim goes with its owner, the part that was never used included.
        claims = np.unique(self._claim[ids])
        self._claim[np.isin(self._claim, claims[claims != _NO_CLAIM])] = _NO_CLAIM


class KVPool:
    """The memory itself and the views that attention reads and writes.

    Attributes:
        storage: ``[num_layers, num_blocks, block_size, 2, kv_heads, head_dim]``, one allocation.
        layers: a view of it for each layer, ``[num_blocks, block_size, 2, kv_heads, head_dim]``.
    """

    def __init__(self, layout: PoolLayout, num_blocks: int, device: torch.device) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        dtype: torch.dtype = getattr(torch, layout.dtype)
        # Not zeroed: fresh pages cost nothing until they are written, and nothing reads what was not written.
        self.storage = torch.empty(
            (layout.num_layers, num_blocks, layout.block_size, 2, layout.num_kv_heads, layout.head_dim),
            dtype=dtype,
            device=device,
        )
        self.layers: tuple[torch.Tensor, ...] = tuple(self.storage.unbind(0))
        self.allocator = BlockAllocator(num_blocks)
        tokens = [layer.flatten(0, 1) for layer in self.layers]
        #: For each layer K (then V) of every token slot, to write: ``[slots, kv_heads, head_dim]``.
        self.key_slots = tuple(t[:, 0] for t in tokens)
        self.value_slots = tuple(t[:, 1] for t in tokens)
        #: The same memory to read: ``[kv_heads, slots, head_dim]``.
        self.keys = tuple(k.transpose(0, 1) for k in self.key_slots)
        self.values = tuple(v.transpose(0, 1) for v in self.value_slots)

    @property
    def num_tokens(self) -> int:
        """Tokens that the pool holds when it is full."""
        return self.num_blocks * self.layout.block_size

    def gather(self, layer: int, block_ids: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy scattered blocks together: K and V as ``[kv_heads, num_tokens, head_dim]``."""
        tokens = self.layers[layer].index_select(0, block_ids).flatten(0, 1)[:num_tokens]
        return tokens[:, 0].transpose(0, 1), tokens[:, 1].transpose(0, 1)


def is_run(block_ids: Sequence[int]) -> bool:
    """Whether the blocks are neighbours in ascending order."""
    first = block_ids[0]
    return block_ids[-1] - first == len(block_ids) - 1 and all(block == first + i for i, block in enumerate(block_ids))
