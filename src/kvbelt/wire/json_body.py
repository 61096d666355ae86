"""JSON from another process, decoded into one type.

A field that the type does not have is ignored, because a newer process may send it. A missing or a wrong one is an
error.
"""

from typing import Any, Generic, TypeVar

import msgspec

T = TypeVar("T")


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
