"""OpenAI's answer shapes for what the proxy writes itself: first events, re-wrapped events, merged answers, errors.

Shapes are those of one server's answer. Text that is only passed on stays raw JSON.
"""

import re
from typing import Any

import msgspec

from kvbelt.proxy.request import splice
from kvbelt.proxy.request.prefill_answer import Members, PrefillAnswer
from kvbelt.proxy.request.usage import DETAILS, count_of
from kvbelt.wire.json_body import JsonDecoder

DONE = b"data: [DONE]\n\n"
EVENT_STREAM = (b"content-type", b"text/event-stream; charset=utf-8")

_encode = msgspec.json.Encoder().encode
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_CREATED = re.compile(rb'"created"\s*:\s*(\d+)')
_NULL = msgspec.Raw(b"null")


def error_event(body: bytes) -> bytes:
    """An error inside a stream, and the end of the stream. ``body`` is an error object."""
    return b"data: " + body.replace(b"\n", b" ") + b"\n\n" + DONE


def _fingerprint(value: bytes) -> bytes:
    return b"" if value == b"null" else b',"system_fingerprint":%b' % value


def excerpt(body: bytes) -> str:
    return body[:200].decode("utf-8", "replace")


class _Choice(msgspec.Struct, frozen=True):
    text: msgspec.Raw = msgspec.Raw(b'""')
    finish_reason: msgspec.Raw = _NULL
    stop_reason: msgspec.Raw = _NULL
    token_ids: msgspec.Raw = _NULL


class _Event(msgspec.Struct, frozen=True):
    choices: list[_Choice] = []
    usage: dict[str, Any] | None = None
    error: msgspec.Raw = _NULL
    system_fingerprint: msgspec.Raw = _NULL


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


