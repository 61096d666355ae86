"""OpenAI's answer shapes: whole answers and stream events, for completions and chat.

An answer's choices are numbered prompt by prompt: choice ``c`` of prompt ``p`` has index ``p * n + c``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any, ClassVar

import msgspec

from kvbelt.engine.api import FinishReason, Output, TokenLogprob, TopLogprob
from kvbelt.worker.tools import Call, Reader

_encode = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"


def event(body: dict[str, Any]) -> bytes:
    return b"data: " + _encode(body) + b"\n\n"


@dataclass(slots=True)
class AnswerChoice:
    index: int
    prompt_token_ids: tuple[int, ...]
    echoed: int = 0  #: characters that are shown before its text
    reader: Reader | None = None  #: of tool calls, where there may be some
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    last: Output | None = None
    said: str = ""  #: by the last output, without calls
    calls: Sequence[Call] = ()  #: that are complete since the last output

    def add(self, output: Output) -> None:
        self.text += output.text
        self.said = output.text
        if self.reader is not None:
            self.said, self.calls = self.reader.push(output.text, last=output.finish_reason is not None)
        self.token_ids.extend(output.token_ids)
        self.logprobs.extend(output.logprobs)
        self.prompt_logprobs = self.prompt_logprobs or output.prompt_logprobs
        self.last = output


def usage_of(choices: Sequence[AnswerChoice], n: int) -> dict[str, Any]:
    """Token counts; a prompt with ``n`` choices is counted once, cached tokens as its first choice found them."""
    prompt = sum(len(choice.prompt_token_ids) for choice in choices[::n])
    completion = sum(len(choice.token_ids) for choice in choices)
    cached = sum(one.last.timing.cached_tokens for one in choices[::n] if one.last is not None and one.last.timing)
    return {**_counts(prompt, completion), "prompt_tokens_details": {"cached_tokens": cached}}


def _counts(prompt: int, completion: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class StreamUsage(Enum):
    """Where a stream tells its token counts."""

    NONE = auto()
    LAST = auto()
    IN_EVERY_EVENT = auto()


@dataclass(frozen=True, slots=True)
class AnswerShape:
    """The common part of an answer's pieces. ``CHUNK`` is the ``object`` of a stream's events."""

    CHUNK: ClassVar[str]

    answer_id: str
    created: int
    model: str
    wants_logprobs: bool
    wants_token_ids: bool
    tokens_by_id: bool  #: tokens of logprobs are named by their ids
    usage: StreamUsage
    tool_is_named: bool  #: by the client, whose call is then no reason to finish

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.answer_id, "object": kind, "created": self.created, "model": self.model}

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The last event before ``[DONE]`` with ``include_usage``."""
        return {**self._head(self.CHUNK), "choices": [], "usage": usage}

    def _chunk(self, choice: AnswerChoice, body: dict[str, Any], *, generated: int | None = None) -> dict[str, Any]:
        """``generated``: the choice's tokens, if they are not all of it."""
        chunk = {**self._head(self.CHUNK), "choices": [body]}
        if self.usage is StreamUsage.LAST:
            chunk["usage"] = None
        elif self.usage is StreamUsage.IN_EVERY_EVENT:
            completion = len(choice.token_ids) if generated is None else generated
            chunk["usage"] = _counts(len(choice.prompt_token_ids), completion)
        return chunk


