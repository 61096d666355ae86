"""The paged KV pool: the memory of all requests' keys and values.

Rules:

1. A block holds ``block_size`` tokens of one layer as one contiguous run of bytes, in the order "T2HD": token,
   K or V, head, element. So a block can be sent as it is, and a run of neighbouring blocks *is* a tensor of tokens,
   whose keys and values are strided views: attention reads them in place.
2. A block id means the same place in every layer.
3. ``blocks`` allocates the blocks, and ``prefix_cache`` knows their prefixes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvbelt.engine.blocks import BlockAllocator


@dataclass(frozen=True, slots=True)
class PoolLayout:
    """The shape of the pool. A peer must agree on every field."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str  #: ``"float32"`` or ``"bfloat16"``
    order: str = "T2HD"

    @property
    def block_bytes(self) -> int:
        itemsize: int = getattr(torch, self.dtype).itemsize
        return self.block_size * 2 * self.num_kv_heads * self.head_dim * itemsize

    def blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)


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
        # Not zeroed: an unwritten page takes no memory, and is never read.
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

    def gather(self, layer: int, block_ids: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of scattered blocks, copied together: ``[kv_heads, num_tokens, head_dim]``."""
        tokens = self.layers[layer].index_select(0, block_ids).flatten(0, 1)[:num_tokens]
        return tokens[:, 0].transpose(0, 1), tokens[:, 1].transpose(0, 1)


def is_run(block_ids: Sequence[int]) -> bool:
    """Whether the blocks are neighbours in ascending order."""
    first = block_ids[0]
    return block_ids[-1] - first == len(block_ids) - 1 and all(block == first + i for i, block in enumerate(block_ids))
