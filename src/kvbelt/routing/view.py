"""The fields of a client's request that routing reads.

Types are OpenAI's and vLLM's; a request with other types is refused before any choice is made.
"""

from typing import Annotated, Any

import msgspec

from kvbelt.wire.lenient import NO_TEXT
from kvbelt.wire.requests import ModelName

_Count = Annotated[int, NO_TEXT]


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class RequestView(msgspec.Struct, frozen=True, kw_only=True):
    """A completion or chat request. ``None``: the client left the field out, or sent null."""

    model: ModelName | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int | None = None
    n: int | None = None
    best_of: Any = None  #: vLLM ignores it
    echo: bool | None = None
    logprobs: bool | int | None = None
    top_logprobs: _Count | None = None
    prompt_logprobs: _Count | None = None
    stop: str | list[str] | None = None
    temperature: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    return_token_ids: bool | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None
    kv_transfer_params: dict[str, Any] | None = None


#: These mean nothing to a completion, and are ignored there.
CHAT_ONLY: frozenset[str] = frozenset({"max_completion_tokens", "top_logprobs", "tools", "tool_choice", "functions"})

VIEWED: frozenset[str] = frozenset(RequestView.__struct_fields__)
