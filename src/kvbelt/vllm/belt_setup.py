"""From settings and vLLM's KV memory to a belt."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from prometheus_client.metrics_core import Metric

from kvbelt import about
from kvbelt.belt_metrics import belt_families, link_families, road_families
from kvbelt.channels.factory import make_channel
from kvbelt.channels.mooncake import MooncakeChannel
from kvbelt.channels.nixl import NixlChannel
from kvbelt.engine.fingerprint import fingerprint
from kvbelt.errors import SettingsError
from kvbelt.paged_copy import TorchPagedCopy, region_of, staging_memory
from kvbelt.transfer.belt import Belt
from kvbelt.transfer.ports import PrefixIndex
from kvbelt.transfer.settings import BeltIdentity, BeltSettings
from kvbelt.vllm.about import Carrier, roads_of
from kvbelt.vllm.pages import Pages
from kvbelt.vllm.settings import ConnectorSettings
from kvbelt.wire.ids import EngineId
from kvbelt.wire.layout import KVLayout

log = logging.getLogger("kvbelt.vllm")

#: Longer than a worker's of our own: on CPU the belt's thread is bound to the core that the model computes on, and
#: on a full machine has gone without it for two seconds.
LEASE_SECONDS = 4.0


@dataclass(frozen=True, slots=True)
class Rank:
    """Which tensor-parallel rank of how many. Each has a belt of its own, over its own part of every block."""

    number: int = 0
    size: int = 1


def channel_for(
    settings: ConnectorSettings, engine_id: EngineId, device: torch.device
) -> NixlChannel | MooncakeChannel:
    """What moves this server's bytes. It holds nothing yet."""
    return make_channel(
        settings.channel,
        f"{settings.role}-{engine_id}",
        settings.host,
        # UCX works on its thread's current device.
        prepare=partial(torch.cuda.set_device, device) if device.type == "cuda" else None,
    )


def make_belt(  # noqa: PLR0917 -- its seams
    settings: ConnectorSettings,
    channel: NixlChannel | MooncakeChannel,
    layout: KVLayout,
    pages: Pages,
    engine_id: EngineId,
    model: str,
    model_fingerprint: str,
    rank: Rank = Rank(),
    prefix: PrefixIndex | None = None,
) -> Belt:
    """A belt over these pages, not yet started. The proxy hears of transfers from rank 0.

    Raises:
        SettingsError: the buffer cannot hold one block of every layer.
    """
    if settings.buffer_bytes < layout.slot_bytes(1):
        raise SettingsError(
            f"pd_buffer_size is {settings.buffer_bytes}; one block of this model takes {layout.slot_bytes(1)} bytes"
        )
    device = pages.rows[0].device
    buffer_device = device if settings.buffer_device == "cuda" else torch.device("cpu")
    problem = about.ucx_problem(os.environ.get("UCX_TLS"), str(buffer_device)) if channel.name == "nixl" else None
    if problem is not None:
        log.warning("UCX_TLS=%s slows transfers down: %s", os.environ["UCX_TLS"], problem)
    send = staging_memory(settings.buffer_bytes, buffer_device, model_on=device) if settings.sends else None
    receive = staging_memory(settings.buffer_bytes, buffer_device, model_on=device) if settings.receives else None
    overflow = None
    if settings.receives and settings.overflow_bytes:
        overflow = staging_memory(settings.overflow_bytes, torch.device("cpu"), model_on=device)
    return Belt(
        BeltIdentity(
            engine_id=engine_id,
            role=settings.role,
            model=model,
            fingerprint=model_fingerprint,
            layout=layout,
            tp_rank=rank.number,
            tp_size=rank.size,
        ),
        BeltSettings(
            advertised_host=settings.host,
            bind_host=settings.host,
            init_port=settings.init_ports[rank.number] if settings.init_ports else 0,
            alloc_port=settings.alloc_ports[rank.number] if settings.alloc_ports else 0,
            notification_endpoint=settings.notification_endpoint if rank.number == 0 else None,
            keys=settings.keys,
            insecure=settings.insecure,
            lease_seconds=LEASE_SECONDS,
            verify=settings.verify,
        ),
        channel,
        TorchPagedCopy(pages.rows, send_staging=send, receive_staging=receive, overflow_staging=overflow),
        send_region=None if send is None else region_of(send),
        receive_region=None if receive is None else region_of(receive),
        overflow_region=None if overflow is None else region_of(overflow),
        prefix=prefix,
    )


def model_fingerprint(model: str, revision: str | None, load_format: str, config: Mapping[str, Any]) -> str:
    """Equal for equal weights: by content where the model is a folder, by name and revision where vLLM fetched it."""
    folder = Path(model)
    contents = fingerprint(folder) if folder.is_dir() else f"{model}@{revision}"
    digest = hashlib.sha256(json.dumps([contents, load_format, dict(config)], sort_keys=True, default=str).encode())
    return digest.hexdigest()[:32]


def families_of(belt: Belt, carrier: Carrier) -> list[Metric]:
    """A belt's metrics, as of now. Waits a turn of it."""
    return [*belt_families(belt.snapshot()), *link_families(belt.links()), *road_families(roads_of(carrier))]
