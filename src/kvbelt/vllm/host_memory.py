"""The host memory of mixed storage, and copies between it and vLLM's blocks. Called on ``host_worker``'s thread only.

A place is one contiguous run of ``layers * block_bytes`` bytes, so one copy takes all layers of a block over the bus.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from kvbelt.errors import StartError

#: Bytes of blocks that are gathered or scattered at once (one block at least). Copies need two or three times as much
#: device memory.
_BOUNCE_BYTES = 16 << 20


def host_memory(rows: Sequence[torch.Tensor], num_bytes: int) -> "CpuHostMemory | CudaHostMemory":
    """As many places as fit into ``num_bytes`` of host memory.

    Args:
        rows: one tensor a layer, ``uint8 [num_blocks, block_bytes]`` (``pages``).
        num_bytes: the most that the places may take.

    Raises:
        StartError: not one block fits, or the memory cannot be pinned for the GPU.
    """
    place_bytes = len(rows) * rows[0].shape[1]
    num_places = num_bytes // place_bytes
    if num_places < 1:
        raise StartError(f"max_local_cpu_size is {num_bytes} bytes; one block of this model takes {place_bytes}")
    # A page takes no memory until a block is kept in it.
    places = torch.empty((num_places, len(rows), rows[0].shape[1]), dtype=torch.uint8)
    return CudaHostMemory(rows, places) if rows[0].is_cuda else CpuHostMemory(rows, places)


class CpuHostMemory:
    """For a model on the CPU: copies are complete when the call returns."""

    def __init__(self, rows: Sequence[torch.Tensor], places: torch.Tensor) -> None:
        self.num_places = places.shape[0]
        self._rows = [row.numpy() for row in rows]
        self._places = places.numpy()

    def keep(self, block_ids: Sequence[int], places: Sequence[int], ready: Any) -> None:  # noqa: ARG002
        for block_id, place in zip(block_ids, places, strict=True):
            for layer, row in enumerate(self._rows):
                np.copyto(self._places[place, layer], row[block_id])

    def restore(self, block_ids: Sequence[int], places: Sequence[int]) -> None:
        for block_id, place in zip(block_ids, places, strict=True):
            for layer, row in enumerate(self._rows):
                np.copyto(row[block_id], self._places[place, layer])

    def close(self) -> None:
        return


class CudaHostMemory:
    """For a model on a GPU: blocks are gathered on a side stream, then copied over the bus one by one."""

    def __init__(self, rows: Sequence[torch.Tensor], places: torch.Tensor) -> None:
        self.num_places, num_layers, block_bytes = places.shape
        # In the widest words that fit: byte by byte, an index costs as much as the byte that it moves.
        word = torch.int64 if block_bytes % 8 == 0 else torch.uint8
        self._rows = [row.view(word) for row in rows]
        self._places = places.view(word)
        self._device = rows[0].device
        self._at_once = max(1, _BOUNCE_BYTES // (num_layers * block_bytes))
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        # torch's own pinned memory comes in powers of two, so the places are pinned here.
        status = torch.cuda.cudart().cudaHostRegister(places.data_ptr(), places.numel(), 0)  # type: ignore[no-untyped-call]
        if int(status) != 0:
            raise StartError(f"{places.numel()} bytes of host memory could not be pinned (CUDA says {status})")

    def keep(self, block_ids: Sequence[int], places: Sequence[int], ready: Any) -> None:
        """Copy blocks to places once ``ready`` (a CUDA event) has happened; returns when the copies are complete."""
        torch.cuda.set_device(self._device)
        with torch.cuda.stream(self._stream):
            if ready is not None:
                self._stream.wait_event(ready)
            for ids, some in self._batches(block_ids, places):
                gathered = torch.stack([row.index_select(0, ids) for row in self._rows], dim=1)
                for at, place in enumerate(some):
                    self._places[place].copy_(gathered[at], non_blocking=True)
            self._wait()

    def restore(self, block_ids: Sequence[int], places: Sequence[int]) -> None:
        torch.cuda.set_device(self._device)
        with torch.cuda.stream(self._stream):
            for ids, some in self._batches(block_ids, places):
                here = torch.empty((len(ids), *self._places.shape[1:]), dtype=self._places.dtype, device=self._device)
                for at, place in enumerate(some):
                    here[at].copy_(self._places[place], non_blocking=True)
                for layer, row in enumerate(self._rows):
                    row.index_copy_(0, ids, here[:, layer])
            self._wait()

    def close(self) -> None:
        torch.cuda.cudart().cudaHostUnregister(self._places.data_ptr())  # type: ignore[no-untyped-call]

    def _batches(self, block_ids: Sequence[int], places: Sequence[int]) -> Iterator[tuple[torch.Tensor, Sequence[int]]]:
        for start in range(0, len(block_ids), self._at_once):
            these = slice(start, start + self._at_once)
            yield torch.tensor(block_ids[these], dtype=torch.int64).to(self._device), places[these]

    def _wait(self) -> None:
        # A blocking event sleeps, while stream.synchronize() may spin.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        event.synchronize()
