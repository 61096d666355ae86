"""LoRA adapters: two servers may have different ones under one name."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from kvbelt.fingerprint import adapter_fingerprint

#: What is told of an adapter whose files are not at hand: vLLM has fetched it from a hub, or they cannot be read.
UNKNOWN = "unknown"


def adapter_of(lora_request: Any | None) -> str:
    """Equal for equal adapters; empty without one."""
    if lora_request is None:
        return ""
    folder = Path(lora_request.lora_path)
    try:
        # An adapter may be replaced in its place.
        saved = max(path.stat().st_mtime_ns for path in folder.glob("adapter_*"))
        return _fingerprint(folder, saved)
    except (OSError, ValueError):
        return UNKNOWN


@lru_cache(maxsize=64)
def _fingerprint(folder: Path, saved: int) -> str:  # noqa: ARG001 -- tells versions apart
    return adapter_fingerprint(folder)


def salt_of(cache_salt: str, adapter: str) -> str:
    """Of the hashes of a prompt's blocks, whose KV depends on the adapter, too."""
    return f"{cache_salt}\0{adapter}" if adapter else cache_salt
