"""``GET /health`` of a worker and of the proxy, and a vLLM server's description, which replaces it."""

from enum import StrEnum
from typing import Literal

import msgspec

from kvbelt.wire.about import About
from kvbelt.wire.handoff import ReceiverAddress
from kvbelt.wire.ids import EngineId
from kvbelt.wire.json_body import JsonMessage
from kvbelt.wire.load import BeltSnapshot, Load
from kvbelt.wire.steps import StepsNow
from kvbelt.wire.workers import WorkerRow


class Role(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"

    def serves(self, wanted: "Role") -> bool:
        """Whether a worker of this role can be used as ``wanted``."""
        return self in (wanted, Role.BOTH)


class WorkerHealth(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """``/health`` of an embedded worker."""

    status: Literal["ok", "unavailable"]
    state: str  #: ``loading``, ``ready``, ``draining``
    role: Role
    model: str
    engine_id: EngineId
    engine: str  #: ``embedded``
    receiver: ReceiverAddress | None  #: where it takes KV; None: it takes none, or is still loading
    hash_seed: str | None = None  #: its PYTHONHASHSEED
    max_model_len: int | None = None  #: None: still loading
    load: Load | None = None  #: None: still loading
    belt: BeltSnapshot | None = None  #: None: it has no belt, or is still loading
    steps: StepsNow | None = None  #: None: it is still loading, or of an older version
    device: str = ""  #: as ``About.device``; empty: it is still loading, or of an older version

    def __post_init__(self) -> None:
        """Require of a ready worker what it knows by then."""
        for name in ("max_model_len", "load"):
            if self.state == "ready" and getattr(self, name) is None:
                raise ValueError(f"Object missing field `{name}`, which a ready worker has")


class AnswerDefaults(msgspec.Struct, frozen=True):
    """What a vLLM server's generation config says of answers."""

    unless_asked: int | None = None  #: their most tokens, unless the request says how many
    most: int | None = None  #: their most tokens, whatever the request says
    penalties: bool = False  #: for presence or frequency, which count the answer's tokens

    def limit(self, asked: int | None, room: int) -> int:
        """The most tokens of an answer for which a request asks; ``room`` is what the context has left for one."""
        most = room if self.most is None else min(room, self.most)
        if asked is None:
            return most if self.unless_asked is None else min(most, self.unless_asked)
        return asked if self.most is None else min(asked, self.most)


NO_DEFAULTS = AnswerDefaults()


class ServerDescription(msgspec.Struct, frozen=True, kw_only=True):
    """What a vLLM server with our connector answers to ``{"kvbelt": "describe"}``: its ``/health`` has no body."""

    role: Role
    model: str
    engine_id: EngineId | None  #: None: its belt does not run yet
    max_model_len: int
    engine: str  #: ``vllm``
    receiver: ReceiverAddress | None
    hash_seed: str | None = None
    about: About | None = None  #: for ``kvbelt doctor``; None: its belt does not run yet
    steps: StepsNow | None = None  #: None: an older version
    defaults: AnswerDefaults = NO_DEFAULTS


class NotificationPort(msgspec.Struct, frozen=True):
    """Where the proxy hears what workers tell it unasked."""

    port: int
    mechanism: str  #: ``CURVE`` or ``NULL``


class PlacementNow(msgspec.Struct, frozen=True, kw_only=True):
    """How the proxy places requests, and what its shadow account says; None: nothing yet."""

    setting: str  #: ``elastic``, ``split`` or ``whole``, as it was started
    mode: str  #: as it acts: ``whole`` too where ``elastic`` has switched splitting off
    regret: float | None  #: share of the last requests within their levels if all had been whole, less that with splits
    actual: float | None  #: share of them that was within their levels
    expected: float | None  #: what the replay says of it


class ProxyHealth(msgspec.Struct, frozen=True, kw_only=True):
    status: Literal["ok", "unavailable"]
    state: str  #: ``ready``, ``waiting``, ``draining``
    notifications: NotificationPort
    workers: list[WorkerRow]
    placement: PlacementNow | None = None  #: None: an older version
    open_requests: int = 0  #: of clients


WORKER_HEALTH = JsonMessage(WorkerHealth, "/health")
SERVER_DESCRIPTION = JsonMessage(ServerDescription, "the description")
PROXY_HEALTH = JsonMessage(ProxyHealth, "/health")
