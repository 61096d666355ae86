"""The ports of a deployment, and whether they are free.

The seed's numbers: proxy 9100, prefill workers from 7100, decode workers from 7200, their init ports from 7300 and
alloc ports from 7400, notifications 7500. Ports are checked before the start, because a worker binds its port only
after it has loaded its model.
"""

import contextlib
import errno
import random
import socket
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvbelt.errors import StartError
from kvbelt.ops.topology import Topology

PROXY_PORT = 9100
NOTIFY_PORT = 7500
PREFILL_PORT = 7100
DECODE_PORT = 7200
INIT_PORT = 7300
ALLOC_PORT = 7400
LIVENESS_PORT = 7700  # in manifests; kvbelt up lets each worker take a free one

#: Only the proxy serves other hosts.
WORKER_HOST = "127.0.0.1"

#: The range of free ports: above the well-known services and below the kernel's ephemeral ports, which any outgoing
#: connection may take between the check and the bind.
_LOWEST_FREE_PORT = 10_000
_EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_USUAL_EPHEMERAL_START = 32_768


@dataclass(frozen=True, slots=True)
class PortUse:
    """One port, the process that listens there, and the flag that changes it."""

    port: int
    owner: str
    flag: str
    host: str = WORKER_HOST


@dataclass(frozen=True, slots=True)
class Ports:
    """Every port of a deployment. ``decode``, ``init`` and ``alloc`` are indexed by decode worker."""

    proxy: int
    notify: int
    prefill: tuple[int, ...]
    decode: tuple[int, ...]
    init: tuple[int, ...]
    alloc: tuple[int, ...]

    def uses(
        self, proxy_host: str, notify_host: str = WORKER_HOST, elsewhere: Container[str] = ()
    ) -> Iterator[PortUse]:
        """Every port on this host. Without prefill workers there are no ports for KV.

        Args:
            proxy_host: where the proxy listens.
            notify_host: where the proxy takes notifications.
            elsewhere: names of workers on other hosts.
        """
        yield PortUse(self.proxy, "the proxy", "--port", proxy_host)
        yield PortUse(self.notify, "the proxy's notifications", "--auto-ports", notify_host)
        role = "decode" if self.prefill else "both"
        for name, port in [
            *((f"prefill-{index}", port) for index, port in enumerate(self.prefill)),
            *((f"{role}-{index}", port) for index, port in enumerate(self.decode)),
        ]:
            if name not in elsewhere:
                yield PortUse(port, name, "--auto-ports")
        if not self.prefill:
            return
        for index, (init, alloc) in enumerate(zip(self.init, self.alloc, strict=True)):
            if f"decode-{index}" not in elsewhere:
                yield PortUse(init, f"decode-{index}'s handshakes", "--auto-ports")
                yield PortUse(alloc, f"decode-{index}'s reservations", "--auto-ports")


def seed_ports(topology: Topology, *, proxy: int = PROXY_PORT) -> Ports:
    def consecutive(first: int, count: int) -> tuple[int, ...]:
        return tuple(range(first, first + count))

    return Ports(
        proxy=proxy,
        notify=NOTIFY_PORT,
        prefill=consecutive(PREFILL_PORT, topology.prefill),
        decode=consecutive(DECODE_PORT, topology.decode),
        init=consecutive(INIT_PORT, topology.decode),
        alloc=consecutive(ALLOC_PORT, topology.decode),
    )


def free_ports(topology: Topology, *, proxy: int | None = None) -> Ports:
    """Ports that are free now; ``proxy`` fixes the proxy's.

    Raises:
        StartError: too few ports are free.
    """
    found = iter(find_free(2 + topology.prefill + 3 * topology.decode))

    def take(count: int) -> tuple[int, ...]:
        return tuple(next(found) for _ in range(count))

    return Ports(
        proxy=proxy if proxy is not None else next(found),
        notify=next(found),
        prefill=take(topology.prefill),
        decode=take(topology.decode),
        init=take(topology.decode),
        alloc=take(topology.decode),
    )


def find_free(count: int, *, host: str = WORKER_HOST) -> list[int]:
    """``count`` distinct free ports, at random, so that two launchers seldom pick the same.

    Raises:
        StartError: too few ports are free.
    """
    end = _ephemeral_start()
    candidates = list(range(_LOWEST_FREE_PORT, end))
    random.shuffle(candidates)
    found: list[int] = []
    for port in candidates:
        if len(found) == count:
            break
        if bind_problem(host, port) is None:
            found.append(port)
    if len(found) < count:
        raise StartError(
            f"only {len(found)} free ports between {_LOWEST_FREE_PORT} and {end} on {host}; {count} needed"
        )
    return found


def check_free(uses: Sequence[PortUse]) -> None:
    """Check that every port can be bound and none is used twice.

    Raises:
        StartError: one line with the port, its owner and the flag to change.
    """
    owners: dict[int, PortUse] = {}
    for use in uses:
        if (other := owners.get(use.port)) is not None:
            flag = "--port" if "--port" in (use.flag, other.flag) else "--auto-ports"
            raise StartError(f"port {use.port} is wanted by both {other.owner} and {use.owner}; change it with {flag}")
        owners[use.port] = use
    for use in uses:
        if (reason := bind_problem(use.host, use.port)) is not None:
            remedy = "--port N or --auto-ports" if use.flag == "--port" else "--auto-ports"
            raise StartError(f"port {use.port} for {use.owner} on {use.host}: {reason}; choose another with {remedy}")


def bind_problem(host: str, port: int) -> str | None:
    """Why ``port`` cannot be bound; None if it can."""
    if not 0 < port < 65_536:
        return "a port lies between 1 and 65535"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As servers do: old connections in TIME_WAIT do not matter, a listener does.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            return "already in use by another process" if taken else f"cannot be bound ({error.strerror or error})"
    return None


def _ephemeral_start() -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        start = int(_EPHEMERAL_RANGE.read_text(encoding="ascii").split()[0])
        if start > _LOWEST_FREE_PORT + 1000:
            return start
    return _USUAL_EPHEMERAL_START
