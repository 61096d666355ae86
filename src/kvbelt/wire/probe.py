"""``POST /kvbelt/probe``: what a link between two workers can do, measured over what their transfers use.

Asked of a prefill worker, about a decode worker that it is connected to. ``kvbelt doctor`` asks.
"""

import msgspec

from kvbelt.wire.ids import EngineId
from kvbelt.wire.json_body import JsonDecoder


class ProbeOrder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which decode worker."""

    engine_id: EngineId


class Figures(msgspec.Struct, frozen=True):
    """One direction. Medians, from posted to done."""

    num_bytes: int  #: of a large operation
    seconds: float  #: that one took
    small_seconds: float  #: that one of 4 KiB took

    @property
    def gb_per_second(self) -> float:
        """Of large ones."""
        return self.num_bytes / self.seconds / 1e9 if self.seconds > 0 else 0.0


class Probed(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it. A direction that was not measured to its end is None, and ``reason`` says why."""

    channel: str = ""  #: the carrier
    write: Figures | None = None
    read: Figures | None = None
    num_bytes: int = 0  #: that have moved, both ways
    reason: str = ""  #: empty: everything was measured
    detail: str = ""


_orders: JsonDecoder[ProbeOrder] = JsonDecoder(ProbeOrder)
_answers: JsonDecoder[Probed] = JsonDecoder(Probed)


def parse_order(body: bytes) -> ProbeOrder:
    """What a worker is asked.

    Raises:
        ValueError: it is something else.
    """
    return _orders.decode(body)


def parse_answer(body: bytes) -> Probed:
    """What a worker has answered.

    Raises:
        ValueError: it is something else.
    """
    return _answers.decode(body)
