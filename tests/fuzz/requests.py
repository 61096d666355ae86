"""Requests drawn by a seeded chance: every field, with values that are right, wrong and at the bounds.

A request is repeatable: it is greedy or has a seed, unless what is drawn is refused for it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from kvbelt.wire.fields import CHATS_ONLY, COMPLETIONS_ONLY

CONTEXT = 2048  #: of the servers, as the bounds here want it

#: For any field: most are of the wrong type, and some only nearly.
ANY: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 1.0, 4.0, 0.5, -0.5, 1e-6, 1e308, 2**31, 2**63, 2**64, 10**30, "", "x", "1",
    "4.0", "0.5", "true", "off", "NaN", [], [1], ["a"], [None], [[]], {}, {"a": 1},
)  # fmt: skip

_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
_TOOL = {"type": "function", "function": {"name": "look", "parameters": _SCHEMA}}
_NAMED = {"type": "function", "function": {"name": "look"}}
_BOOLEANS = (True, False, None, 1, 0, "true", "no", 2)
_IDS = ([], [5], [5, 300, 7000], [-1], [0], [49151], [49152], [10**9], [2**63], [5.0], ["5"], [5.5], None, [True])
_PENALTIES = (0, 0.5, -0.5, 2, -2, 2.01, -2.01, 100, "1", None, True)
_MORE: tuple[Any, ...] = ("a", {}, [], 1)

#: What is drawn for each field beside ``ANY``.
VALUES: Mapping[str, tuple[Any, ...]] = {
    # on nothing
    "metadata": ({}, {"a": "b"}),
    "store": _BOOLEANS,
    "service_tier": ("auto", "flex"),
    "safety_identifier": ("a",),
    "prompt_cache_key": ("a",),
    # on the prompt
    "prompt": (
        "", "a", "One two three", ["a", "b c"], [], [[]], [5, 300, 7000], [[5, 300], [7]], ["a", 5], ["a", [5]], [""],
        ["a", ""], [-1], [49151], [49152], [10**9], [2**63], [[5], []], [5.0], ["5"], [True], 5, None, {}, "\U0001f600",
        "word " * 2500, [5] * (CONTEXT - 1), [5] * CONTEXT, [5] * (CONTEXT + 1), ["x"] * 3, [5.5], [[5], ["a"]], [None],
    ),
    "messages": (
        [], None, "hello", {}, [{}], ["hello"], [{"role": "user"}], [{"content": "no role"}],
        [{"role": "user", "content": None}], [{"role": 5, "content": "a"}], [{"role": "user", "content": 5}],
        [{"role": "anybody", "content": "a"}], [{"role": "", "content": "a"}], [{"role": "user", "content": ""}],
        [{"role": "user", "content": []}], [{"role": "user", "content": ["a", "b"]}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
        [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": [{"type": "text", "text": 5}]}],
        [{"role": "user", "content": [{"text": "a"}]}], [{"role": "user", "content": [{"type": "sound", "text": "a"}]}],
        [{"role": "user", "content": [{"type": "refusal", "refusal": "a"}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}],
        [{"role": "system", "content": "a"}], [{"role": "developer", "content": "a"}, {"role": "user", "content": "b"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        [{"role": "user", "content": "a"}, {"role": "assistant"}, {"role": "user", "content": "c"}],
        [{"role": "user", "content": "a", "name": "b"}], [{"role": "user", "content": "a", "name": 5}],
        [{"role": "user", "content": "a", "more": 5}],
        [{"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}]},
         {"role": "tool", "tool_call_id": "1", "content": "b"}],
        [{"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "look"}}]}],
        [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "look", "arguments": "["}}]}],
        [{"role": "assistant", "tool_calls": [{}]}], [{"role": "assistant", "tool_calls": [5]}],
        [{"role": "assistant", "tool_calls": 5}], [{"role": "assistant", "tool_calls": []}],
        [{"role": "assistant", "content": "a", "refusal": "b"}], [{"role": "assistant", "reasoning": "a"}],
        [{"role": "tool", "content": "a"}], [{"role": "function", "name": "f", "content": "a"}],
        [{"role": "user", "content": "word " * 2500}],
    ),
    "add_special_tokens": _BOOLEANS,
    "add_generation_prompt": _BOOLEANS,
    "continue_final_message": _BOOLEANS,
    "documents": ([], [{"title": "a", "text": "b"}], [{"a": 1}], ["a"]),
    "chat_template": ("{{ messages }}", "{% for", ""),
    "chat_template_kwargs": ({}, {"a": 1}, {"chat_template": "x"}, {"messages": []}, {"tokenize": False}, {"tools": 1}),
    # on a token
    "model": ("", "nobody", None),
    "temperature": (0, 0.5, 1, 2, 2.01, -0.1, 1e-9, 1e-6, 0.005, "0", "0.7", None),
    "top_p": (1, 0.5, 0.01, 0, -0.1, 1.01, "0.5", None),
    "top_k": (0, -1, 1, 5, 10**6, 2**31, -2, "5", 5.0, None),
    "min_p": (0, 0.1, 1, 1.1, -0.1, None),
    "logit_bias": (
        {}, {"5": 1}, {"5": -100}, {"5": 101}, {"49151": 1}, {"49152": 1}, {"-1": 1}, {"x": 1}, {"5": "1"}, {"5": None},
        {"5.0": 1}, {" 5": 1}, {"05": 1}, None,
    ),
    "allowed_token_ids": _IDS,
    "ignore_eos": _BOOLEANS,
    "stop_token_ids": _IDS,
    "include_stop_str_in_output": _BOOLEANS,
    "skip_special_tokens": _BOOLEANS,
    "seed": (0, 1, -1, 2**31, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64, "5", 5.0, None),
    "presence_penalty": _PENALTIES,
    "frequency_penalty": _PENALTIES,
    "repetition_penalty": (1, 1.2, 0.5, 0, -1, 2.1, 100, None),
    "user": ("a", 5, None),
    "return_token_ids": _BOOLEANS,
    "cache_salt": ("a", "", None, "a" * 1024, "a" * 1025, "\0", "é"),
    "spaces_between_special_tokens": _BOOLEANS,
    # on the answer
    "stream": _BOOLEANS,
    "stream_options": (
        {}, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}, {"include_usage": "yes"},
        {"include_usage": 5}, {"continuous_usage_stats": True}, {"more": 1}, None,
    ),
    "max_tokens": (0, 1, 2, 5, 20, -1, "3", 3.0, 3.5, 100, CONTEXT - 1, CONTEXT, CONTEXT + 1, 10**9, 2**63, None),
    "max_completion_tokens": (0, 1, 2, 5, -1, "3", 3.0, 100, CONTEXT, 10**9, None),
    "min_tokens": (0, 1, 3, 4, 5, -1, 10**9, "2", None),
    "n": (1, 2, 3, 0, -1, 128, 129, 1024, 16384, 16385, 2.0, "2", None),
    "echo": _BOOLEANS,
    "logprobs": (0, 1, 5, 20, 21, -1, -2, True, False, None, "1", "true"),
    "top_logprobs": (0, 1, 5, 20, 21, -1, -2, True, None, "1"),
    "stop": (
        "", "a", [], ["a", "b"], ["a", ""], ["a"] * 4, ["a"] * 5, [5], 5, None, "\n", [None], "x" * 5000, ["a", 5],
    ),
    "bad_words": ([], ["a"], [""], ["a", "b c"], "a", [5], None, ["a"] * 129),
    "truncate_prompt_tokens": (-1, 0, 1, 2, 5, CONTEXT, CONTEXT + 1, -2, "2", 2.0, None, 10**9),
    "truncation_side": ("left", "right", "middle", "", None),
    "return_tokens_as_token_ids": _BOOLEANS,
    "kv_transfer_params": ({}, {"a": 1}, None, 5),
    "best_of": (1, 2, 0, None),
    "reasoning_effort": ("low", "none", "extreme", "", None, 5),
    "include_reasoning": _BOOLEANS,
    "stream_interval": (1, 2, 0, -1, None, "2"),
    "session_id": ("a", "", None, 5),
    "request_id": ("a", "", "a b", "é", 5, None),
    "priority": (0, 1, -1, None, 2**63, "0"),
    "audio": (None, {}),
    "function_call": ("none", "auto", None, {"name": "look"}),
    "functions": ([], None, [{"name": "look"}]),
    "guided_choice": (None, ["a"]),
    "guided_grammar": (None, "a"),
    "guided_json": (None, _SCHEMA),
    "guided_regex": (None, "a"),
    "logprob_token_ids": (None, [], [5], [-1]),
    "media_io_kwargs": (None, {}, {"a": {}}),
    "mm_processor_kwargs": (None, {}, {"a": 1}),
    "modalities": (None, ["text"], ["audio"]),
    "parallel_tool_calls": _BOOLEANS,
    "prompt_embeds": (None, [], "AAAA", [""]),
    "prompt_logprobs": (None, 0, 1, -1, -2, 21, "1"),
    "repetition_detection": (None, {}, {"max_pattern_size": 2, "min_count": 2}),
    "response_format": (
        None, {"type": "text"}, {"type": "json_object"}, {"type": "xml"}, {}, {"type": None}, "json_object",
        {"type": "json_schema"}, {"type": "json_schema", "json_schema": {}},
        {"type": "json_schema", "json_schema": {"name": "a"}},
        {"type": "json_schema", "json_schema": {"schema": _SCHEMA}},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": _SCHEMA}},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": _SCHEMA, "strict": True}},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nothing"}}},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": "x"}},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#/none"}}},
        {"type": "text", "json_schema": 5}, {"type": "structural_tag"},
    ),
    "return_prompt_text": _BOOLEANS,
    "structured_outputs": (
        None, {}, {"json": _SCHEMA}, {"json": json.dumps(_SCHEMA)}, {"json": "{"}, {"regex": "[ab]+"}, {"regex": "("},
        {"choice": ["a", "b"]}, {"choice": []}, {"choice": [5]}, {"choice": "a"}, {"json_object": True},
        {"json_object": False}, {"json": _SCHEMA, "regex": "a"}, {"grammar": 'root ::= "a"'}, {"grammar": "("},
        {"nothing": 1}, {"regex": ""}, {"json": {}},
    ),
    "suffix": (None, "", "a"),
    "thinking_token_budget": (None, -1, 0, 5, -2),
    "tool_choice": ("none", "auto", "required", None, "any", _NAMED, {"function": {"name": "a"}}, {}, {"name": "a"}),
    "tools": (
        None, [], [_TOOL], [_TOOL, _TOOL], [{}], [{"type": "function"}], [{"type": "other", "function": {"name": "a"}}],
        [{"function": {"name": "look"}}], [{"type": "function", "function": {}}], [5], "x",
        [{"type": "function", "function": {"name": "look", "parameters": None}}],
        [{"type": "function", "function": {"name": "look", "parameters": {"type": "nothing"}}}],
        [{"type": "function", "function": {"name": ""}}], [{"type": "function", "function": {"name": 5}}],
        [{"type": "function", "function": {"name": "look", "parameters": "x"}}],
    ),
    "use_beam_search": _BOOLEANS,
    "vllm_xargs": (None, {}, {"a": 1}, {"a": None}),
    "watermarking": _BOOLEANS,
    "web_search_options": (None, {}),
    # not on the list
    "unknown": _MORE,
    "": _MORE,
}  # fmt: skip

#: Fields that mean something together.
TOGETHER: tuple[Mapping[str, Any], ...] = (
    {"tools": [_TOOL], "tool_choice": "required", "max_tokens": 12},
    {"tools": [_TOOL], "tool_choice": _NAMED, "max_tokens": 12},
    {"tools": [_TOOL], "tool_choice": "auto"},
    {"tools": [_TOOL], "tool_choice": "none"},
    {"echo": True, "max_tokens": 0, "logprobs": 1},
    {"echo": True, "logprobs": 2},
    {"n": 2, "temperature": 0.8, "seed": 5},
    {"n": 2, "temperature": 0},
    {"stream": True, "stream_options": {"include_usage": True}},
    {"logprobs": True, "top_logprobs": 3},
    {"min_tokens": 3, "stop": "a"},
    {"continue_final_message": True, "add_generation_prompt": False},
    {"temperature": 1, "seed": 3, "top_k": 5, "top_p": 0.9},
    {"truncate_prompt_tokens": 2, "prompt": "One two three four five"},
    {"max_tokens": 3, "max_completion_tokens": 5},
)

#: Bodies that are no requests, and content types, each with a body that would be one.
_ODD_BODIES = (
    b"", b"{", b"[]", b'"text"', b"null", b"5", b"{} {}", b'{"prompt": "\xff"}', b"\xef\xbb\xbf{}", b'{"prompt": "a",}',
    b'{"prompt": "a", "prompt": "b", "temperature": 0}', b"\x00", b'{"a":' * 2000, b"{'prompt': 'a'}",
    b'{"prompt": "a\nb"}',
    b'{"prompt": "a", "temperature": 0, "x": NaN}', b'{"prompt": "\\ud800", "temperature": 0}',
    b'{"prompt": "a", "temperature": -Infinity}', b'{"prompt": "a", "temperature": 0, "stop": "\\ud800"}',
)  # fmt: skip
_CONTENT_TYPES = (
    "application/json; charset=utf-8", "application/json; charset=latin-1", "text/plain", "application/x-json", "",
    "application/x-www-form-urlencoded", "multipart/form-data", "application/problem+json", "APPLICATION/JSON", None,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Drawn:
    path: str
    body: bytes
    content_type: str | None = "application/json"

    @property
    def chat(self) -> bool:
        return "chat" in self.path

    @property
    def members(self) -> dict[str, Any]:
        """The body's fields; none where it is no JSON object."""
        try:
            members = json.loads(self.body)
        except (ValueError, RecursionError):
            return {}
        return members if isinstance(members, dict) else {}