class FirstTokenMerger:
    """Merges a prefill worker's first token and a decode worker's continuation into one answer.

    Args:
        first: the prefill worker's answer.
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
        self._created: bytes | None = None  # the decode worker's creation time, if it differs; b"": it does not
        kind = b"chat.completion.chunk" if chat else b"text_completion"
        self._fields = b'{"id":%b,"object":"%b","created":%d,"model":%b,"choices":[' % (
            _encode(first.id), kind, first.created, _encode(first.model),
        )  # fmt: skip

    # Streaming

    def opening(self, finish_reason: str | None) -> bytes:
        """The first token's events, with the ``finish_reason`` if it is also the last token."""
        first, events = self._first, b""
        prompt_ids = bytes((self._token_ids and first.prompt_token_ids) or b"null")
        if self._chat:
            role = b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
            events = self._chunk(
                role, b',"prompt_token_ids":%b' % prompt_ids if first.writes_nulls or self._token_ids else b""
            )
            if first.has_prompt_text:
                events = events[:-3] + b',"prompt_text":null}\n\n'
        choice = self._choice(
            _encode(first.text),
            _encode(finish_reason),
            first.stop_reason if finish_reason == "stop" else b"null",
            b"[%d]" % (first.token_id or 0),
            prompt_ids,
        )
        last = finish_reason is not None and not self._include_usage
        return events + self._chunk(choice, _fingerprint(first.fingerprint) if last else b"")

    def ending(self) -> bytes:
        """The usage, if it was asked for, and the end of a stream that no decode worker continues."""
        if not self._include_usage:
            return DONE
        return self._usage_chunk({"completion_tokens": 1}, fingerprint=self._first.fingerprint) + DONE

    def relayed(self, events: bytes) -> bytes:
        """Whole events of the decode worker, in the client's shape.

        Raises:
            ValueError: an event is not a completion's.
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
            return self._usage_chunk(parsed.usage, extra=1, fingerprint=bytes(parsed.system_fingerprint))
        more = _fingerprint(bytes(parsed.system_fingerprint))
        return b"".join(
            self._chunk(
                self._choice(*(bytes(raw) for raw in (c.text, c.finish_reason, c.stop_reason, c.token_ids))), more
            )
            for c in parsed.choices
        )

    def _choice(
        self, text: bytes, finish_reason: bytes, stop_reason: bytes, token_ids: bytes, prompt_ids: bytes = b"null"
    ) -> bytes:
        nulls = self._first.writes_nulls
        shown = token_ids if self._token_ids else b"null" if nulls else None
        if self._chat:
            delta = b'{"content":%b}' % text if nulls or text != b'""' else b"{}"
            stop = b"" if finish_reason == b"null" else b',"stop_reason":%b' % stop_reason
            ids = b"" if shown is None else b',"token_ids":%b' % shown
            return b'{"index":0,"delta":%b,"logprobs":null,"finish_reason":%b%b%b}' % (delta, finish_reason, stop, ids)
        ids = b"" if shown is None else b',"prompt_token_ids":%b,"token_ids":%b' % (prompt_ids, shown)
        return b'{"index":0,"text":%b,"logprobs":null,"finish_reason":%b,"stop_reason":%b%b}' % (
            text, finish_reason, stop_reason, ids,
        )  # fmt: skip

    def _chunk(self, choice: bytes, more: bytes = b"") -> bytes:
        usage = b',"usage":null' if self._include_usage and not self._first.writes_nulls else b""
        return b"data: " + self._fields + choice + b"]" + usage + more + b"}\n\n"

    def _usage_chunk(self, usage: dict[str, Any], *, extra: int = 0, fingerprint: bytes = b"null") -> bytes:
        counts = {name: value for name, value in self._usage(usage, extra).items() if value is not None}
        return b"".join((b"data: ", self._fields, b'],"usage":', _encode(counts), _fingerprint(fingerprint), b"}\n\n"))

    # Whole answers

    def whole(self, continuation: bytes | None, finish_reason: str | None = None) -> bytes:
        """One JSON answer. ``continuation`` is the decode worker's; None if the first token was the last.

        Raises:
            ValueError: the continuation is not a completion (msgspec's errors are ValueErrors).
        """
        first = self._first
        # What the two do not tell together is the prefill worker's: it answered the client's own request.
        answer, choice, message = first.members()
        text, ids = first.text, [first.token_id]
        stop_reason = first.stop_reason if finish_reason == "stop" else b"null"
        usage = self._usage({"completion_tokens": 1}, 0)
        if continuation is not None:
            parsed = _continuation.decode(continuation)
            if not parsed.choices:
                raise ValueError("an answer without a choice")
            more = parsed.choices[0]
            text += more.text
            ids += more.token_ids or []
            finish_reason, stop_reason = more.finish_reason, bytes(more.stop_reason)
            usage = self._usage(parsed.usage, 1)
        if self._chat:
            message["content"] = _encode(text)
            choice["message"] = splice.object_of(message)
        else:
            choice["text"] = _encode(text)
        choice |= {"finish_reason": _encode(finish_reason), "stop_reason": stop_reason}
        asked = self._token_ids
        self._set(choice, "token_ids", _encode(ids) if asked else None)
        prompt_ids = bytes(first.prompt_token_ids or b"null")
        self._set(answer if self._chat else choice, "prompt_token_ids", prompt_ids if asked else None)
        self._set(answer, "kv_transfer_params", None)
        answer |= {"choices": b"[" + splice.object_of(choice) + b"]", "usage": _encode(usage)}
        return splice.object_of(answer)

    def _set(self, members: Members, name: str, value: bytes | None) -> None:
        """Set a member, or what such a worker writes of it without a value."""
        if value is not None:
            members[name] = value
        elif self._first.writes_nulls and name in members:
            members[name] = b"null"
        else:
            members.pop(name, None)

    def _usage(self, usage: dict[str, Any], extra: int) -> dict[str, Any]:
        # The prompt's counts, its cached tokens included, are the prefill worker's; the rest is the decode worker's.
        counts = self._first.usage | usage
        completion = count_of(usage, "completion_tokens") + extra
        counts["prompt_tokens"] = self._first.prompt_tokens
        counts["completion_tokens"] = completion
        counts["total_tokens"] = self._first.prompt_tokens + completion
        if DETAILS in counts:
            counts[DETAILS] = self._first.usage.get(DETAILS)
        return counts
