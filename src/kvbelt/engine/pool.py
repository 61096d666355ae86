"""The paged KV pool: where the keys and values of all requests lie.

Rules:

1. A block holds ``block_size`` tokens of one layer as one contiguous run of bytes, in the order "T2HD": token,
   K or V, head, element. So a block can travel as it is, and a run of neighbouring blocks *is* a tensor of tokens,
   whose keys and values are strided views: attention reads them where they lie.
2. A block id means the same place in every layer.
3. Who uses a block, and when its memory is given to somebody else, is told in ``blocks``; which prefix it holds, in
   ``prefix_cache``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvbelt.engine.blocks import BlockAllocator


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
