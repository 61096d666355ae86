"""Chats of a server with a reasoning parser: unparsed text is passed on only where nothing is parsed."""

# ruff: noqa: S310 -- our own servers

import json
import os
import urllib.request
from typing import Any

import pytest

from tests.e2e.prompts import long_text
from tests.vllm.asking import ask
from tests.vllm.conftest import Deployment
from tests.vllm.servers import Server

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(600),
    pytest.mark.skipif("reasoning-parser" not in os.environ.get("KVBELT_VLLM_ARGUMENTS", ""), reason="no parser"),
]

CHAT = {"messages": [{"role": "user", "content": "Think of it: " + long_text(40, start=3)}], "max_tokens": 8}


def streamed(server: Server, body: dict[str, Any]) -> tuple[str, dict[str, Any], Any]:
    """The path, what the stream's deltas say together, and the usage."""
    data = {"model": "demo", "temperature": 0, "stream": True, "stream_options": {"include_usage": True}, **body}
    request = urllib.request.Request(
        server.url + "/v1/chat/completions", json.dumps(data).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=200) as answer:
        way, events = answer.headers.get("x-kvbelt-path", ""), answer.read().decode().split("\n\n")
    found = [json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: {")]
    said: dict[str, Any] = {}
    for delta in (choice["delta"] for event in found for choice in event["choices"]):
        for name in ("reasoning", "content"):
            said[name] = said.get(name, "") + (delta.get(name) or "")
    return way, said, [event["usage"] for event in found if event.get("usage")]


@pytest.mark.parametrize(("thinking", "path"), [(False, "first-token"), (True, "re-derive; reason=parsed_message")])
def test_a_streamed_chat_is_parsed_as_by_one_server(deployment: Deployment, thinking: bool, path: str) -> None:
    """Where the template has ended the reasoning, the first token leaves at once."""
    body = CHAT | {"chat_template_kwargs": {"enable_thinking": thinking}}
    way, said, usage = streamed(deployment.proxy, body)
    assert (said, usage) == streamed(deployment.plain, body)[1:]
    assert bool(said["reasoning"]) is thinking
    assert way in (path, "re-derive; reason=incomplete_text")


@pytest.mark.parametrize("thinking", [False, True])
def test_a_whole_chat_is_parsed_as_by_one_server(deployment: Deployment, thinking: bool) -> None:
    body = CHAT | {"chat_template_kwargs": {"enable_thinking": thinking}}
    way, got, _ = ask(deployment.proxy, body)
    _, expected, _ = ask(deployment.plain, body)
    assert got["choices"] == expected["choices"]
    assert way == "re-derive; reason=parsed_message"
