"""OpenAI's answer shapes, for what the proxy says itself: first events, re-wrapped events, merged answers, errors.

Shapes are the workers' own (as one server would have sent them). Text stays raw JSON wherever it only passes
through.
"""

import re
from typing import Any

import msgspec

from kvbelt.proxy.prefill_answer import PrefillAnswer, count_of
from kvbelt.wire.json_body import JsonDecoder

DONE = b"data: [DONE]\n\n"
JSON = (b"content-type", b"application/json")
EVENT_STREAM = (b"content-type", b"text/event-stream; charset=utf-8")

_encode = msgspec.json.Encoder().encode
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_CREATED = re.compile(rb'"created"\s*:\s*(\d+)')
_NULL = msgspec.Raw(b"null")


def error_body(
    message: str,
    *,
    kind: str = "invalid_request_error",
    param: str | None = None,
    code: int | str | None = None,
    reason: str | None = None,
) -> bytes:
    """OpenAI's error object. ``reason``, of ``wire/reasons.py``, is ours, and there only where it says something."""
    error = {"message": message, "type": kind, "param": param, "code": code}
    return _encode({"error": error if reason is None else error | {"reason": reason}})


def error_event(body: bytes) -> bytes:
    """An error inside a stream, and the end of the stream. ``body`` is an error object."""
    return b"data: " + body.replace(b"\n", b" ") + b"\n\n" + DONE


class _Choice(msgspec.Struct, frozen=True):
    text: msgspec.Raw = msgspec.Raw(b'""')
    finish_reason: msgspec.Raw = _NULL
    stop_reason: msgspec.Raw = _NULL
    token_ids: msgspec.Raw = _NULL


class _Event(msgspec.Struct, frozen=True):
    choices: list[_Choice] = []
    usage: dict[str, Any] | None = None
    error: msgspec.Raw = _NULL


class _Continuation(msgspec.Struct, frozen=True):
    choices: list["_WholeChoice"]
    usage: dict[str, Any]


class _WholeChoice(msgspec.Struct, frozen=True):
    text: str
    finish_reason: str | None = None
    stop_reason: msgspec.Raw = _NULL
    token_ids: list[int] | None = None


_event: JsonDecoder[_Event] = JsonDecoder(_Event)
_continuation: JsonDecoder[_Continuation] = JsonDecoder(_Continuation)


