"""Copies on CPU, with numpy. Neighbouring blocks are copied as one piece.

Measured with 24 KiB blocks in random order on one core: ``numpy.take`` into a warm buffer 23 GB/s, torch's
``index_select`` 15 to 20; assigning rows back 14 GB/s, ``index_copy_`` 1.6. torch would also start a pool of threads
for every thread that copies.

A digest is the product of a matrix of words with a vector of weights (9 GB/s on one core).
"""

import math
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvbelt.paged_copy.cuts import cut
from kvbelt.paged_copy.fences import DONE, Known, checked
from kvbelt.paged_copy.staging import Staging
from kvbelt.transfer.ports import Digest, Fence
from kvbelt.wire.digest import WORD_BYTES, Cells, Words, plus, weights
from kvbelt.wire.layout import KVLayout

Bytes = npt.NDArray[np.uint8]

#: Threads that fill runs of neighbouring blocks. On the machine of docs/performance.md ``benchmarks/transfer.py`` took
#: 10.5 ms to scatter 46 MB with one thread and 5.3 with two, and the request waits for nothing else.
_FILLING_THREADS = 2

#: Blocks whose digest is computed at once, so that their temporary copies stay small.
_DIGEST_ROWS = 256


class _FutureFence:
    """A copy on one of the copier's threads."""

    def __init__(self, copy: "Future[None]") -> None:
        self._copy = copy

    def done(self) -> bool:
        if not self._copy.done():
            return False
        self._copy.result()
        return True


class CpuPagedCopy:
    """``PagedCopy`` on CPU. Gathers are complete when the call returns.

    Scatters into neighbouring blocks run on two threads, which copy different layers. ``layers`` are ``[num_blocks,
    bytes]``, or ``[num_blocks, runs, bytes]`` of some heads.
    """

    def __init__(
        self,
        layers: Sequence[torch.Tensor],
        send_staging: Staging | None,
        receive_staging: Sequence[Staging],
    ) -> None:
        self._layers: list[Bytes] = [layer.numpy() for layer in layers]
        self._shape = self._layers[0].shape[1:]
        self.block_bytes = math.prod(self._shape)
        self._given = layers, send_staging, receive_staging
        self._send = send_staging
        self._receive = receive_staging
        self._weights = weights(-(-self.block_bytes // WORD_BYTES))
        self._fillers = ThreadPoolExecutor(_FILLING_THREADS, thread_name_prefix="scatter")

    def gather(self, layer: int, block_ids: Sequence[int], offset: int, ready: Any) -> Fence:  # noqa: ARG002
        """Copy paged blocks to ``send_staging``. ``ready`` is None on CPU."""
        assert self._send is not None
        blocks = self._layers[layer]
        ids = checked(block_ids, len(blocks))
        staged = self._send.array[offset : offset + ids.size * self.block_bytes].reshape(-1, *self._shape)
        first = _run_start(ids)
        if first is not None:
            np.copyto(staged, blocks[first : first + ids.size])
        elif not blocks.flags.c_contiguous:
            # ``take`` would make a copy of all blocks first.
            staged[:] = blocks[ids]
        else:
            # The ids are in range; "raise" would check them again and make a second copy.
            np.take(blocks, ids, axis=0, out=staged, mode="clip")
        return DONE

    def cut(self, heads: range | None, per_block: int, layers: range | None, layout: KVLayout) -> "CpuPagedCopy":
        whole, send, receive = self._given
        return CpuPagedCopy(cut(whole, heads, per_block, layers, layout), send, receive)

    def digest_sent(self, offset: int, cells: Cells) -> Digest:
        assert self._send is not None
        return Known(self._digest(self._send.array[offset:], cells))

    def digest_received(self, offset: int, cells: Cells, region: int = 0) -> Digest:
        return Known(self._digest(self._receive[region].array[offset:], cells))

    def _digest(self, staging: Bytes, cells: Cells) -> int:
        total = 0
        for begin in range(0, len(cells), _DIGEST_ROWS):
            rows, keys = cells.rows[begin : begin + _DIGEST_ROWS], cells.keys[begin : begin + _DIGEST_ROWS]
            total = plus(total, int(np.dot(self._words(staging, rows) @ self._weights, keys)))
        return total

    def _words(self, staging: Bytes, rows: npt.NDArray[np.int64]) -> Words:
        """The blocks at these rows, ``[rows, words]``."""
        end = (int(rows[-1]) + 1) * self.block_bytes
        blocks = staging[:end].reshape(-1, self.block_bytes)
        first = _run_start(rows)
        chosen = blocks[rows] if first is None else blocks[first:]
        short = -self.block_bytes % WORD_BYTES
        if short:
            chosen = np.pad(chosen, ((0, 0), (0, short)))
        return chosen.view(np.uint64) if chosen.ctypes.data % WORD_BYTES == 0 else chosen.copy().view(np.uint64)

    def scatter(self, block_ids: Sequence[int], offset: int, stride: int, region: int = 0) -> list[Fence]:
        ids = checked(block_ids, len(self._layers[0]))
        first = _run_start(ids)
        copies: list[Future[None]] = []
        try:
            for layer, blocks in enumerate(self._layers):
                start = offset + layer * stride
                staged = self._receive[region].array[start : start + ids.size * self.block_bytes]
                rows = staged.reshape(-1, *self._shape)
                if first is not None:
                    copies.append(self._fillers.submit(np.copyto, blocks[first : first + ids.size], rows))
                else:
                    blocks[ids] = rows  # does not release the interpreter, so a second thread would not help
                # Give other threads the interpreter between two layers.
                time.sleep(0)
        except BaseException:
            # The caller gives slot and blocks back, and the copies of earlier layers still use them.
            wait(copies)
            raise
        return [_FutureFence(copy) for copy in copies]


def _run_start(ids: npt.NDArray[np.int64]) -> int | None:
    """The first id if the ids are consecutive, else None."""
    return int(ids[0]) if ids.size and bool((np.diff(ids) == 1).all()) else None
