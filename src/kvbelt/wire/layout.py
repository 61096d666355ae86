"""What both sides of a transfer must agree on before any memory is shared."""

import msgspec


class KVLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The shape of a paged KV cache: ``num_layers`` tensors of equal blocks.

    A block of one layer is ``block_bytes`` contiguous bytes that hold ``block_size`` tokens. How they lie
    inside the block (``order``) is compared, never interpreted: whole blocks travel.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    #: Order of the dimensions inside a block, e.g. ``"T2HD"``: token, K or V, head, element.
    order: str
    #: Bytes of one block of one layer.
    block_bytes: int

    def blocks(self, num_tokens: int) -> int:
        """How many blocks hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def slot_bytes(self, num_blocks: int) -> int:
        """Bytes of ``num_blocks`` blocks of every layer."""
        return self.num_layers * num_blocks * self.block_bytes
