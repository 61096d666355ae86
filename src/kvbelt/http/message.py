"""Requests and heads."""

import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from urllib.parse import unquote

from kvbelt.http.errors import BadRequestError

#: Names are lower case; a repeated header's values are joined by ``", "`` (RFC 9110, 5.3).
Headers = dict[bytes, bytes]

#: Pairs, or their lines as ``encode_lines`` makes them, for several requests with the same.
HeadersToSend = Sequence[tuple[bytes, bytes]] | bytes

#: A body in pieces, which are copied once, when it is sent.
Pieces = tuple[bytes | memoryview, ...]

JSON = (b"content-type", b"application/json")

_ABSOLUTE = re.compile(rb"https?://([^/?#@]+)(/[^?#]*)?(\?[^#]*)?\Z", re.IGNORECASE)
_STATUS_LINES = {int(s): f"HTTP/1.1 {int(s)} {s.phrase}\r\n".encode() for s in HTTPStatus}


@dataclass(slots=True, eq=False, repr=False)
class Request:
    method: str
    target: str  #: path and query, as sent; ``*``: the server itself
    version: str  #: ``"1.1"`` or ``"1.0"``
    headers: Headers
    body: bytes
    keep_alive: bool
    arrived: float  #: ``time.monotonic()`` when it was complete (uvloop's own time has steps of 1 ms)

    @property
    def path(self) -> str:
        """The target without its query and its escapes."""
        path = self.target.partition("?")[0]
        return unquote(path) if "%" in path else path

    def __repr__(self) -> str:
        return f"<Request {self.method} {self.target} {len(self.body)} bytes>"


def target_of(method: bytes, sent: bytes, headers: Headers) -> str:
    """A request's target by any of its forms (RFC 9112, 3.2). Raises BadRequestError: it is none of them.

    The host of a whole URL replaces the header's.
    """
    if sent[:1] == b"/" or (sent == b"*" and method == b"OPTIONS"):
        return sent.decode("latin-1")
    absolute = _ABSOLUTE.match(sent)
    if absolute is None:
        shown = sent[:80].decode("latin-1")
        raise BadRequestError(400, f"{shown!r} is no target of {method.decode('latin-1')}; send a path, or a whole URL")
    headers[b"host"], path, query = absolute.groups()
    if path is None and query is None and method == b"OPTIONS":
        return "*"
    return ((path or b"/") + (query or b"")).decode("latin-1")


def add_header(headers: Headers, name: bytes, value: bytes) -> None:
    name = name.lower()
    if name in headers:
        value = headers[name] + b", " + value
    headers[name] = value


def encode_lines(first_line: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The first lines of a head.

    Raises:
        ValueError: a header contains a line break, which would start a new header.
    """
    lines = [first_line, *[b"%b: %b\r\n" % header for header in headers]]
    head = b"".join(lines)
    # The first line may be empty: then the head goes on.
    breaks = len(lines) if first_line else len(lines) - 1
    if head.count(b"\n") != breaks or head.count(b"\r") != breaks:
        raise ValueError(f"a line break inside a header: {head!r}")
    return head


def encode_head(first_line: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A head up to and including its empty line. Raises ValueError: as ``encode_lines``."""
    return encode_lines(first_line, headers) + b"\r\n"


class _Clock:
    """The header ``Date``, written once a second."""

    def __init__(self) -> None:
        self._second = 0
        self._line = b""

    def date(self) -> bytes:
        second = int(time.time())
        if second != self._second:
            self._second, self._line = second, formatdate(second, usegmt=True).encode()
        return self._line


date = _Clock().date


def status_line(status: int) -> bytes:
    """``HTTP/1.1 200 OK``, with its line break."""
    return _STATUS_LINES.get(status) or b"HTTP/1.1 %d Unknown\r\n" % status
