"""NIXL: RDMA, NVLink, shared memory or TCP, whatever UCX finds between two processes.

What was learnt about it (docs/dependencies.md has the figures):

- Its progress thread burns a whole core even when idle, so it is off, and ``progress`` is called instead
  while a peer may be writing here: a peer that never does completes no first transfer.
- A killed peer is reported by an exception of ``check_xfer_state``; a stopped one by nothing at all.
- A write cannot be recalled. NIXL lets its handle be released, and its peer be removed, and then calls it failed; but
  its bytes still leave this process's memory for a stopped peer's when that wakes up, whatever the memory holds by
  then. So a write that is not done is in flight until NIXL says how it ended, and its peer is not removed before.
- The Python layer raises for some failures and returns "ERR" for others. Both are ChannelErrors here.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from kvbelt.channels.choice import Choice
from kvbelt.channels.ucx_report import ucx_report
from kvbelt.errors import ChannelError

#: NIXL's names of kinds of memory.
_MEMORY = {"cpu": "DRAM", "cuda": "VRAM"}

ResultT = TypeVar("ResultT")


def _vendor(what: str, call: Callable[..., ResultT], *arguments: Any) -> ResultT:
    """Call NIXL; whatever it raises becomes a ChannelError with its text."""
    try:
        return call(*arguments)
    except Exception as error:
        raise ChannelError(f"nixl could not {what}: {type(error).__name__}: {error}") from error


def _place(device: str) -> tuple[str, int]:
    """``"cuda:1"`` to NIXL's kind of memory and device number."""
    kind, _, index = device.partition(":")
    try:
        return _MEMORY[kind], int(index or 0)
    except (KeyError, ValueError):
        raise ChannelError(f"device {device!r}: nixl moves memory of cpu and cuda devices here") from None


class NixlChannel:
    """``transfer.ports.Channel`` over a NIXL agent.

    The agent is created by the first ``register``, on the thread that uses it from then on.

    Args:
        name: unique among all processes that meet.
        backends: NIXL's; None: UCX.
        prepare: called once on that thread, before NIXL is loaded.
    """

    name = "nixl"

    def __init__(
        self, name: str, backends: Sequence[str] | None = None, prepare: Callable[[], None] | None = None
    ) -> None:
        self._agent_name = name
        self._prepare = prepare
        self._backends = list(backends or ["UCX"])
        self._agent: Any = None
        self._registered: list[Any] = []
        self._kinds: frozenset[str] = frozenset()  # of registered memory, as UCX calls them
        self._peers: set[str] = set()
        self._leaving: set[str] = set()  # removed by the owner, with writes in flight
        self._in_flight: list[NixlWrite] = []
        self.backends: tuple[str, ...] = ()  #: that are in use, once there is an agent
        self.plugins: tuple[str, ...] = ()  #: that NIXL could load

    def choices(self) -> tuple[Choice, ...]:
        """What UCX has chosen so far, for the kinds of memory that are registered here. From any thread.

        It chooses for others as well: two processes with nothing but a GPU's memory have a way for the host's, which
        says nothing of how KV travels.
        """
        return tuple(one for one in ucx_report().choices() if one.memory in self._kinds)

    @staticmethod
    def complaints() -> list[str]:
        """UCX's warnings and errors so far."""
        return ucx_report().complaints()

    def register(self, region: Any) -> None:
        """Make a region reachable.

        Raises:
            ChannelError: NIXL is not installed, a backend is missing, or the memory cannot be registered.
        """
        if self._agent is None:
            self._agent = self._make_agent()
        memory, _ = _place(region.device)
        entries = [(region.address, region.num_bytes, region.device_index, "")]
        what = f"register {region.num_bytes} bytes of {region.device} memory"
        self._registered.append(_vendor(what, self._agent.register_memory, entries, memory))
        self._kinds |= {"host" if memory == "DRAM" else "cuda"}

    def _make_agent(self) -> Any:
        if self._prepare is not None:
            self._prepare()
        # Its notices about versions and plugins belong in nobody's log unless asked for.
        os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
        try:
            from nixl._api import nixl_agent, nixl_agent_config  # noqa: PLC0415 -- seconds, and only if used
        except ImportError as error:
            raise ChannelError(f"transfer_channel nixl needs the package nixl: {error}") from error
        config = nixl_agent_config(enable_prog_thread=False, backends=self._backends)
        with ucx_report().asked_for():
            agent = _vendor(f"start with backends {self._backends}", nixl_agent, self._agent_name, config)
        self.backends, self.plugins = tuple(sorted(agent.backends)), tuple(sorted(agent.plugin_list))
        missing = [backend for backend in self._backends if backend not in agent.backends]
        if missing:
            raise ChannelError(
                f"nixl has no backend {missing[0]!r} here; it has {sorted(agent.plugin_list)} (nixl_backends)"
            )
        return agent

    def local_metadata(self) -> bytes:
        """What a peer needs to reach this process's regions."""
        return bytes(_vendor("describe this agent", self._agent.get_agent_metadata))

    def add_peer(self, metadata: bytes) -> str:
        """Learn a peer. Returns its agent name.

        Raises:
            ChannelError: the metadata is not of a compatible agent.
        """
        self._tidy()
        name = _vendor("learn a peer", self._agent.add_remote_agent, metadata)
        agent = name.decode() if isinstance(name, bytes) else str(name)
        self._leaving.discard(agent)
        self._peers.add(agent)
        return agent

    def connect(self, agent: str) -> None:
        """Have UCX open its connection, with a notification that says nothing.

        NIXL's own ``make_connection`` returns in microseconds and opens nothing: UCX connects when it first has
        something to say, and goes on in ``progress`` of both sides. Where both sides let it work each millisecond the
        first write takes as long with this as without (``benchmarks/carriers.py``); it is for those that do not.

        Raises:
            ChannelError: the peer is not known, or cannot be reached.
        """
        if agent not in self._peers:
            raise ChannelError(f"peer {agent!r} is not known")
        _vendor(f"connect to {agent}", self._agent.send_notif, agent, b"")

    def remove_peer(self, agent: str) -> None:
        """Forget a peer. Its connection is closed once nothing is in flight to it."""
        if agent in self._peers:
            self._peers.discard(agent)
            self._leaving.add(agent)
        self._tidy()

    def _tidy(self) -> None:
        self._in_flight = [write for write in self._in_flight if write.look()]
        for agent in self._leaving - {write.agent for write in self._in_flight}:
            self._leaving.discard(agent)
            _vendor(f"forget {agent}", self._agent.remove_remote_agent, agent)

    def write(self, agent: str, spans: Sequence[tuple[int, int, int]], device: str, peer_device: str) -> "NixlWrite":
        """Post one write of ``(local address, remote address, bytes)`` spans.

        Raises:
            ChannelError: it could not be posted.
        """
        return self._post("WRITE", agent, spans, device, peer_device)

    def read(self, agent: str, spans: Sequence[tuple[int, int, int]], device: str, peer_device: str) -> "NixlWrite":
        """The other way round: from the peer's memory to ours. No transfer reads; ``kvbelt doctor`` measures it.

        Raises:
            ChannelError: it could not be posted.
        """
        return self._post("READ", agent, spans, device, peer_device)

    def _post(
        self, operation: str, agent: str, spans: Sequence[tuple[int, int, int]], device: str, peer_device: str
    ) -> "NixlWrite":
        if agent not in self._peers:
            raise ChannelError(f"peer {agent!r} is not known")
        nixl = self._agent
        memory, index = _place(device)
        peer_memory, peer_index = _place(peer_device)
        local = [(address, num_bytes, index) for address, _, num_bytes in spans]
        remote = [(address, num_bytes, peer_index) for _, address, num_bytes in spans]
        what = f"{operation.lower()} {len(spans)} spans {'to' if operation == 'WRITE' else 'from'} {agent}"
        handle = _vendor(
            what,
            nixl.initialize_xfer,
            operation,
            nixl.get_xfer_descs(local, memory),
            nixl.get_xfer_descs(remote, peer_memory),
            agent,
        )
        write = NixlWrite(nixl, handle, agent, what)
        write.post()
        self._in_flight = [other for other in self._in_flight if other.in_flight]
        if write.in_flight:
            self._in_flight.append(write)
        return write

    def progress(self) -> None:
        """Let UCX work."""
        _vendor("make progress", self._agent.get_new_notifs)
        if self._leaving:
            self._tidy()

    def close(self) -> None:
        """Forget every peer, deregister, end. Idempotent."""
        agent, self._agent = self._agent, None
        if agent is None:
            return
        for peer in self._peers | self._leaving:
            _vendor(f"forget {peer}", agent.remove_remote_agent, peer)
        self._peers.clear()
        self._leaving.clear()
        self._in_flight.clear()
        for registered in self._registered:
            _vendor("deregister memory", agent.deregister_memory, registered)
        self._registered.clear()


