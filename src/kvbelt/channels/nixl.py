"""NIXL: RDMA, NVLink, shared memory or TCP, as UCX chooses between two processes.

Observations (docs/dependencies.md has the figures):

- The progress thread uses a whole core even when idle, so it is off. ``progress`` is called instead while a peer may be
  writing here; without it the peer's first transfer never completes.
- A killed peer is reported by an exception of ``check_xfer_state``; a stopped peer is not reported at all.
- A write cannot be recalled. NIXL allows its handle to be released and its peer to be removed, and then reports the
  write as failed. But when a stopped peer wakes up, the bytes still go from this process's memory to the peer's,
  whatever the memory holds by then. So a write is in flight until NIXL reports its end, and only then its peer is
  removed.
- The Python layer raises for some failures and returns "ERR" for others. Both become ChannelErrors.
"""

import contextlib
import os
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

from kvbelt.channels.choice import Choice
from kvbelt.channels.ucx_report import ucx_report
from kvbelt.errors import ChannelError

#: NIXL's names for kinds of memory.
_MEMORY = {"cpu": "DRAM", "cuda": "VRAM"}

ResultT = TypeVar("ResultT")


def _vendor(what: str, call: Callable[..., ResultT], *arguments: Any) -> ResultT:
    """Call NIXL, and turn any exception into a ChannelError with its text."""
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
    """``transfer.ports.Channel`` over a NIXL agent (see ``make_channel``).

    ``open`` creates the agent, on the thread that uses it from then on.
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
        self._leaving: set[str] = set()  # removed peers with writes in flight
        self._in_flight: list[NixlWrite] = []
        self.backends: tuple[str, ...] = ()  #: in use, once there is an agent
        self.plugins: tuple[str, ...] = ()  #: those that NIXL could load

    def choices(self) -> tuple[Choice, ...]:
        """Any thread: the transports that UCX has chosen so far, for the kinds of memory that are registered here.

        UCX chooses for other kinds as well. Between two processes with GPU memory alone, its choice for host memory
        carries no KV.
        """
        return tuple(one for one in ucx_report().choices() if one.memory in self._kinds)

    @staticmethod
    def complaints() -> list[str]:
        return ucx_report().complaints()

    def open(self, devices: Collection[str]) -> None:
        for device in devices:
            _place(device)
        if self._agent is None:
            self._agent = self._make_agent()

    def register(self, region: Any) -> None:
        memory, _ = _place(region.device)
        entries = [(region.address, region.num_bytes, region.device_index, "")]
        what = f"register {region.num_bytes} bytes of {region.device} memory"
        self._registered.append(_vendor(what, self._agent.register_memory, entries, memory))
        self._kinds |= {"host" if memory == "DRAM" else "cuda"}

    def _make_agent(self) -> Any:
        if self._prepare is not None:
            self._prepare()
        # NIXL's notices about versions and plugins are useful only to a user who asks for them.
        os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
        try:
            from nixl._api import nixl_agent, nixl_agent_config  # noqa: PLC0415 -- takes seconds
        except ImportError as error:
            raise ChannelError(
                f"transfer_channel nixl needs nixl ({error}): pip install 'kvbelt[embedded]', or 'kvbelt[vllm]'"
            ) from error
        config = nixl_agent_config(enable_prog_thread=False, backends=self._backends)
        with ucx_report().requested():
            agent = _vendor(f"start with backends {self._backends}", nixl_agent, self._agent_name, config)
        self.backends, self.plugins = tuple(sorted(agent.backends)), tuple(sorted(agent.plugin_list))
        missing = [backend for backend in self._backends if backend not in agent.backends]
        if missing:
            raise ChannelError(
                f"nixl has no backend {missing[0]!r} here; it has {sorted(agent.plugin_list)} (nixl_backends)"
            )
        return agent

    def local_metadata(self) -> bytes:
        return bytes(_vendor("describe this agent", self._agent.get_agent_metadata))

    def add_peer(self, metadata: bytes) -> str:
        self._tidy()
        name = _vendor("learn a peer", self._agent.add_remote_agent, metadata)
        agent = name.decode() if isinstance(name, bytes) else str(name)
        self._leaving.discard(agent)
        self._peers.add(agent)
        return agent

    def connect(self, agent: str) -> None:
        """Make UCX open its connection, by an empty notification.

        NIXL's ``make_connection`` returns in microseconds and opens nothing: UCX connects for the first message, and
        continues in ``progress`` of both sides. If both sides call it each millisecond, the first write takes as long
        without this (``benchmarks/carriers.py``); otherwise this saves time.
        """
        if agent not in self._peers:
            raise ChannelError(f"peer {agent!r} is not known")
        _vendor(f"connect to {agent}", self._agent.send_notif, agent, b"")

    def remove_peer(self, agent: str) -> None:
        """Forget a peer. Its connection is closed once no write to it is in flight."""
        if agent in self._peers:
            self._peers.discard(agent)
            self._leaving.add(agent)
        self._tidy()

    def _tidy(self) -> None:
        self._in_flight = [write for write in self._in_flight if write.poll()]
        for agent in self._leaving - {write.agent for write in self._in_flight}:
            self._leaving.discard(agent)
            _vendor(f"forget {agent}", self._agent.remove_remote_agent, agent)

    def write(self, agent: str, spans: Sequence[tuple[int, int, int]], device: str, peer_device: str) -> "NixlWrite":
        return self._post("WRITE", agent, spans, device, peer_device)

    def read(self, agent: str, spans: Sequence[tuple[int, int, int]], device: str, peer_device: str) -> "NixlWrite":
        """Post one read from the peer's memory. Transfers never read; ``kvbelt doctor`` measures it."""
        return self._post("READ", agent, spans, device, peer_device)

    def _post(
        self, operation: str, agent: str, spans: Sequence[tuple[int, int, int]], device: str, peer_device: str
    ) -> "NixlWrite":
        if agent not in self._peers:
            raise ChannelError(f"peer {agent!r} is not known")
        nixl = self._agent
        memory, index = _place(device)
        peer_memory, peer_index = _place(peer_device)
        local = nixl.get_xfer_descs([(address, num_bytes, index) for address, _, num_bytes in spans], memory)
        remote = nixl.get_xfer_descs([(there, num_bytes, peer_index) for _, there, num_bytes in spans], peer_memory)
        what = f"{operation.lower()} {len(spans)} spans {'to' if operation == 'WRITE' else 'from'} {agent}"
        handle = _vendor(what, nixl.initialize_xfer, operation, local, remote, agent)
        write = NixlWrite(nixl, handle, agent, what)
        write.post()
        self._in_flight = [other for other in self._in_flight if other.in_flight]
        if write.in_flight:
            self._in_flight.append(write)
        return write

    def progress(self) -> None:
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
    def __init__(self, nixl: Any, handle: Any, agent: str, what: str) -> None:
        self.agent = agent
        self._nixl = nixl
        self._handle = handle
        self._what = what
        self._state = "PROC"
        self._error = ""

    def post(self) -> None:
        """Start it. Small writes, and writes within one machine, are often done at once."""
        try:
            self._state = _vendor(self._what, self._nixl.transfer, self._handle)
        except ChannelError:
            # It never started. NIXL may still refuse to free the handle, and then keeps it until the agent ends.
            self._state = "ERR"
            self.release()
            raise

    @property
    def in_flight(self) -> bool:
        """Whether it had not ended at the last ``poll``."""
        return self._state == "PROC"

    def poll(self) -> bool:
        if self.in_flight:
            try:
                self._state = _vendor(self._what, self._nixl.check_xfer_state, self._handle)
            except ChannelError as error:
                self._state, self._error = "ERR", str(error)
        return self.in_flight

    def done(self) -> bool:
        self.poll()
        if self._state == "ERR":
            raise ChannelError(self._error or f"nixl could not {self._what}: the transfer is in state ERR")
        return self._state == "DONE"

    def release(self) -> None:
        """Free NIXL's handle. A write in flight cannot be recalled, so it raises."""
        if self._handle is None:
            return
        if self.poll():
            raise ChannelError(f"nixl cannot abort: {self._what}")
        # A write that has ended uses no memory of ours, even if NIXL refuses to free its handle.
        with contextlib.suppress(Exception):
            self._handle.release()
        self._handle = None
