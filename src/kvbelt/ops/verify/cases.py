"""What is asked: a table of request fields with values, for completions, chats or both. Pure.

Each case is a difference from a plain request. It belongs to one field of ``wire/fields.py``; those that cannot be
tried are in ``UNTRIED``, with the reason. Values that servers refuse are cases, too: refusals are compared as answers
are. ``...`` leaves a field out.
"""

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COMPLETIONS, CHAT = "completions", "chat"
PATHS = {COMPLETIONS: "/v1/completions", CHAT: "/v1/chat/completions"}

UNTRIED = {"kv_transfer_params": "it is how the proxy and workers hand over a request"}


@dataclass(frozen=True, slots=True)
class Case:
    endpoint: str
    field: str
    what: str  #: tells apart the cases of one field; empty: there is one
    body: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.field}, {self.what}" if self.what else self.field

    @property
    def streamed_only(self) -> bool:
        return "stream" in self.body or "stream_options" in self.body


TEXTS = (
    "The library opens at nine, and the librarian writes down every book that leaves the house. In spring",
    "图书馆九点开门，读者来这里借书。天空是蓝色的，因为阳光在空气中散射。从前有一座山，山里有",
    "Les rivières coulent là où la pierre est tendre ; l'été, les élèves dînent près du château où",
    "المكتبة تفتح في التاسعة صباحا، ويأتي القراء من كل مكان لكي",
    "नदी वहाँ मुड़ती है जहाँ पत्थर नरम होता है, और वहीं",
    "Today was 😊🎉, tomorrow 👩‍👩‍👧‍👦 and 🇫🇷 come with 🍕👍🏽 and then",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) +",
    "SELECT name, count(*) FROM visits WHERE day > '2026-01-01' GROUP BY name ORDER BY 2 DESC; -- and",
)
_DIGITS = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 9}, "b": {"type": "integer", "maximum": 9}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
_TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": _DIGITS}}
_OTHER_TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
_CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
_USER = {"role": "user", "content": "Add one and two, please. 一加二等于几？"}


def _named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def _schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "digits", "schema": schema}}


def _completion(field: str, what: str = "", **body: Any) -> tuple[Case, ...]:
    return (Case(COMPLETIONS, field, what, body),)


def _chat(field: str, what: str = "", **body: Any) -> tuple[Case, ...]:
    return (Case(CHAT, field, what, body),)


def _both(field: str, what: str = "", **body: Any) -> tuple[Case, ...]:
    return _completion(field, what, **body) + _chat(field, what, **body)


def _each(field: str, *values: Any) -> tuple[Case, ...]:
    return tuple(case for value in values for case in _both(field, f"{value!r:.40}", **{field: value}))