class Seam:
    """Joins a prefill worker's first token and a decode worker's continuation into one answer.

    Args:
        first: the prefill leg's answer.
        chat: whether the client asked for a chat completion.
        include_usage: whether its stream ends with a usage event.
        token_ids: whether it asked for token ids.
    """

    __slots__ = ("_chat", "_created", "_fields", "_first", "_include_usage", "_token_ids")

    def __init__(self, first: PrefillAnswer, *, chat: bool, include_usage: bool, token_ids: bool) -> None:
        self._first = first
        self._chat = chat
        self._include_usage = include_usage
        self._token_ids = token_ids
        self._created: bytes | None = None  # the decode worker's, once seen, if it is another
        kind = b"chat.completion.chunk" if chat else b"text_completion"
        self._fields = b'{"id":%b,"object":"%b","created":%d,"model":%b,"choices":[' % (
            _encode(first.id), kind, first.created, _encode(first.model),
        )  # fmt: skip

    # Streaming

    def opening(self, finish_reason: str | None) -> bytes:
        """The first token's events; ``finish_reason`` if it is also the last."""
        first = self._first
        events = b""
        if self._chat:
            role = b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
            events = self._chunk(role)
        return events + self._chunk(
            self._choice(
                _encode(first.text),
                _encode(finish_reason),
                first.stop_reason if finish_reason == "stop" else b"null",
                b"[%d]" % (first.token_id or 0),
            )
        )

    def ending(self, completion_tokens: int = 1) -> bytes:
        """Usage if it was asked for, and the end: for a stream that no decode worker continues."""
        return (self._usage_chunk({"completion_tokens": completion_tokens}) if self._include_usage else b"") + DONE

    def relayed(self, events: bytes) -> bytes:
        """Whole events of the decode worker, as the client is to see them.

        Raises:
            ValueError: one of them is not a completion's.
        """
        if self._chat or self._token_ids:
            return b"".join(map(self._rewrapped, events.split(b"\n\n")[:-1]))
        if self._created is None:
            found = _CREATED.search(events)
            self._created = b"" if found is None or int(found[1]) == self._first.created else found[0]
        if self._created:
            events = events.replace(self._created, b'"created":%d' % self._first.created)
        if self._include_usage and _USAGE.search(events):
            return b"".join(
                self._rewrapped(event) if _USAGE.search(event) else event + b"\n\n"
                for event in events.split(b"\n\n")[:-1]
            )
        return events

    def _rewrapped(self, event: bytes) -> bytes:
        data = event.removeprefix(b"data:").strip()
        if not event.startswith(b"data:") or data == b"[DONE]":
            return event + b"\n\n"
        parsed = _event.decode(data)
        if bytes(parsed.error) != b"null":
            return event + b"\n\n"
        if parsed.usage is not None and not parsed.choices:
            return self._usage_chunk(parsed.usage, extra=1)
        return b"".join(
            self._chunk(self._choice(*(bytes(raw) for raw in (c.text, c.finish_reason, c.stop_reason, c.token_ids))))
            for c in parsed.choices
        )

    def _choice(self, text: bytes, finish_reason: bytes, stop_reason: bytes, token_ids: bytes) -> bytes:
        if self._chat:
            delta = b'{"content":%b}' % text if text != b'""' else b"{}"
            stop = b"" if finish_reason == b"null" else b',"stop_reason":%b' % stop_reason
            ids = b',"token_ids":%b' % token_ids if self._token_ids else b""
            return b'{"index":0,"delta":%b,"logprobs":null,"finish_reason":%b%b%b}' % (delta, finish_reason, stop, ids)
        ids = b',"prompt_token_ids":null,"token_ids":%b' % token_ids if self._token_ids else b""
        return b'{"index":0,"text":%b,"logprobs":null,"finish_reason":%b,"stop_reason":%b%b}' % (
            text, finish_reason, stop_reason, ids,
        )  # fmt: skip

    def _chunk(self, choice: bytes) -> bytes:
        usage = b',"usage":null' if self._include_usage else b""
        return b"data: " + self._fields + choice + b"]" + usage + b"}\n\n"

    def _usage_chunk(self, usage: dict[str, Any], *, extra: int = 0) -> bytes:
        return b"data: " + self._fields + b'],"usage":' + _encode(self._usage(usage, extra)) + b"}\n\n"

    # Whole answers

    def whole(self, continuation: bytes | None, finish_reason: str | None = None) -> bytes:
        """One JSON answer. ``continuation`` is the decode worker's; None if the first token was the last.

        Raises:
            ValueError: the continuation is not a completion (msgspec's errors are ValueErrors).
        """
        first = self._first
        text, ids = first.text, [first.token_id]
        stop_reason = first.stop_reason if finish_reason == "stop" else b"null"
        usage = self._usage({"completion_tokens": 1}, 0)
        if continuation is not None:
            parsed = _continuation.decode(continuation)
            if not parsed.choices:
                raise ValueError("an answer without a choice")
            choice = parsed.choices[0]
            text += choice.text
            ids += choice.token_ids or []
            finish_reason, stop_reason = choice.finish_reason, bytes(choice.stop_reason)
            usage = self._usage(parsed.usage, 1)
        body: dict[str, Any] = {"index": 0}
        if self._chat:
            body["message"] = {"role": "assistant", "content": text}
        else:
            body["text"] = text
        body |= {"logprobs": None, "finish_reason": finish_reason, "stop_reason": msgspec.Raw(stop_reason)}
        prompt_ids = {"prompt_token_ids": msgspec.Raw(first.prompt_token_ids or b"null")} if self._token_ids else {}
        if self._token_ids:
            body["token_ids"] = ids
        kind = "chat.completion" if self._chat else "text_completion"
        answer: dict[str, Any] = {"id": first.id, "object": kind, "created": first.created, "model": first.model}
        if self._chat:
            answer |= {"choices": [body], "usage": usage} | prompt_ids
        else:
            answer |= {"choices": [body | prompt_ids], "usage": usage}
        return _encode(answer)

    def _usage(self, usage: dict[str, Any], extra: int) -> dict[str, Any]:
        # The prompt's counts, its cached tokens included, are the prefill worker's; the rest is the decode worker's.
        counts = self._first.usage | usage
        completion = count_of(usage, "completion_tokens") + extra
        counts["prompt_tokens"] = self._first.prompt_tokens
        counts["completion_tokens"] = completion
        counts["total_tokens"] = self._first.prompt_tokens + completion
        if "prompt_tokens_details" in self._first.usage:
            counts["prompt_tokens_details"] = self._first.usage["prompt_tokens_details"]
        return counts
