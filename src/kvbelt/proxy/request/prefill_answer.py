"""A prefill worker's answer: the first token, the prompt's ids, and the state of the transfer.

The ids are never decoded: they go into the decode call's body as they came.
"""

import re
from typing import Any

import msgspec

from kvbelt.proxy.request import splice
from kvbelt.proxy.request.usage import count_of
from kvbelt.wire.handoff import HandoffState
from kvbelt.wire.json_body import PLACEHOLDER, JsonDecoder, cut_numbers

_REPLACEMENT = "\ufffd"  # a tokenizer's output for an incomplete character
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
    routed_experts: msgspec.Raw = _NULL


class _Answer(msgspec.Struct, frozen=True):
    id: str
    created: int
    model: str
    choices: list[_Choice]
    usage: dict[str, Any]
    prompt_token_ids: msgspec.Raw = _NULL
    kv_transfer_params: HandoffState | None = None
    system_fingerprint: str | msgspec.UnsetType | None = msgspec.UNSET
    prompt_text: str | msgspec.UnsetType | None = msgspec.UNSET


_decoder: JsonDecoder[_Answer] = JsonDecoder(_Answer)
_choices = JsonDecoder[list[msgspec.Raw]](list[msgspec.Raw])

Members = dict[str, splice.Value]


class PrefillAnswer:
    """One answer to a prefill call.

    Attributes:
        prompt_token_ids: a JSON list of at least one number; None if the worker sent none.
        prompt_tokens: the prompt's length.
        usage: the worker's token counts.
        handoff: the state of the transfer.
        finish_reason: ``length`` unless the first token ended the answer.
        stop_reason: as JSON.
        text, token_id: the first token.
        routed: it tells which experts computed which token, which no two workers' answers tell together.
        writes_nulls: the worker is a vLLM server, which writes fields that have no value.
        fingerprint: of a vLLM server, as JSON.
        has_prompt_text: its chats have a field for the rendered prompt.
    """

    __slots__ = (
        "_message", "_rest", "created", "fingerprint", "finish_reason", "handoff", "has_prompt_text", "id", "model",
        "prompt_token_ids", "prompt_tokens", "routed", "stop_reason", "text", "token_id", "usage", "writes_nulls",
    )  # fmt: skip

    def __init__(self, body: bytes) -> None:
        """Parse. Raises ValueError: not such an answer (msgspec's errors are ValueErrors)."""
        cut = cut_numbers(body, b"prompt_token_ids")
        self._rest = body if cut is None else cut[0]
        answer = _decoder.decode(self._rest)
        if not answer.choices:
            raise ValueError("an answer without a choice")
        choice = answer.choices[0]
        self.id, self.created, self.model = answer.id, answer.created, answer.model
        self.usage, self.handoff = answer.usage, answer.kv_transfer_params
        self.writes_nulls = answer.system_fingerprint is not msgspec.UNSET
        self.fingerprint = msgspec.json.encode(answer.system_fingerprint) if self.writes_nulls else b"null"
        self.has_prompt_text = answer.prompt_text is not msgspec.UNSET
        self.routed = bytes(choice.routed_experts) != b"null"
        self.prompt_tokens = count_of(answer.usage, "prompt_tokens")
        ids: bytes | memoryview = bytes(choice.prompt_token_ids)
        if ids == b"null":
            ids = bytes(answer.prompt_token_ids)
        if cut is not None and ids == PLACEHOLDER:
            ids = cut[1]
        self.prompt_token_ids = ids if _FLAT_LIST.match(ids) else None
        self.finish_reason, self.stop_reason = choice.finish_reason, bytes(choice.stop_reason)
        message = self._message = choice.message
        self.text = (message.content if message is not None else choice.text) or ""
        self.token_id = choice.token_ids[0] if choice.token_ids and len(choice.token_ids) == 1 else None

    def members(self) -> tuple[Members, Members, Members]:
        """The answer's members, those of its choice, and those of the choice's message, if it has one. Yours."""
        answer = splice.members_of(self._rest)
        choice = splice.members_of(_choices.decode(answer["choices"])[0])
        return answer, choice, splice.members_of(choice["message"]) if "message" in choice else {}

    def why_not_fast(self, *, streams: bool) -> str | None:
        """Why the client cannot have this token as it is; None: it can.

        ``streams``: the client's answer does. vLLM's parsers may take a whole answer otherwise than a streamed one.
        """
        if self.token_id is None or self.prompt_token_ids is None:
            return "no_token_ids"
        if self.handoff is not None and self.handoff.media:
            return "media"
        message = self._message
        if message is not None and (message.reasoning or message.reasoning_content or message.tool_calls):
            return "parsed_message"
        reasoning = "none" if self.handoff is None or message is None else self.handoff.reasoning
        if reasoning == "open" or (reasoning == "ended" and not streams):
            return "parsed_message"
        if not self.text or self.text.endswith(_REPLACEMENT):
            return "incomplete_text"
        return None