_PROMPTS = (
    *(case for number, text in enumerate(TEXTS) for case in _completion("prompt", f"text {number}", prompt=text)),
    *_completion("prompt", "long", prompt=" ".join(TEXTS) * 2),
    *_completion("prompt", "ids", prompt=[72, 99, 65, 80, 61] * 7),
    *_completion("prompt", "two texts", prompt=[TEXTS[0], TEXTS[5]]),
    *_completion("prompt", "two texts, two choices", prompt=[TEXTS[0], TEXTS[1]], n=2, seed=5, temperature=1),
    *_completion("prompt", "two lists of ids", prompt=[[72, 99, 65], [80, 61, 99, 70]]),
    *_completion("prompt", "empty", prompt=""),
    *_completion("prompt", "no text", prompt={"a": 1}),
    *_completion("prompt", "too long", prompt=[65] * 262_144),
    *_completion("prompt", "left out", prompt=...),
)
_MESSAGES = (
    *(
        case
        for number, text in enumerate(TEXTS)
        for case in _chat("messages", f"text {number}", messages=[{"role": "user", "content": text}])
    ),
    *_chat("messages", "roles", messages=[{"role": "system", "content": "Be short."}, {**_USER, "name": "ada"}]),
    *_chat("messages", "developer", messages=[{"role": "developer", "content": "Be short."}, _USER]),
    *_chat("messages", "parts", messages=[{"role": "user", "content": [{"type": "text", "text": TEXTS[1]}]}]),
    *_chat(
        "messages", "tool history",
        messages=[_USER, {"role": "assistant", "content": None, "tool_calls": [_CALL]},
                  {"role": "tool", "tool_call_id": "call_1", "content": "3"}],
    ),
    *_chat("messages", "none", messages=[]),
    *_chat("messages", "no role", messages=[{"content": "Hi"}]),
    *_chat("messages", "image", messages=[
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}
    ]),
    *_chat("messages", "left out", messages=...),
)  # fmt: skip
_SAMPLING = (
    *_both("temperature", "1.3", temperature=1.3, seed=11),
    *_each("temperature", -1, 3, "warm"),
    *_both("top_p", "0.7", top_p=0.7, temperature=0.9, seed=12),
    *_each("top_p", 0, 1.5),
    *_both("top_k", "5", top_k=5, temperature=1, seed=13),
    *_each("top_k", -2),
    *_both("min_p", "0.2", min_p=0.2, temperature=1, seed=14),
    *_each("min_p", 2),
    *_both("seed", "1", seed=1, temperature=1),
    *_both("seed", "and all filters", seed=15, temperature=1.2, top_p=0.9, top_k=20, min_p=0.05),
    *_each("seed", "x", 1.5),
    *_each("presence_penalty", 1.5, 3),
    *_each("frequency_penalty", 1.5, "1", -3),
    *_each("repetition_penalty", 1.4, 0),
    *_each("logit_bias", {"72": 5, "65": -100}, {"99999999": 1}, {"a": 1}),
    *_each("allowed_token_ids", [72, 80, 99], [], [99_999_999]),
    *_each("bad_words", ["the", "a"], "the"),
    *_each("use_beam_search", True),
    *_each("watermarking", True),
    *_each("repetition_detection", {"max_pattern_size": 4, "min_count": 2}),
    *_each("thinking_token_budget", 4),
    *_each("logprob_token_ids", [72, 80]),
)
_COURSE = (
    *_each("max_tokens", 1, 2, 0, -1, "4", 4.5),
    *_chat("max_completion_tokens", "5", max_completion_tokens=5),
    *_completion("max_completion_tokens", "5", max_completion_tokens=5),
    *_both("min_tokens", "9", min_tokens=9, stop=[".", "e"]),
    *_each("min_tokens", -1, 5000),
    *_each("ignore_eos", True),
    *_both("stop", "a text", stop="e"),
    *_each("stop", ["\n", " the", "。"], [""], 5),
    *_both("include_stop_str_in_output", stop=[" ", "e"], include_stop_str_in_output=True),
    *_each("stop_token_ids", [28, 30, 72, 99, 284], ["a"]),
    *_both("n", "3", n=3, seed=17, temperature=1),
    *_each("n", 2, 0, 100_000, "2"),
    *_completion("best_of", "1", best_of=1),
    *_completion("best_of", "3", best_of=3),
    *_chat("best_of", "3", best_of=3),
    *_each("priority", 0, 1),
)
_REPORTED = (
    *_completion("logprobs", "3", logprobs=3),
    *_completion("logprobs", "0", logprobs=0),
    *_completion("logprobs", "99", logprobs=99),
    *_chat("logprobs", "true", logprobs=True),
    *_chat("top_logprobs", "3", logprobs=True, top_logprobs=3),
    *_chat("top_logprobs", "alone", top_logprobs=3),
    *_chat("top_logprobs", "99", logprobs=True, top_logprobs=99),
    *_each("prompt_logprobs", 1),
    *_both("echo", echo=True),
    *_completion("echo", "logprobs", echo=True, logprobs=2),
    *_completion("echo", "only the prompt's logprobs", echo=True, logprobs=1, max_tokens=0),
    *_each("return_token_ids", False),
    *_completion("return_tokens_as_token_ids", logprobs=1, return_tokens_as_token_ids=True),
    *_chat("return_tokens_as_token_ids", logprobs=True, return_tokens_as_token_ids=True),
    *_each("skip_special_tokens", False),
    *_each("spaces_between_special_tokens", False),
    *_chat("return_prompt_text", return_prompt_text=True),
    *_both("stream", "no options", stream=True, stream_options=...),
    *_both("stream", "no boolean", stream="maybe"),
    *_both(
        "stream_options", "usage in each event", stream_options={"include_usage": True, "continuous_usage_stats": True}
    ),
    *_both("stream_options", "no usage", stream_options={"include_usage": False}),
    *_both("stream_options", "not streamed", stream=False, stream_options={"include_usage": True}),
    *_both("stream_interval", "3", stream=True, stream_interval=3),
)
_INPUT = (
    *_each("truncate_prompt_tokens", 5, -1, -2),
    *_both("truncation_side", "right", truncate_prompt_tokens=5, truncation_side="right"),
    *_both("truncation_side", "middle", truncate_prompt_tokens=5, truncation_side="middle"),
    *_each("add_special_tokens", True, False),
    *_completion("suffix", "x", suffix="x"),
    *_completion("prompt_embeds", "broken", prompt_embeds="AAAA"),
    *_chat("add_generation_prompt", "false", add_generation_prompt=False),
    *_chat("continue_final_message", add_generation_prompt=False, continue_final_message=True,
           messages=[_USER, {"role": "assistant", "content": "The sum is"}]),
    *_chat("continue_final_message", "and a new turn", add_generation_prompt=True, continue_final_message=True),
    *_chat("documents", documents=[{"title": "A", "text": "B"}]),
    *_chat("chat_template", chat_template="{{ messages[0].content }}"),
    *_chat("chat_template_kwargs", chat_template_kwargs={"enable_thinking": False}),
    *_chat("reasoning_effort", "low", reasoning_effort="low"),
    *_chat("reasoning_effort", "unknown", reasoning_effort="utmost"),
    *_chat("include_reasoning", "false", include_reasoning=False),
    *_chat("audio", audio={"voice": "a", "format": "wav"}),
    *_chat("modalities", "text", modalities=["text"]),
    *_chat("modalities", "audio", modalities=["audio"]),
    *_chat("mm_processor_kwargs", mm_processor_kwargs={"a": 1}),
    *_chat("media_io_kwargs", media_io_kwargs={"image": {"a": 1}}),
    *_chat("web_search_options", web_search_options={}),
)  # fmt: skip
_FORMS = (
    *_chat("tools", "auto", tools=[_TOOL, _OTHER_TOOL]),
    *_chat("tools", "no list", tools="add"),
    *_chat("tool_choice", "required", tools=[_TOOL, _OTHER_TOOL], tool_choice="required", max_tokens=60),
    *_chat("tool_choice", "named", tools=[_TOOL, _OTHER_TOOL], tool_choice=_named("add"), max_tokens=60),
    *_chat("tool_choice", "none", tools=[_TOOL], tool_choice="none"),
    *_chat("tool_choice", "unknown name", tools=[_TOOL], tool_choice=_named("subtract")),
    *_chat("tool_choice", "without tools", tool_choice="required"),
    *_chat("parallel_tool_calls", "false", tools=[_TOOL], tool_choice="required", parallel_tool_calls=False,
           max_tokens=60),
    *_chat("functions", functions=[_TOOL["function"]]),
    *_chat("function_call", function_call={"name": "add"}),
    *_both("response_format", "text", response_format={"type": "text"}),
    *_both("response_format", "json_object", response_format={"type": "json_object"}, max_tokens=30),
    *_both("response_format", "json_schema", response_format=_schema(_DIGITS), max_tokens=60),
    *_both("response_format", "broken schema", response_format=_schema({"type": "unknown"})),
    *_both("response_format", "unknown type", response_format={"type": "xml"}),
    *_both("structured_outputs", "choice", structured_outputs={"choice": ["yes", "no 😊"]}),
    *_both("structured_outputs", "regex", structured_outputs={"regex": "[0-9]{3}-[a-f]{2}"}),
    *_both("structured_outputs", "json", structured_outputs={"json": _DIGITS}, max_tokens=60),
    *_both("structured_outputs", "two", structured_outputs={"choice": ["a"], "regex": "b"}),
    *_each("guided_choice", ["yes", "no"]),
    *_each("guided_regex", "[0-9]{3}"),
    *_each("guided_json", _DIGITS),
    *_each("guided_grammar", 'root ::= "a"'),
)  # fmt: skip
_ABOUT = (
    *_both("model", "unknown", model="no-such-model"),
    *_each("user", "ada"),
    *_each("metadata", {"a": "b"}),
    *_each("store", False),
    *_each("service_tier", "auto"),
    *_each("safety_identifier", "a"),
    *_each("prompt_cache_key", "a"),
    *_each("request_id", "verify"),
    *_each("session_id", "verify"),
    *_each("cache_salt", "verify", ""),
    *_each("vllm_xargs", {"a": 1}),
)
CASES: tuple[Case, ...] = (
    *_both("(plain)"), *_PROMPTS, *_MESSAGES, *_SAMPLING, *_COURSE, *_REPORTED, *_INPUT, *_FORMS, *_ABOUT,
)  # fmt: skip

