"""Client requests (``wire/requests.py``), parsed once.

A field of the wrong type is an error that names it; types are as lenient as vLLM's (``wire/lenient.py``). An unknown
field is ignored, as OpenAI's servers and clients expect. A known field (``wire/fields.py``) that this engine cannot
honour is refused.
"""

import re
from collections.abc import Mapping
from math import inf
from typing import Any, TypeVar, cast

import msgspec

from kvbelt.errors import RequestError
from kvbelt.limits import DEFAULTS, Limits, require_ids_fit
from kvbelt.wire.fields import INSTEAD, refused
from kvbelt.wire.handoff import Handoff, handoff_of
from kvbelt.wire.json_body import PLACEHOLDER, JsonDecoder, cut_numbers
from kvbelt.wire.lenient import fields_relaxed
from kvbelt.wire.requests import ChatRequest, CompletionRequest

#: The place of an error in msgspec's text: ``$.stop[...]`` → ``stop``.
_PLACE = re.compile(r" - at `\$\.?([^`\[.]*)[^`]*`$")
_MISSING = re.compile(r"Object missing required field `(\w+)`\Z")

ITL_HEADER = "x-kvbelt-itl-ms"  #: the level between tokens that the proxy wants for a request

MAX_LOGPROBS = 20  #: OpenAI's limit
MAX_CHOICES = 128  #: likewise

T = TypeVar("T", CompletionRequest, ChatRequest)

_members = JsonDecoder[dict[str, Any]](dict[str, Any])
_token_ids = JsonDecoder[list[int]](list[int])
_PLACEHOLDER = msgspec.json.decode(PLACEHOLDER)


def _decode(shape: type[T], body: bytes, limits: Limits, context: int | None) -> T:
    """The request, once it asks for nothing that this engine does not compute."""
    ids: list[int] | None = None
    try:
        members, numbers = _taken_apart(body, limits) if shape is CompletionRequest else (_members.decode(body), None)
        limits.require_fields(members)
        if numbers is not None:
            if members.get("truncate_prompt_tokens") is None:
                require_ids_fit(numbers, context)
            try:
                ids = _token_ids.decode(numbers)
            except msgspec.ValidationError:
                members["prompt"] = msgspec.json.decode(numbers)
        try:
            request = msgspec.convert(members, shape)
        except msgspec.ValidationError:
            members = fields_relaxed(members, shape)
            request = msgspec.convert(members, shape)
    except msgspec.ValidationError as error:
        text = str(error)
        if missing := _MISSING.match(text):
            raise RequestError(f"{missing[1]} is missing; send it", param=missing[1]) from None
        place = _PLACE.search(text)
        raise RequestError(
            f"invalid request: {text}; correct the field and send the request again",
            param=place.group(1) or None if place else None,
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"the request body is not valid JSON: {error}") from None
    if ids is not None:
        request = msgspec.structs.replace(request, prompt=ids)
    _check_common(request, members, limits)
    name = refused(members, chat=shape is ChatRequest)
    if name is not None:
        value = members[name]
        if isinstance(value, dict):
            value = value.get("type", "")
        shown = f" {value!r:.80}" if isinstance(value, str | int | float) else ""
        raise RequestError(
            f"{name}{shown} is not supported by the embedded engine; {INSTEAD.get(name, 'leave it out')}", param=name
        )
    return request


def _taken_apart(body: bytes, limits: Limits) -> tuple[dict[str, Any], memoryview | None]:
    """A completion's members. A long prompt of ids is apart, as JSON: in its place is ``_PLACEHOLDER``."""
    cut = None if limits.is_small(body) else cut_numbers(body, b"prompt")
    if cut is not None:
        members = _members.decode(cut[0])
        if members.get("prompt") == _PLACEHOLDER:
            return members, cut[1]
    return _members.decode(body), None


def parse_completion(body: bytes, limits: Limits = DEFAULTS, context: int | None = None) -> CompletionRequest:
    """Check all that does not need the model but its ``context``, in tokens.

    Raises RequestError 400, with the field at fault.
    """
    request = _decode(CompletionRequest, body, limits, context)
    if request.best_of not in (None, request.n):
        raise RequestError(
            f"best_of is {request.best_of}; only best_of equal to n is supported, leave it out", param="best_of"
        )
    _require_range("logprobs", request.logprobs, 0, MAX_LOGPROBS)
    return request


def parse_chat(body: bytes, limits: Limits = DEFAULTS, context: int | None = None) -> ChatRequest:
    request = _decode(ChatRequest, body, limits, context)
    _require_range("top_logprobs", request.top_logprobs, 0, MAX_LOGPROBS)
    if request.top_logprobs and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    if request.continue_final_message and request.add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt are both true; set add_generation_prompt to false, "
            "which is true by default",
            param="continue_final_message",
        )
    return request


def _require_range(name: str, value: int | None, least: int, most: int) -> None:
    if value is not None and not least <= value <= most:
        raise RequestError(f"{name} is {value}; it must lie between {least} and {most}", param=name)


def _check_common(request: CompletionRequest | ChatRequest, members: Mapping[str, Any], limits: Limits) -> None:
    # In the proxy's order, so that a request with two faults is refused in the same words.
    for name in ("max_tokens", "max_completion_tokens"):
        limit = getattr(request, name, None)
        if limit is not None and limit < 0:
            raise RequestError(f"{name} is {limit}; it must be at least 0", param=name)
    if members.get("stream_options") and not request.stream:
        raise RequestError("stream_options is only allowed with stream: true", param="stream_options")
    prompts = len(split_prompts(request.prompt)) if isinstance(request, CompletionRequest) else 1
    limits.require_sequences(prompts, request.n or 1)
    _require_range("n", request.n, 1, MAX_CHOICES)
    if not request.skip_special_tokens and not request.spaces_between_special_tokens:
        raise RequestError(
            "spaces_between_special_tokens false is not supported together with skip_special_tokens false; "
            "leave one of them out",
            param="spaces_between_special_tokens",
        )


def parse_handoff(params: Mapping[str, Any] | None) -> Handoff | None:
    """The proxy's ``kv_transfer_params``. Raises RequestError 400: they are no handoff."""
    if params is None:
        return None
    try:
        return handoff_of(params)
    except msgspec.ValidationError as error:
        raise RequestError(f"kv_transfer_params is wrong: {error}", param="kv_transfer_params") from None


def parse_level(header: str | None) -> float | None:
    """The header in seconds. Raises RequestError 400: it is no positive number."""
    if header is None:
        return None
    try:
        seconds = float(header) / 1e3
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < inf:
        raise RequestError(f"{ITL_HEADER} is {header[:64]!r}; send milliseconds, more than 0", param=ITL_HEADER)
    return seconds


def split_prompts(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """The prompts, each a text or a list of token ids. Raises RequestError 400: empty, or of mixed kinds."""
    if isinstance(prompt, str):
        prompts: list[str | list[int]] = [prompt]
    else:
        kinds = set(map(type, prompt))  # in C: it may be a million ids
        if len(kinds) > 1:
            raise RequestError(
                "prompt mixes kinds; send one text, a list of texts, a list of token ids, or a list of such lists",
                param="prompt",
            )
        prompts = [cast("list[int]", prompt)] if kinds == {int} else cast("list[str | list[int]]", prompt)
    if not prompts or any(len(item) == 0 for item in prompts):
        raise RequestError("prompt is empty; send at least one token", param="prompt")
    return prompts
