"""Requests and heads."""

from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus

#: Names are lower case; a repeated header's values are joined by ``", "`` (RFC 9110, 5.3).
Headers = dict[bytes, bytes]

JSON = (b"content-type", b"application/json")

_STATUS_LINES = {int(s): f"HTTP/1.1 {int(s)} {s.phrase}\r\n".encode() for s in HTTPStatus}


@dataclass(slots=True, eq=False, repr=False)
class Request:
    method: str
    target: str  #: as sent: path and query
    version: str  #: ``"1.1"`` or ``"1.0"``
    headers: Headers
    body: bytes
    keep_alive: bool
    arrived: float  #: ``time.monotonic()`` when it was complete (uvloop's own time has steps of 1 ms)

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]

    def __repr__(self) -> str:
        return f"<Request {self.method} {self.target} {len(self.body)} bytes>"


def add_header(headers: Headers, name: bytes, value: bytes) -> None:
    name = name.lower()
    if name in headers:
        value = headers[name] + b", " + value
    headers[name] = value


def encode_head(first_line: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A head up to and including its empty line.

    Raises:
        ValueError: a header contains a line break, which would start a new header.
    """
    lines = [b"%b: %b\r\n" % header for header in headers]
    head = b"".join([first_line, *lines, b"\r\n"])
    breaks = len(lines) + 2
    if head.count(b"\n") != breaks or head.count(b"\r") != breaks:
        raise ValueError(f"a line break inside a header: {head!r}")
    return head


def status_line(status: int) -> bytes:
    """``HTTP/1.1 200 OK``, with its line break."""
    return _STATUS_LINES.get(status) or b"HTTP/1.1 %d Unknown\r\n" % status
