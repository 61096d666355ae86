"""Copies whole blocks between an engine's paged KV and contiguous staging memory.

On CPU the copies are numpy's: one call a run of blocks, on the calling thread alone. (Measured, 24 KiB
blocks in random order, one core: ``numpy.take`` into a warm buffer 23 GB/s against 15 to 20 for torch's
``index_select``; assigning rows back 14 GB/s against 1.6 for ``index_copy_``. torch would also start a pool of
threads for every thread that copies.) Blocks that lie side by side are copied as one piece.

On CUDA the copies are torch's, on a side stream, and a fence is an event.

The copier also looks at what lies in staging memory: the digests of wire/digest.py. On CPU they are numpy's product of
a matrix of words with a vector of weights (9 GB/s on one core, where that was measured), on CUDA a few kernels.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvbelt.transfer.ports import Digest, Fence, Region
from kvbelt.wire.digest import WORD_BYTES, Cells, Words, weights

Bytes = npt.NDArray[np.uint8]
_Ids = tuple[tuple[int, ...], torch.Tensor]


def staging_memory(num_bytes: int, device: torch.device, *, model_on: torch.device) -> torch.Tensor:
    """Memory for staging on ``device``, flat; pinned where it is the host's and the model is on a GPU."""
    # Untouched pages of host memory cost nothing, unless a GPU must reach them: so a buffer may be large.
    pinned = device.type == "cpu" and model_on.type == "cuda"
    return torch.empty(num_bytes, dtype=torch.uint8, device=device, pin_memory=pinned)


def region_of(staging: torch.Tensor) -> Region:
    """Staging memory as a channel registers it."""
    return Region(staging.data_ptr(), staging.numel(), staging.device.type, staging.device.index or 0)


class _Done:
    """A copy that was complete when the call returned."""

    def done(self) -> bool:
        """It is."""
        return True


class _EventFence:
    """A copy on a stream, with what must stay alive until it has run."""

    def __init__(self, event: torch.cuda.Event, held: tuple[torch.Tensor, ...]) -> None:
        self._event = event
        self._held = held

    def done(self) -> bool:
        """Whether the stream has come past it."""
        if self._held and bool(self._event.query()):  # type: ignore[no-untyped-call]
            self._held = ()
        return not self._held


DONE = _Done()


class _Known(_Done):
    """A digest that was known when the call returned."""

    def __init__(self, value: int) -> None:
        self._value = value

    def value(self) -> int:
        """It."""
        return self._value


class _DigestOnDevice(_EventFence):
    """A digest that a stream computes, and copies to where the host can read it."""

    def __init__(self, event: torch.cuda.Event, result: torch.Tensor, held: tuple[torch.Tensor, ...]) -> None:
        super().__init__(event, held)
        self._result = result

    def value(self) -> int:
        """It, once it is done."""
        return int(self._result.item()) & 0xFFFF_FFFF_FFFF_FFFF


def TorchPagedCopy(  # noqa: N802 -- a factory that reads as the class it makes
    layers: Sequence[torch.Tensor],
    send_staging: torch.Tensor | None,
    receive_staging: torch.Tensor | None,
    overflow_staging: torch.Tensor | None = None,
) -> "CpuPagedCopy | CudaPagedCopy":
    """The copier for where ``layers`` live.

    Args:
        layers: one tensor a layer, ``[num_blocks, ...]``; a block is contiguous, and only its bytes matter.
        send_staging: where gathers go: ``uint8``, one dimension, CPU (pinned, if the layers are on a GPU) or CUDA.
        receive_staging: where scatters come from, likewise.
        overflow_staging: where they come from as well (region 1), likewise.

    Raises:
        ValueError: a block is not contiguous, or a staging buffer is not a flat run of bytes.
    """
    for staging in (send_staging, receive_staging, overflow_staging):
        if staging is not None and (staging.dtype is not torch.uint8 or staging.dim() != 1):
            raise ValueError(f"a staging buffer of {staging.dtype} with shape {tuple(staging.shape)}; uint8 and flat")
    blocks = [_blocks_of_bytes(layer) for layer in layers]
    received = [staging for staging in (receive_staging, overflow_staging) if staging is not None]
    if blocks and blocks[0].is_cuda:
        return CudaPagedCopy(blocks, send_staging, received)
    return CpuPagedCopy(blocks, send_staging, received)


def _blocks_of_bytes(layer: torch.Tensor) -> torch.Tensor:
    """``[num_blocks, block_bytes]`` over the same memory."""
    if not layer.is_contiguous():
        raise ValueError(f"a layer of shape {tuple(layer.shape)} and strides {layer.stride()} is not contiguous")
    return layer.view(layer.shape[0], -1).view(torch.uint8)


