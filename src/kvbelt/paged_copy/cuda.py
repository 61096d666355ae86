"""Copies on one CUDA device, on a side stream for each direction; a fence is an event.

Every call of torch releases the interpreter and waits to get it back, which may take long while a model runner prepares
its next step. So operations of many calls (all layers of a scatter, the cells of a digest) are one launch of a kernel
if Triton is available (kernels.py), as it is with torch's CUDA builds. Without Triton they are calls of torch.
"""

import logging
import threading
from collections import deque
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvbelt.paged_copy.cuts import cut
from kvbelt.paged_copy.fences import checked
from kvbelt.paged_copy.staging import Staging
from kvbelt.transfer.ports import Digest, Fence
from kvbelt.wire.digest import WORD_BYTES, Cells, Words, weights
from kvbelt.wire.layout import KVLayout

log = logging.getLogger(__name__)

_Ids = tuple[tuple[int, ...], torch.Tensor]

#: Without kernels, bytes of cells at once. A sample of 7,500 tokens of an 8B model is 17 MiB.
_DIGEST_BYTES = 32 << 20

_MASK = 0xFFFF_FFFF_FFFF_FFFF


class _EventFence:
    """Work on a stream, and the tensors that must stay alive until it has run."""

    def __init__(self, event: torch.cuda.Event, held: tuple[torch.Tensor, ...]) -> None:
        self._event = event
        self._held = held

    def done(self) -> bool:
        if self._held and bool(self._event.query()):  # type: ignore[no-untyped-call]
            self._held = ()
        return not self._held


class _DigestOnDevice(_EventFence):
    """A digest that a stream computes and copies to host memory."""

    def __init__(self, event: torch.cuda.Event, result: torch.Tensor, held: tuple[torch.Tensor, ...]) -> None:
        super().__init__(event, held)
        self._result = result

    def value(self) -> int:
        return int(self._result.item()) & _MASK


class _DigestOfCells(_EventFence):
    """A digest whose cells a kernel writes to host memory."""

    def __init__(self, event: torch.cuda.Event, cells: torch.Tensor, keys: Words) -> None:
        super().__init__(event, (cells,))
        self._parts = cells.numpy()[1::2].view(np.uint64)
        self._keys = keys

    def value(self) -> int:
        return int(np.dot(self._parts, self._keys)) & _MASK


