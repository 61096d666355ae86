"""From the bytes that a client got to an answer, an error, or the finding that they are neither. Pure.

Nothing is excused here: an event that is no JSON, an error without OpenAI's body or a choice that never ended is
told as what it is.
"""

import json
from dataclasses import dataclass, field
from typing import Any


class MalformedError(ValueError):
    """What came is not in OpenAI's shape. The message says what is wrong, and with which bytes."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What must be the same, whoever answers: texts, ids and ends of every choice, and the usage."""

    texts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    finish_reasons: tuple[str | None, ...]
    usage: tuple[int, int] | None  #: prompt and completion tokens


@dataclass(slots=True)
class Streamed:
    """What a stream has told, to its end or not."""

    texts: dict[int, str] = field(default_factory=dict)
    token_ids: dict[int, list[int]] = field(default_factory=dict)
    ends: dict[int, str] = field(default_factory=dict)
    usage: tuple[int, int] | None = None
    error: str | None = None  #: of an error event
    done: bool = False  #: ``[DONE]`` came

    def answer(self) -> Answer:
        """As a whole answer would tell it; of a stream that broke off, as far as it came."""
        order = range(max([*self.texts, *self.token_ids, *self.ends], default=-1) + 1)
        return Answer(
            tuple(self.texts.get(i, "") for i in order),
            tuple(tuple(self.token_ids.get(i, ())) for i in order),
            tuple(self.ends.get(i) for i in order),
            self.usage,
        )


def read_whole(raw: bytes) -> Answer:
    """An answer with status 200 that was not streamed.

    Raises:
        MalformedError: it is none.
    """
    body = _json(raw)
    try:
        choices = body["choices"]
        return Answer(
            tuple(c["message"]["content"] if "message" in c else c["text"] for c in choices),
            tuple(tuple(c["token_ids"]) for c in choices),
            tuple(c["finish_reason"] for c in choices),
            _usage(body["usage"]),
        )
    except (KeyError, TypeError) as error:
        raise MalformedError(f"not an answer ({error!r}): {raw[:300]!r}") from None


def read_error(raw: bytes) -> str:
    """What an error with another status says: its type, and why if it says so.

    Raises:
        MalformedError: it has not OpenAI's body.
    """
    return _error_of(_json(raw), raw)


def read_stream(raw: bytes) -> Streamed:
    """Everything that came of a stream with status 200. An event that was cut off in the middle is left out.

    Raises:
        MalformedError: an event is not what OpenAI's are, something follows ``[DONE]``, or a choice ends twice.
    """
    told = Streamed()
    for event in raw.split(b"\n\n")[:-1]:
        if event.startswith(b":"):  # a comment
            continue
        if told.done:
            raise MalformedError(f"something follows [DONE]: {event[:300]!r}")
        if event == b"data: [DONE]":
            told.done = True
        elif event.startswith(b"data: "):
            _take(told, event)
        else:
            raise MalformedError(f"not an event: {event[:300]!r}")
    return told


def _take(told: Streamed, event: bytes) -> None:
    body = _json(event.removeprefix(b"data: "))
    if "error" in body:
        told.error = _error_of(body, event)
        return
    try:
        if body.get("usage"):
            told.usage = _usage(body["usage"])
        for choice in body["choices"]:
            index = choice["index"]
            text = choice["delta"].get("content") if "delta" in choice else choice["text"]
            told.texts[index] = told.texts.get(index, "") + (text or "")
            told.token_ids.setdefault(index, []).extend(choice.get("token_ids") or ())
            if choice["finish_reason"] is not None:
                if index in told.ends:
                    raise MalformedError(f"choice {index} ends twice: {event[:300]!r}")
                told.ends[index] = choice["finish_reason"]
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
