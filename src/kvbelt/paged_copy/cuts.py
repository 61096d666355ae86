"""Smaller blocks, and some of the heads of every block, over the same memory."""

from collections.abc import Sequence

import torch

from kvbelt.wire.layout import KVLayout


def cut(
    layers: Sequence[torch.Tensor], heads: range | None, per_block: int, layout: KVLayout
) -> Sequence[torch.Tensor]:
    """Layers of ``[num_blocks, bytes]`` as ``[num_blocks * per_block, bytes]``, or with heads ``[…, runs, bytes]``.

    ``layout`` is that of whole blocks.
    """
    layers = [layer.view(layer.shape[0] * per_block, -1) for layer in layers]
    if heads is None:
        return layers
    runs = layout.head_runs // per_block
    width = layout.block_bytes // per_block // runs // layout.num_kv_heads
    return [layer.view(layer.shape[0], runs, -1)[:, :, heads.start * width : heads.stop * width] for layer in layers]