class CudaPagedCopy:
    def __init__(
        self,
        layers: Sequence[torch.Tensor],
        send_staging: Staging | None,
        receive_staging: Sequence[Staging],
    ) -> None:
        self._given = layers, send_staging, receive_staging
        self.block_bytes = layers[0][0].numel()
        # In the widest words that fit: byte by byte, an index costs as much as the byte that it moves.
        self._word = torch.int64 if all(map(_in_words, layers)) else torch.uint8
        self._layers = [layer.view(self._word) for layer in layers]
        self._device = layers[0].device
        self._send = send_staging
        self._receive = receive_staging
        self._weights = torch.from_numpy(weights(self.block_bytes // WORD_BYTES).view(np.int64)).to(self._device)
        self._gathers = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._scatters = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        # The layers of a prompt are gathered in turn, from the same blocks, so their ids are copied to the device once.
        self._last_gather: _Ids | None = None
        self._addresses = torch.tensor([layer.data_ptr() for layer in layers], dtype=torch.int64).to(self._device)
        self._kernels: ModuleType | None = None
        self._compile()

    def cut(self, heads: range | None, per_block: int, layers: range | None, layout: KVLayout) -> "CudaPagedCopy":
        whole, send, receive = self._given
        return CudaPagedCopy(cut(whole, heads, per_block, layers, layout), send, receive)

    def gather(self, layer: int, block_ids: Sequence[int], offset: int, ready: Any) -> Fence:
        """Copy paged blocks to ``send_staging`` once ``ready`` (a CUDA event, or None) has happened."""
        assert self._send is not None
        staged = self._staged(self._send.memory, len(block_ids), offset)
        with torch.cuda.stream(self._gathers):
            if ready is not None:
                self._gathers.wait_event(ready)
            ids, self._last_gather = self._cached_ids(block_ids, self._last_gather)
            if staged.is_cuda:
                torch.index_select(self._layers[layer], 0, ids, out=staged)
                held: tuple[torch.Tensor, ...] = (ids,)
            else:
                gathered = self._layers[layer].index_select(0, ids)
                staged.copy_(gathered, non_blocking=True)
                held = (ids, gathered)
            return _EventFence(self._gathers.record_event(), held)

    def digest_sent(self, offset: int, cells: Cells) -> Digest:
        """The digest of blocks in ``send_staging``, once the gathers before it have run."""
        assert self._send is not None
        return self._digest(self._send, offset, cells, self._gathers)

    def digest_received(self, offset: int, cells: Cells, region: int = 0) -> Digest:
        return self._digest(self._receive[region], offset, cells, self._scatters)

    def scatter(self, block_ids: Sequence[int], offset: int, stride: int, region: int = 0) -> list[Fence]:
        staging = self._receive[region]
        ids = checked(block_ids, len(self._layers[0]))
        self._check(staging, offset, (len(self._layers) - 1) * stride + ids.size * self.block_bytes)
        # Host memory is copied over the bus as a whole, and not word by word by a kernel.
        # The kernel knows whole blocks.
        whole = self._layers[0].is_contiguous()
        if self._kernels is not None and staging.device == "cuda" and ids.size and whole:
            return [self._scatter_in_one(staging.words, self._addresses, ids, offset, stride)]
        return [self._scatter_in_layers(staging.memory, ids, offset, stride)]

    @staticmethod
    def _check(staging: Staging, offset: int, num_bytes: int) -> None:
        # A kernel would read other memory, or end CUDA for this process.
        if offset < 0 or offset + num_bytes > staging.num_bytes:
            raise ValueError(f"bytes {offset} to {offset + num_bytes} of a staging buffer of {staging.num_bytes}")

    # With kernels.

    def _compile(self) -> None:
        """Compile the kernels by using them once. If that fails, torch does their work."""
        if self._word is not torch.int64:
            return
        try:
            from kvbelt.paged_copy import kernels  # noqa: PLC0415 -- imports Triton

            self._kernels = kernels
            block = torch.zeros(self.block_bytes // WORD_BYTES, dtype=torch.int64, device=self._device)
            cells = Cells(np.zeros(1, np.int64), np.ones(1, np.uint64))
            self._scatters.wait_stream(torch.cuda.current_stream(self._device))
            self._digest_of_cells(block, 0, cells, self._scatters)
            # Each layer has one block, which is also the source.
            addresses = torch.full_like(self._addresses, block.data_ptr())
            self._scatters.wait_stream(torch.cuda.current_stream(self._device))
            self._scatter_in_one(block, addresses, np.zeros(1, np.int64), 0, 0)
            self._scatters.synchronize()
        except Exception:  # whatever a compiler may lack
            self._kernels = None
            log.warning(
                "Triton kernels are not available; copies of KV need more calls and take some milliseconds longer",
                exc_info=True,
            )

    def _digest_of_cells(self, words: torch.Tensor, offset: int, cells: Cells, stream: torch.cuda.Stream) -> Digest:
        assert self._kernels is not None
        # The kernel reads and writes it in host memory: the first word of each cell, and then the cell's sum.
        given = torch.empty(2 * len(cells), dtype=torch.int64, pin_memory=True)
        given.numpy()[::2] = cells.rows * (self.block_bytes // WORD_BYTES) + offset // WORD_BYTES
        with torch.cuda.stream(stream):
            self._kernels.digest(words, given, self._weights)
            event = stream.record_event()
        _IN_FLIGHT.add(event, given)
        return _DigestOfCells(event, given, cells.keys)

    def _scatter_in_one(
        self, words: torch.Tensor, addresses: torch.Tensor, ids: npt.NDArray[np.int64], offset: int, stride: int
    ) -> Fence:
        assert self._kernels is not None
        given = torch.empty(2 + ids.size, dtype=torch.int64, pin_memory=True)
        told = given.numpy()
        told[:2] = offset // WORD_BYTES, stride // WORD_BYTES
        told[2:] = ids
        with torch.cuda.stream(self._scatters):
            self._kernels.scatter(words, given, addresses, self.block_bytes // WORD_BYTES)
            event = self._scatters.record_event()
        _IN_FLIGHT.add(event, given)
        return _EventFence(event, (given,))

    # With torch.

    def _digest(self, staging: Staging, offset: int, cells: Cells, stream: torch.cuda.Stream) -> Digest:
        self._check(staging, offset, (int(cells.rows[-1]) + 1) * self.block_bytes)
        if self._kernels is not None:
            return self._digest_of_cells(staging.words, offset, cells, stream)
        end = offset + (int(cells.rows[-1]) + 1) * self.block_bytes
        blocks = staging.memory[offset:end].view(torch.int64).view(-1, self.block_bytes // WORD_BYTES)
        result = torch.zeros((), dtype=torch.int64, pin_memory=True)
        with torch.cuda.stream(stream):
            # Few calls, because each waits for the interpreter: a sample's rows are read at once.
            here = torch.from_numpy(np.stack([cells.rows, cells.keys.view(np.int64)]))
            ids, keys = here.pin_memory().to(self._device, non_blocking=True)
            total: torch.Tensor | None = None
            at_once = max(_DIGEST_BYTES // self.block_bytes, 1)
            for begin in range(0, len(cells), at_once):
                # Blocks in host memory are chosen there, so that only these cross the bus.
                rows = (ids if staging.device == "cuda" else here[0])[begin : begin + at_once]
                chosen = blocks.index_select(0, rows).to(self._device)
                # In place, because another copy would be as large.
                part = chosen.mul_(self._weights).sum(dim=1).mul_(keys[begin : begin + at_once]).sum()
                total = part if total is None else total + part
            assert total is not None  # there are cells
            result.copy_(total, non_blocking=True)
            return _DigestOnDevice(stream.record_event(), result, (ids, keys, total))

    def _scatter_in_layers(self, staging: torch.Tensor, ids: npt.NDArray[np.int64], offset: int, stride: int) -> Fence:
        with torch.cuda.stream(self._scatters):
            there = self._on_device(ids)
            try:
                for layer, blocks in enumerate(self._layers):
                    staged = self._staged(staging, ids.size, offset + layer * stride)
                    blocks.index_copy_(0, there, staged.to(self._device, non_blocking=True))
            except BaseException:
                # The caller gives slot and blocks back, and the copies of earlier layers still use them.
                self._scatters.synchronize()
                raise
            return _EventFence(self._scatters.record_event(), (there,))

    def _staged(self, staging: torch.Tensor, num_blocks: int, offset: int) -> torch.Tensor:
        staged = staging[offset : offset + num_blocks * self.block_bytes].view(self._word)
        return staged.view(num_blocks, *self._layers[0].shape[1:])

    def _cached_ids(self, block_ids: Sequence[int], last: _Ids | None) -> tuple[torch.Tensor, _Ids | None]:
        if last is not None and last[0] is block_ids:
            return last[1], last
        ids = self._on_device(checked(block_ids, len(self._layers[0])))
        # A list could be changed later.
        return ids, (block_ids, ids) if isinstance(block_ids, tuple) else None

    def _on_device(self, ids: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(ids).pin_memory().to(self._device, non_blocking=True)


class _InFlight:
    """Keeps host memory alive while kernels use it, because torch does not know that they do.

    The caller may have dropped it by then, for example when a transfer was cancelled or a belt closed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: deque[tuple[torch.cuda.Event, torch.Tensor]] = deque()

    def add(self, event: torch.cuda.Event, memory: torch.Tensor) -> None:
        with self._lock:
            self._kept.append((event, memory))
            while self._kept and self._kept[0][0].query():  # type: ignore[no-untyped-call]
                self._kept.popleft()


_IN_FLIGHT = _InFlight()


def _in_words(layer: torch.Tensor) -> bool:
    """Whether every run of bytes begins and ends at a word."""
    return all(each % WORD_BYTES == 0 for each in (layer.shape[-1], *layer.stride()[:-1], layer.storage_offset()))