def drawn(chance: Random) -> Drawn:
    chat = chance.random() < 0.5
    path = "/v1/chat/completions" if chat else "/v1/completions"
    members: dict[str, Any] = {"temperature": 0, "max_tokens": 4}
    members |= {"messages": [{"role": "user", "content": "One two"}]} if chat else {"prompt": "One two"}
    if chance.random() < 0.03:
        return Drawn(path, chance.choice(_ODD_BODIES))
    if chance.random() < 0.5:
        members["stream"] = True
    if chance.random() < 0.2:
        members |= chance.choice(TOGETHER)
    other = COMPLETIONS_ONLY | {"prompt"} if chat else CHATS_ONLY | {"messages"}
    names = [name for name in VALUES if name not in other or chance.random() < 0.1]
    for name in chance.sample(names, chance.choice((1, 1, 1, 2, 2, 3, 5))):
        members[name] = chance.choice(VALUES[name] if chance.random() < 0.8 else ANY)
    if chance.random() < 0.03:
        members.pop("messages" if chat else "prompt")
    if members.get("temperature") != 0 and members.get("seed") in (None, -1):
        members["seed"] = 7
    kind = chance.choice(_CONTENT_TYPES) if chance.random() < 0.03 else "application/json"
    return Drawn(path, json.dumps(members).encode(), kind)


def requests(seed: int) -> Iterator[Drawn]:
    """Without end; the same seed draws the same ones."""
    chance = Random(seed)
    while True:
        yield drawn(chance)