class _FutureFence:
    """A copy on a thread of the copier's."""

    def __init__(self, copy: "Future[None]") -> None:
        self._copy = copy

    def done(self) -> bool:
        """Whether it has run. Raises what it raised."""
        if not self._copy.done():
            return False
        self._copy.result()
        return True


#: Threads that fill runs of neighbouring blocks. ``benchmarks/transfer.py`` printed 10.5 ms for the scatter of 46 MB
#: with one and 5.3 with two, on the machine of docs/performance.md; the request waits for nothing else.
_FILLING_THREADS = 2

#: Blocks whose digest is computed in one go, so that the copies it makes of them stay small.
_DIGEST_ROWS = 256

#: On a device so many bytes in one go: a sample of 7,500 tokens of an 8B model is 17 MiB, and each go is five calls,
#: after each of which the thread may have to wait for the interpreter.
_DIGEST_BYTES = 32 << 20


class CpuPagedCopy:
    """``PagedCopy`` on CPU. Gathers are complete when the call returns, on the belt's own thread.

    Scatters into neighbouring blocks run on two threads, layer beside layer; they sleep while there is nothing to fill.
    """

    def __init__(
        self,
        layers: Sequence[torch.Tensor],
        send_staging: torch.Tensor | None,
        receive_staging: Sequence[torch.Tensor],
    ) -> None:
        self._layers: list[Bytes] = [layer.numpy() for layer in layers]
        self.block_bytes = self._layers[0].shape[1]
        self._send: Bytes | None = None if send_staging is None else send_staging.numpy()
        self._receive: list[Bytes] = [staging.numpy() for staging in receive_staging]
        self._weights = weights(-(-self.block_bytes // WORD_BYTES))
        self._fillers = ThreadPoolExecutor(_FILLING_THREADS, thread_name_prefix="scatter")
        self._filled: tuple[Sequence[int], npt.NDArray[np.int64], int | None] = ([], np.empty(0, np.int64), None)

    def gather(self, layer: int, block_ids: Sequence[int], offset: int, ready: Any) -> Fence:  # noqa: ARG002
        """Paged blocks to ``send_staging``. ``ready`` is None on CPU."""
        assert self._send is not None
        blocks = self._layers[layer]
        ids = _checked(block_ids, len(blocks))
        staged = self._send[offset : offset + ids.size * self.block_bytes].reshape(-1, self.block_bytes)
        first = _run_start(ids)
        if first is not None:
            np.copyto(staged, blocks[first : first + ids.size])
        else:
            # The ids are in range; "raise" would check them again, at the price of a second copy.
            np.take(blocks, ids, axis=0, out=staged, mode="clip")
        return DONE

    def digest_sent(self, offset: int, cells: Cells) -> Digest:
        """Of blocks in ``send_staging``."""
        assert self._send is not None
        return _Known(self._digest(self._send[offset:], cells))

    def digest_received(self, offset: int, cells: Cells, region: int = 0) -> Digest:
        """Of blocks in ``receive_staging``."""
        return _Known(self._digest(self._receive[region][offset:], cells))

    def _digest(self, staging: Bytes, cells: Cells) -> int:
        total = np.uint64(0)
        for begin in range(0, len(cells), _DIGEST_ROWS):
            rows, keys = cells.rows[begin : begin + _DIGEST_ROWS], cells.keys[begin : begin + _DIGEST_ROWS]
            total += np.dot(self._words(staging, rows) @ self._weights, keys)
        return int(total)

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

    def scatter(self, layer: int, block_ids: Sequence[int], offset: int, region: int = 0) -> Fence:
        """``receive_staging`` to paged blocks."""
        blocks = self._layers[layer]
        ids, first = self._ids_to_fill(block_ids)
        staged = self._receive[region][offset : offset + ids.size * self.block_bytes].reshape(-1, self.block_bytes)
        if first is not None:
            return _FutureFence(self._fillers.submit(np.copyto, blocks[first : first + ids.size], staged))
        blocks[ids] = staged  # keeps the interpreter to itself, so a second thread would not help
        return DONE

    def _ids_to_fill(self, block_ids: Sequence[int]) -> tuple[npt.NDArray[np.int64], int | None]:
        """The ids, and the first one if they follow one upon another."""
        # A slot is scattered layer after layer into the same blocks: a tuple, seen before, need not be looked at again.
        # (One attribute, read once: threads that scatter at the same time only lose the shortcut.)
        seen, ids, first = self._filled
        if block_ids is not seen or not isinstance(block_ids, tuple):
            ids = _checked(block_ids, len(self._layers[0]))
            first = _run_start(ids)
            self._filled = (block_ids, ids, first)
        return ids, first


def _run_start(ids: npt.NDArray[np.int64]) -> int | None:
    """The first id, when the ids follow one upon another."""
    return int(ids[0]) if ids.size and bool((np.diff(ids) == 1).all()) else None


def _checked(block_ids: Sequence[int], num_blocks: int) -> npt.NDArray[np.int64]:
    ids = np.asarray(block_ids, dtype=np.int64)
    if ids.size and not (int(ids.min()) >= 0 and int(ids.max()) < num_blocks):
        raise ValueError(f"block ids {int(ids.min())} to {int(ids.max())} of a pool of {num_blocks} blocks")
    return ids


class CudaPagedCopy:
    """``PagedCopy`` on one CUDA device, on a side stream for each direction."""

    def __init__(
        self,
        layers: Sequence[torch.Tensor],
        send_staging: torch.Tensor | None,
        receive_staging: Sequence[torch.Tensor],
    ) -> None:
        self.block_bytes = layers[0].shape[1]
        # Copied in the widest words that fit: byte by byte an index costs as much as what it moves.
        self._word = torch.int64 if self.block_bytes % 8 == 0 else torch.uint8
        self._layers = [layer.view(self._word) for layer in layers]
        self._device = layers[0].device
        self._send = send_staging
        self._receive = list(receive_staging)
        self._weights = torch.from_numpy(weights(self.block_bytes // WORD_BYTES).view(np.int64)).to(self._device)
        self._gathers = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._scatters = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        # Two engine threads never scatter at once, but nothing here rests on it.
        self._lock = threading.Lock()
        # The layers of a prompt are copied one after another, with the same blocks: their ids travel once.
        self._last_gather: _Ids | None = None
        self._last_scatter: _Ids | None = None

    def gather(self, layer: int, block_ids: Sequence[int], offset: int, ready: Any) -> Fence:
        """Paged blocks to ``send_staging``, once ``ready`` (a CUDA event, or None) has happened."""
        assert self._send is not None
        staged = self._staged(self._send, len(block_ids), offset)
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
        """Of blocks in ``send_staging``, once the gathers before it have run."""
        assert self._send is not None
        return self._digest(self._send, offset, cells, self._gathers)

    def digest_received(self, offset: int, cells: Cells, region: int = 0) -> Digest:
        """Of blocks in ``receive_staging``."""
        return self._digest(self._receive[region], offset, cells, self._scatters)

    def _digest(self, staging: torch.Tensor, offset: int, cells: Cells, stream: torch.cuda.Stream) -> Digest:
        end = offset + (int(cells.rows[-1]) + 1) * self.block_bytes
        blocks = staging[offset:end].view(torch.int64).view(-1, self.block_bytes // WORD_BYTES)
        result = torch.zeros((), dtype=torch.int64, pin_memory=True)
        with torch.cuda.stream(stream):
            # Few calls, and so few that wait for the interpreter: a sample's rows are looked at in one go.
            here = torch.from_numpy(np.stack([cells.rows, cells.keys.view(np.int64)]))
            ids, keys = here.pin_memory().to(self._device, non_blocking=True)
            total: torch.Tensor | None = None
            at_once = max(_DIGEST_BYTES // self.block_bytes, 1)
            for begin in range(0, len(cells), at_once):
                # What lies in host memory is picked there: only the chosen blocks cross the bus.
                rows = (ids if staging.is_cuda else here[0])[begin : begin + at_once]
                chosen = blocks.index_select(0, rows).to(self._device)
                # In place: it is a copy, and another one would be as large.
                part = chosen.mul_(self._weights).sum(dim=1).mul_(keys[begin : begin + at_once]).sum()
                total = part if total is None else total + part
            assert total is not None  # there are cells
            result.copy_(total, non_blocking=True)
            return _DigestOnDevice(stream.record_event(), result, (ids, keys, total))

    def scatter(self, layer: int, block_ids: Sequence[int], offset: int, region: int = 0) -> Fence:
        """``receive_staging`` to paged blocks."""
        staged = self._staged(self._receive[region], len(block_ids), offset)
        with self._lock, torch.cuda.stream(self._scatters):
            ids, self._last_scatter = self._cached_ids(block_ids, self._last_scatter)
            here = staged.to(self._device, non_blocking=True)
            self._layers[layer].index_copy_(0, ids, here)
            return _EventFence(self._scatters.record_event(), (ids, here))

    def _staged(self, staging: torch.Tensor, num_blocks: int, offset: int) -> torch.Tensor:
        return staging[offset : offset + num_blocks * self.block_bytes].view(self._word).view(num_blocks, -1)

    def _cached_ids(self, block_ids: Sequence[int], last: _Ids | None) -> tuple[torch.Tensor, _Ids | None]:
        if last is not None and last[0] is block_ids:
            return last[1], last
        ids = self._ids(block_ids)
        # A list could be changed behind our back.
        return ids, (block_ids, ids) if isinstance(block_ids, tuple) else None

    def _ids(self, block_ids: Sequence[int]) -> torch.Tensor:
        ids = _checked(block_ids, len(self._layers[0]))
        return torch.from_numpy(ids).pin_memory().to(self._device, non_blocking=True)
