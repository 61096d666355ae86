"""What a receiving session asks its desk, its driver and its reader to do."""

from dataclasses import dataclass

from kvbelt.transfer.shape import SlotShape
from kvbelt.transfer.slots import Slot
from kvbelt.wire import reservation as wire
from kvbelt.wire.ids import EngineId, TransferId


@dataclass(frozen=True, slots=True)
class Answer:
    """Send a message to the writer."""

    writer: EngineId
    message: wire.FromReceiver


@dataclass(frozen=True, slots=True)
class Enqueue:
    """Put it at the end of the queue for room."""


@dataclass(frozen=True, slots=True)
class LeaveQueue:
    """Take it out of the queue."""


@dataclass(frozen=True, slots=True)
class FreeSlot:
    """Nobody will touch this slot any more."""

    slot: Slot


@dataclass(frozen=True, slots=True)
class Check:
    """Compute the digest of a part, or of the whole slot (``part`` None); answer with Verified."""

    transfer_id: TransferId
    slot: Slot
    shape: SlotShape
    part: int | None
    digest: int  #: as the sender has it


@dataclass(frozen=True, slots=True)
class Deliver:
    """Give the slot to the reader. Exactly one of Deliver and Lose for every reader.

    Where the shape has parts none of them need be there yet: PartReady follows for each, then Finish, or Break.
    """

    transfer_id: TransferId
    slot: Slot
    num_tokens: int
    shape: SlotShape


@dataclass(frozen=True, slots=True)
class PartReady:
    """The next part may be taken out."""

    transfer_id: TransferId
    part: int


@dataclass(frozen=True, slots=True)
class Finish:
    """Every part was taken: what the reader has is whole."""

    transfer_id: TransferId


@dataclass(frozen=True, slots=True)
class Break:
    """No part follows: what the reader has taken is worth nothing."""

    transfer_id: TransferId
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Lose:
    """Tell the reader that nothing will come."""

    transfer_id: TransferId
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Ended:
    """It is over for readers and for the counters. Exactly once."""

    reason: str
    num_bytes: int  #: that have come and were made visible; 0 where nothing was
    reused_bytes: int  #: that did not have to come; 0 likewise


ToReader = Deliver | PartReady | Finish | Break | Lose
ReceiverCommand = Answer | Enqueue | LeaveQueue | FreeSlot | Check | ToReader | Ended