_GREEDY = {"temperature": 0}


@dataclass(frozen=True, slots=True)
class Question:
    case: Case
    variant: str  #: ``greedy``, ``seeded`` or ``as given``
    body: Mapping[str, Any]
    streamable: bool
    wholeable: bool

    @property
    def endpoint(self) -> str:
        return self.case.endpoint


def cases_of(fields: Collection[str] | None) -> tuple[Case, ...]:
    """All; or those of some fields."""
    return CASES if fields is None else tuple(case for case in CASES if case.field in fields)


def questions(cases: Sequence[Case], seed: int, *, quick: bool) -> list[Question]:
    """Each case, greedy and seeded where it chooses neither; with ``quick``, greedy only."""
    return [question for case in cases for question in _variants(case, seed, quick=quick)]


def _variants(case: Case, seed: int, *, quick: bool) -> list[Question]:
    chance = random.Random(f"{seed} {case.endpoint} {case.name}")
    text = chance.choice(TEXTS) + f" {chance.randrange(1000)}"
    start = {"prompt": text} if case.endpoint == COMPLETIONS else {"messages": [{"role": "user", "content": text}]}
    plain = {**start, "max_tokens": 12, "return_token_ids": True}
    if case.body.keys() & {"temperature", "seed"}:
        ways: dict[str, dict[str, Any]] = {"as given": {}}
    else:
        seeded = {"temperature": 0.8, "seed": chance.randrange(1 << 31)}
        ways = {"greedy": _GREEDY} if quick else {"greedy": _GREEDY, "seeded": seeded}
    return [
        Question(
            case, way, {key: value for key, value in {**plain, **more, **case.body}.items() if value is not ...},
            streamable="stream" not in case.body or case.body["stream"] is not False,
            wholeable=not case.streamed_only or case.body.get("stream") is False,
        )
        for way, more in ways.items()
    ]  # fmt: skip
