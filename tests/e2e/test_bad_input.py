"""What is wrong gets a clear error in OpenAI's shape, at once, and the next request is unharmed."""

from typing import Any

import httpx
import pytest

from kvbelt.ops.deployment import SyncDeployment

pytestmark = pytest.mark.e2e

GOOD: dict[str, Any] = {"prompt": "The capital of France is", "max_tokens": 3, "temperature": 0}

#: Body changes, the field that the error names, and a word of its message.
WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "max_tokens zero": ({"max_tokens": 0}, "max_tokens", "0"),
    "max_tokens negative": ({"max_tokens": -5}, "max_tokens", "-5"),
    "max_tokens a text": ({"max_tokens": "ten"}, "max_tokens", "int"),
    "temperature negative": ({"temperature": -1}, "temperature", "-1"),
    "top_p above one": ({"top_p": 1.5}, "top_p", "1.5"),
    "prompt a number": ({"prompt": 5}, "prompt", "int"),
    "prompt empty": ({"prompt": ""}, "prompt", "empty"),
    "prompt an empty list": ({"prompt": []}, "prompt", "empty"),
    "prompt of mixed kinds": ({"prompt": ["a", 5]}, "prompt", "mixes"),
    "prompt too long": ({"prompt": "word " * 5000}, "prompt", "2048"),
    "token id outside the vocabulary": ({"prompt": [1, 2, 99999999]}, "prompt", "99999999"),
    "max_tokens beyond the context": ({"max_tokens": 2048}, "max_tokens", "2048"),
    "stream a text": ({"stream": "maybe"}, "stream", "bool"),
    "n zero": ({"n": 0}, "n", "0"),
    "logprobs too many": ({"logprobs": 500}, "logprobs", "500"),
    "logit_bias of a word": ({"logit_bias": {"x": 1}}, "logit_bias", "x"),
    "an unknown format": ({"response_format": {"type": "xml"}}, "response_format", "xml"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_field_is_named(name: str, one_p_one_d: SyncDeployment, client: httpx.Client) -> None:
    """400, the field, the value and the reason; then a good request works."""
    changes, param, word = WRONG[name]
    reply = client.post(one_p_one_d.url + "/v1/completions", json={**GOOD, **changes})
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert word in error["message"]
    assert client.post(one_p_one_d.url + "/v1/completions", json=GOOD).status_code == 200


@pytest.mark.parametrize(
    "body", [b"{", b"", b"[]", b'"text"', b'{"prompt": "\xff\xfe"}', b'{"prompt": "a"} extra', b"\x00" * 100]
)
def test_what_is_not_a_json_object_is_refused(body: bytes, one_p_one_d: SyncDeployment, client: httpx.Client) -> None:
    """400 in OpenAI's shape for broken JSON and invalid UTF-8."""
    for path in ("/v1/completions", "/v1/chat/completions"):
        reply = client.post(one_p_one_d.url + path, content=body, headers={"content-type": "application/json"})
        assert reply.status_code == 400, reply.text
        assert reply.json()["error"]["message"]
    assert client.post(one_p_one_d.url + "/v1/completions", json=GOOD).status_code == 200


def test_chat_without_messages_or_with_an_unknown_role_is_refused(
    one_p_one_d: SyncDeployment, client: httpx.Client
) -> None:
    """The field at fault is named."""
    for messages in ([], None, "hello", [{"content": "no role"}], [{"role": 5, "content": "x"}]):
        body = {"messages": messages, "max_tokens": 3}
        reply = client.post(one_p_one_d.url + "/v1/chat/completions", json=body)
        assert reply.status_code == 400, reply.text
        assert reply.json()["error"]["param"] == "messages"


def test_unknown_paths_and_methods(one_p_one_d: SyncDeployment, client: httpx.Client) -> None:
    """404 and 405 in OpenAI's shape."""
    missing = client.get(one_p_one_d.url + "/v1/nothing")
    assert (missing.status_code, "error" in missing.json()) == (404, True)
    wrong = client.get(one_p_one_d.url + "/v1/completions")
    assert (wrong.status_code, "error" in wrong.json()) == (405, True)
