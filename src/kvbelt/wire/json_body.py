"""JSON that somebody else has written, decoded into one type.

msgspec's own decoder raises RecursionError, which is no ValueError, where lists or objects are nested very deeply.
Whoever sends ``[[[[…`` must get the answer to a malformed body, and must not end the task that reads it.
"""

from typing import Any, Generic, TypeVar

import msgspec

T = TypeVar("T")


class JsonDecoder(Generic[T]):
    """Decodes into ``shape``, or raises an error of msgspec's, a ValueError."""

    def __init__(self, shape: Any) -> None:
        self._decoder: msgspec.json.Decoder[T] = msgspec.json.Decoder(shape)

    def decode(self, body: bytes | memoryview) -> T:
        """Decode.

        Raises:
            msgspec.DecodeError: not JSON, nested too deeply, or of another shape (ValidationError).
            UnicodeDecodeError: a text in it is not UTF-8.
        """
        try:
            return self._decoder.decode(body)
        except RecursionError:
            raise msgspec.DecodeError("JSON is nested too deeply") from None
