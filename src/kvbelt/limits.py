"""What one request may ask for, so that it takes nothing that others need (``docs/limits.md``). Pure."""

from codecs import utf_8_decode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from kvbelt.errors import RequestError, SettingsError, context_exceeded

OPTION = "--limit"

_NUMBERS_A_PART = 8  #: numbers cost less to read than the other parts of a body, and prompts consist of them
#: Bytes of a body that are looked through before others get their turn, in about a millisecond.
_PIECE = 256 * 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """The first four hold in the proxy and in workers, the others in embedded workers.

    vLLM has limits of its own, some of them the same.
    """

    body_bytes: int = 16 * 1024 * 1024  #: a million tokens take 9 MB at most, as ids or as escaped text
    sequences: int = 1024  #: prompts times n; vLLM's number of prompts
    json_parts: int = 131_072  #: objects, lists and strings in a body, and eighths of its commas
    fields: int = 1024  #: of the body's object
    messages: int = 16_384
    message_parts: int = 4096  #: content parts and tool calls of all messages
    tools: int = 1024
    documents: int = 1024
    chat_template_kwargs: int = 128
    stop: int = 4  #: strings; OpenAI's and vLLM's number
    stop_characters: int = 4096  #: in all of them
    stop_token_ids: int = 1024
    logit_bias: int = 4096
    allowed_token_ids: int = 262_144
    bad_words: int = 128  #: vLLM's number
    bad_words_characters: int = 4096  #: in all of them

    def require_sequences(self, prompts: int, n: int) -> None:
        """Raises RequestError 400: one request would become more sequences than a request may."""
        if prompts * n > self.sequences:
            many = f"{prompts} prompts" if prompts > 1 else "1 prompt"
            raise RequestError(
                f"{many} with n = {n} are {prompts * n} answers, and a request may ask for {self.sequences} at most; "
                f"send several requests, or raise {OPTION} sequences=N",
                param="prompt" if prompts > 1 else "n",
            )

    def is_small(self, body: bytes) -> bool:
        """Whether it is read in no time, whatever its parts are."""
        return len(body) <= self.json_parts

    def looking_through(self, body: bytes) -> Iterator[None]:
        """Stops between pieces, so that others can have their turn.

        A small body is left to its parser. Raises RequestError 400: it is not UTF-8, or a body of so many parts would
        take too long to read.
        """
        if self.is_small(body):
            return
        yield from self._counting(body)
        if not body.isascii():
            yield from _decoding(body)

    def _counting(self, body: bytes) -> Iterator[None]:
        # A byte of each part. Brackets and commas of texts count as well: texts have few, and to leave them out is to
        # parse. Quotes of texts are escaped.
        marks, quotes, commas = 0, 0, 0
        for start in range(0, len(body), _PIECE):
            end = start + _PIECE
            marks += body.count(b"{", start, end) + body.count(b"[", start, end)
            quotes += body.count(b'"', start, end) - body.count(b'\\"', start, end + 1)
            commas += body.count(b",", start, end)
            parts = marks + quotes // 2 + commas // _NUMBERS_A_PART
            if parts > self.json_parts:
                raise RequestError(
                    f"the request body has more than {self.json_parts} objects, lists and strings, which are allowed; "
                    f"send less, or raise {OPTION} json_parts=N"
                )
            yield

    def require_members(self, members: Mapping[str, Any]) -> None:
        """Raises RequestError 400: the body has more fields than it may."""
        if len(members) > self.fields:
            raise RequestError(
                f"the request body has {len(members)} fields, and {self.fields} are allowed; send fewer, or raise "
                f"{OPTION} fields=N"
            )

    def require_fields(self, members: Mapping[str, Any]) -> None:
        """Raises RequestError 400: there are too many fields, or one has more entries than it may."""
        self.require_members(members)
        for name in _COUNTED:
            value = members.get(name)
            if isinstance(value, list | dict) and len(value) > (most := getattr(self, name)):
                raise self._too_many(name, f"{len(value)} entries", most)
        parts = _parts_of(members.get("messages"))
        if parts > self.message_parts:
            raise self._too_many("messages", f"{parts} parts and tool calls", self.message_parts, "message_parts")
        for name in ("stop", "bad_words"):
            value = members.get(name)
            size = sum(len(one) for one in (value if isinstance(value, list) else [value]) if isinstance(one, str))
            if size > (most := getattr(self, f"{name}_characters")):
                raise self._too_many(name, f"{size} characters", most, f"{name}_characters")

    def _too_many(self, field: str, has: str, most: int, name: str | None = None) -> RequestError:
        setting = f"{OPTION} {name or field}=N"
        return RequestError(f"{field} has {has}, and {most} are allowed; send fewer, or raise {setting}", param=field)


DEFAULTS = Limits()

_COUNTED = (
    "messages", "tools", "documents", "chat_template_kwargs", "stop", "stop_token_ids", "logit_bias",
    "allowed_token_ids", "bad_words",
)  # fmt: skip
_NAMES = tuple(field.name for field in fields(Limits))


def require_ids_fit(ids: memoryview, context: int | None) -> None:
    """``ids``: a flat JSON list of numbers. Raises RequestError 400: they are more than the context, if it is known.

    They are counted, not read: most lists that are too long are so by far.
    """
    if context is not None and len(ids) > 2 * context:  # a number and a comma each
        count = bytes(ids).count(b",") + 1
        if count > context:
            raise context_exceeded(context, count)


def not_an_object(error: Exception) -> RequestError:
    return RequestError(f"the request body is not a JSON object in UTF-8: {error}")


def _decoding(body: bytes) -> Iterator[None]:
    start = 0
    while start < len(body):
        yield
        end = start + _PIECE
        try:
            _, read = utf_8_decode(memoryview(body)[start:end], "strict", end >= len(body))
        except UnicodeDecodeError as error:
            at = start + error.start
            raise not_an_object(UnicodeDecodeError("utf-8", body, at, start + error.end, error.reason)) from None
        start += read


def _parts_of(messages: Any) -> int:
    if not isinstance(messages, list):
        return 0
    lists = (one.get(name) for one in messages if isinstance(one, dict) for name in ("content", "tool_calls"))
    return sum(len(one) for one in lists if isinstance(one, list))


def limits_of(given: Sequence[str]) -> Limits:
    """From ``NAME=N`` each. Raises SettingsError: there is no such limit, or the number is none."""
    changed = {}
    for text in given:
        name, _, number = text.partition("=")
        if name not in _NAMES:
            raise SettingsError(f"{OPTION} {text}: there is no limit {name!r}; there are {', '.join(_NAMES)}")
        if not number.isdecimal() or len(number) > 15 or int(number) < 1:
            raise SettingsError(f"{OPTION} {text}: {number!r} is not a positive whole number")
        changed[name] = int(number)
    return replace(Limits(), **changed)
