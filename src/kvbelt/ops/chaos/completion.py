"""Parses the bytes that a client got into a completion or an error. Pure.

The parser is strict: an event that is not JSON, an error without OpenAI's body, or a choice that ends twice is
malformed.
"""

import json
from dataclasses import dataclass, field
from typing import Any


class MalformedError(ValueError):
    """A response is not in OpenAI's format. The message says what is wrong, and quotes the bytes."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What must be equal on every path: texts, token ids and finish reasons of all choices, and the usage."""

    texts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    finish_reasons: tuple[str | None, ...]
    usage: tuple[int, int] | None  #: prompt and completion tokens


@dataclass(slots=True)
class StreamedCompletion:
    """What a stream has delivered so far."""

    texts: dict[int, str] = field(default_factory=dict)
    token_ids: dict[int, list[int]] = field(default_factory=dict)
    ends: dict[int, str] = field(default_factory=dict)
    usage: tuple[int, int] | None = None
    error: str | None = None  #: from an error event
    done: bool = False  #: ``[DONE]`` came

    def answer(self) -> Completion:
        """As a whole completion; of a broken stream, the part that came."""
        order = range(max([*self.texts, *self.token_ids, *self.ends], default=-1) + 1)
        return Completion(
            tuple(self.texts.get(i, "") for i in order),
            tuple(tuple(self.token_ids.get(i, ())) for i in order),
            tuple(self.ends.get(i) for i in order),
            self.usage,
        )


def read_whole(raw: bytes) -> Completion:
    """Parse a response with status 200 that was not streamed.

    Raises:
        MalformedError: it is not a completion.
    """
    body = _json(raw)
    try:
        choices = body["choices"]
        return Completion(
            tuple(c["message"]["content"] if "message" in c else c["text"] for c in choices),
            tuple(tuple(c["token_ids"]) for c in choices),
            tuple(c["finish_reason"] for c in choices),
            _usage(body["usage"]),
        )
    except (KeyError, TypeError) as error:
        raise MalformedError(f"not an answer ({error!r}): {raw[:300]!r}") from None


def read_error(raw: bytes) -> str:
    """The type of an error response, and its reason if there is one.

    Raises:
        MalformedError: it lacks OpenAI's error body.
    """
    return _error_of(_json(raw), raw)


def read_stream(raw: bytes) -> StreamedCompletion:
    """Parse what came of a stream with status 200. A cut-off last event is ignored.

    Raises:
        MalformedError: an event is not in OpenAI's format, something follows ``[DONE]``, or a choice ends twice.
    """
    stream = StreamedCompletion()
    for event in raw.split(b"\n\n")[:-1]:
        if event.startswith(b":"):
            continue
        if stream.done:
            raise MalformedError(f"something follows [DONE]: {event[:300]!r}")
        if event == b"data: [DONE]":
            stream.done = True
        elif event.startswith(b"data: "):
            _add_event(stream, event)
        else:
            raise MalformedError(f"not an event: {event[:300]!r}")
    return stream


def _add_event(stream: StreamedCompletion, event: bytes) -> None:
    body = _json(event.removeprefix(b"data: "))
    if "error" in body:
        stream.error = _error_of(body, event)
        return
    try:
        if body.get("usage"):
            stream.usage = _usage(body["usage"])
        for choice in body["choices"]:
            index = choice["index"]
            text = choice["delta"].get("content") if "delta" in choice else choice["text"]
            stream.texts[index] = stream.texts.get(index, "") + (text or "")
            stream.token_ids.setdefault(index, []).extend(choice.get("token_ids") or ())
            if choice["finish_reason"] is not None:
                if index in stream.ends:
                    raise MalformedError(f"choice {index} ends twice: {event[:300]!r}")
                stream.ends[index] = choice["finish_reason"]
    except (KeyError, TypeError) as error:
        raise MalformedError(f"not a chunk ({error!r}): {event[:300]!r}") from None


def _json(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
    except ValueError as error:
        raise MalformedError(f"not JSON ({error}): {raw[:300]!r}") from None
    if not isinstance(body, dict):
        raise MalformedError(f"not a JSON object: {raw[:300]!r}")
    return body


def _error_of(body: dict[str, Any], raw: bytes) -> str:
    error = body.get("error")
    if not isinstance(error, dict) or not isinstance(error.get("message"), str) or not error["message"]:
        raise MalformedError(f"an error without OpenAI's body: {raw[:300]!r}")
    kind, reason = error.get("type") or "error", error.get("reason")
    return f"{kind} ({reason})" if reason else str(kind)


def _usage(usage: dict[str, Any]) -> tuple[int, int]:
    return usage["prompt_tokens"], usage["completion_tokens"]
