"""``POST /kvbelt/probe``: a prefill worker measures its link to a decode worker that it is connected to.

It is measured over what transfers use. ``kvbelt doctor`` asks.
"""

import msgspec

from kvbelt.wire.ids import EngineId
from kvbelt.wire.json_body import JsonMessage


class ProbeRequest(msgspec.Struct, frozen=True):
    engine_id: EngineId


#: If the fastest of so many operations is slow, the link is. Fewer may be slow because a process had no CPU.
ENOUGH_OPERATIONS = 3


class LinkSpeed(msgspec.Struct, frozen=True):
    """One direction. Seconds are of the fastest operation: a link is not slow because a process did not run."""

    num_bytes: int  #: of a large operation
    seconds: float  #: from posted to done
    small_seconds: float  #: the same, of 4 KiB
    operations: int = 1  #: large ones

    @property
    def gb_per_second(self) -> float:
        return self.num_bytes / self.seconds / 1e9 if self.seconds > 0 else 0.0


class ProbeResult(msgspec.Struct, frozen=True, kw_only=True):
    """The answer. A direction that was not measured to its end is None, and ``reason`` says why."""

    channel: str = ""  #: empty: there is none
    write: LinkSpeed | None = None
    read: LinkSpeed | None = None
    num_bytes: int = 0  #: moved, both ways
    reason: str = ""  #: empty: everything was measured
    detail: str = ""


PROBE_REQUEST = JsonMessage(ProbeRequest, "the probe")
PROBE_RESULT = JsonMessage(ProbeResult, "/kvbelt/probe")
