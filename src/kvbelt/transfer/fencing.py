"""When the bytes of a dead sender have all arrived: only then may its slots be reused.

The kernel of a dead process still sends what the process had put into its sockets, and over a slow link that takes
longer than the news of the death. A TCP connection ends after its last byte. So the slots are kept until the channel
has read every TCP connection with the sender's address to its end. Not counted are connections that cannot be the
channel's: accepted at a port of another purpose, or held by a living process of this host.
Carriers that are no sockets (RDMA, GPU copies) have ended within ``DRAIN_SECONDS``.
"""

import contextlib
import ipaddress
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

#: A kernel closes a dead process's sockets and devices one after another. What an RDMA card or a GPU had begun
#: ends within this time.
DRAIN_SECONDS = 5.0

#: Another sender at the same address has connections that look the same. They are waited for no longer than this.
SHARED_SECONDS = 20.0

_TABLES = ("/proc/self/net/tcp", "/proc/self/net/tcp6")
_V4_MAPPED = "0000000000000000FFFF0000"
_LISTENS, _ENDED = "0A", "08"  #: TCP_LISTEN, TCP_CLOSE_WAIT


@dataclass(frozen=True, slots=True)
class ControlEnds:
    """Where this process has TCP connections that are not the channel's."""

    accepting: set[int] = field(default_factory=set)  #: ports
    dialled: set[str] = field(default_factory=set)  #: ends, as /proc/net/tcp shows them

    def dial(self, host: str, port: int) -> None:
        """Note a connection that this process opens. A host name is left out: its address is not known here."""
        with contextlib.suppress(ValueError):
            self.dialled.add(f"{_as_in_proc(host)}:{port:04X}")


class Drain:
    """The wait for the last bytes of one dead sender.

    Args:
        address: the sender's.
        now: the moment of its death.
        control: what cannot carry its bytes.
        shared: whether a living sender has the same address.
    """

    def __init__(self, address: str, now: float, control: ControlEnds, *, shared: bool) -> None:
        self._address = address
        self._control = control
        self._ends_at = now + DRAIN_SECONDS
        self._gives_up_at = now + SHARED_SECONDS if shared else float("inf")
        # Also those whose other end is held: the process may still be ending. None: not known yet.
        self._left = self._connections(held=True)

    def over(self, now: float) -> bool:
        """Whether no byte can arrive any more."""
        if now < self._ends_at:
            return False
        if self._left is None or self._left:
            found = self._connections(held=False)
            if found is not None:
                self._left = found if self._left is None else self._left & found
        return self._left == frozenset() or now >= self._gives_up_at

    def _connections(self, *, held: bool) -> frozenset[str] | None:
        try:
            return connections_with(self._address, self._control, held=held)
        except OSError:  # this process has no file descriptor left to read the table with
            return None


class _Row(NamedTuple):
    """One line of /proc/net/tcp. An end is an address and a port, in hexadecimal."""

    here: str
    there: str
    listens: bool
    read: bool  #: the other side has ended it, and every byte has been read
    inode: str  #: "0": no process holds it


def connections_with(address: str, control: ControlEnds | None = None, *, held: bool = False) -> frozenset[str]:
    """This process's TCP connections with an address, by inode, that a dead process may have left.

    Not among them: connections that were read to their end, those of ``control``, and, unless ``held``, those whose
    other end a process of this host holds.

    Raises:
        OSError: no file descriptor is left.
    """
    control = control if control is not None else ControlEnds()
    remote, own, rows = _as_in_proc(address), set(_own_sockets()), list(_rows())
    living = set() if held else {(row.here, row.there) for row in rows if row.inode != "0"}
    return frozenset(
        row.inode
        for row in rows
        if row.inode in own
        and row.there.partition(":")[0] == remote
        and (row.there, row.here) not in living
        and not row.read
        and _port(row.here) not in control.accepting
        and row.there not in control.dialled
    )


def listening_ports() -> frozenset[int]:
    own = set(_own_sockets())
    return frozenset(_port(row.here) for row in _rows() if row.listens and row.inode in own)


def _rows() -> Iterator[_Row]:
    for table in _TABLES:
        try:
            text = Path(table).read_text(encoding="ascii")
        except FileNotFoundError:
            continue  # this kernel has no IPv6
        for line in text.splitlines()[1:]:
            fields = line.split()
            here, there = fields[1].removeprefix(_V4_MAPPED), fields[2].removeprefix(_V4_MAPPED)
            # The end of a connection counts as one byte until it is read.
            unread = int(fields[4].rpartition(":")[2], 16)
            yield _Row(here, there, fields[3] == _LISTENS, fields[3] == _ENDED and unread <= 1, fields[9])


def _port(end: str) -> int:
    return int(end.rpartition(":")[2], 16)


def _own_sockets() -> Iterator[str]:
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            target = str(descriptor.readlink())
        except OSError:
            continue  # closed meanwhile
        if target.startswith("socket:["):
            yield target[len("socket:[") : -1]


def _as_in_proc(address: str) -> str:
    """An address as /proc/net/tcp shows it: words of four bytes, each in the order of this machine."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(parsed, "ipv4_mapped", None) or parsed
    family = socket.AF_INET if mapped.version == 4 else socket.AF_INET6
    words = socket.inet_pton(family, str(mapped))
    return "".join(f"{word:08X}" for word in struct.unpack(f"={len(words) // 4}I", words))
