"""Measures NIXL between two processes with this environment: ``python -m kvbelt.ops.doctor.nixl_pair cpu``.

It prints a ``NixlMeasurement`` as JSON. The second process runs this module, too: it registers memory and makes
progress until its standard input closes. With two GPUs each process uses its own.
"""

import contextlib
import ctypes
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec

from kvbelt.channels.nixl import NixlChannel
from kvbelt.channels.ucx_resources import resources
from kvbelt.errors import ChannelError
from kvbelt.ops.doctor.nixl_measurement import NixlMeasurement
from kvbelt.transfer.ports import Region
from kvbelt.wire.about import TransportChoice

LARGE = 8 << 20
SMALL = 4096
LARGE_ROUNDS, SMALL_ROUNDS = 8, 50

#: Limit of one transfer: 8 MB at one MB/s.
PATIENCE_SECONDS = 10.0


class _Memory:
    """Registered memory of one side."""

    def __init__(self, device: str) -> None:
        kind, _, index = device.partition(":")
        if kind == "cuda":
            import torch  # noqa: PLC0415 -- seconds, and only for GPUs

            self._keep: Any = torch.zeros(LARGE, dtype=torch.uint8, device=device)
            torch.cuda.synchronize()
            address = self._keep.data_ptr()
        else:
            self._keep = ctypes.create_string_buffer(LARGE)
            address = ctypes.addressof(self._keep)
        self.region = Region(address, LARGE, kind, int(index or 0))


def _end(device: str) -> tuple[NixlChannel, Region, _Memory]:
    memory = _Memory(device)
    channel = NixlChannel(f"doctor-{os.getpid()}")
    channel.open({memory.region.device})
    channel.register(memory.region)
    return channel, memory.region, memory


def help_out(device: str) -> None:
    """Run the second process."""
    channel, region, _memory = _end(device)
    sys.stdout.write(f"{channel.local_metadata().hex()} {region.address}\n")
    sys.stdout.flush()
    while not select.select([sys.stdin], [], [], 0)[0]:
        channel.progress()
    os._exit(0)  # skip native atexit handlers


def measure(here: str, there: str) -> NixlMeasurement:
    """Measure in both directions.

    Raises:
        ChannelError: NIXL cannot be loaded, or moves nothing.
    """
    channel, region, _memory = _end(here)
    command = [sys.executable, "-m", "kvbelt.ops.doctor.nixl_pair", "help", there]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as peer:
        try:
            assert peer.stdout is not None
            said = peer.stdout.readline().split()
            if len(said) != 2:
                raise ChannelError("the other process has not started")
            agent, address = channel.add_peer(bytes.fromhex(said[0])), int(said[1])

            def once(post: Callable[..., Any], num_bytes: int) -> float:
                began = time.perf_counter()
                moving = post(agent, [(region.address, address, num_bytes)], region.place, there)
                while not moving.done():
                    channel.progress()
                    if time.perf_counter() - began > PATIENCE_SECONDS:
                        raise ChannelError(f"{num_bytes} bytes have not moved within {PATIENCE_SECONDS:g} s")
                seconds = time.perf_counter() - began
                moving.release()
                return seconds

            def fastest(post: Callable[..., Any], num_bytes: int, rounds: int) -> float:
                once(post, num_bytes)
                return min(once(post, num_bytes) for _ in range(rounds))

            write, read = fastest(channel.write, LARGE, LARGE_ROUNDS), fastest(channel.read, LARGE, LARGE_ROUNDS)
            return NixlMeasurement(
                device=here if here == there else f"{here} to {there}",
                num_bytes=LARGE,
                write_gb_per_second=LARGE / write / 1e9,
                read_gb_per_second=LARGE / read / 1e9,
                write_us=fastest(channel.write, SMALL, SMALL_ROUNDS) * 1e6,
                read_us=fastest(channel.read, SMALL, SMALL_ROUNDS) * 1e6,
                backends=list(channel.backends),
                plugins=list(channel.plugins),
                resources=_resources(),
                transports=[
                    TransportChoice(one.scope, one.operation, one.memory, one.transport) for one in channel.choices()
                ],
                complaints=channel.complaints(),
            )
        finally:
            assert peer.stdin is not None
            with contextlib.suppress(OSError):
                peer.stdin.close()
            try:
                peer.wait(timeout=5)
            except subprocess.TimeoutExpired:
                peer.kill()


def _resources() -> list[str]:
    try:
        return resources()
    except (OSError, AttributeError):  # an unknown version of UCX
        return []


def main() -> None:
    """``nixl_pair DEVICE [DEVICE]``, or ``nixl_pair help DEVICE``."""
    if sys.argv[1] == "help":
        help_out(sys.argv[2])
        return
    here, there = sys.argv[1], sys.argv[-1]
    try:
        found = measure(here, there)
    except ChannelError as error:
        found = NixlMeasurement(device=here, error=str(error))
    sys.stdout.write(msgspec.json.encode(found).decode() + "\n")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
