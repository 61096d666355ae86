"""From settings and vLLM's KV memory to a belt."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kvbelt.channels.nixl import NixlChannel
from kvbelt.engine.fingerprint import fingerprint
from kvbelt.errors import SettingsError
from kvbelt.paged_copy import TorchPagedCopy
from kvbelt.transfer.belt import Belt
from kvbelt.transfer.ports import Region
from kvbelt.transfer.settings import BeltIdentity, BeltSettings
from kvbelt.vllm.pages import Pages
from kvbelt.vllm.settings import ConnectorSettings
from kvbelt.wire.ids import EngineId
from kvbelt.wire.layout import KVLayout

#: Longer than a worker's of our own: on CPU the belt's thread is bound to the core that the model computes on, and
#: on a full machine has gone without it for two seconds.
LEASE_SECONDS = 4.0


class _DeviceChannel(NixlChannel):
    """A NIXL channel whose thread works on one CUDA device: UCX takes the thread's current one."""

    def __init__(self, name: str, backends: tuple[str, ...], device: torch.device) -> None:
        super().__init__(name, backends)
        self._device = device

    def register(self, region: Region) -> None:
        """The first call of the belt's thread."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        super().register(region)


def make_belt(  # noqa: PLR0917 -- its seams
    settings: ConnectorSettings, layout: KVLayout, pages: Pages, engine_id: EngineId, model: str, model_fingerprint: str
) -> Belt:
    """A belt over these pages, not yet started.

    Raises:
        SettingsError: the buffer cannot hold one block of every layer.
    """
    if settings.buffer_bytes < layout.slot_bytes(1):
        raise SettingsError(
            f"pd_buffer_size is {settings.buffer_bytes}; one block of this model takes {layout.slot_bytes(1)} bytes"
        )
    device = pages.rows[0].device
    send = _staging(settings, device) if settings.sends else None
    receive = _staging(settings, device) if settings.receives else None
    return Belt(
        BeltIdentity(
            engine_id=engine_id,
            role=settings.role,
            model=model,
            fingerprint=model_fingerprint,
            layout=layout,
        ),
        BeltSettings(
            advertised_host=settings.host,
            bind_host=settings.host,
            init_port=settings.init_port,
            alloc_port=settings.alloc_port,
            notification_endpoint=settings.notification_endpoint,
            keys=settings.keys,
            insecure=settings.insecure,
            lease_seconds=LEASE_SECONDS,
        ),
        _DeviceChannel(f"{settings.role}-{engine_id}", settings.nixl_backends, device),
        TorchPagedCopy(pages.rows, send_staging=send, receive_staging=receive),
        send_region=_region(send),
        receive_region=_region(receive),
    )


def _staging(settings: ConnectorSettings, device: torch.device) -> torch.Tensor:
    if settings.buffer_device == "cuda":
        return torch.empty(settings.buffer_bytes, dtype=torch.uint8, device=device)
    # Untouched pages of host memory cost nothing, unless a GPU must reach them.
    return torch.empty(settings.buffer_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def _region(staging: torch.Tensor | None) -> Region | None:
    if staging is None:
        return None
    return Region(staging.data_ptr(), staging.numel(), staging.device.type, staging.device.index or 0)


def model_fingerprint(model: str, revision: str | None, load_format: str, config: Mapping[str, Any]) -> str:
    """Equal for equal weights: by content where the model is a folder, by name and revision where vLLM fetched it."""
    folder = Path(model)
    contents = fingerprint(folder) if folder.is_dir() else f"{model}@{revision}"
    digest = hashlib.sha256(json.dumps([contents, load_format, dict(config)], sort_keys=True, default=str).encode())
    return digest.hexdigest()[:32]
