"""A network namespace for each worker on one machine, joined by a bridge, to cut off and slow down.

    with Network(["prefill-0", "decode-0"]) as network:
        spec = dataclasses.replace(spec, places=network.places, notify_host=network.gateway)
        with running(spec):
            network.cut("prefill-0")  # its packets vanish, as with an unplugged cable
            network.mend("prefill-0")

The bridge has an address of this machine, so the proxy and its clients need no namespace. All names contain this
process's pid, so that runs do not collide; leftovers of a killed run are removed by the next one. Needs root and
iproute2. The addresses are from the range for network tests (RFC 2544).
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import string
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from kvbelt.errors import StartError
from kvbelt.ops.processes import Place

#: The device inside every namespace.
_DEVICE = "eth0"

_PREFIX = "kvbelt-"
_NAMESPACE = re.compile(r"kvbelt-((\d+)[a-z])-.+")
_SUBNETS = 512  # of /24 in 198.18.0.0/15
_MAX_HOSTS = 200

#: Distinguishes several networks of one process.
_letters = itertools.cycle(string.ascii_lowercase)

#: Limit of one call of ``ip`` or ``tc``.
_COMMAND_SECONDS = 20.0


class NetworkRefusedError(StartError):
    """Network namespaces cannot be made on this machine. The message says why."""


@dataclass(frozen=True, slots=True)
class Host:
    """One worker's namespace, and this machine's end of its veth pair."""

    namespace: str
    interface: str
    address: str


def hosts_of(names: Sequence[str], tag: str, subnet: int) -> dict[str, Host]:
    """One host per worker. ``tag`` is a pid and a letter: interface names have at most 15 characters."""
    if len(names) > _MAX_HOSTS:
        raise NetworkRefusedError(f"{len(names)} workers; at most {_MAX_HOSTS} get a network namespace each")
    return {
        name: Host(f"{_PREFIX}{tag}-{name}", f"kvb{tag}h{number}", f"{_network(subnet)}.{number + 2}")
        for number, name in enumerate(names)
    }


def free_subnet(pid: int, taken: str) -> int:
    """A /24 of the range without an address in ``taken`` (the output of ``ip addr``), starting with the pid's own."""
    for offset in range(_SUBNETS):
        subnet = (pid + offset) % _SUBNETS
        if f" {_network(subnet)}." not in taken:
            return subnet
    raise NetworkRefusedError("every network of 198.18.0.0/15 is in use on this machine")


def _network(subnet: int) -> str:
    return f"198.{18 + subnet // 256}.{subnet % 256}"


