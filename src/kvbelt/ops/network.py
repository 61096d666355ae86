"""Hosts on one machine: a network namespace for each worker, joined by a bridge, to be cut off and slowed down.

with Network(["prefill-0", "decode-0"]) as network:
    spec = dataclasses.replace(spec, places=network.places, notify_host=network.gateway)
    with running(spec):
        network.cut("prefill-0")  # from here on its packets vanish, as if somebody had pulled a cable of a switch
        network.mend("prefill-0")

The bridge carries an address of this machine, so that the proxy and whoever asks are reached as ever. Everything is
named after this process, so that runs do not meet, and what a killed run left is removed by the next one.
Needs root and iproute2; the address range is the one that is set aside for tests of networks (RFC 2544).
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

#: Inside every namespace.
_DEVICE = "eth0"

_PREFIX = "kvbelt-"
_NAMESPACE = re.compile(r"kvbelt-((\d+)[a-z])-.+")
_SUBNETS = 512  # of /24 in 198.18.0.0/15
_MAX_HOSTS = 200

#: Tells the networks of one process apart.
_letters = itertools.cycle(string.ascii_lowercase)

#: Longest that one call of ``ip`` or ``tc`` may take.
_COMMAND_SECONDS = 20.0


class NetworkRefusedError(StartError):
    """This machine does not let us make hosts. The message says why."""


@dataclass(frozen=True, slots=True)
class Host:
    """One worker's namespace, and the end of its cable that this machine holds."""

    namespace: str
    link: str
    address: str


def hosts_of(names: Sequence[str], tag: str, subnet: int) -> dict[str, Host]:
    """A host for each worker. ``tag`` is a pid and a letter: interface names have at most 15 characters."""
    if len(names) > _MAX_HOSTS:
        raise NetworkRefusedError(f"{len(names)} workers; at most {_MAX_HOSTS} get a network namespace each")
    return {
        name: Host(f"{_PREFIX}{tag}-{name}", f"kvb{tag}h{number}", f"{_network(subnet)}.{number + 2}")
        for number, name in enumerate(names)
    }


def free_subnet(pid: int, taken: str) -> int:
    """A /24 of the range that no address in ``taken`` (what ``ip addr`` says) lies in, by preference the pid's own."""
    for offset in range(_SUBNETS):
        subnet = (pid + offset) % _SUBNETS
        if f" {_network(subnet)}." not in taken:
            return subnet
    raise NetworkRefusedError("every network of 198.18.0.0/15 is in use on this machine")


def _network(subnet: int) -> str:
    return f"198.{18 + subnet // 256}.{subnet % 256}"


class Network:
    """A bridge with a host for each worker. A context manager; its calls take some milliseconds and wait for nobody.

    Raises (on entry):
        NetworkRefusedError: not root, no iproute2, or the kernel refuses. Nothing is left behind.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._tag = f"{os.getpid()}{next(_letters)}"
        self._bridge = f"kvb{self._tag}"
        self._hosts: dict[str, Host] = {}
        self._netem = False
        self.gateway = ""  #: this machine's address, as the hosts see it

    @property
    def places(self) -> Mapping[str, Place]:
        """For ``DeploymentSpec.places``. UCX must go through the network: shared memory would not notice a cut."""
        env = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": _DEVICE}
        return {
            name: Place(host.address, ("ip", "netns", "exec", host.namespace), env)
            for name, host in self._hosts.items()
        }

    @property
    def slows_by(self) -> str:
        """How a link is made slow here: ``netem`` (rate and delay) or, where the kernel lacks it, ``tbf`` (rate)."""
        return "netem" if self._netem else "tbf"

    def cut(self, name: str) -> None:
        """From now on nothing reaches this host and nothing leaves it. No connection ends, no interface goes down."""
        _ip("link", "set", self._hosts[name].link, "nomaster")

    def mend(self, name: str) -> None:
        """Undo ``cut``."""
        _ip("link", "set", self._hosts[name].link, "master", self._bridge)

    def slow(self, name: str, *, kbit: int, delay_ms: int = 0) -> None:
        """Let so many kbit/s through in each direction, ``delay_ms`` later where the kernel can do that."""
        shape = (
            ["netem", "rate", f"{kbit}kbit", "delay", f"{delay_ms}ms", "limit", "10000"]
            if self._netem
            else ["tbf", "rate", f"{kbit}kbit", "burst", "16kb", "latency", "400ms"]
        )
        for where in self._ends(name):
            _run("tc", *where, *shape, verb="replace")

    def fast(self, name: str) -> None:
        """Undo ``slow``. Nothing if it was not slow."""
        for where in self._ends(name):
            with contextlib.suppress(NetworkRefusedError):
                _run("tc", *where, verb="del")

    def _ends(self, name: str) -> Iterator[tuple[str, ...]]:
        host = self._hosts[name]
        yield ("qdisc", "VERB", "dev", host.link, "root")
        yield ("-n", host.namespace, "qdisc", "VERB", "dev", _DEVICE, "root")

    def __enter__(self) -> Self:
        """Make everything."""
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
        """Remove everything."""
        self._remove()

    def _make(self) -> None:
        _ip("link", "add", self._bridge, "type", "bridge", "stp_state", "0", "forward_delay", "0")
        _ip("addr", "add", f"{self.gateway}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for host in self._hosts.values():
            inside = ("-n", host.namespace)
            _ip("netns", "add", host.namespace)
            _ip("link", "add", host.link, "type", "veth", "peer", "name", _DEVICE, "netns", host.namespace)
            _ip("link", "set", host.link, "master", self._bridge, "up")
            _ip(*inside, "addr", "add", f"{host.address}/24", "dev", _DEVICE)
            _ip(*inside, "link", "set", "lo", "up")
            _ip(*inside, "link", "set", _DEVICE, "up")
        self._netem = self._has_netem()

    def _has_netem(self) -> bool:
        link = next(iter(self._hosts.values())).link
        try:
            _run("tc", "qdisc", "VERB", "dev", link, "root", "netem", "delay", "1ms", verb="replace")
            _run("tc", "qdisc", "VERB", "dev", link, "root", verb="del")
        except NetworkRefusedError:
            return False
        return True

    def _remove(self) -> None:
        for host in self._hosts.values():  # a namespace takes its end of the cable with it, and that the other one
            with contextlib.suppress(NetworkRefusedError):
                _ip("netns", "del", host.namespace)
        with contextlib.suppress(NetworkRefusedError):
            _ip("link", "del", self._bridge)


def remove_leftovers() -> None:
    """Remove what runs that were killed left: their process is gone, and nobody lives in their namespaces."""
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
        NetworkRefusedError: it says no.
    """
    words = [verb if word == "VERB" else word for word in command]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=_COMMAND_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NetworkRefusedError(f"{' '.join(words)}: {error}") from None
    if done.returncode != 0:
        raise NetworkRefusedError(f"{' '.join(words)}: {done.stderr.strip() or f'status {done.returncode}'}")
    return done.stdout
