"""W3C Trace Context (w3.org/TR/trace-context): what a client says of its trace, and what workers are told."""

import random
import re
from dataclasses import dataclass

Header = tuple[bytes, bytes]

_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL)
_NO_TRACE = b"0" * 32
_NO_SPAN = b"0" * 16
#: Of a question of the proxy's own. Told nothing, a vLLM server would begin a trace for each.
UNKEPT: Header = (b"traceparent", b"00-%b-%b-00" % (b"1".zfill(32), b"1".zfill(16)))

_MAX_STATE_BYTES = 512  #: that everybody must pass on; longer ones are not


class Ids:
    """New ids. Belongs to one thread."""

    def __init__(self) -> None:
        self._numbers = random.Random()  # noqa: S311 -- no secrets; seeded by the system

    def trace(self) -> bytes:
        """Of a trace."""
        return b"%032x" % (self._numbers.getrandbits(128) or 1)

    def span(self) -> bytes:
        """Of a span."""
        return b"%016x" % (self._numbers.getrandbits(64) or 1)

    def chance(self) -> float:
        """From 0 to 1."""
        return self._numbers.random()


@dataclass(frozen=True, slots=True)
class Parent:
    """The span of the client that a request belongs to. Ids are lower-case hexadecimal."""

    trace_id: bytes
    span_id: bytes
    flags: int

    @property
    def sampled(self) -> bool:
        """Whether the client keeps this trace."""
        return bool(self.flags & 1)


def parse_traceparent(header: bytes) -> Parent | None:
    """What a ``traceparent`` header says; None: it is none. Of a later version, what this one knows."""
    found = _TRACEPARENT.fullmatch(header)
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    if version == b"ff" or (version == b"00" and more is not None) or trace_id == _NO_TRACE or span_id == _NO_SPAN:
        return None
    return Parent(trace_id, span_id, int(flags, 16))


@dataclass(frozen=True, slots=True)
class Trace:
    """Of one request."""

    trace_id: bytes
    parent: Parent | None  #: of the client; None: the trace begins here
    span_id: bytes  #: of the request at this proxy; of the client, where it has a trace that is not recorded here
    recorded: bool  #: this proxy sends spans of it
    state: bytes = b""  #: ``tracestate``, which belongs to others and is passed on

    def headers(self, span_id: bytes) -> list[Header]:
        """For a leg whose span has this id."""
        # Of a trace that begins here and is not kept, workers keep nothing either.
        flags = b"01" if self.recorded else b"%02x" % (self.parent.flags if self.parent is not None else 0)
        said = [(b"traceparent", b"00-%b-%b-%b" % (self.trace_id, span_id, flags))]
        return [*said, (b"tracestate", self.state)] if 0 < len(self.state) <= _MAX_STATE_BYTES else said