class Network:
    """A bridge with a host for each worker. Calls take some milliseconds.

    Raises (on entry):
        NetworkRefusedError: not root, no iproute2, or the kernel refuses. Nothing is left behind.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._tag = f"{os.getpid()}{next(_letters)}"
        self._bridge = f"kvb{self._tag}"
        self._hosts: dict[str, Host] = {}
        self._netem = False
        self.gateway = ""  #: this machine's address in the network

    @property
    def places(self) -> Mapping[str, Place]:
        """For ``DeploymentSpec.places``. UCX must use the network: a cut does not affect shared memory."""
        env = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": _DEVICE}
        return {
            name: Place(host.address, ("ip", "netns", "exec", host.namespace), env)
            for name, host in self._hosts.items()
        }

    @property
    def slows_by(self) -> str:
        """How a link is slowed: ``netem`` (rate and delay) or, without it in the kernel, ``tbf`` (rate)."""
        return "netem" if self._netem else "tbf"

    def cut(self, name: str) -> None:
        """Drop all packets from and to this host. Connections stay open, and no interface goes down."""
        _ip("link", "set", self._hosts[name].interface, "nomaster")

    def mend(self, name: str) -> None:
        _ip("link", "set", self._hosts[name].interface, "master", self._bridge)

    def slow(self, name: str, *, kbit: int, delay_ms: int = 0) -> None:
        """Limit the rate in each direction, and add ``delay_ms`` where the kernel has netem."""
        shape = (
            ["netem", "rate", f"{kbit}kbit", "delay", f"{delay_ms}ms", "limit", "10000"]
            if self._netem
            else ["tbf", "rate", f"{kbit}kbit", "burst", "16kb", "latency", "400ms"]
        )
        for where in self._ends(name):
            _run("tc", *where, *shape, verb="replace")

    def fast(self, name: str) -> None:
        """Undo ``slow``."""
        for where in self._ends(name):
            with contextlib.suppress(NetworkRefusedError):
                _run("tc", *where, verb="del")

    def _ends(self, name: str) -> Iterator[tuple[str, ...]]:
        host = self._hosts[name]
        yield ("qdisc", "VERB", "dev", host.interface, "root")
        yield ("-n", host.namespace, "qdisc", "VERB", "dev", _DEVICE, "root")

    def __enter__(self) -> Self:
        _check_rights()
        remove_leftovers()
        subnet = free_subnet(os.getpid(), _ip("-o", "-4", "addr"))
        self.gateway = f"{_network(subnet)}.1"
        self._hosts = hosts_of(self._names, self._tag, subnet)
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._remove()

    def _make(self) -> None:
        _ip("link", "add", self._bridge, "type", "bridge", "stp_state", "0", "forward_delay", "0")
        _ip("addr", "add", f"{self.gateway}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for host in self._hosts.values():
            inside = ("-n", host.namespace)
            _ip("netns", "add", host.namespace)
            _ip("link", "add", host.interface, "type", "veth", "peer", "name", _DEVICE, "netns", host.namespace)
            _ip("link", "set", host.interface, "master", self._bridge, "up")
            _ip(*inside, "addr", "add", f"{host.address}/24", "dev", _DEVICE)
            _ip(*inside, "link", "set", "lo", "up")
            _ip(*inside, "link", "set", _DEVICE, "up")
        self._netem = self._has_netem()

    def _has_netem(self) -> bool:
        link = next(iter(self._hosts.values())).interface
        try:
            _run("tc", "qdisc", "VERB", "dev", link, "root", "netem", "delay", "1ms", verb="replace")
            _run("tc", "qdisc", "VERB", "dev", link, "root", verb="del")
        except NetworkRefusedError:
            return False
        return True

    def _remove(self) -> None:
        for host in self._hosts.values():  # a namespace is deleted with both ends of its veth pair
            with contextlib.suppress(NetworkRefusedError):
                _ip("netns", "del", host.namespace)
        with contextlib.suppress(NetworkRefusedError):
            _ip("link", "del", self._bridge)


def remove_leftovers() -> None:
    """Remove what killed runs left: their process is gone, and no process is in their namespaces."""
    dead = set()
    for entry in json.loads(_ip("-j", "netns", "list") or "[]"):
        found = _NAMESPACE.fullmatch(entry["name"])
        if found and not Path(f"/proc/{found[2]}").exists() and not _ip("netns", "pids", entry["name"]).strip():
            dead.add(found[1])
            with contextlib.suppress(NetworkRefusedError):
                _ip("netns", "del", entry["name"])
    for tag in dead:
        with contextlib.suppress(NetworkRefusedError):
            _ip("link", "del", f"kvb{tag}")


def _check_rights() -> None:
    if os.geteuid() != 0:
        raise NetworkRefusedError("network namespaces need root")
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            raise NetworkRefusedError(f"network namespaces need the program {program!r}; install iproute2")


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str, verb: str = "") -> str:
    """Run ``ip`` or ``tc``; ``VERB`` stands for ``verb``.

    Raises:
        NetworkRefusedError: the command failed.
    """
    words = [verb if word == "VERB" else word for word in command]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=_COMMAND_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NetworkRefusedError(f"{' '.join(words)}: {error}") from None
    if done.returncode != 0:
        raise NetworkRefusedError(f"{' '.join(words)}: {done.stderr.strip() or f'status {done.returncode}'}")
    return done.stdout
