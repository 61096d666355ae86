"""The interfaces of the belt: what it needs (copying, moving bytes) and what it offers to an engine.

``Channel`` and ``PagedCopy`` are implemented outside this package. ``ReceivedKV`` and the outcomes are for engines. An
engine may call from any thread; callbacks run on the belt's thread and must return quickly.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from kvbelt.wire.digest import Cells
from kvbelt.wire.layout import KVLayout


class SlotGoneError(Exception):
    """A received slot was released, or the belt was closed, before it was read."""


@dataclass(frozen=True, slots=True)
class Region:
    """Registered memory of this process: where a peer may write, or a write may start from."""

    address: int
    num_bytes: int
    device: str  #: ``"cpu"`` or ``"cuda"``
    device_index: int = 0

    @property
    def place(self) -> str:
        """As ``Channel.write`` wants it: ``"cpu"``, ``"cuda:1"``."""
        return self.device if self.device == "cpu" else f"{self.device}:{self.device_index}"

    def take(self) -> "Region":
        return self


class Buffer(Protocol):
    """Memory for a region, which may be taken later: a ``Region`` is a buffer that has been taken."""

    @property
    def num_bytes(self) -> int: ...

    @property
    def device(self) -> str:
        """``"cpu"`` or ``"cuda"``."""

    def take(self) -> Region:
        """The same region each time.

        Raises:
            ChannelError: the device has not that much memory.
        """


class Fence(Protocol):
    def done(self) -> bool:
        """Whether its bytes are in place. Never blocks."""


class Digest(Fence, Protocol):
    def value(self) -> int:
        """The digest (wire/digest.py), once it is done."""


class PagedCopy(Protocol):
    """Copies whole blocks between an engine's paged KV and contiguous staging buffers, and sums what is in the buffers.

    ``offset`` is in bytes from the start of a staging buffer; block *i* of the call lies at
    ``offset + i * layout.block_bytes``. ``region`` says which receive buffer: 0, or 1 for the overflow.
    """

    def gather(self, layer: int, block_ids: Sequence[int], offset: int, ready: Any) -> Fence:
        """Copy paged blocks to staging, after ``ready`` (an engine's event, or None)."""

    def scatter(self, block_ids: Sequence[int], offset: int, stride: int, region: int = 0) -> Sequence[Fence]:
        """Copy staging to paged blocks, every layer: layer *n* lies at ``offset + n * stride``.

        Raises:
            ValueError: a block that the engine does not have.
        """

    def digest_sent(self, offset: int, cells: Cells) -> Digest:
        """Sum blocks that were gathered."""

    def digest_received(self, offset: int, cells: Cells, region: int = 0) -> Digest:
        """Sum blocks that a peer has written."""

    def cut(self, heads: range | None, per_block: int, layers: range | None, layout: KVLayout) -> "PagedCopy":
        """The same of these heads and layers alone, and of smaller blocks, over the same memory.

        Args:
            heads: None: all.
            per_block: what each block is cut into; block *i* becomes ``i * per_block`` and those after it.
            layers: None: all. Their first becomes layer 0.
            layout: of the whole blocks.
        """


class PrefixIndex(Protocol):
    """The blocks of earlier prompts that an engine holds."""

    def held(self, hashes: Sequence[bytes]) -> int:
        """How many blocks, from the first on, with these hashes are here; they count as used just now.

        Called on the belt's thread; returns at once. It pins nothing: a block may be evicted before the prompt is read,
        and then the prompt is computed here. So nothing waits for a block that is held.
        """


class WriteHandle(Protocol):
    def done(self) -> bool:
        """Whether it has completed. Never blocks.

        Raises:
            ChannelError: it failed; the reason is in the message.
        """

    def release(self) -> None:
        """Free what the vendor holds for it. Idempotent; a write that is not done is aborted where possible.

        Raises:
            ChannelError: it is still in flight and could not be aborted: its memory must not be used again.
        """


class Channel(Protocol):
    """Moves bytes between registered regions of two processes. All calls come from the belt's thread."""

    name: str

    def open(self, devices: Collection[str]) -> None:
        """Make ready to move memory of these devices (``"cpu"``, ``"cuda"``).

        Raises:
            ChannelError: the vendor is not installed, too old, or cannot move such memory.
        """

    def register(self, region: Region) -> None:
        """Make a region reachable. Once a region.

        Raises:
            ChannelError: the vendor cannot move this memory.
        """

    def local_metadata(self) -> bytes:
        """What a peer needs to reach the regions that are registered by now."""

    def add_peer(self, metadata: bytes) -> str:
        """Add a peer. Returns its agent name.

        Raises:
            ChannelError: the metadata is not that of a compatible agent.
        """

    def connect(self, agent: str) -> None:
        """Begin to open the connection to a peer that was added, so that the first write finds it open.

        Returns at once. The rest is done on the vendor's threads, or in ``progress`` of both sides.

        Raises:
            ChannelError: the peer is not known, or cannot be reached.
        """

    def remove_peer(self, agent: str) -> None:
        """Forget a peer and everything posted to it."""

    def write(self, agent: str, spans: Sequence[tuple[int, int, int]], device: str, peer_device: str) -> WriteHandle:
        """Post one write of ``(local address, remote address, bytes)`` spans; returns at once.

        Devices are ``"cpu"`` or ``"cuda:<index>"``.

        Raises:
            ChannelError: it could not be posted.
        """

    def progress(self) -> None:
        """Let the vendor's library work (its handshakes, incoming traffic). Never blocks."""

    def close(self) -> None:
        """Deregister and end."""


@runtime_checkable
class Reads(Protocol):
    """A channel that can read, too. Transfers never do; a link is measured both ways (link_probe.py)."""

    def read(self, agent: str, spans: Sequence[tuple[int, int, int]], device: str, peer_device: str) -> WriteHandle:
        """Post one read, as ``Channel.write``."""


@dataclass(frozen=True, slots=True)
class TransferOutcome:
    ok: bool
    reason: str  #: ``"done"``, or a low-cardinality cause such as ``"refused_layout"``, ``"deadline"``, ``"peer_lost"``
    detail: str  #: for people: what happened, with values
    num_bytes: int = 0
    num_writes: int = 0
    seconds: float = 0.0  #: first write posted to last completed
    exposed_seconds: float = 0.0  #: end of the prompt's computation to the acknowledged commit


class ReceivedKV(Protocol):
    """A prompt's KV on a decode worker: committed, or coming in parts.

    A prompt larger than the buffer comes in parts while it is read: ``scatter`` then waits for them, on a thread that
    may wait, and can be called once.
    """

    num_tokens: int  #: of the prompt
    num_blocks: int  #: of the prompt
    first_block: int  #: earlier ones were not sent, because this process's engine had them (PrefixIndex)
    whole: bool  #: every byte is there: ``scatter`` takes as long as the copies take
    heads: range | None  #: of this process's heads, that it has; None: all
    layers: range | None  #: likewise

    def scatter(self, block_ids: Sequence[int], first: int | None = None) -> None:
        """Copy every layer's blocks, from the prompt's block ``first`` on, into these; returns when they are in place.

        Args:
            block_ids: as many of the engine's blocks as are wanted.
            first: the prompt's block that goes into the first of them; None: ``first_block``.

        Raises:
            SlotGoneError: the slot is no longer this transfer's, or a part did not come.
            ValueError: blocks that were not sent.
        """

    def release(self) -> None:
        """Free the slot. Idempotent."""


@dataclass(frozen=True, slots=True)
class PeerOutcome:
    ok: bool
    reason: str  #: empty, or a low-cardinality cause as in TransferOutcome
    detail: str  #: for people; of a refused handshake, the two values that differ


@dataclass(frozen=True, slots=True)
class Lost:
    reason: str  #: low cardinality, as in TransferOutcome
    detail: str
