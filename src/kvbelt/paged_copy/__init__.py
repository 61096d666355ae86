"""Copies whole blocks between an engine's paged KV and contiguous staging memory, on CPU (cpu.py) and CUDA (cuda.py).

A copier also computes digests of staging memory (wire/digest.py).
"""

from collections.abc import Sequence

import torch

from kvbelt.paged_copy.cpu import CpuPagedCopy
from kvbelt.paged_copy.staging import Staging
from kvbelt.transfer.ports import PagedCopy, Region

__all__ = ["CpuPagedCopy", "Staging", "TorchPagedCopy", "region_of"]


def region_of(staging: torch.Tensor) -> Region:
    return Region(staging.data_ptr(), staging.numel(), staging.device.type, staging.device.index or 0)


def TorchPagedCopy(  # noqa: N802 -- a factory that reads as the class it makes
    layers: Sequence[torch.Tensor],
    send_staging: Staging | torch.Tensor | None,
    receive_staging: Staging | torch.Tensor | None,
    overflow_staging: Staging | torch.Tensor | None = None,
) -> PagedCopy:
    """The copier for the device of ``layers``: one tensor a layer, ``[num_blocks, ...]``, with contiguous blocks.

    Gathers write to ``send_staging``; scatters read ``receive_staging`` or, as region 1, ``overflow_staging``. They
    are on CUDA or the CPU (pinned, if the layers are on a GPU).

    Raises:
        ValueError: a block is not contiguous, layers differ, or a staging buffer is not a flat run of bytes.
    """
    send, *received = [
        Staging.of(given) if isinstance(given, torch.Tensor) else given
        for given in (send_staging, receive_staging, overflow_staging)
    ]
    blocks = [_blocks_of_bytes(layer) for layer in layers]
    if len({(layer.shape, layer.device) for layer in blocks}) > 1:
        raise ValueError(f"layers differ in blocks, bytes or device: {[tuple(layer.shape) for layer in blocks]}")
    receive = [staging for staging in received if staging is not None]
    if blocks and blocks[0].is_cuda:
        from kvbelt.paged_copy.cuda import CudaPagedCopy  # noqa: PLC0415 -- imports Triton, if it is installed

        return CudaPagedCopy(blocks, send, receive)
    return CpuPagedCopy(blocks, send, receive)


def _blocks_of_bytes(layer: torch.Tensor) -> torch.Tensor:
    """``[num_blocks, block_bytes]`` over the same memory."""
    if not layer.is_contiguous():
        raise ValueError(f"a layer of shape {tuple(layer.shape)} and strides {layer.stride()} is not contiguous")
    return layer.view(layer.shape[0], -1).view(torch.uint8)
