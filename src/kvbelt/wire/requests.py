"""The fields of a client's completion and chat requests, with their types.

Names, defaults and meaning are OpenAI's, and vLLM's where OpenAI has none. A field may be null where vLLM's may be.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from kvbelt.wire.lenient import NO_TEXT


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class JsonSchema(msgspec.Struct, frozen=True):
    name: str
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(msgspec.Struct, frozen=True):
    type: str
    json_schema: JsonSchema | None = None


Count = Annotated[int, NO_TEXT]
ModelName = Annotated[str, Meta(max_length=1024)]  #: errors name it, and the proxy keeps what it learns by it


class Request(msgspec.Struct, frozen=True, kw_only=True):
    model: ModelName | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    min_tokens: int = 0
    ignore_eos: bool = False
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] = []
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None
    return_token_ids: bool | None = False
    return_tokens_as_token_ids: bool | None = False
    #: Only requests with the same one share blocks. vLLM's stores make names of files of it.
    cache_salt: Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[^@/\\\0]*$")] | None = None
    kv_transfer_params: dict[str, Any] | None = None
    user: str | None = None
    session_id: str | None = None
    request_id: str = ""
    stream_interval: Annotated[int, Meta(ge=1)] | None = None
    priority: int = 0
    prompt_logprobs: Count | None = None
    thinking_token_budget: int | None = None
    use_beam_search: bool = False
    watermarking: bool | None = None


class CompletionRequest(Request, frozen=True, kw_only=True):
    prompt: str | list[str | int | list[int]]
    n: int = 1
    echo: bool | None = False
    logprobs: Count | None = None
    best_of: int | None = None
    add_special_tokens: bool = True


class ChatMessage(msgspec.Struct, frozen=True):
    """One message. ``content`` is a text or a list of text parts."""

    role: str
    content: str | list[str | dict[str, Any]] | None = None
    refusal: str | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    tools: list[dict[str, Any]] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class ChatRequest(Request, frozen=True, kw_only=True):
    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: int | None = None
    n: int | None = None
    logprobs: bool | None = False
    top_logprobs: Count | None = None
    echo: bool = False
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = True
    add_special_tokens: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    documents: list[dict[str, str]] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    include_reasoning: bool = True
    return_prompt_text: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
