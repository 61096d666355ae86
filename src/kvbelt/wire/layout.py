"""What both sides of a transfer must agree on before any memory is shared."""

import msgspec


class KVLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The shape of a paged KV cache: ``num_layers`` tensors of equal blocks.

    A block of one layer is ``block_bytes`` contiguous bytes that hold ``block_size`` tokens. Their order inside the
    block is compared and never interpreted: whole blocks are sent, or what is cut out of them as below.

    Where ``tokens_outside``, a block can be cut into blocks of fewer tokens, too.

    With tensor parallelism a block has the heads of one rank. All of them follow each other ``head_runs`` times in it
    (once for each token, for example). So some heads can be cut out of a block, and make a block of fewer heads.

    The last ``draft_layers`` of the layers are a drafter's (speculative decoding). Between servers without the same
    drafter they do not travel.

    Several groups of layers may share these tensors, each with blocks of its own. A prompt's blocks are those of the
    first group, which are all that it has, and after them those of each other one, from ``first_kept`` on.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    #: Order of the dimensions inside a block, e.g. ``"T2HD"``: token, K or V, head, element. It does not tell how many
    #: heads there are where ``head_runs`` is known, nor how many tokens.
    order: str
    block_bytes: int  #: bytes of one block of one layer
    windows: tuple[int, ...] = ()  #: of each group after the first, how far its layers look back, in tokens; 0: to all
    head_runs: int = 0  #: 0: one head's bytes cannot be told from another's
    tokens_outside: bool = False  #: a block is a run of blocks of fewer tokens
    draft_layers: int = 0
    drafter: str = ""  #: fingerprint of what drafts with these layers

    def beside(self, other: "KVLayout") -> "KVLayout":
        """Of the layers that may travel between the two."""
        if (self.drafter, self.draft_layers) == (other.drafter, other.draft_layers):
            return self
        num_layers = self.num_layers - self.draft_layers
        return msgspec.structs.replace(self, num_layers=num_layers, draft_layers=0, drafter="")

    def of_heads(self, count: int) -> "KVLayout | None":
        """Of so many of these heads; None: a block cannot be cut."""
        if count == self.num_kv_heads:
            # How often one head follows itself says nothing.
            return self if count > 1 else msgspec.structs.replace(self, head_runs=0)
        if not self.head_runs or not 0 < count < self.num_kv_heads:
            return None
        cut = self.block_bytes // self.num_kv_heads * count
        runs = self.head_runs if count > 1 else 0
        return msgspec.structs.replace(self, num_kv_heads=count, block_bytes=cut, head_runs=runs)

    def of_tokens(self, block_size: int) -> "KVLayout | None":
        """With so many tokens in a block; None: a block cannot be cut into such."""
        if block_size == self.block_size:
            return self
        # What a window has left behind is counted in blocks.
        if not self.tokens_outside or self.windows or self.block_size % block_size:
            return None
        times = self.block_size // block_size
        return msgspec.structs.replace(
            self, block_size=block_size, block_bytes=self.block_bytes // times, head_runs=self.head_runs // times
        )

    def blocks(self, num_tokens: int) -> int:
        """All blocks of a prompt, of every group."""
        end = self.end(num_tokens)
        return end + sum(end - first_kept(num_tokens, window, self.block_size) for window in self.windows)

    def end(self, num_tokens: int) -> int:
        """Blocks of one group up to a prompt's end, those that it has left behind included."""
        return -(-num_tokens // self.block_size)

    def slot_bytes(self, num_blocks: int) -> int:
        """Bytes of so many blocks of every layer."""
        return self.num_layers * num_blocks * self.block_bytes


def first_kept(num_tokens: int, window: int, block_size: int) -> int:
    """The first block that the token after so many can see: of ``window`` tokens, itself included, if that is not 0."""
    return max(num_tokens - window + 1, 0) // block_size if window else 0
