"""Every field of a completion or chat request, and what it acts on.

The proxy chooses a request's path by this list, and the embedded engine refuses by it what it does not compute. A field
that is not on it is unknown: the proxy takes no first token beside it, and an engine ignores it, as vLLM does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any


class Acts(Enum):
    ON_NOTHING = auto()  #: that a worker generates
    ON_THE_PROMPT = auto()  #: before its first token is computed
    ON_A_TOKEN = auto()  #: on each by itself, so it is carried to a continuation unchanged
    ON_THE_ANSWER = auto()  #: as a whole: on its course, its parts or its form


@dataclass(frozen=True, slots=True)
class Field:
    acts: Acts
    #: Values that ask for nothing, where the embedded engine refuses all others; None: it honours the field.
    refused_but: tuple[Any, ...] | None = None


_NOTHING, _PROMPT, _TOKEN, _ANSWER = Acts.ON_NOTHING, Acts.ON_THE_PROMPT, Acts.ON_A_TOKEN, Acts.ON_THE_ANSWER


def _fields(acts: Acts, names: str) -> dict[str, Field]:
    return dict.fromkeys(names.split(), Field(acts))


FIELDS: Mapping[str, Field] = {
    **_fields(
        _NOTHING,
        "metadata store service_tier safety_identifier prompt_cache_key",
    ),
    **_fields(
        _PROMPT,
        "prompt messages add_special_tokens continue_final_message documents chat_template chat_template_kwargs",
    ),
    **_fields(
        _TOKEN,
        "model temperature top_p top_k min_p logit_bias allowed_token_ids ignore_eos stop_token_ids "
        "include_stop_str_in_output skip_special_tokens seed presence_penalty frequency_penalty repetition_penalty "
        "user return_token_ids cache_salt spaces_between_special_tokens",
    ),
    **_fields(
        _ANSWER,
        "stream stream_options max_tokens max_completion_tokens min_tokens n echo logprobs top_logprobs stop bad_words "
        "truncate_prompt_tokens truncation_side return_tokens_as_token_ids kv_transfer_params best_of reasoning_effort "
        "include_reasoning stream_interval session_id request_id",
    ),
    "add_generation_prompt": Field(_ANSWER),  # without it, vLLM's answer has the role of the last message
    "priority": Field(_TOKEN, (0,)),
    "audio": Field(_ANSWER, (None,)),
    "function_call": Field(_ANSWER, (None, "none")),
    "functions": Field(_ANSWER, (None, [])),
    "guided_choice": Field(_ANSWER, (None,)),
    "guided_grammar": Field(_ANSWER, (None,)),
    "guided_json": Field(_ANSWER, (None,)),
    "guided_regex": Field(_ANSWER, (None,)),
    "logprob_token_ids": Field(_ANSWER, (None, [])),
    "media_io_kwargs": Field(_ANSWER, (None, {})),
    "mm_processor_kwargs": Field(_ANSWER, (None, {})),
    "modalities": Field(_ANSWER, (None, ["text"])),
    "parallel_tool_calls": Field(_ANSWER),
    "prompt_embeds": Field(_ANSWER, (None, [])),
    "prompt_logprobs": Field(_ANSWER, (None,)),
    "repetition_detection": Field(_ANSWER, (None,)),
    "response_format": Field(_ANSWER),
    "return_prompt_text": Field(_ANSWER, (None, False)),
    "structured_outputs": Field(_ANSWER),
    "suffix": Field(_ANSWER, (None,)),
    "thinking_token_budget": Field(_ANSWER, (None, -1)),
    "tool_choice": Field(_ANSWER),
    "tools": Field(_ANSWER),
    "use_beam_search": Field(_ANSWER, (False,)),
    "vllm_xargs": Field(_ANSWER, (None, {})),
    "watermarking": Field(_ANSWER, (None, False)),
    "web_search_options": Field(_ANSWER, (None,)),
}

#: In requests of the other kind these are unknown, as to vLLM.
CHATS_ONLY = frozenset(
    {
        "audio", "function_call", "functions", "include_reasoning", "modalities", "reasoning_effort",
        "return_prompt_text", "web_search_options",
    }
)  # fmt: skip
COMPLETIONS_ONLY = frozenset({"prompt_embeds", "suffix"})

#: What else to do; without an entry: leave the field out.
INSTEAD: Mapping[str, str] = {
    "functions": "send tools, which have replaced it",
    "function_call": "send tool_choice, which has replaced it",
    "guided_choice": "send structured_outputs, which has replaced it",
    "guided_grammar": "send structured_outputs, which has replaced it",
    "guided_json": "send response_format, which has replaced it",
    "guided_regex": "send structured_outputs, which has replaced it",
}


def acting(*acts: Acts) -> frozenset[str]:
    return frozenset(name for name, field in FIELDS.items() if field.acts in acts)


def refused(members: Mapping[str, Any], *, chat: bool) -> str | None:
    """The first of a request's fields that asks for what the embedded engine does not compute."""
    other = COMPLETIONS_ONLY if chat else CHATS_ONLY
    for name, value in members.items():
        field = FIELDS.get(name)
        if field is None or field.refused_but is None or name in other:
            continue
        if value not in field.refused_but:
            return name
    return None
