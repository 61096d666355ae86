"""Every field of a request works, or the request is refused and the error names it."""

import json

import pytest

from kvbelt.wire.fields import CHATS_ONLY, COMPLETIONS_ONLY, FIELDS
from kvbelt.wire.requests import ChatRequest, CompletionRequest

PROMPT = {"prompt": "the prompt", "max_tokens": 6, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


@pytest.fixture
def ask(client):
    """Asks the worker; returns the status and the answer."""

    def asked(changes, path="/v1/completions", base=PROMPT):
        reply = client.post(path, json=base | changes)
        return reply.status_code, reply.json()

    return asked


@pytest.fixture
def events(client):
    """Asks for a stream; returns its events."""

    def asked(changes):
        lines = client.post("/v1/completions", json=PROMPT | {"stream": True} | changes).text.split("\n\n")
        return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]

    return asked


def _ids(answer):
    return answer["choices"][0]["token_ids"]


def test_no_other_tokens_than_the_allowed_ones(ask):
    """``allowed_token_ids``."""
    status, answer = ask({"allowed_token_ids": [100, 101]})
    assert status == 200
    assert set(_ids(answer)) <= {100, 101}


def test_a_bad_word_of_several_tokens_is_not_generated(ask):
    """Each token of it may be, and the answer is another one."""
    text = ask({})[1]["choices"][0]["text"]
    word = ask({"allowed_token_ids": [97, 98], "logit_bias": {"97": 1}})[1]["choices"][0]["text"][:2]
    changed = ask({"allowed_token_ids": [97, 98], "logit_bias": {"97": 1}, "bad_words": [word]})[1]
    assert word not in changed["choices"][0]["text"]
    assert ask({"bad_words": ["\u2603"]})[1]["choices"][0]["text"] == text


@pytest.mark.parametrize(("side", "kept"), [(None, "pt"), ("left", "pt"), ("right", "th")])
def test_a_prompt_is_truncated_on_the_side_asked_for(ask, side, kept):
    """``truncate_prompt_tokens`` keeps the prompt's end, unless ``truncation_side`` is right."""
    answer = ask({"truncate_prompt_tokens": 2} | ({"truncation_side": side} if side else {}))[1]
    assert bytes(answer["choices"][0]["prompt_token_ids"]).decode() == kept
    assert _ids(answer) == _ids(ask({"prompt": kept})[1])


def test_a_prompt_is_truncated_to_what_there_is_room_for(ask):
    """``truncate_prompt_tokens`` -1."""
    answer = ask({"prompt": "x" * 200, "truncate_prompt_tokens": -1, "max_tokens": 1})[1]
    assert answer["usage"]["prompt_tokens"] == 127


def test_usage_stands_in_every_event(events):
    """``continuous_usage_stats`` counts up, and ends at what the last event says."""
    got = events({"stream_options": {"include_usage": True, "continuous_usage_stats": True}})
    counts = [event["usage"]["completion_tokens"] for event in got]
    assert counts == sorted(counts)
    assert counts[-2:] == [6, 6]
    assert all(event["usage"]["prompt_tokens"] == 10 for event in got)


def test_a_continued_message_is_repeated_if_asked_for(ask):
    """``echo`` in a chat."""
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well,"}]
    base = {"messages": messages, "max_tokens": 3, "temperature": 0}
    base |= {"continue_final_message": True, "add_generation_prompt": False}
    plain, echoed = (ask({"echo": echo}, "/v1/chat/completions", base)[1] for echo in (False, True))
    said = [answer["choices"][0]["message"]["content"] for answer in (plain, echoed)]
    assert said[1] == "Well," + said[0]


CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.refused_but is not None])
def test_what_is_not_computed_is_refused_by_name(ask, name):
    """And its neutral values are not; the other kind of request does not know some of the fields."""
    kinds = (("/v1/completions", PROMPT, CHATS_ONLY), ("/v1/chat/completions", CHAT, COMPLETIONS_ONLY))
    for path, base, unknown in kinds:
        status, answer = ask({name: 7}, path, base)
        assert (status == 200) if name in unknown else (status, answer["error"]["param"]) == (400, name)
        for neutral in FIELDS[name].refused_but:
            assert ask({name: neutral}, path, base)[0] == 200


