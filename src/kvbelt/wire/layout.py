"""What both sides of a transfer must agree on before any memory is shared."""

import msgspec


class KVLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The shape of a paged KV cache: ``num_layers`` tensors of equal blocks.

    A block of one layer is ``block_bytes`` contiguous bytes that hold ``block_size`` tokens. Their order inside the
    block is compared and never interpreted, because only whole blocks are sent.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    order: str  #: order of the dimensions inside a block, e.g. ``"T2HD"``: token, K or V, head, element
    block_bytes: int  #: bytes of one block of one layer

    def blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def slot_bytes(self, num_blocks: int) -> int:
        """Bytes of so many blocks of every layer."""
        return self.num_layers * num_blocks * self.block_bytes
