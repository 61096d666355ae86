"""What a prefill worker's answer says: the first token, the prompt's ids, and how the transfer stands.

The ids are never decoded: they go into the decode leg's body as they came.
"""

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from kvbelt.proxy import splice
from kvbelt.wire.handoff import HandoffState
from kvbelt.wire.json_body import JsonDecoder

_REPLACEMENT = "\ufffd"  # what a tokenizer says for an incomplete character
_NULL = msgspec.Raw(b"null")
_FLAT_LIST = re.compile(rb"\[\s*\d")


class _Message(msgspec.Struct, frozen=True):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct, frozen=True):
    text: str | None = None
    message: _Message | None = None
    finish_reason: str | None = None
    stop_reason: msgspec.Raw = _NULL
    token_ids: list[int] | None = None
    prompt_token_ids: msgspec.Raw = _NULL


class _Answer(msgspec.Struct, frozen=True):
    id: str
    created: int
    model: str
    choices: list[_Choice]
    usage: dict[str, Any]
    prompt_token_ids: msgspec.Raw = _NULL
    kv_transfer_params: HandoffState | None = None


def count_of(usage: Mapping[str, Any], name: str) -> int:
    """A count of a worker's usage; 0 where it has none.

    Raises:
        ValueError: it is no whole number.
    """
    count = usage.get(name, 0)
    if not isinstance(count, int):
        raise ValueError(f"usage.{name} is {str(count)[:64]}; it must be a whole number")  # noqa: TRY004 - of a message
    return count


_decoder: JsonDecoder[_Answer] = JsonDecoder(_Answer)


class PrefillAnswer:
    """One answer of a prefill leg.

    Attributes:
        prompt_token_ids: as a JSON list of at least one number; None if the worker did not send them.
        prompt_tokens: the prompt's length.
    """

    __slots__ = ("_answer", "_choice", "prompt_token_ids", "prompt_tokens")

    def __init__(self, body: bytes) -> None:
        """Parse.

        Raises:
            ValueError: not such an answer (msgspec's errors are ValueErrors).
        """
        cut = splice.cut_numbers(body, b"prompt_token_ids")
        if cut is None:
            self._answer = _decoder.decode(body)
        else:
            self._answer = _decoder.decode(cut[0])
        if not self._answer.choices:
            raise ValueError("an answer without a choice")
        self.prompt_tokens = count_of(self._answer.usage, "prompt_tokens")
        self._choice = self._answer.choices[0]
        ids = bytes(self._choice.prompt_token_ids)
        if ids == b"null":
            ids = bytes(self._answer.prompt_token_ids)
        if cut is not None and ids == splice.PLACEHOLDER:
            ids = cut[1]
        self.prompt_token_ids = ids if _FLAT_LIST.match(ids) else None

    @property
    def id(self) -> str:
        """The answer's id."""
        return self._answer.id

    @property
    def created(self) -> int:
        """Seconds since the epoch."""
        return self._answer.created

    @property
    def model(self) -> str:
        """The model's name."""
        return self._answer.model

    @property
    def usage(self) -> dict[str, Any]:
        """Token counts of this leg."""
        return self._answer.usage

    @property
    def handoff(self) -> HandoffState | None:
        """How the transfer stands."""
        return self._answer.kv_transfer_params

    @property
    def finish_reason(self) -> str | None:
        """``length`` unless the first token ended the answer."""
        return self._choice.finish_reason

    @property
    def stop_reason(self) -> bytes:
        """As JSON."""
        return bytes(self._choice.stop_reason)

    @property
    def text(self) -> str:
        """The first token's text."""
        message = self._choice.message
        return (message.content if message is not None else self._choice.text) or ""

    @property
    def token_id(self) -> int | None:
        """The first token's id."""
        ids = self._choice.token_ids
        return ids[0] if ids and len(ids) == 1 else None

    def why_not_fast(self) -> str | None:
        """The reason why the client cannot have this token as it is, or None."""
        if self.token_id is None or self.prompt_token_ids is None:
            return "no_token_ids"
        message = self._choice.message
        if message is not None and (message.reasoning or message.reasoning_content or message.tool_calls):
            return "parsed_message"
        if not self.text or self.text.endswith(_REPLACEMENT):
            return "incomplete_text"
        return None
