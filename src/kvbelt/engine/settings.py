from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "bfloat16"]

#: The default KV memory on a CPU: 23,000 tokens of the demo model in fp32.
DEFAULT_CPU_KV_BYTES = 1 << 30
#: The default KV memory on a GPU: this share of what is free once the weights are loaded. Activations need the rest.
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
    itl_seconds: float | None = None  #: of requests that name no level between tokens; None: any
    max_model_len: int | None = None  #: None: the model's context, or what the KV memory holds if that is less
    threads: int | None = None  #: CPU threads of the forward pass; None: PyTorch's choice
    prefix_caching: bool = True  #: share blocks of equal prefixes, of requests with ``PrefixHashes``

    def __post_init__(self) -> None:
        for name in ("block_size", "max_batch_tokens", "max_running", "kv_bytes", "max_model_len", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.itl_seconds is not None and not self.itl_seconds > 0:
            raise ValueError(f"itl_seconds is {self.itl_seconds}; it must be more than 0")
        if self.max_batch_tokens < self.max_running:
            raise ValueError(
                f"max_batch_tokens ({self.max_batch_tokens}) is less than max_running ({self.max_running}): "
                "not every running request could get its token a step; raise the one or lower the other"
            )
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device is {self.device!r}; it must be auto, cpu or cuda")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"dtype is {self.dtype!r}; it must be auto, float32 or bfloat16")