def test_every_field_that_is_parsed_is_on_the_list():
    """So the proxy knows what each acts on."""
    parsed = {*CompletionRequest.__struct_fields__, *ChatRequest.__struct_fields__}
    assert parsed <= FIELDS.keys()


@pytest.mark.parametrize(
    "changes",
    [
        {"max_tokens": "4"},
        {"max_tokens": 4.0},
        {"temperature": "0"},
        {"n": True},
        {"ignore_eos": "yes"},
        {"stream": 0},
        {"prompt": [1.0, 2.0]},
        {"logit_bias": {"5": "1"}},
        {"stop_token_ids": ["5"]},
    ],
)
def test_types_are_as_lenient_as_vllms(ask, changes):
    """Where the meaning is clear."""
    assert ask(changes)[0] == 200


@pytest.mark.parametrize(
    "changes",
    [
        {"max_tokens": "4.5"},
        {"max_tokens": "four"},
        {"max_tokens": 4.5},
        {"max_tokens": [4]},
        {"temperature": "warm"},
        {"temperature": 2.1},
        {"ignore_eos": 2},
        {"ignore_eos": None},
        {"min_tokens": None},
        {"stop": 5},
        {"stop": [5]},
        {"model": 5},
        {"allowed_token_ids": []},
        {"allowed_token_ids": [-1]},
        {"bad_words": [""]},
        {"truncate_prompt_tokens": -2},
        {"truncate_prompt_tokens": 129},
    ],
)
def test_and_not_more_lenient(ask, changes):
    """400, and the error names the field."""
    status, answer = ask(changes)
    assert (status, answer["error"]["param"]) == (400, next(iter(changes)))


def test_a_stream_begins_with_the_prompt_s_ids(events):
    """``return_token_ids``: in the first event alone, also where the prompt is echoed."""
    for changes in ({}, {"echo": True}):
        ids = [event["choices"][0]["prompt_token_ids"] for event in events(changes)]
        assert bytes(ids[0]).decode() == PROMPT["prompt"]
        assert set(map(type, ids[1:])) == {type(None)}


def test_a_chat_s_stream_begins_with_the_prompt_s_ids(client):
    """In the event that has the role."""
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "temperature": 0, "stream": True}
    whole = client.post("/v1/chat/completions", json=body | {"stream": False, "return_token_ids": True}).json()
    lines = client.post("/v1/chat/completions", json=body | {"return_token_ids": True}).text.split("\n\n")
    first, *others = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert first["prompt_token_ids"] == whole["prompt_token_ids"]
    assert not any("prompt_token_ids" in event for event in others)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"user": 5}, "user"),
        ({"session_id": True}, "session_id"),
        ({"request_id": None}, "request_id"),
        ({"stream_interval": 0}, "stream_interval"),
        ({"cache_salt": "a" * 129}, "cache_salt"),
        ({"cache_salt": "a/b"}, "cache_salt"),
        ({"n": None}, "n"),
        ({"priority": None}, "priority"),
        ({"logprobs": "1"}, "logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"media_io_kwargs": {"a": {}}}, "media_io_kwargs"),
        ({"suffix": ""}, "suffix"),
        ({"response_format": {"type": "text", "json_schema": 5}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format"),
    ],
)
def test_what_vllm_refuses_is_refused(ask, changes, param):
    """A field that means nothing here has its type and its limits all the same."""
    status, answer = ask(changes)
    assert (status, answer["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"continue_final_message": True}, "continue_final_message"),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"include_reasoning": None}, "include_reasoning"),
    ],
)
def test_what_vllm_refuses_in_chats_is_refused(ask, changes, param):
    """A new turn follows by default."""
    status, answer = ask(changes, "/v1/chat/completions", CHAT)
    assert (status, answer["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    "changes",
    [
        {"stream_options": {}},
        {"priority": "0"},
        {"use_beam_search": "no"},
        {"watermarking": 0},
        {"logit_bias": {" 5": 1}},
    ],
)
def test_what_vllm_takes_is_taken(ask, changes):
    """Fields that are not computed may be sent with values that ask for nothing, in every form."""
    assert ask(changes)[0] == 200
