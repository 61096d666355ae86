"""Triton kernels: one launch for a digest's cells, and one for a scatter's blocks of all layers.

Numbers that change from call to call are in memory, not arguments: Triton compiles again for each property of an
argument (a multiple of 16, more than 32 bits), and a request would wait for that.
"""

import torch
import triton
import triton.language as tl

#: Words of 8 bytes that a program handles at once.
_TILE = 1024
_WARPS = 4


@triton.jit  # type: ignore[untyped-decorator]
def _digest(staging, cells, weights, WORDS: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """``cells[2 i]`` is the word at which cell i begins; ``cells[2 i + 1]`` becomes the sum of its weighted words."""
    cell = tl.program_id(0)
    first = tl.load(cells + 2 * cell)
    total = tl.zeros((TILE,), dtype=tl.int64)
    for begin in range(0, WORDS, TILE):
        place = begin + tl.arange(0, TILE)
        inside = place < WORDS
        words = tl.load(staging + first + place, mask=inside, other=0)
        total += words * tl.load(weights + place, mask=inside, other=0)
    tl.store(cells + 2 * cell + 1, tl.sum(total, axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def _scatter(  # type: ignore[no-untyped-def]
    staging,
    order,
    layers,
    NUM_LAYERS: tl.constexpr,
    WORDS: tl.constexpr,
    TILE: tl.constexpr,
):
    """``order``: the first word of layer 0 in staging, words from a layer to the next, and each block's id."""
    number = tl.program_id(0).to(tl.int64)
    first = tl.load(order) + number * WORDS
    stride = tl.load(order + 1)
    block = tl.load(order + 2 + number)
    for layer in range(NUM_LAYERS):
        there = tl.load(layers + layer).to(tl.pointer_type(tl.int64)) + block * WORDS
        here = staging + first + layer * stride
        for begin in range(0, WORDS, TILE):
            place = begin + tl.arange(0, TILE)
            inside = place < WORDS
            tl.store(there + place, tl.load(here + place, mask=inside), mask=inside)


def digest(staging: torch.Tensor, cells: torch.Tensor, weights: torch.Tensor) -> None:
    """Launch the digest kernel on the current stream.

    Args:
        staging: ``int64``, on the device or pinned.
        cells: ``int64[2 * cells]``, likewise: the first word of each cell, each followed by a place for its sum.
        weights: ``int64[words of a block]``, on the device.
    """
    programs = (cells.numel() // 2,)
    _digest[programs](staging, cells, weights, WORDS=weights.numel(), TILE=_TILE, num_warps=_WARPS)


def scatter(staging: torch.Tensor, order: torch.Tensor, layers: torch.Tensor, words: int) -> None:
    """Launch the scatter kernel on the current stream.

    Args:
        staging: ``int64``, on the device.
        order: ``int64[2 + blocks]``, at least one block, on the device or pinned; see the kernel.
        layers: ``int64[layers]``, on the device: the address of each layer's block 0.
        words: words in a block.
    """
    programs = (order.numel() - 2,)
    _scatter[programs](staging, order, layers, NUM_LAYERS=layers.numel(), WORDS=words, TILE=_TILE, num_warps=_WARPS)
