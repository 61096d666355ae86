"""The one place that makes a channel from settings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kvbelt.channels.mooncake import MooncakeChannel
from kvbelt.channels.nixl import NixlChannel


@dataclass(frozen=True, slots=True)
class ChannelSettings:
    """Which vendor moves the bytes, and how."""

    name: Literal["nixl", "mooncake"] = "nixl"
    nixl_backends: tuple[str, ...] = ("UCX",)
    mooncake_protocol: Literal["tcp", "rdma"] = "tcp"
    mooncake_device: str = ""  #: RDMA devices, as ``mlx5_0,mlx5_1``; empty: all of the host


def make_channel(
    settings: ChannelSettings, agent_name: str, host: str, prepare: Callable[[], None] | None = None
) -> NixlChannel | MooncakeChannel:
    """A channel that holds nothing yet.

    Args:
        settings: which, and how.
        agent_name: unique among all processes that meet.
        host: this host, as peers reach it.
        prepare: called once on the thread that uses the channel, before the vendor is loaded.
    """
    if settings.name == "mooncake":
        return MooncakeChannel(host, settings.mooncake_protocol, settings.mooncake_device, prepare)
    return NixlChannel(agent_name, settings.nixl_backends, prepare)
