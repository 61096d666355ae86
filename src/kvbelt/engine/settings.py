"""What an engine is built with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "bfloat16"]

#: KV memory on a CPU where none is asked for: 23,000 tokens of the demo model in fp32.
DEFAULT_CPU_KV_BYTES = 1 << 30
#: Share of the GPU memory that is free once the weights are loaded; the rest is for activations.
DEFAULT_CUDA_KV_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Settings of one engine.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    model_dir: Path
    device: Device = "auto"
    dtype: DType = "auto"  #: auto: as the weights are stored on CUDA, float32 on CPU
    kv_bytes: int | None = None  #: memory for KV; None: 1 GiB on CPU, 80 % of what is free on CUDA
    block_size: int = 16  #: tokens a block
    max_batch_tokens: int = 512  #: tokens of one step, prefill chunks and decodes together
    max_running: int = 64  #: requests in one step
    max_model_len: int | None = None  #: None: the model's context, or what the KV memory holds if that is less
    threads: int | None = None  #: CPU threads of the forward pass; None: PyTorch's choice
    prefix_caching: bool = True  #: share blocks of equal prefixes (requests that say which: ``PrefixHashes``)

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        for name in ("block_size", "max_batch_tokens", "max_running"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("kv_bytes", "max_model_len", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1, or absent")
        if self.max_batch_tokens < self.max_running:
            raise ValueError(
                f"max_batch_tokens ({self.max_batch_tokens}) is less than max_running ({self.max_running}): "
                "not every running request could get its token a step; raise the one or lower the other"
            )
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device is {self.device!r}; it must be auto, cpu or cuda")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"dtype is {self.dtype!r}; it must be auto, float32 or bfloat16")
