"""JSON from another process, decoded into one type.

A field that the type does not have is ignored, because a newer process may send it. A missing or a wrong one is an
error.

A long list of numbers, a prompt as token ids, is expensive even to skip: about 30 µs for 7,500 ids, against 2 µs to
find its end. ``cut_numbers`` cuts it out before parsing. This is safe:

* ``"name"`` before a colon is a key wherever it stands in valid JSON, unless the quote before ``name`` is escaped. The
  caller checks that the key it meant has the placeholder, and that there is no second one.
* The cut contains no quote and no second opening bracket or brace. So the first ``]`` is its end, and nothing in it
  closes anything else when it is written into another object.
"""

import re
from typing import Any, Generic, TypeVar

import msgspec

T = TypeVar("T")

#: Stands where numbers were cut. A client that sends this string only spoils its own request.
PLACEHOLDER = b'"\\u0000kvbelt cut\\u0000"'
_BEFORE_LIST = re.compile(rb"[ \t\r\n]*:[ \t\r\n]*(?=\[)")


class JsonDecoder(Generic[T]):
    """Decodes into ``shape``.

    msgspec's own decoder raises RecursionError, which is not a ValueError, for very deeply nested lists or objects.
    A body of ``[[[[…`` must get the answer to any malformed body, and must not end the task that reads it.
    """

    def __init__(self, shape: Any) -> None:
        self._decoder: msgspec.json.Decoder[T] = msgspec.json.Decoder(shape)

    def decode(self, body: bytes | memoryview) -> T:
        """Raises msgspec.DecodeError: it is not JSON, nested too deeply, or of another shape; UnicodeDecodeError."""
        try:
            return self._decoder.decode(body)
        except RecursionError:
            raise msgspec.DecodeError("JSON is nested too deeply") from None


class MessageError(ValueError):
    """A message breaks its contract. The text names the message, its sender and the field at fault."""


class JsonMessage(Generic[T]):
    """The contract of one message between processes: its type, and its name in errors."""

    def __init__(self, shape: type[T], name: str) -> None:
        self.shape = shape
        self.name = name
        self._decoder: JsonDecoder[T] = JsonDecoder(shape)

    def parse(self, body: bytes | memoryview, sender: str) -> T:
        """Decode a body that ``sender`` has sent. Raises MessageError: it is not this message."""
        try:
            return self._decoder.decode(body)
        except ValueError as error:
            raise MessageError(f"{self.name} of {sender}: {error}") from None

    def convert(self, content: Any, sender: str) -> T:
        """Check what has been decoded as a part of a larger body. Raises MessageError: it is not this message."""
        try:
            return msgspec.convert(content, self.shape)
        except ValueError as error:
            raise MessageError(f"{self.name} of {sender}: {error}") from None


def cut_numbers(body: bytes, name: bytes) -> tuple[bytes, memoryview] | None:
    """Cut a flat list of numbers that follows ``"name":``.

    Returns:
        The body with a placeholder in its place, and the list with its brackets; None if the first ``name``
        is followed by anything else, or there is a second one behind it.
    """
    quoted = b'"%b"' % name
    at = body.find(quoted)
    if at < 0:
        return None
    before = _BEFORE_LIST.match(body, at + len(quoted))
    if before is None:
        return None
    start = before.end()
    end = body.find(b"]", start) + 1
    if end == 0:
        return None
    others = max(body.find(b'"', start, end), body.find(b"{", start, end), body.find(b"[", start + 1, end))
    if others >= 0 or body.find(quoted, end) >= 0:
        return None
    return b"".join((body[:start], PLACEHOLDER, body[end:])), memoryview(body)[start:end]
