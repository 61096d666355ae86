"""From the YAML file to a belt over this engine's blocks: staging memory, identity, addresses."""

import os

import torch

from kvbelt import about
from kvbelt.channels.factory import make_channel
from kvbelt.channels.mooncake import MooncakeChannel
from kvbelt.channels.nixl import NixlChannel
from kvbelt.engine.engine import Engine
from kvbelt.errors import SettingsError
from kvbelt.paged_copy import TorchPagedCopy, region_of, staging_memory
from kvbelt.security.keys import Keys
from kvbelt.settings import BeltFile, WorkerSettings, channel_of
from kvbelt.telemetry import get_logger
from kvbelt.transfer.belt import Belt
from kvbelt.transfer.settings import BeltIdentity, BeltSettings
from kvbelt.wire.ids import EngineId
from kvbelt.wire.layout import KVLayout

log = get_logger(__name__)


def wire_layout(engine: Engine) -> KVLayout:
    """The engine's pool in the words of the handshake."""
    layout = engine.layout
    return KVLayout(
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        block_size=layout.block_size,
        dtype=layout.dtype,
        order=layout.order,
        block_bytes=layout.block_bytes,
    )


def channel_for(settings: WorkerSettings, file: BeltFile, engine_id: EngineId) -> NixlChannel | MooncakeChannel:
    """What moves this worker's bytes. It holds nothing yet."""
    return make_channel(channel_of(file), f"{settings.role}-{engine_id}", file.pd_peer_host or settings.host)


def make_belt(  # noqa: PLR0917 -- its seams
    settings: WorkerSettings,
    file: BeltFile,
    keys: Keys | None,
    engine: Engine,
    channel: NixlChannel | MooncakeChannel,
    engine_id: EngineId,
    model_name: str,
) -> Belt:
    """A belt that sends (prefill) or receives (decode), not yet started.

    Raises:
        SettingsError: the buffer cannot hold one block of every layer.
    """
    assert file.pd_buffer_size is not None
    layout = wire_layout(engine)
    if file.pd_buffer_size < layout.slot_bytes(1):
        raise SettingsError(
            f"pd_buffer_size is {file.pd_buffer_size}; one block of this model takes {layout.slot_bytes(1)} bytes"
        )
    device = engine.pool.storage.device
    buffer_device = torch.device("cpu") if file.pd_buffer_device == "cpu" else device
    if file.pd_buffer_device == "cuda" and device.type != "cuda":
        log.warning("pd_buffer_device is cuda, but the engine runs on the CPU: the staging buffer is in host memory")
    problem = about.ucx_problem(os.environ.get("UCX_TLS"), str(buffer_device)) if channel.name == "nixl" else None
    if problem is not None:
        log.warning("UCX_TLS slows transfers down", UCX_TLS=os.environ["UCX_TLS"], problem=problem)
    sends = file.pd_role == "sender"
    host = file.pd_peer_host or settings.host
    staging = staging_memory(file.pd_buffer_size, buffer_device, model_on=device)
    overflow = None
    if file.pd_overflow_size and not sends:
        overflow = staging_memory(file.pd_overflow_size, torch.device("cpu"), model_on=device)
    notify = f"tcp://{file.pd_proxy_host}:{file.pd_proxy_port}" if sends and file.pd_proxy_host else None
    return Belt(
        BeltIdentity(
            engine_id=engine_id,
            role=settings.role,
            model=model_name,
            fingerprint=engine.fingerprint,
            layout=layout,
            worker=f"{settings.host}:{settings.port}",
        ),
        BeltSettings(
            advertised_host=host,
            bind_host=host,
            init_port=_port(file.pd_peer_init_port),
            alloc_port=_port(file.pd_peer_alloc_port),
            notification_endpoint=notify,
            keys=keys,
            insecure=file.pd_insecure,
            verify=file.pd_verify,
        ),
        channel,
        TorchPagedCopy(
            engine.pool.layers,
            send_staging=staging if sends else None,
            receive_staging=None if sends else staging,
            overflow_staging=overflow,
        ),
        send_region=region_of(staging) if sends else None,
        receive_region=None if sends else region_of(staging),
        overflow_region=None if overflow is None else region_of(overflow),
        prefix=engine if settings.prefix_caching and not sends else None,
    )


def _port(given: int | list[int] | None) -> int:
    """The port of tensor-parallel rank 0, the only one that the embedded engine has."""
    if isinstance(given, list):
        return given[0]
    return given or 0
