"""Flat memory for KV in transit, taken when the first peer connects: a worker without peers holds none."""

import numpy as np
import numpy.typing as npt
import torch

from kvbelt.errors import ChannelError
from kvbelt.transfer.ports import Region
from kvbelt.wire.digest import WORD_BYTES


class Staging:
    """A ``transfer.ports.Buffer`` of ``num_bytes`` on ``on``; pinned if it is host memory and the model is on a GPU."""

    def __init__(self, num_bytes: int, on: torch.device, *, model_on: torch.device) -> None:
        self.num_bytes = num_bytes
        self.device: str = on.type
        self._on = on
        self._pinned = on.type == "cpu" and model_on.type == "cuda"
        self._memory: torch.Tensor | None = None
        self._words: torch.Tensor | None = None
        self._array: npt.NDArray[np.uint8] | None = None

    @classmethod
    def of(cls, memory: torch.Tensor) -> "Staging":
        """Over memory that has been taken: ``uint8``, of one dimension.

        Raises:
            ValueError: it is not a flat run of bytes.
        """
        if memory.dtype is not torch.uint8 or memory.dim() != 1:
            raise ValueError(f"a staging buffer of {memory.dtype} with shape {tuple(memory.shape)}; uint8 and flat")
        staging = cls(memory.numel(), memory.device, model_on=memory.device)
        staging._memory = memory
        return staging

    def take(self) -> Region:
        memory = self.memory
        return Region(memory.data_ptr(), self.num_bytes, self.device, memory.device.index or 0)

    @property
    def memory(self) -> torch.Tensor:
        """``uint8[num_bytes]``, taken now if it has not been.

        Raises:
            ChannelError: the device has not that much.
        """
        if self._memory is None:
            try:
                # Unless it is pinned, an untouched page of host memory takes no memory, so a buffer may be large.
                self._memory = torch.empty(self.num_bytes, dtype=torch.uint8, device=self._on, pin_memory=self._pinned)
            except RuntimeError as error:  # also CUDA's "out of memory"
                reason = str(error).partition("\n")[0]
                raise ChannelError(
                    f"{self.num_bytes} bytes of {self._on} memory for KV in transit (pd_buffer_size): {reason}"
                ) from error
        return self._memory

    # Views take calls, so each is made once.

    @property
    def words(self) -> torch.Tensor:
        """``int64[num_bytes // 8]`` over the same memory."""
        if self._words is None:
            self._words = self.memory[: self.num_bytes // WORD_BYTES * WORD_BYTES].view(torch.int64)
        return self._words

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """Host memory as numpy sees it."""
        if self._array is None:
            self._array = self.memory.numpy()
        return self._array
