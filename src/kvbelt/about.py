"""Versions, environment and machine of this process, for ``GET /kvbelt/about``."""

import contextlib
import os
import platform
import socket
import time
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

from kvbelt import __version__
from kvbelt.wire.about import About, Machine

#: Packages whose versions should agree between two workers.
PACKAGES = ("torch", "nixl", "mooncake-transfer-engine", "mooncake-transfer-engine-non-cuda", "transformers", "vllm")

#: Variables that change how KV travels, or what is computed. None holds a secret.
VARIABLES = (
    "PYTHONHASHSEED",
    "UCX_TLS",
    "UCX_NET_DEVICES",
    "UCX_PROTO_ENABLE",
    "UCX_RNDV_SCHEME",
    "NIXL_PLUGIN_DIR",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
)


def on_this_host(device: str, visible: str | None) -> str:
    """PyTorch's name of a device with the host's number of the GPU, or its UUID.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``, of those that the process sees.
        visible: ``CUDA_VISIBLE_DEVICES``.
    """
    kind, _, number = device.partition(":")
    names = [name.strip() for name in (visible or "").split(",") if name.strip()]
    if kind != "cuda" or not number.isdecimal():
        return device
    return f"cuda:{names[int(number)]}" if int(number) < len(names) else device


def of_this_process(role: str, engine: str = "", device: str = "") -> About:
    """The facts that any process has; a worker adds those of its model and belt."""
    return About(
        role=role,
        engine=engine,
        device=on_this_host(device, os.environ.get("CUDA_VISIBLE_DEVICES")),
        kvbelt=__version__,
        python=platform.python_version(),
        packages=dict(versions()),
        env={name: os.environ[name] for name in VARIABLES if name in os.environ},
        machine=this_machine(),
        unix_time=time.time(),
    )


@cache
def versions() -> Mapping[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@cache
def this_machine() -> Machine:
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        network = str(Path("/proc/self/ns/net").readlink())
    except OSError:
        boot_id = network = ""
    return Machine(socket.gethostname(), boot_id, network, os.getpid())
