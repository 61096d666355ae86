"""Memory whose cells know what lies in them, and copies and writes that end when the schedule says so.

A cell is a block of one layer. It holds the ``(transfer, layer, block)`` of its last writer, or a value that must
never be read.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from kvbelt.errors import ChannelError
from kvbelt.wire.digest import Cells
from kvbelt.wire.ids import TransferId

#: Bytes of a cell: as many as an arena aligns to, so that cells and pieces of buffers agree.
CELL = 4096

#: Where the buffers lie in each process. Region numbers are those of Welcome.regions.
STAGING = 1 << 32
RECEIVE = (2 << 32, 3 << 32)

_MASK = (1 << 64) - 1


class Content(NamedTuple):
    """One block of one layer of one prompt."""

    transfer: TransferId
    layer: int
    block: int


#: What the engine has made of a block that was given back to it.
REUSED = Content(TransferId("another prompt"), 0, 0)
#: Half of a block.
TORN = Content(TransferId("torn"), 0, 0)

Memory = dict[int, Content]


class Fate(StrEnum):
    """How a write ends."""

    LAND = "land"
    FAIL = "fail"  # it says so
    DROP = "drop"  # it says that it has landed, and nothing has
    TEAR = "tear"  # likewise, and its last cell is half written


class Span(NamedTuple):
    """Cells here, cells there."""

    local: int
    remote: int
    cells: int


@dataclass(eq=False)
class Write:
    """``WriteHandle``: one write, in flight until the schedule lands it."""

    channel: "SimChannel"
    agent: str
    transfer: TransferId
    spans: list[Span]
    stuck: bool = False  #: it cannot be aborted
    reads: bool = False  #: it is a read: from there to here
    ended: bool = False
    error: str | None = None

    def done(self) -> bool:
        if self.error is not None:
            raise ChannelError(self.error)
        return self.ended

    def release(self) -> None:
        """Abort it, unless it is stuck."""
        if self in self.channel.ether.flying:
            if self.stuck:
                raise ChannelError("it cannot be aborted")
            self.end(Fate.FAIL)

    def cells(self) -> Iterator[int]:
        """The cells that it writes on the other side."""
        for span in () if self.reads else self.spans:
            yield from range(span.remote, span.remote + span.cells)

    def end(self, fate: Fate) -> None:
        """End the write."""
        self.channel.ether.flying.remove(self)
        self.ended = True
        if fate is Fate.FAIL:
            self.error = "it failed"
        there = self.channel.ether.memories.get(self.agent)
        if there is None or fate in (Fate.FAIL, Fate.DROP):
            return
        here = self.channel.memory
        if self.reads:
            for span in self.spans:
                for cell in range(span.cells):
                    here[span.local + cell] = there.get(span.remote + cell, TORN)
            return
        for span in self.spans:
            for cell in range(span.cells):
                there[span.remote + cell] = here[span.local + cell]
        if fate is Fate.TEAR:
            there[self.spans[-1].remote + self.spans[-1].cells - 1] = TORN


@dataclass(eq=False)
class Ether:
    """The channels by agent, and all writes in flight."""

    memories: dict[str, Memory] = field(default_factory=dict)  #: of every living agent
    flying: list[Write] = field(default_factory=list)

    def writes(self, sender: str, receiver: str) -> list[Write]:
        """The writes of one agent into another's memory that may still land."""
        return [w for w in self.flying if w.channel.agent == sender and w.agent == receiver and not w.reads]


