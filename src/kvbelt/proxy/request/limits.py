"""What a client asks for in headers: a deadline, and service levels of its own."""

from math import inf

from kvbelt.errors import RequestError
from kvbelt.http import Headers
from kvbelt.routing.levels import ServiceLevels

#: Seconds from the request's arrival.
DEADLINE = b"x-kvbelt-deadline-seconds"

#: Milliseconds. An embedded worker takes the second one, too.
TTFT, ITL, TPOT = b"x-kvbelt-slo-ttft-ms", b"x-kvbelt-slo-itl-ms", b"x-kvbelt-slo-tpot-ms"


def deadline_seconds(headers: Headers, most: float) -> float:
    """Seconds that a request may take: the client's own limit, at most ``most``. Raises RequestError: 400."""
    said = headers.get(DEADLINE)
    return most if said is None else min(most, _number(DEADLINE, said, "of seconds greater than 0"))


def levels_of(headers: Headers, default: ServiceLevels) -> ServiceLevels:
    """The client's own levels where it says them. Raises RequestError: 400."""
    ttft, itl, tpot = headers.get(TTFT), headers.get(ITL), headers.get(TPOT)
    if ttft is None and itl is None and tpot is None:
        return default
    return ServiceLevels(
        default.ttft if ttft is None else _number(TTFT, ttft, "of milliseconds greater than 0") / 1e3,
        default.itl if itl is None else _level(ITL, itl),
        default.tpot if tpot is None else _level(TPOT, tpot),
    )


def _level(name: bytes, said: bytes) -> float | None:
    return None if said == b"0" else _number(name, said, "of milliseconds greater than 0, or 0 for no level") / 1e3


def _number(name: bytes, said: bytes, what: str) -> float:
    try:
        value = float(said)
    except ValueError:
        value = 0.0
    if not 0 < value < inf:
        shown = said[:64].decode("latin-1")
        raise RequestError(f"{name.decode()} is {shown!r}; it must be a number {what}", param=name.decode())
    return value
