"""Tools, schemas and log probabilities: the same over the belt as of one worker, and as OpenAI's client reads them."""

from typing import Any

import httpx
import openai
import pytest

from kvbelt.ops.deployment import SyncDeployment

pytestmark = pytest.mark.e2e

DIGITS = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 9}, "b": {"type": "integer", "maximum": 9}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "add", "parameters": DIGITS}}
NAMED: Any = {"type": "function", "function": {"name": "add"}}
FORM: Any = {"type": "json_schema", "json_schema": {"name": "digits", "schema": DIGITS}}
CHAT: Any = {"messages": [{"role": "user", "content": "Add two digits."}], "max_tokens": 100, "temperature": 0}
TEXT: Any = {"prompt": "The sky 😊 is", "max_tokens": 4, "temperature": 0, "ignore_eos": True}

#: Path, body, and the path over the belt.
ASKED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a named tool": ("/v1/chat/completions", {**CHAT, "tools": [TOOL], "tool_choice": NAMED}, "re-derive"),
    "a schema": ("/v1/chat/completions", {**CHAT, "response_format": FORM}, "re-derive"),
    "choices": ("/v1/completions", {**TEXT, "structured_outputs": {"choice": ["yes", "no"]}}, "re-derive"),
    "bad words": ("/v1/completions", {**TEXT, "bad_words": ["the", "a"]}, "re-derive"),
    "allowed tokens": ("/v1/completions", {**TEXT, "allowed_token_ids": [100, 200, 300]}, "first-token"),
    "a cut prompt": ("/v1/completions", {**TEXT, "truncate_prompt_tokens": 3}, "re-derive"),
    "logprobs": ("/v1/completions", {**TEXT, "logprobs": 3}, "re-derive"),
    "a prompt's logprobs": ("/v1/completions", {**TEXT, "logprobs": 3, "echo": True, "max_tokens": 0}, "local"),
}


@pytest.mark.parametrize("name", ASKED)
def test_the_same_over_the_belt(
    name: str, one_p_one_d: SyncDeployment, aggregated: SyncDeployment, client: httpx.Client
) -> None:
    """The choices are those of one worker, but for the ids of calls and the last digits of log probabilities."""
    path, body, taken = ASKED[name]
    replies = [client.post(one.url + path, json=body) for one in (one_p_one_d, aggregated)]
    assert [reply.status_code for reply in replies] == [200, 200]
    assert replies[0].headers["x-kvbelt-path"].startswith(taken)
    over_the_belt, whole = (reply.json()["choices"] for reply in replies)
    for choice in (*over_the_belt, *whole):
        for call in choice.get("message", {}).get("tool_calls", []):
            del call["id"]
        if choice["logprobs"]:
            choice["logprobs"] = [choice["logprobs"][part] for part in ("tokens", "text_offset")]
    assert over_the_belt == whole


def test_openais_client_reads_a_streamed_call(one_p_one_d: SyncDeployment) -> None:
    """Name and arguments come in the deltas."""
    with openai.OpenAI(base_url=one_p_one_d.url + "/v1", api_key="none") as client:
        stream = client.chat.completions.create(model="", stream=True, **CHAT, tools=[TOOL], tool_choice=NAMED)
        calls = [call for chunk in stream for choice in chunk.choices for call in choice.delta.tool_calls or []]
    assert [(call.index, call.type, call.function and call.function.name) for call in calls] == [(0, "function", "add")]
