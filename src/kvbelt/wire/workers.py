"""``/kvbelt/workers``: the workers of a proxy, and how an operator adds one."""

from typing import Literal

import msgspec

from kvbelt.wire.ids import EngineId
from kvbelt.wire.json_body import JsonMessage
from kvbelt.wire.load import Buffers, Load


class WorkerRow(msgspec.Struct, frozen=True, kw_only=True):
    worker: str  #: ``host:port``
    role: str  #: what the proxy uses it for: ``prefill`` or ``decode``
    state: str  #: ``unknown``, ``ready``, ``unready``, ``lost``
    detail: str  #: why it is not ready, for people
    standing: str  #: what operators want: ``active``, ``draining``, ``leaving``
    warming: bool  #: its first connections to the other side are still being made
    engine_id: EngineId | None
    model: str
    max_model_len: int | None
    load: Load
    buffers: Buffers | None  #: None: it has no belt, or does not tell
    in_flight: int  #: requests of this proxy that need it

    @property
    def shown_state(self) -> str:
        if self.standing != "active":
            return "drained" if self.standing == "draining" and not self.in_flight else self.standing
        return "warming" if self.warming and self.state == "ready" else self.state


class PairRow(msgspec.Struct, frozen=True, kw_only=True):
    """Whether one prefill worker can send to one decode worker."""

    prefill: str
    decode: str
    state: str  #: ``warm``, ``unwarmed``, ``failed``, ``refused``
    reason: str | None  #: of ``wire/reasons.py``; None: it can
    detail: str


class WorkerList(msgspec.Struct, frozen=True, kw_only=True):
    workers: list[WorkerRow]
    pairs: list[PairRow]  #: that have been tried
    admin: bool  #: the proxy has an admin key


class NewWorker(msgspec.Struct, frozen=True):
    """``POST /kvbelt/workers``: a worker joins."""

    role: Literal["prefill", "decode"]
    host: str
    port: int


WORKER_LIST = JsonMessage(WorkerList, "/kvbelt/workers")
WORKER_ROW = JsonMessage(WorkerRow, "/kvbelt/workers")
NEW_WORKER = JsonMessage(NewWorker, "the new worker")
