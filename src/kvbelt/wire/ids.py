"""Names that processes share."""

from typing import NewType

import msgspec

#: One incarnation of a worker. A restart makes a new one, so that messages to the old one are refused.
EngineId = NewType("EngineId", str)

#: One attempt to hand the KV of one prompt from one prefill worker to one decode worker.
TransferId = NewType("TransferId", str)


class SlotName(msgspec.Struct, frozen=True, array_like=True):
    """One use of a piece of a decode worker's staging buffer.

    The generation grows with every use of the slot: a message with an older one is refused.
    """

    engine_id: EngineId
    slot: int
    generation: int
