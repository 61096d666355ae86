"""What this process is: versions, environment, machine, for ``GET /kvbelt/about``."""

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

#: What both sides' versions of matter to each other, or to whoever compares two hosts.
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


def of_this_process(role: str, engine: str = "") -> About:
    """What any process can say of itself; a worker adds what it knows of its model and belt."""
    return About(
        role=role,
        engine=engine,
        kvbelt=__version__,
        python=platform.python_version(),
        packages=dict(versions()),
        env={name: os.environ[name] for name in VARIABLES if name in os.environ},
        machine=this_machine(),
        unix_time=time.time(),
    )


@cache
def versions() -> Mapping[str, str]:
    """Of the packages that are installed, without importing any."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def this_machine() -> Machine:
    """Where this process runs."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        network = str(Path("/proc/self/ns/net").readlink())
    except OSError:
        boot_id = network = ""
    return Machine(socket.gethostname(), boot_id, network, os.getpid())


def ucx_problem(ucx_tls: str | None, device: str) -> str | None:
    """What is wrong with a setting of UCX_TLS for memory of this device; None: nothing, or UCX may choose."""
    if not ucx_tls:
        return None
    named = {word.strip() for word in ucx_tls.lstrip("^").split(",")}
    if ucx_tls.startswith("^"):
        missing = {"cuda_ipc", "cuda"} & named
        lacks = bool(missing) and device.startswith("cuda")
    else:
        lacks = device.startswith("cuda") and not named & {"all", "cuda", "cuda_ipc"}
    if lacks:
        return "cuda_ipc is not in it: GPUs of one host exchange KV through the CPU at 0.3 GB/s instead of 359"
    nearby = {"all", "sm", "shm", "cma", "xpmem", "knem"}
    if device.startswith("cpu") and not ucx_tls.startswith("^") and not named & nearby:
        return (
            "nothing in it reaches another process's memory within a host: workers of one host go through the network"
        )
    return None
