"""Smaller blocks, and some of the heads of every block and some layers, over the same memory."""

from collections.abc import Sequence

import torch

from kvbelt.wire.layout import KVLayout


def cut(
    whole: Sequence[torch.Tensor], heads: range | None, per_block: int, layers: range | None, layout: KVLayout
) -> Sequence[torch.Tensor]:
    """Layers of ``[num_blocks, bytes]`` as ``[num_blocks * per_block, bytes]``, or with heads ``[…, runs, bytes]``.

    ``layout`` is that of ``whole``.
    """
    chosen = whole if layers is None else whole[layers.start : layers.stop]
    rows = [layer.view(layer.shape[0] * per_block, -1) for layer in chosen]
    if heads is None:
        return rows
    runs = layout.head_runs // per_block
    width = layout.block_bytes // per_block // runs // layout.num_kv_heads
    return [layer.view(layer.shape[0], runs, -1)[:, :, heads.start * width : heads.stop * width] for layer in rows]
