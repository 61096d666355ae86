"""A conversation as a chat template reads it.

Clients send what OpenAI's API allows, and what agents make of it: no content beside tool calls, arguments as JSON,
texts in parts, refusals. Templates know less: a text as content, arguments as objects. As in vLLM, missing content is
an empty text, parts are joined by line ends, and arguments that are no object are an empty one, since a conversation
with one such turn in its past must go on.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kvbelt.errors import RequestError
from kvbelt.wire.requests import ChatMessage, ChatRequest

#: Types of content parts that are text, and the member that has it.
_TEXT_IN: Mapping[str, str] = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}


def for_template(messages: Sequence[ChatMessage], template: str) -> list[dict[str, Any]]:
    """Raises RequestError 400: a part is no text, or a tool call is none."""
    # The role that has followed "system"; few templates know it.
    renamed = {} if "developer" in template else {"developer": "system"}
    return [{**_message(one), "role": renamed.get(one.role, one.role)} for one in messages]


def text_of(message: ChatMessage) -> str:
    """The message's content. Raises RequestError 400: a part is no text."""
    content = message.content
    if content is None:
        return message.refusal or ""
    if isinstance(content, str):
        return content
    texts = [part if isinstance(part, str) else _part(part) for part in content]
    return "\n".join(text for text in texts if text is not None)


def continued_text(request: ChatRequest) -> str:
    """The last message's text, where the answer continues that message and the client wants all of it."""
    last = request.messages[-1]
    role = "assistant" if request.add_generation_prompt else last.role
    return text_of(last) if request.echo and last.role == role else ""


def _part(part: Mapping[str, Any]) -> str | None:
    kind = part.get("type")
    member = _TEXT_IN.get(kind) if isinstance(kind, str) else None
    if member is None:
        raise RequestError(f"a message part has type {kind!r:.80}; only text parts are supported", param="messages")
    text = part.get(member)
    if text is not None and not isinstance(text, str):
        raise RequestError(f"a message part of type {kind!r} has no text in {member!r}; send one", param="messages")
    return text


def _message(message: ChatMessage) -> dict[str, Any]:
    made: dict[str, Any] = {"content": text_of(message)}
    for name in ("name", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            made[name] = value
    if message.role == "assistant":
        if message.tool_calls:
            made["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
        reasoning = message.reasoning_content if message.reasoning is None else message.reasoning
        if reasoning is not None:
            made |= {"reasoning": reasoning, "reasoning_content": reasoning}  # templates know either
    elif message.role == "developer" and message.tools is not None:
        made["tools"] = message.tools
    return made


def _tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if call.get("type", "function") != "function" or not isinstance(function, dict):
        raise RequestError(
            "a tool call of a message is not of type 'function' with a function; correct or leave it out",
            param="messages",
        )
    return {**call, "function": {**function, "arguments": _arguments(function.get("arguments"))}}


def _arguments(given: Any) -> dict[str, Any]:
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            return {}
    return given if isinstance(given, dict) else {}
