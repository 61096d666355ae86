"""Tokens as bytes: what logprobs say of each token fits the answer's text, whole and streamed."""

import json

import pytest

from kvbelt.engine.api import TokenLogprob, TopLogprob
from kvbelt.worker.answers import _alternatives

EMOJI = list("😊é🚀".encode())


@pytest.fixture
def ask(client):
    """Asks for these bytes as the answer, whole or streamed; returns its choices or the stream's."""

    def asked(wanted, path="/v1/completions", **changes):
        body = {"max_tokens": len(wanted), "temperature": 0, "ignore_eos": True, "allowed_token_ids": wanted, **changes}
        if path == "/v1/completions":
            body = {"prompt": "x", "logprobs": 2, **body}
        else:
            body = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 2, **body}
        reply = client.post(path, json=body)
        assert reply.status_code == 200, reply.text
        if not body.get("stream"):
            return reply.json()["choices"]
        events = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line.startswith("data: {")]
        return [choice for event in events for choice in json.loads(event)["choices"]]

    return asked


def _said(choices):
    """The tokens, offsets and text that choices tell together."""
    tokens = [token for one in choices if one["logprobs"] for token in one["logprobs"]["tokens"]]
    offsets = [offset for one in choices if one["logprobs"] for offset in one["logprobs"]["text_offset"]]
    return tokens, offsets, "".join(one["text"] for one in choices)


# A tokenizer with one token a byte writes any character of several bytes in as many tokens.


@pytest.mark.parametrize("prompt", ["x", [*b"x", *EMOJI[:2]]])
@pytest.mark.parametrize("wanted", [EMOJI[:4], [0xC3], [0xC3, 0xA9], list(b"ab")])
def test_offsets_are_places_in_the_text_whole_and_streamed(ask, prompt, wanted):
    """Also behind a prompt that ends within a character, and in an answer that does."""
    whole, streamed = (_said(ask(wanted, prompt=prompt, stream=stream)) for stream in (False, True))
    assert whole == streamed
    _, offsets, text = whole
    assert offsets == sorted(offsets)
    assert not text or offsets[-1] < len(text)


def test_offsets_count_what_is_echoed(ask):
    """The answer's text begins behind the prompt."""
    choices = ask(list(b"ab"), prompt="four", echo=True, logprobs=None)
    assert choices[0]["text"].startswith("four")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["x", "x😊"])
@pytest.mark.parametrize("wanted", [list("é".encode()), list("ü".encode()), list(b"abc")])
def test_bytes_join_to_the_text(ask, wanted, prompt, stream):
    """As far as the answer ends with a character."""
    message = [{"role": "user", "content": prompt}]
    choices = ask(wanted, "/v1/chat/completions", messages=message, stream=stream)
    text = "".join(one.get("delta", one.get("message")).get("content", "") for one in choices)
    entries = [entry for one in choices if one["logprobs"] for entry in one["logprobs"]["content"]]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode(errors="replace") == text


def test_a_token_that_is_hidden_has_no_bytes(ask):
    """The end of an answer is no part of its text."""
    (choice,) = ask([256], "/v1/chat/completions", ignore_eos=False)
    assert choice["message"]["content"] == ""
    assert [entry["bytes"] for entry in choice["logprobs"]["content"]] == [None]


def test_a_token_that_is_no_text_is_named_by_its_bytes(ask):
    """So two of them are not one."""
    (choice,) = ask([0xC3, 0xC4])
    assert set(choice["logprobs"]["tokens"]) <= {"bytes:\\xc3", "bytes:\\xc4"}


def test_tokens_may_be_named_by_their_ids(ask):
    """``return_tokens_as_token_ids``, also the alternatives."""
    (choice,) = ask([97], return_tokens_as_token_ids=True)
    assert choice["logprobs"]["tokens"] == ["token_id:97"]
    assert all(name.startswith("token_id:") for name in choice["logprobs"]["top_logprobs"][0])


def test_alternatives_with_one_text_do_not_overwrite_each_other():
    """The text is the chosen token's; the other shows its id."""
    top = (TopLogprob(5, "a", b"a", -0.5), TopLogprob(6, "b", b"b", -1.5))
    assert _alternatives(TokenLogprob(7, "a", b"a", 0, -2.0, top), by_id=False) == {
        "token_id:5": -0.5,
        "b": -1.5,
        "a": -2.0,
    }


@pytest.mark.parametrize("most", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
def test_the_prompt_is_echoed_with_its_logprobs(ask, most, stream):
    """The first token has none; with ``max_tokens`` 0 there is no other token."""
    choices = ask([97], prompt="é ab", echo=True, max_tokens=most, stream=stream)
    tokens, offsets, text = _said(choices)
    values = [value for one in choices if one["logprobs"] for value in one["logprobs"]["token_logprobs"]]
    assert text == "é ab" + "a" * most
    assert len(tokens) == len(values) == 5 + most
    assert offsets == [0, 0, 1, 2, 3, 4][: 5 + most]
    assert values[0] is None
    assert all(value < 0 for value in values[1:])
    assert choices[-1]["finish_reason"] == "length"


def test_a_token_that_is_left_out_is_not_counted(client):
    """``max_tokens`` 0."""
    body = {"prompt": ["ab", "c"], "max_tokens": 0, "echo": True, "logprobs": 1}
    answer = client.post("/v1/completions", json=body).json()
    assert [choice["text"] for choice in answer["choices"]] == ["ab", "c"]
    assert answer["usage"]["completion_tokens"] == 0


def test_nothing_is_echoed_without_being_asked_for(client):
    """``max_tokens`` 0 without ``echo`` asks for nothing."""
    reply = client.post("/v1/completions", json={"prompt": "ab", "max_tokens": 0})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "max_tokens")
