"""W3C Trace Context (w3.org/TR/trace-context): the client's trace, and the headers that workers get."""

import random
import re
from dataclasses import dataclass

Header = tuple[bytes, bytes]

_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL)
_NO_TRACE = b"0" * 32
_NO_SPAN = b"0" * 16

_MAX_STATE_BYTES = 512  #: that every hop must pass on; longer ones are dropped


def new_trace_id() -> bytes:
    return b"%032x" % (random.getrandbits(128) or 1)


def new_span_id() -> bytes:
    return b"%016x" % (random.getrandbits(64) or 1)


@dataclass(frozen=True, slots=True)
class Parent:
    """The span of the client that a request belongs to. Ids are lower-case hexadecimal."""

    trace_id: bytes
    span_id: bytes
    flags: int

    @property
    def sampled(self) -> bool:
        return bool(self.flags & 1)


def parse_traceparent(header: bytes) -> Parent | None:
    """A ``traceparent`` header; None: it is not valid. Of a later version, the fields that this one knows."""
    found = _TRACEPARENT.fullmatch(header)
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    if version == b"ff" or (version == b"00" and more is not None) or trace_id == _NO_TRACE or span_id == _NO_SPAN:
        return None
    return Parent(trace_id, span_id, int(flags, 16))


@dataclass(frozen=True, slots=True)
class Trace:
    trace_id: bytes
    parent: Parent | None  #: of the client; None: the trace begins here
    span_id: bytes  #: of the request at this proxy; where its trace is not recorded here, the client's
    recorded: bool  #: this proxy sends spans of it
    state: bytes = b""  #: ``tracestate``, which is passed on unread

    def headers(self, span_id: bytes) -> list[Header]:
        """For a leg whose span has this id."""
        # If a trace begins here and is not kept, workers keep nothing of it either.
        flags = b"01" if self.recorded else b"%02x" % (self.parent.flags if self.parent is not None else 0)
        said = [(b"traceparent", b"00-%b-%b-%b" % (self.trace_id, span_id, flags))]
        return [*said, (b"tracestate", self.state)] if 0 < len(self.state) <= _MAX_STATE_BYTES else said