class SimChannel:
    """``Channel`` of one life of one process. ``stick`` tells whether the next write can be aborted."""

    name = "memory"

    def __init__(self, agent: str, ether: Ether, memory: Memory) -> None:
        self.agent = agent
        self.ether = ether
        self.memory = memory
        self.stick = False
        #: Whose measurement's staging begins at an address; None: it is no measurement's.
        self.measures: Callable[[int], TransferId | None] = lambda address: None
        self._peers: set[str] = set()

    def add_peer(self, metadata: bytes) -> str:
        agent = metadata.decode()
        if agent not in self.ether.memories:
            raise ChannelError(f"there is no agent {agent}")
        self._peers.add(agent)
        return agent

    def connect(self, agent: str) -> None:
        """Connections are always open here."""

    def remove_peer(self, agent: str) -> None:
        """Forget a peer, and abort the writes that can be aborted."""
        self._peers.discard(agent)
        for write in [w for w in self.ether.flying if w.channel is self and w.agent == agent and not w.stuck]:
            write.end(Fate.FAIL)

    def write(self, agent: str, spans: Sequence[tuple[int, int, int]], device: str, peer_device: str) -> Write:
        if agent not in self._peers or agent not in self.ether.memories:
            raise ChannelError(f"agent {agent} is not known")
        cells = [Span(local // CELL, remote // CELL, num_bytes // CELL) for local, remote, num_bytes in spans]
        measured = self.measures(spans[0][0])
        if measured is not None:  # nothing was gathered
            for cell in range(cells[0].cells):
                self.memory[cells[0].local + cell] = Content(measured, -1, -1)
        write = Write(self, agent, self.memory[cells[0].local].transfer, cells, self.stick)
        self.ether.flying.append(write)
        return write

    def read(self, agent: str, spans: Sequence[tuple[int, int, int]], device: str, peer_device: str) -> Write:
        """Post a read of a measurement."""
        if agent not in self._peers or agent not in self.ether.memories:
            raise ChannelError(f"agent {agent} is not known")
        measured = self.measures(spans[0][0])
        assert measured is not None, "no transfer reads"
        cells = [Span(local // CELL, remote // CELL, num_bytes // CELL) for local, remote, num_bytes in spans]
        read = Write(self, agent, measured, cells, self.stick, reads=True)
        self.ether.flying.append(read)
        return read

    def progress(self) -> None:
        """Nothing."""


@dataclass(eq=False)
class Copy:
    """``Fence`` and ``Digest``: a copy takes effect when it ends."""

    do: Any
    result: int = 0
    ended: bool = False

    def done(self) -> bool:
        return self.ended

    def value(self) -> int:
        assert self.ended
        return self.result

    def end(self) -> None:
        self.ended = True
        self.result = self.do() or 0


class SimCopy:
    """``PagedCopy`` of one incarnation. Engine blocks are numbers, and ``pool`` has their contents."""

    def __init__(self, memory: Memory, asynchronous: bool) -> None:
        self.memory = memory
        self.pool: dict[tuple[int, int], Content] = {}  #: (layer, block id)
        self.under_way: list[Copy] = []
        self._asynchronous = asynchronous

    def _begin(self, do: Any) -> Copy:
        copy = Copy(do)
        if self._asynchronous:
            self.under_way.append(copy)
        else:
            copy.end()
        return copy

    def gather(self, layer: int, block_ids: Sequence[int], offset: int, ready: Any) -> Copy:
        """Copy into staging, whose old contents are torn until the end."""
        first = (STAGING + offset) // CELL
        for index in range(len(block_ids)):
            self.memory[first + index] = Content(self.pool[layer, block_ids[index]].transfer, -1, -1)

        def do() -> None:
            for index, block in enumerate(block_ids):
                self.memory[first + index] = self.pool[layer, block]

        return self._begin(do)

    def scatter(self, block_ids: Sequence[int], offset: int, stride: int, region: int = 0) -> list[Copy]:
        """Readers in this world look at the memory themselves."""
        raise NotImplementedError

    def digest_sent(self, offset: int, cells: Cells) -> Copy:
        return self._begin(lambda: self._digest((STAGING + offset) // CELL, cells))

    def digest_received(self, offset: int, cells: Cells, region: int = 0) -> Copy:
        """The digest of a part of a receive buffer."""
        return self._begin(lambda: self._digest((RECEIVE[region] + offset) // CELL, cells))

    def _digest(self, first: int, cells: Cells) -> int:
        rows, keys = cells.rows.tolist(), cells.keys.tolist()
        return sum(key * hash(self.memory.get(first + row, TORN)) for row, key in zip(rows, keys, strict=True)) & _MASK
