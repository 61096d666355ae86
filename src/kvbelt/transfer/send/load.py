"""What a transfer's record holds for the write pipeline: the bytes that are to move, that move, and that have moved."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvbelt.transfer.ports import Digest, Fence, WriteHandle
from kvbelt.transfer.send.links import LinkTally
from kvbelt.transfer.send.plan import Run
from kvbelt.transfer.shape import SlotShape
from kvbelt.wire.digest import Choice


@dataclass(frozen=True, slots=True)
class Target:
    agent: str
    device: str
    slot_address: int
    shape: SlotShape
    choice: Choice | None = None  #: which cells' digests are wanted; None: none


@dataclass(slots=True, eq=False)
class Piece:
    part: int
    runs: Sequence[Run]
    offset: int  #: in staging
    num_blocks: int
    num_bytes: int
    fences: list[Fence] = field(default_factory=list)
    write: WriteHandle | None = None
    digest: Digest | None = None
    link: LinkTally | None = None  #: while its write counts as in flight


@dataclass(slots=True, eq=False)
class PartLoad:
    """One part of a transfer's bytes; a transfer that is not in parts has one."""

    total_blocks: int  #: of all layers
    pending: deque[Run] = field(default_factory=deque)
    landed_blocks: int = 0
    digest: int = 0  #: of what has landed
    reported: bool = False

    @property
    def landed(self) -> bool:
        return self.landed_blocks == self.total_blocks


@dataclass(slots=True, eq=False)
class Load:
    target: Target | None = None  #: None until the slot is granted
    handed: list[Run] = field(default_factory=list)  #: until the slot is granted, then empty
    parts: list[PartLoad] = field(default_factory=list)  #: once it is granted
    taken: int = 0  #: parts that the receiver has read
    pieces: deque[Piece] = field(default_factory=deque)  #: gathering first come, first written
    handed_blocks: int = 0
    stopped: bool = False
    stuck: bool = False  #: a write in flight could not be aborted, and ends when the peer or the carrier ends it
    reported: bool = False  #: Written or WriteFailed was reported; each follows at most once
    blocks_free: bool = False  #: none of the engine's blocks is read any more, nor will be
    num_writes: int = 0
    first_write: float | None = None
    last_landed: float | None = None
