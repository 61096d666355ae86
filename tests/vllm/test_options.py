"""Every option of a client besides a greedy answer, against one plain vLLM server."""

from typing import Any

import pytest

from tests.e2e.prompts import long_text
from tests.vllm.asking import ask
from tests.vllm.conftest import Deployment

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
CHAT = {
    "messages": [{"role": "user", "content": "What is the weather like in Paris, and in " + long_text(20, start=29)}]
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 12}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]
THE_TOOL = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.8, "seed": 7},
        {"stop": ["the", "。"]},
        {"n": 2, "temperature": 0.8, "seed": 5},
        {"presence_penalty": 1.5, "repetition_penalty": 1.2},
        {"prompt": ["One prompt of two", "Another, " + long_text(60, start=7)]},
        {"structured_outputs": {"json": SCHEMA}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
        {**CHAT, "temperature": 0.8, "seed": 7},
        {**CHAT, "n": 2, "temperature": 0.8, "seed": 5},
        {**CHAT, "stop": ["the"]},
        {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
        {**CHAT, "tools": TOOLS},
        {**CHAT, "tools": TOOLS, "tool_choice": "required", "max_tokens": 60},
        {**CHAT, "tools": TOOLS, "tool_choice": THE_TOOL, "max_tokens": 60},
    ],
    ids="-".join,
)
def test_options(deployment: Deployment, options: dict[str, Any]) -> None:
    """An option that the fast path would change takes the other path, and the answer equals the plain server's."""
    body = options if "messages" in options else {"prompt": "Options: " + long_text(40, start=17), **options}
    _, _, expected = ask(deployment.plain, body)
    way, _, got = ask(deployment.proxy, body)
    assert got == expected
    several = isinstance(body.get("prompt"), list)
    assert way == "local; reason=many_prompts" if several else way.startswith(("first-token", "re-derive"))


def test_a_forced_tool_is_called(deployment: Deployment) -> None:
    """The comparison above compares calls, not their absence."""
    body = {**CHAT, "tools": TOOLS, "tool_choice": THE_TOOL, "max_tokens": 60}
    _, answer, _ = ask(deployment.proxy, body)
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert call["function"]["arguments"]


def test_logprobs(deployment: Deployment) -> None:
    """A completion has the same tokens, alternatives and probabilities, except for rounding."""
    body = {"prompt": "Logprobs: " + long_text(40, start=17), "logprobs": 2}
    _, expected, _ = ask(deployment.plain, body)
    way, got, _ = ask(deployment.proxy, body)
    theirs, ours = expected["choices"][0]["logprobs"], got["choices"][0]["logprobs"]
    assert (ours["tokens"], ours["text_offset"]) == (theirs["tokens"], theirs["text_offset"])
    assert ours["token_logprobs"] == pytest.approx(theirs["token_logprobs"], abs=1e-3)
    assert [set(top) for top in ours["top_logprobs"]] == [set(top) for top in theirs["top_logprobs"]]
    assert way.startswith("re-derive")


def test_chat_logprobs(deployment: Deployment) -> None:
    """A chat has the same tokens, alternatives and probabilities, except for rounding."""
    body = {**CHAT, "logprobs": True, "top_logprobs": 3}
    _, expected, _ = ask(deployment.plain, body)
    way, got, _ = ask(deployment.proxy, body)
    theirs, ours = (answer["choices"][0]["logprobs"]["content"] for answer in (expected, got))
    assert [one["token"] for one in ours] == [one["token"] for one in theirs]
    assert [one["logprob"] for one in ours] == pytest.approx([one["logprob"] for one in theirs], abs=1e-3)
    assert [{top["token"] for top in one["top_logprobs"]} for one in ours] == [
        {top["token"] for top in one["top_logprobs"]} for one in theirs
    ]
    assert way.startswith("re-derive")
