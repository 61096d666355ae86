"""The device and the sizes of an engine, from its settings and the machine.

A device that PyTorch does not find, and sizes that do not fit, raise a ModelError.
"""

import torch

from kvbelt.engine.api import ModelError
from kvbelt.engine.settings import DEFAULT_CPU_KV_BYTES, DEFAULT_CUDA_KV_SHARE, EngineSettings


def choose_device(settings: EngineSettings) -> torch.device:
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ModelError("device is cuda, but PyTorch finds no CUDA device here; choose cpu or auto")
    return torch.device(settings.device)


def choose_dtype(settings: EngineSettings, device: torch.device) -> torch.dtype | None:
    """The data type of the weights; None: as they are stored."""
    if settings.dtype != "auto":
        return torch.float32 if settings.dtype == "float32" else torch.bfloat16
    return torch.float32 if device.type == "cpu" else None


def count_blocks(settings: EngineSettings, bytes_per_block: int, device: torch.device) -> int:
    """Blocks that the KV memory holds, at least two; ``bytes_per_block`` counts all layers."""
    kv_bytes = settings.kv_bytes
    if kv_bytes is None:
        on_gpu = device.type == "cuda"
        kv_bytes = int(torch.cuda.mem_get_info(device)[0] * DEFAULT_CUDA_KV_SHARE) if on_gpu else DEFAULT_CPU_KV_BYTES
    num_blocks = kv_bytes // bytes_per_block
    if num_blocks < 2:
        raise ModelError(
            f"{kv_bytes} bytes of KV memory hold {num_blocks} blocks of {settings.block_size} tokens "
            f"({bytes_per_block} bytes each, all layers); give at least {2 * bytes_per_block}"
        )
    return num_blocks


def bound_length(settings: EngineSettings, context: int, pool_tokens: int) -> int:
    """Most tokens of a request: as set, or else as the model and the pool allow."""
    asked = settings.max_model_len
    if asked is None:
        return min(context, pool_tokens)
    if asked > context:
        raise ModelError(f"max_model_len is {asked}; the model supports at most {context} tokens")
    if asked > pool_tokens:
        raise ModelError(
            f"max_model_len is {asked}, but the KV memory holds {pool_tokens} tokens; "
            "give more KV memory or lower max_model_len"
        )
    return asked
