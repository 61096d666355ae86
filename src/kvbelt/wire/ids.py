"""Names of things that more than one process speaks of."""

from typing import NewType

import msgspec

#: One life of one worker process. A restart makes a new one, so that whatever names the old one is refused.
EngineId = NewType("EngineId", str)

#: One attempt to hand the KV of one prompt from one prefill worker to one decode worker.
TransferId = NewType("TransferId", str)


class SlotName(msgspec.Struct, frozen=True, array_like=True):
    """A piece of a decode worker's staging buffer, for one use of it.

    The generation grows with every use of the slot: a message that names an older one is refused.
    """

    engine_id: EngineId
    slot: int
    generation: int
