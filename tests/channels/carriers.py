"""All channels, and how to make an end of each, for the contract suite and the belt's tests."""

import itertools
import os
from collections.abc import Callable
from importlib import util

import pytest
import torch

from kvbelt.channels.mooncake import MooncakeChannel
from kvbelt.channels.nixl import NixlChannel
from kvbelt.transfer.ports import Channel, Region
from tests.channels.memory import MemoryChannel, MemoryNetwork

#: Between processes: NIXL over what UCX finds, NIXL over TCP, Mooncake.
REMOTE = ("nixl", "nixl-tcp", "mooncake")

NAMES = itertools.count()


def why_not(kind: str) -> str | None:
    """Why a channel cannot be tested here; None: it can."""
    if kind != "mooncake":
        return None
    if util.find_spec("mooncake") is None:
        return "mooncake-transfer-engine-non-cuda is not installed"
    try:
        from mooncake import engine  # noqa: F401, PLC0415
    except ImportError as error:
        return f"mooncake does not load ({error}); Debian's packages libibverbs1 and librdmacm1 are needed"
    return None


def need(kind: str) -> None:
    """Skip the test if the channel cannot be tested here."""
    if reason := why_not(kind):
        pytest.skip(reason)


def environment(kind: str) -> dict[str, str]:
    """The variables that a process needs to use a channel."""
    return {"UCX_TLS": "tcp"} if kind == "nixl-tcp" else {}


def maker(kind: str) -> Callable[[], Channel]:
    """Makes channels that reach each other. The caller sets the environment."""
    if kind == "memory":
        network = MemoryNetwork()
        return lambda: MemoryChannel(f"end-{next(NAMES)}", network)
    if kind == "mooncake":
        return lambda: MooncakeChannel("127.0.0.1")
    return lambda: NixlChannel(f"end-{os.getpid()}-{next(NAMES)}")


class End:
    """A channel with registered memory."""

    def __init__(self, channel: Channel, num_bytes: int = 1 << 20) -> None:
        self.memory = torch.zeros(num_bytes, dtype=torch.uint8)
        self.region = Region(self.memory.data_ptr(), num_bytes, "cpu")
        self.channel = channel
        channel.open({"cpu"})
        channel.register(self.region)

    @property
    def at(self) -> int:
        """The address of the memory."""
        return self.region.address
