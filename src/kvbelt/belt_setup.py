"""The one way from settings and an engine's KV memory to a belt, for every engine."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from kvbelt.channels.factory import ChannelSettings, VendorChannel, make_channel
from kvbelt.channels.ucx_tls import ucx_tls_problem
from kvbelt.errors import SettingsError
from kvbelt.paged_copy import Staging, TorchPagedCopy
from kvbelt.security.keys import Keys
from kvbelt.settings import BeltFile, channel_of
from kvbelt.transfer.belt import Belt
from kvbelt.transfer.ports import PrefixIndex
from kvbelt.transfer.settings import LEASE_SECONDS, BeltIdentity, BeltSettings
from kvbelt.wire.health import Role
from kvbelt.wire.ids import EngineId
from kvbelt.wire.reservation import Verify

log = logging.getLogger(__name__)

#: 1 GiB: one prompt of 8,000 tokens of an 8B model.
DEFAULT_BUFFER_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class BeltOptions:
    """What the belt's file says, for one process."""

    role: Role
    buffer_bytes: int  #: of the staging buffer, one for each direction
    buffer_device: Literal["cpu", "cuda"]
    host: str
    channel: ChannelSettings  #: what moves the bytes
    init_ports: tuple[int, ...] = ()  #: one a rank; empty: any
    alloc_ports: tuple[int, ...] = ()
    liveness_ports: tuple[int, ...] = ()
    notification_endpoint: str | None = None  #: the proxy's port to which rank 0 reports transfers and steps
    keys: Keys | None = None
    insecure: bool = False  #: without keys, listen beyond loopback all the same
    overflow_bytes: int = 0  #: of host memory, for KV that finds the buffer full
    host_bytes: int = 0  #: of host memory, for KV blocks of a vLLM server's prompts and answers; 0: none
    verify: Verify = "sample"  #: which digests of what lands are compared
    lease_seconds: float = LEASE_SECONDS

    @property
    def sends(self) -> bool:
        return self.role is not Role.DECODE

    @property
    def receives(self) -> bool:
        return self.role is not Role.PREFILL


def options_of(file: BeltFile, role: Role, host: str, keys: Keys | None) -> BeltOptions:
    """What a checked file says. ``host``: where it does not say."""
    notifies = file.pd_proxy_host is not None and file.pd_proxy_port is not None
    return BeltOptions(
        role=role,
        buffer_bytes=file.pd_buffer_size or DEFAULT_BUFFER_BYTES,
        buffer_device=file.pd_buffer_device,
        host=file.pd_peer_host or host,
        init_ports=_ports(file.pd_peer_init_port),
        alloc_ports=_ports(file.pd_peer_alloc_port),
        liveness_ports=_ports(file.pd_peer_liveness_port),
        notification_endpoint=f"tcp://{file.pd_proxy_host}:{file.pd_proxy_port}" if notifies else None,
        channel=channel_of(file),
        keys=keys,
        insecure=file.pd_insecure,
        overflow_bytes=file.pd_overflow_size,
        verify=file.pd_verify,
    )


def _ports(given: int | list[int] | None) -> tuple[int, ...]:
    return tuple(given) if isinstance(given, list) else () if given is None else (given,)


def channel_for(options: BeltOptions, engine_id: EngineId, device: torch.device) -> VendorChannel:
    """What moves the bytes of the engine on ``device``. It holds nothing yet."""
    return make_channel(
        options.channel,
        f"{options.role}-{engine_id}",
        options.host,
        # UCX works on its thread's current device.
        prepare=partial(torch.cuda.set_device, device) if device.type == "cuda" else None,
    )


def _check_room(device: torch.device, options: BeltOptions) -> None:
    """Warn of buffers that a GPU has no room for: they are taken when the first peer connects."""
    if device.type == "cuda":
        needed = options.buffer_bytes * (options.sends + options.receives)
        free, _ = torch.cuda.mem_get_info(device)
        if free < needed:
            log.warning(
                "%d bytes of %s are free, and the buffers need %d (pd_buffer_size): no KV may cross; leave more room",
                free,
                device,
                needed,
            )


def make_belt(
    options: BeltOptions,
    identity: BeltIdentity,
    channel: VendorChannel,
    layers: Sequence[torch.Tensor],
    prefix: PrefixIndex | None = None,
) -> Belt:
    """A belt over an engine's KV memory, not yet started.

    Args:
        options: what the file says.
        identity: who this process is.
        channel: made by ``channel_for``.
        layers: one tensor a layer, ``[num_blocks, ...]``, on one device.
        prefix: what the engine holds already.

    Raises:
        SettingsError: the buffer cannot hold one block of every layer.
    """
    needed = identity.layout.slot_bytes(1)
    if options.buffer_bytes < needed:
        raise SettingsError(f"pd_buffer_size is {options.buffer_bytes}; one block of this model takes {needed} bytes")
    device = layers[0].device
    buffer_device = device if options.buffer_device == "cuda" else torch.device("cpu")
    if options.buffer_device == "cuda" and device.type != "cuda":
        log.warning("pd_buffer_device is cuda, but the engine runs on the CPU: the staging buffer is in host memory")
    _check_room(buffer_device, options)
    tls = os.environ.get("UCX_TLS")
    problem = ucx_tls_problem(tls, str(buffer_device)) if channel.name == "nixl" else None
    if problem is not None:
        log.warning("UCX_TLS=%s slows transfers down: %s", tls, problem)

    def buffer(num_bytes: int, on: torch.device) -> Staging | None:
        return Staging(num_bytes, on, model_on=device) if num_bytes else None

    send = buffer(options.buffer_bytes * options.sends, buffer_device)
    receive = buffer(options.buffer_bytes * options.receives, buffer_device)
    overflow = buffer(options.overflow_bytes * options.receives, torch.device("cpu"))
    rank = identity.rank
    init_port, alloc_port, liveness_port = (
        ports[rank] if ports else 0 for ports in (options.init_ports, options.alloc_ports, options.liveness_ports)
    )
    return Belt(
        identity,
        BeltSettings(
            advertised_host=options.host,
            bind_host=options.host,
            init_port=init_port,
            alloc_port=alloc_port,
            liveness_port=liveness_port,
            notification_endpoint=options.notification_endpoint if rank == 0 else None,
            keys=options.keys,
            insecure=options.insecure,
            lease_seconds=options.lease_seconds,
            verify=options.verify,
        ),
        channel,
        TorchPagedCopy(layers, send_staging=send, receive_staging=receive, overflow_staging=overflow),
        send_buffer=send,
        receive_buffer=receive,
        overflow_buffer=overflow,
        prefix=prefix,
    )
