"""What a receiving session commands: of ``IncomingTransfers``, of the driver, and for the consumer."""

from msgspec import Struct

from kvbelt.transfer.receive.slots import Slot
from kvbelt.transfer.shape import SlotShape
from kvbelt.wire import reservation as wire
from kvbelt.wire.ids import EngineId, TransferId


class Answer(Struct, frozen=True):
    sender: EngineId
    message: wire.FromReceiver


class Enqueue(Struct, frozen=True):
    """Put the transfer at the end of the queue for slots."""


class LeaveQueue(Struct, frozen=True):
    """Take the transfer out of the queue."""


class FreeSlot(Struct, frozen=True):
    """The sender writes no more into this slot, and no consumer reads it."""

    slot: Slot


class Check(Struct, frozen=True):
    """Compute the digest of a part, or of the whole slot (``part`` None); answer with Verified."""

    transfer_id: TransferId
    slot: Slot
    shape: SlotShape
    part: int | None
    digest: int  #: as the sender has it


class Deliver(Struct, frozen=True):
    """Give the slot to the consumer. Exactly one of Deliver and Lose for every consumer.

    Where the shape has parts none of them need be there yet: PartReady follows for each, then Finish, or Break.
    """

    transfer_id: TransferId
    slot: Slot
    num_tokens: int
    shape: SlotShape


class PartReady(Struct, frozen=True):
    transfer_id: TransferId
    part: int


class Finish(Struct, frozen=True):
    """Every part was taken: what the consumer has is whole."""

    transfer_id: TransferId


class Break(Struct, frozen=True):
    """No part follows: what the consumer has taken must not be used."""

    transfer_id: TransferId
    reason: str
    detail: str


class Lose(Struct, frozen=True):
    transfer_id: TransferId
    reason: str
    detail: str


class Ended(Struct, frozen=True):
    """The transfer is over for consumers and for the counters. Exactly once."""

    reason: str
    num_bytes: int  #: that came and were made visible; 0 where none were
    reused_bytes: int  #: that the engine had already; 0 where none were made visible


ToConsumer = Deliver | PartReady | Finish | Break | Lose
ReceiverCommand = Answer | Enqueue | LeaveQueue | FreeSlot | Check | ToConsumer | Ended
