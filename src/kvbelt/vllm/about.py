"""What a vLLM server says of itself to ``kvbelt doctor``, as a worker of our own says it in ``GET /kvbelt/about``.

The belt lives in each rank's process, and the answer is given in the scheduler's. What stays as it is comes with the
rank's identity, once. What changes is looked at when somebody asks, on a thread of its own, and comes with the output
of the step after.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import msgspec

from kvbelt import about
from kvbelt.channels.choice import Choice
from kvbelt.transfer.belt import Belt
from kvbelt.vllm.settings import ConnectorSettings
from kvbelt.wire.about import About, Link, Road

log = logging.getLogger("kvbelt.vllm")

#: Of the carrier's own warnings, the last ones of each rank.
_MOST_COMPLAINTS = 5


class Carrier(Protocol):
    """What moves the bytes, as far as it tells of itself."""

    @property
    def name(self) -> str:
        """Of the vendor."""

    @property
    def backends(self) -> tuple[str, ...]:
        """That are in use."""

    @property
    def plugins(self) -> tuple[str, ...]:
        """That could be loaded."""

    def choices(self) -> Iterable[Choice]:
        """What it has chosen so far."""

    def complaints(self) -> list[str]:
        """Its warnings and errors so far."""


@dataclass(frozen=True, slots=True)
class BeltLook:
    """What changes, of one rank's belt, at one moment."""

    roads: tuple[Road, ...] = ()
    links: tuple[Link, ...] = ()
    complaints: tuple[str, ...] = ()


def roads_of(carrier: Carrier) -> list[Road]:
    """What it has chosen, as it is said on the wire."""
    return [Road(one.scope, one.operation, one.memory, one.transport) for one in carrier.choices()]


def look_at(belt: Belt, carrier: Carrier) -> BeltLook:
    """As of now. Waits a turn of the belt."""
    complaints = carrier.complaints()[-_MOST_COMPLAINTS:]
    return BeltLook(tuple(roads_of(carrier)), tuple(belt.links()), tuple(complaints))


def about_rank(settings: ConnectorSettings, belt: Belt, carrier: Carrier, device: str) -> About:
    """What stays as it is, said by the process that has the belt: its environment is what the carrier has read."""
    layout = belt.identity.layout
    return msgspec.structs.replace(
        about.of_this_process(settings.role, "vllm"),
        device=device,
        buffer_device=settings.buffer_device,
        buffer_bytes=settings.buffer_bytes,
        bytes_per_token=layout.slot_bytes(1) // layout.block_size,
        compatibility=belt.identity.compatibility(carrier.name),
        backends=list(carrier.backends),
        plugins=list(carrier.plugins),
    )


def about_server(first: About, looks: Mapping[int, BeltLook], max_model_len: int, now: float) -> About:
    """The whole server: as its first rank is, with what all ranks have seen. Sizes are of a rank, as settings are."""
    seen = [look for _, look in sorted(looks.items())]
    return msgspec.structs.replace(
        first,
        unix_time=now,
        max_model_len=max_model_len,
        roads=list(dict.fromkeys(road for look in seen for road in look.roads)),
        links=[link for look in seen for link in look.links],
        complaints=list(dict.fromkeys(line for look in seen for line in look.complaints)),
    )


class Looks:
    """Looks when it is told to, so that the model runner never waits for a look. Belongs to that one's thread."""

    def __init__(self, look: Callable[[], BeltLook]) -> None:
        self._look = look
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvbelt-look")
        self._under_way: Future[BeltLook] | None = None

    def begin(self) -> None:
        """Look, unless a look is under way."""
        if self._under_way is None:
            self._under_way = self._thread.submit(self._look)

    def take(self) -> BeltLook | None:
        """What was seen by a look that has ended since the last call. One that has failed has seen nothing."""
        if self._under_way is None or not self._under_way.done():
            return None
        ended, self._under_way = self._under_way, None
        if (error := ended.exception()) is not None:
            # It is for a doctor's eyes; the model runner, which asks, has others to serve.
            log.warning("the belt could not be looked at", exc_info=error)
            return None
        return ended.result()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True)
