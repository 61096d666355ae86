from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kvbelt.channels.mooncake import MooncakeChannel
from kvbelt.channels.nixl import NixlChannel

VendorChannel = NixlChannel | MooncakeChannel


@dataclass(frozen=True, slots=True)
class ChannelSettings:
    name: Literal["nixl", "mooncake"] = "nixl"
    nixl_backends: tuple[str, ...] = ("UCX",)
    mooncake_protocol: Literal["tcp", "rdma"] = "tcp"
    mooncake_device: str = ""  #: RDMA devices, as ``mlx5_0,mlx5_1``; empty: all of the host


def make_channel(
    settings: ChannelSettings, agent_name: str, host: str, prepare: Callable[[], None] | None = None
) -> VendorChannel:
    """A channel without registered memory.

    ``agent_name`` is unique among all processes that exchange KV; ``host`` is this host's address, for peers.
    ``prepare`` is called once on the thread that uses the channel, before the vendor's library is loaded.
    """
    if settings.name == "mooncake":
        return MooncakeChannel(host, settings.mooncake_protocol, settings.mooncake_device, prepare)
    return NixlChannel(agent_name, settings.nixl_backends, prepare)