@dataclass(frozen=True, slots=True)
class CompletionShape(AnswerShape):
    CHUNK = "text_completion"

    def whole(self, choices: Sequence[AnswerChoice], echoes: Sequence[str], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer in one piece; ``echoes`` has one text a choice."""
        bodies = []
        for choice, echo in zip(choices, echoes, strict=True):
            assert choice.last is not None
            body = self._choice(choice, echo + choice.text, choice.last, choice.logprobs, choice.prompt_logprobs)
            if self.wants_token_ids:
                body["prompt_token_ids"] = choice.prompt_token_ids
                body["token_ids"] = choice.token_ids
            bodies.append(body)
        return {**self._head("text_completion"), "choices": bodies, "usage": usage}

    def opening(self, choice: AnswerChoice, echo: str) -> list[dict[str, Any]]:
        """Events before a choice's first output."""
        if not echo:
            return []
        logprobs = None
        if self.wants_logprobs:
            logprobs = _completion_logprobs(choice.prompt_logprobs, by_id=self.tokens_by_id)
        body = {"index": choice.index, "text": echo, "logprobs": logprobs, "finish_reason": None}
        if self.wants_token_ids:
            body |= {"prompt_token_ids": choice.prompt_token_ids, "token_ids": []}
        return [self._chunk(choice, body, generated=0)]

    def chunk(self, choice: AnswerChoice, output: Output) -> dict[str, Any] | None:
        body = self._choice(choice, output.text, output, output.logprobs)
        if self.wants_token_ids:
            begins = not choice.echoed and len(choice.token_ids) == len(output.token_ids)
            body["prompt_token_ids"] = choice.prompt_token_ids if begins else None
            body["token_ids"] = output.token_ids
        return self._chunk(choice, body)

    def _choice(
        self,
        choice: AnswerChoice,
        text: str,
        last: Output,
        answer: Sequence[TokenLogprob],
        prompt: Sequence[TokenLogprob] = (),
    ) -> dict[str, Any]:
        logprobs = None
        if self.wants_logprobs:
            moved = [replace(entry, offset=choice.echoed + entry.offset) for entry in answer]
            logprobs = _completion_logprobs((*prompt, *moved), by_id=self.tokens_by_id)
        return {
            "index": choice.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": last.finish_reason,
            "stop_reason": last.stop_reason,
        }


@dataclass(frozen=True, slots=True)
class ChatShape(AnswerShape):
    CHUNK = "chat.completion.chunk"

    def whole(self, choices: Sequence[AnswerChoice], echoes: Sequence[str], usage: dict[str, Any]) -> dict[str, Any]:
        bodies: list[dict[str, Any]] = []
        for choice, echo in zip(choices, echoes, strict=True):
            assert choice.last is not None
            body: dict[str, Any] = {
                "index": choice.index,
                "message": _message(choice, echo),
                "logprobs": _chat_logprobs(choice.logprobs, by_id=self.tokens_by_id) if self.wants_logprobs else None,
                "finish_reason": self._finish(choice, choice.last),
                "stop_reason": choice.last.stop_reason,
            }
            if self.wants_token_ids:
                body["token_ids"] = choice.token_ids
            bodies.append(body)
        answer = {**self._head("chat.completion"), "choices": bodies, "usage": usage}
        if self.wants_token_ids:
            answer["prompt_token_ids"] = choices[0].prompt_token_ids
        return answer

    def _finish(self, choice: AnswerChoice, output: Output) -> str | None:
        called = choice.reader is not None and choice.reader.calls
        if called and output.finish_reason is FinishReason.STOP and not self.tool_is_named:
            return "tool_calls"
        return output.finish_reason

    def opening(self, choice: AnswerChoice, echo: str) -> list[dict[str, Any]]:
        """The role, and the last message's text where it is continued and wanted."""
        deltas = [{"role": "assistant", "content": ""}, *([{"content": echo}] if echo else [])]
        events = [
            self._chunk(
                choice, {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}, generated=0
            )
            for delta in deltas
        ]
        if self.wants_token_ids:
            events[0]["prompt_token_ids"] = choice.prompt_token_ids
        return events

    def chunk(self, choice: AnswerChoice, output: Output) -> dict[str, Any] | None:
        """None: what has come is held back, since it may be a call."""
        delta: dict[str, Any] = {"content": choice.said} if choice.said else {}
        if choice.calls:
            assert choice.reader is not None
            first = len(choice.reader.calls) - len(choice.calls)
            delta["tool_calls"] = [{"index": first + i, **_call(call)} for i, call in enumerate(choice.calls)]
        if output.text and not (delta or output.logprobs or output.finish_reason or self.wants_token_ids):
            return None
        body: dict[str, Any] = {
            "index": choice.index,
            "delta": delta,
            "logprobs": _chat_logprobs(output.logprobs, by_id=self.tokens_by_id)
            if self.wants_logprobs and output.logprobs
            else None,
            "finish_reason": self._finish(choice, output),
        }
        if output.finish_reason is not None:
            body["stop_reason"] = output.stop_reason
        if self.wants_token_ids:
            body["token_ids"] = output.token_ids
        return self._chunk(choice, body)


def _message(choice: AnswerChoice, echo: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": echo + choice.text}
    if choice.reader is not None:
        message["content"] = echo + choice.reader.content
        if choice.reader.calls:
            message["content"] = message["content"] or None
            message["tool_calls"] = [_call(call) for call in choice.reader.calls]
    return message


def _call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


_LEAST = -9999.0  #: stands for minus infinity, which JSON does not have; as in vLLM


def _by_id(token_id: int) -> str:
    return f"token_id:{token_id}"


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _LEAST)


def _completion_logprobs(entries: Sequence[TokenLogprob], *, by_id: bool) -> dict[str, Any]:
    return {
        "tokens": [_by_id(entry.token_id) if by_id else entry.token for entry in entries],
        "token_logprobs": [_finite(entry.logprob) for entry in entries],
        "top_logprobs": [None if entry.logprob is None else _alternatives(entry, by_id=by_id) for entry in entries],
        "text_offset": [entry.offset for entry in entries],
    }


def _alternatives(entry: TokenLogprob, *, by_id: bool) -> dict[str, float | None]:
    """By text. If several have one text, it is the chosen token's or else the best one's; others show their ids."""
    both: tuple[TopLogprob | TokenLogprob, ...] = (*entry.top, entry)
    names = {} if by_id else {entry.token: entry.token_id}
    found: dict[str, float | None] = {}
    for one in both:
        name = _by_id(one.token_id) if by_id or names.setdefault(one.token, one.token_id) != one.token_id else one.token
        found[name] = _finite(one.logprob)
    return found


def _chat_logprobs(entries: Sequence[TokenLogprob], *, by_id: bool) -> dict[str, Any]:
    def one(entry: TokenLogprob | TopLogprob) -> dict[str, Any]:
        return {
            "token": _by_id(entry.token_id) if by_id else entry.token,
            "logprob": _finite(entry.logprob),
            "bytes": None if entry.data is None else list(entry.data),
        }

    return {"content": [{**one(entry), "top_logprobs": [one(other) for other in entry.top]} for entry in entries]}
