"""Answers through the proxy have every field that plain vLLM's have, with the same values."""

import json
import re
import urllib.error
import urllib.request
from typing import Any

import pytest

from tests.e2e.prompts import long_text
from tests.vllm.conftest import Deployment
from tests.vllm.servers import Server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

TEXT = "Field by field: " + long_text(40, start=77)
COMPLETION: dict[str, Any] = {"prompt": TEXT}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": TEXT}]}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
SAMPLED = {"seed": 3, "temperature": 0.7}

#: In ``system_fingerprint``: a server with a connector has another one than a plain server.
_CONFIGURATION = re.compile(r"-[0-9a-f]{8}(?=\")")

BODIES: list[dict[str, Any]] = [
    body | more
    for body in (COMPLETION, CHAT)
    for more in (
        {},
        {"stream": True},
        USAGE,
        {"return_token_ids": True},
        {"return_token_ids": True, "stream": True},
        {"return_token_ids": True, **USAGE},
        {"max_tokens": 1},
        {"max_tokens": 1, "return_token_ids": True, "stream": True},
        {"prompt_logprobs": 1},
        {"return_token_ids": True, **SAMPLED},
        {"return_token_ids": True, "stream": True, **SAMPLED},
        {"max_tokens": 0},
        {"max_tokens": -1},
    )
] + [
    COMPLETION | {"logprobs": 2},
    CHAT | {"logprobs": True, "top_logprobs": 2},
    COMPLETION | {"echo": True, "return_token_ids": True},
    COMPLETION | {"echo": True, "max_tokens": 0, "logprobs": 1},
    {"prompt_embeds": "AAAA"},
]


def answer(server: Server, body: dict[str, Any]) -> tuple[int, list[Any]]:
    """The status, and the answer without what differs between any two answers."""
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    data = json.dumps({"model": "demo", "temperature": 0, "max_tokens": 6, **body}).encode()
    request = urllib.request.Request(server.url + path, data, {"content-type": "application/json"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=200) as response:  # noqa: S310 -- ours
            return response.status, parts_of(response.read().decode())
    except urllib.error.HTTPError as refused:
        return refused.code, []  # in whose words is not compared


def parts_of(text: str) -> list[Any]:
    """A whole answer; or the shapes of a stream's events, one after another, and what they say together."""
    text = _CONFIGURATION.sub("", text)
    events = [text] if text.startswith("{") else text.removesuffix("data: [DONE]\n\n").split("\n\n")[:-1]
    # Log probabilities differ in the sixth digit where another number of tokens is computed at once.
    found = [json.loads(event.removeprefix("data: "), parse_float=lambda _: "a number") for event in events]
    for one in found:
        del one["id"], one["created"]
    return found if text.startswith("{") else folded(found)


def folded(events: list[dict[str, Any]]) -> list[Any]:
    """The number of events varies: vLLM puts into one what it has at once."""
    said: dict[str, list[Any]] = {}
    shapes: list[dict[str, Any]] = []
    for event in events:
        for part in (part for choice in event["choices"] for part in (choice, choice.get("delta", {}))):
            for name in ("text", "content", "token_ids"):
                if part.get(name) is not None:
                    said.setdefault(name, []).extend(part[name])
                    part[name] = ""
        if not shapes or shapes[-1] != event:
            shapes.append(event)
    return [*shapes, said]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: " ".join(f"{k}" for k in body))
def test_an_answer_has_plain_vllm_s_fields(deployment: Deployment, body: dict[str, Any]) -> None:
    """Nulls included; and a request that plain vLLM refuses is refused with its status."""
    assert answer(deployment.proxy, body) == answer(deployment.plain, body)
