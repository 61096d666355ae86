"""Some of the heads of every block, over the same memory."""

from collections.abc import Sequence

import torch

from kvbelt.wire.layout import KVLayout


def cut(layers: Sequence[torch.Tensor], heads: range, layout: KVLayout) -> list[torch.Tensor]:
    """``[num_blocks, runs, bytes]`` of these heads, of layers that are ``[num_blocks, bytes]``."""
    runs = layout.head_runs
    width = layout.block_bytes // runs // layout.num_kv_heads
    return [layer.view(layer.shape[0], runs, -1)[:, :, heads.start * width : heads.stop * width] for layer in layers]