class NixlWrite:
    """One posted write."""

    def __init__(self, nixl: Any, handle: Any, agent: str, what: str) -> None:
        self.agent = agent
        self._nixl = nixl
        self._handle = handle
        self._what = what
        self._state = "PROC"
        self._error = ""

    def post(self) -> None:
        """Start it. Small writes, and writes within one machine, are often done at once.

        Raises:
            ChannelError: it could not be started.
        """
        try:
            self._state = _vendor(self._what, self._nixl.transfer, self._handle)
        except ChannelError:
            # It was never under way; NIXL may still refuse to free the handle, and keeps it until the agent ends.
            self._state = "ERR"
            self.release()
            raise

    @property
    def in_flight(self) -> bool:
        """Whether NIXL was still at it when it was last asked."""
        return self._state == "PROC"

    def look(self) -> bool:
        """Ask NIXL. Returns whether it is in flight."""
        if self.in_flight:
            try:
                self._state = _vendor(self._what, self._nixl.check_xfer_state, self._handle)
            except ChannelError as error:
                self._state, self._error = "ERR", str(error)
        return self.in_flight

    def done(self) -> bool:
        """Whether it has completed.

        Raises:
            ChannelError: it failed.
        """
        self.look()
        if self._state == "ERR":
            raise ChannelError(self._error or f"nixl could not {self._what}: the transfer is in state ERR")
        return self._state == "DONE"

    def release(self) -> None:
        """Free NIXL's handle.

        Raises:
            ChannelError: it is in flight, and cannot be recalled.
        """
        if self._handle is None:
            return
        if self.look():
            raise ChannelError(f"nixl cannot abort: {self._what}")
        # A write that has ended holds no memory of ours, whatever NIXL thinks of its handle.
        with contextlib.suppress(Exception):
            self._handle.release()
        self._handle = None
