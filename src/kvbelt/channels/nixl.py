"""NIXL: RDMA, NVLink, shared memory or TCP, whatever UCX finds between two processes.

What was learnt about it (docs/dependencies.md has the figures):

- Its progress thread burns a whole core even when idle, so it is off, and ``progress`` is called instead
  while a peer may be writing here: a peer that never does completes no first transfer.
- A killed peer is reported by an exception of ``check_xfer_state``; a stopped one by nothing at all.
- A write that is released before it is done is aborted where the transport can; where it cannot, ``release``
  raises, and the memory must be taken to be in use.
- The Python layer raises for some failures and returns "ERR" for others. Both are ChannelErrors here.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

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

    ``agent_name`` must be unique among all processes that meet; ``backends`` are NIXL's (default UCX).
    The agent is created by the first ``register``, on the thread that uses it from then on.
    """

    name = "nixl"

    def __init__(self, name: str, backends: Sequence[str] | None = None) -> None:
        self._agent_name = name
        self._backends = list(backends or ["UCX"])
        self._agent: Any = None
        self._registered: list[Any] = []
        self._peers: set[str] = set()

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

    def _make_agent(self) -> Any:
        # Its notices about versions and plugins belong in nobody's log unless asked for.
        os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
        try:
            from nixl._api import nixl_agent, nixl_agent_config  # noqa: PLC0415 -- seconds, and only if used
        except ImportError as error:
            raise ChannelError(f"transfer_channel nixl needs the package nixl: {error}") from error
        config = nixl_agent_config(enable_prog_thread=False, backends=self._backends)
        agent = _vendor(f"start with backends {self._backends}", nixl_agent, self._agent_name, config)
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
        name = _vendor("learn a peer", self._agent.add_remote_agent, metadata)
        agent = name.decode() if isinstance(name, bytes) else str(name)
        self._peers.add(agent)
        return agent

    def remove_peer(self, agent: str) -> None:
        """Forget a peer: its connection is closed and what is in flight on it ends."""
        if agent in self._peers:
            self._peers.discard(agent)
            _vendor(f"forget {agent}", self._agent.remove_remote_agent, agent)

    def write(self, agent: str, spans: Sequence[tuple[int, int, int]], device: str, peer_device: str) -> "NixlWrite":
        """Post one write of ``(local address, remote address, bytes)`` spans.

        Raises:
            ChannelError: it could not be posted.
        """
        nixl = self._agent
        memory, index = _place(device)
        peer_memory, peer_index = _place(peer_device)
        local = [(address, num_bytes, index) for address, _, num_bytes in spans]
        remote = [(address, num_bytes, peer_index) for _, address, num_bytes in spans]
        what = f"write {len(spans)} spans to {agent}"
        handle = _vendor(
            what,
            nixl.initialize_xfer,
            "WRITE",
            nixl.get_xfer_descs(local, memory),
            nixl.get_xfer_descs(remote, peer_memory),
            agent,
        )
        write = NixlWrite(nixl, handle, what)
        write.post()
        return write

    def progress(self) -> None:
        """Let UCX work."""
        _vendor("make progress", self._agent.get_new_notifs)

    def close(self) -> None:
        """Forget every peer, deregister, end. Idempotent."""
        agent, self._agent = self._agent, None
        if agent is None:
            return
        for peer in self._peers:
            _vendor(f"forget {peer}", agent.remove_remote_agent, peer)
        self._peers.clear()
        for registered in self._registered:
            _vendor("deregister memory", agent.deregister_memory, registered)
        self._registered.clear()


class NixlWrite:
    """One posted write."""

    def __init__(self, agent: Any, handle: Any, what: str) -> None:
        self._agent = agent
        self._handle = handle
        self._what = what
        self._state = "PROC"

    def post(self) -> None:
        """Start it. Small writes, and writes within one machine, are often done at once."""
        try:
            self._state = _vendor(self._what, self._agent.transfer, self._handle)
            self._check()
        except ChannelError:
            # It was never under way; NIXL may still refuse to free the handle, and keeps it until the agent ends.
            self._release_quietly()
            raise

    def done(self) -> bool:
        """Whether it has completed.

        Raises:
            ChannelError: it failed.
        """
        if self._state == "PROC":
            try:
                self._state = _vendor(self._what, self._agent.check_xfer_state, self._handle)
            except ChannelError:
                self._state = "ERR"
                raise
        self._check()
        return self._state == "DONE"

    def release(self) -> None:
        """Free NIXL's handle.

        Raises:
            ChannelError: it is in flight and cannot be aborted.
        """
        if self._handle is None:
            return
        if self._state != "PROC":
            self._release_quietly()
            return
        _vendor(f"abort: {self._what}", self._handle.release)
        self._handle = None

    def _release_quietly(self) -> None:
        # A write that has ended holds no memory of ours, whatever NIXL thinks of its handle.
        with contextlib.suppress(Exception):
            self._handle.release()
        self._handle = None

    def _check(self) -> None:
        if self._state == "ERR":
            raise ChannelError(f"nixl could not {self._what}: the transfer is in state ERR")
