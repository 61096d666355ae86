"""Bodies that are taken apart and put together equal what a JSON parser gives."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvbelt.errors import RequestError
from kvbelt.limits import Limits
from kvbelt.proxy.request import splice
from kvbelt.proxy.request.body import ClientBody
from kvbelt.proxy.request.fields import KnownFields
from kvbelt.proxy.request.prefill_answer import PrefillAnswer
from kvbelt.wire.handoff import DecodeHandoff, PrefillHandoff, ReceiverAddress
from kvbelt.wire.json_body import PLACEHOLDER, cut_numbers

PREFILL = PrefillHandoff("t1", ReceiverAddress("e", "h", 1, 2), 5.0)
DECODE = DecodeHandoff("t1", 5.0)
PREFILL_JSON = {
    "transfer_id": "t1",
    "receiver": {"engine_id": "e", "host": "h", "init_port": 1, "alloc_port": 2},
    "deadline_seconds": 5.0,
}
DECODE_JSON = {"transfer_id": "t1", "deadline_seconds": 5.0}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
prompts = st.text() | st.lists(st.integers(0, 10**6), min_size=1) | st.lists(st.text(), min_size=1)
extras = st.dictionaries(
    st.text().filter(lambda n: n not in ("prompt", "kv_transfer_params"))
    .filter(lambda n: n not in ClientBody.__slots__), json_values, max_size=4,
).map(lambda d: {name: value for name, value in d.items() if name.startswith(("x", '"', "é", "\n"))})  # fmt: skip
spacings = st.sampled_from([None, (",", ":"), (" , ", " : "), (",\n", ":\t")])


def read(pieces):
    return json.loads(b"".join(pieces))


def written(body, separators):
    """A body as a client might write it."""
    return json.dumps(body, separators=separators, ensure_ascii=len(str(body)) % 2 == 0).encode()


@settings(deadline=None)
@given(prompt=prompts, extra=extras, separators=spacings, limit=st.integers(2, 500))
@example(prompt=[1, 2], extra={'x"prompt': [3]}, separators=None, limit=5)
@example(prompt="a", extra={"x": {"prompt": [1]}}, separators=None, limit=5)
@example(prompt=[7], extra={"x": {"prompt": [1]}}, separators=(",", ":"), limit=5)
def test_the_legs_bodies_are_the_clients_with_the_overrides(prompt, extra, separators, limit):
    """Each call's body equals the dictionary that one would build by hand."""
    request = {
        **extra, "prompt": prompt, "max_tokens": limit, "stream": True, "n": None, "min_tokens": 3, "temperature": 0,
        "stream_options": {"include_usage": True}, "logprobs": None, "kv_transfer_params": {"transfer_id": "stolen"},
        "seed": 7,
    }  # fmt: skip
    client = ClientBody(written(request, separators), chat=False)
    plain = {name: value for name, value in request.items() if name != "kv_transfer_params"}
    assert read(client.plain()) == plain
    dropped = ("stream_options", "logprobs", "seed")
    forced = {"max_tokens": 1, "n": 1, "stream": False, "return_token_ids": True, "min_tokens": 1}
    expected = {name: value for name, value in plain.items() if name not in dropped} | forced
    assert read(client.for_prefill(PREFILL)) == expected | {"kv_transfer_params": PREFILL_JSON}
    assert read(client.for_decode(DECODE)) == plain | {"kv_transfer_params": DECODE_JSON}
    continued = read(client.for_continuation(b"[1, 2]", 3, limit - 1, DECODE))
    assert continued == {
        "prompt": [1, 2, 3], "max_tokens": limit - 1, "stream": True, "temperature": 0,
        "stream_options": {"include_usage": True}, "kv_transfer_params": DECODE_JSON, "seed": 7,
    }  # fmt: skip


def test_a_chat_leg_limits_tokens_by_both_names():
    """max_completion_tokens counts if both are sent."""
    body = {"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 9, "max_tokens": 5}
    client = ClientBody(json.dumps(body).encode(), chat=True)
    assert client.fields.limit == 9
    leg = read(client.for_prefill(PREFILL))
    assert (leg["max_tokens"], leg["max_completion_tokens"]) == (1, 1)
    assert leg["messages"] == body["messages"]


def test_a_name_sent_twice_counts_the_last_time():
    """The last value counts in every call, as in the worker's parser."""
    client = ClientBody(b'{"prompt":[1],"prompt":"b","max_tokens":3,"max_tokens":4}', chat=False)
    assert client.fields.limit == 4
    assert read(client.for_decode(DECODE))["prompt"] == "b"


def test_an_escaped_name_is_the_same_name():
    """A client cannot smuggle a second prompt, or a handoff, behind an escape."""
    body = rb'{"prompt":[1,2],"pr\u006fmpt":"real","kv\u005ftransfer_params":{"transfer_id":"x"}}'
    client = ClientBody(body, chat=False)
    assert read(client.for_decode(DECODE)) == {"prompt": "real", "kv_transfer_params": DECODE_JSON}
    assert read(client.plain()) == {"prompt": "real"}


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("x", 1), ([1, 2], 1), (["a"], 1), (["a", "b"], 2), ([[1], [2]], 2), ([[1]], 1), ([], 1), ("", 1), (5, 1)],
)
def test_prompts_are_counted(prompt, count):
    """One text or list of ids is one prompt; the worker refuses anything else."""
    assert ClientBody(json.dumps({"prompt": prompt}).encode(), chat=False).num_prompts == count


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"prompt": ["x"] * 5}, "prompt"),
        ({"prompt": [[5]] * 5}, "prompt"),
        ({"prompt": ["x"] * 3, "n": 2}, "prompt"),
        ({"prompt": "x", "n": 5}, "n"),
        ({"prompt": ["\\"] * 500}, "prompt"),
        ({"prompt": ['"'] * 500}, "prompt"),
    ],
)
def test_too_many_answers_are_refused(more, param):
    """Prompts times n; the message says how many were asked for at most."""
    with pytest.raises(RequestError, match="4 at most") as caught:
        ClientBody(json.dumps(more).encode(), chat=False, limits=Limits(sequences=4))
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(("more", "fits"), [({}, False), ({"truncate_prompt_tokens": 2}, True)])
def test_ids_beyond_the_longest_context_are_refused_without_a_look_at_each(more, fits):
    """Unless the worker is to truncate them."""
    body = json.dumps({"prompt": [5] * 9} | more).encode()
    ClientBody(body, chat=False, context=9)
    if fits:
        ClientBody(body, chat=False, context=8)
        return
    with pytest.raises(RequestError, match="context length is 8 tokens; the prompt has 9"):
        ClientBody(body.replace(b"5]", b"five]"), chat=False, context=8)


@pytest.mark.parametrize("separators", [None, (",", ":")])
@settings(deadline=None)
@given(
    st.lists(st.text('a",[]\\{} ', max_size=5), min_size=1, max_size=9) | st.lists(st.just([5]), min_size=1, max_size=9)
)
def test_as_many_answers_as_allowed_are_not_refused(separators, prompts):
    """Whatever the texts contain."""
    body = json.dumps({"prompt": prompts}, separators=separators).encode()
    assert ClientBody(body, chat=False, limits=Limits(sequences=len(prompts))).num_prompts == len(prompts)
    with pytest.raises(RequestError):
        ClientBody(body, chat=False, limits=Limits(sequences=len(prompts) - 1))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"[]", None),
        (b"nonsense", None),
        (b'{"prompt": "x"', None),
        (b'{"prompt": "\xff\xfe"}', None),
        (b'{"prompt": "x"} trailing', None),
        (b"{}", "prompt"),
        (b'{"prompt": "x", "max_tokens": "many"}', "max_tokens"),
        (b'{"prompt": "x", "max_tokens": -3}', "max_tokens"),
        (b'{"prompt": "x", "stream": "maybe"}', "stream"),
        (b'{"prompt": "x", "stop": [5]}', "stop"),
        (b'{"prompt": "x", "stream_options": {"include_usage": 7}}', "stream_options"),
        (b'{"prompt": "x", "stream_options": {"include_usage": true}}', "stream_options"),
    ],
)
def test_a_wrong_body_is_refused_with_the_field_at_fault(body, param):
    """The answer is 400 and names the field."""
    with pytest.raises(RequestError) as caught:
        ClientBody(body, chat=False)
    assert caught.value.status == 400
    assert caught.value.param == param


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_no_body_breaks_the_parser(body):
    """Any bytes are a request or a RequestError."""
    for chat in (False, True):
        try:
            ClientBody(body, chat=chat)
        except RequestError:
            continue


@settings(deadline=None)
@given(st.lists(st.integers(0, 99999), min_size=1), spacings)
def test_cutting_a_list_and_putting_it_back_changes_nothing(ids, separators):
    """The rest parses without it, and the list parses by itself."""
    body = written({"a": 1, "ids": ids, "b": [2]}, separators)
    rest, numbers = cut_numbers(body, b"ids")
    assert json.loads(bytes(numbers)) == ids
    assert json.loads(rest) == {"a": 1, "ids": json.loads(PLACEHOLDER), "b": [2]}


@pytest.mark.parametrize("value", ['"a]b"', '["a]", 1]', "[[1]]", "[{}]", "null", "[1", '{"ids": [1]}'])
def test_only_flat_lists_without_text_are_cut(value):
    """A value that could hide a bracket is left to the parser."""
    assert cut_numbers(b'{"ids": ' + value.encode() + b"}", b"ids") is None


def prefill_body(**choice):
    """A prefill worker's answer."""
    choice = {
        "index": 0,
        "text": " a",
        "finish_reason": "length",
        "token_ids": [5],
        "prompt_token_ids": [1, 2],
    } | choice
    usage = {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}
    return {"id": "cmpl-x", "created": 1, "model": "m", "choices": [choice], "usage": usage}


@pytest.mark.parametrize("separators", [None, (",", ":")])
def test_a_prefill_answer_is_read(separators):
    """Text, ids, counts and the transfer's state, whatever the spacing."""
    body = prefill_body() | {"kv_transfer_params": {"transfer_id": "t", "state": "failed", "reason": "deadline"}}
    first = PrefillAnswer(json.dumps(body, separators=separators).encode())
    assert (first.text, first.token_id, json.loads(bytes(first.prompt_token_ids))) == (" a", 5, [1, 2])
    assert (first.prompt_tokens, first.handoff.reason, first.why_not_fast(streams=True)) == (2, "deadline", None)


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ({"text": ""}, "incomplete_text"),
        ({"text": "a\ufffd"}, "incomplete_text"),
        ({"token_ids": None}, "no_token_ids"),
        ({"token_ids": [1, 2]}, "no_token_ids"),
        ({"prompt_token_ids": None}, "no_token_ids"),
        ({"prompt_token_ids": []}, "no_token_ids"),
        ({"message": {"content": "x", "reasoning_content": "y"}}, "parsed_message"),
        ({"message": {"content": "x", "tool_calls": [{}]}}, "parsed_message"),
    ],
)
def test_a_first_token_that_cannot_be_shown_is_a_reason(choice, reason):
    """The decode worker derives it again."""
    assert PrefillAnswer(json.dumps(prefill_body(**choice)).encode()).why_not_fast(streams=True) == reason


@pytest.mark.parametrize(
    ("reasoning", "streams", "reason"),
    [
        ("none", False, None), ("open", True, "parsed_message"), ("ended", True, None),
        ("ended", False, "parsed_message"),
    ],
)  # fmt: skip
def test_a_chat_is_continued_unparsed_only_where_nothing_is_parsed(reasoning, streams, reason):
    """Whatever the first token looks like: a server's parser may find reasoning behind it."""
    choice = {"message": {"content": "x"}}
    state = {"transfer_id": "t", "state": "open", "reasoning": reasoning}
    first = PrefillAnswer(json.dumps(prefill_body(**choice) | {"kv_transfer_params": state}).encode())
    assert first.why_not_fast(streams=streams) == reason


@pytest.mark.parametrize("body", [b"", b"{}", b'{"id":1}', json.dumps(prefill_body() | {"choices": []}).encode()])
def test_a_malformed_prefill_answer_is_an_error(body):
    """A malformed answer raises ValueError."""
    with pytest.raises(ValueError):
        PrefillAnswer(body)


@pytest.mark.parametrize("prompts", [("a", "b"), ([1, 2], [3])])
def test_equal_fields_are_worked_out_once(prompts):
    """Requests that differ in their prompts alone share what follows from the rest; each has its own prompt."""
    first, second = (
        ClientBody(json.dumps({"model": "shared", "prompt": prompt, "max_tokens": 7}).encode(), chat=False)
        for prompt in prompts
    )
    assert first.fields is second.fields
    assert [read(one.for_prefill(PREFILL))["prompt"] for one in (first, second)] == list(prompts)


def test_a_chat_and_a_completion_share_no_fields():
    """``logprobs: true`` is right in a chat, and a value that workers refuse in a completion."""
    fields = {"model": "shared", "logprobs": True}
    chat = ClientBody(json.dumps({"messages": [], **fields}).encode(), chat=True)
    completion = ClientBody(json.dumps({"prompt": "x", **fields}).encode(), chat=False)
    assert (chat.fields.may_be_refused, completion.fields.may_be_refused) == (False, True)


def test_kept_fields_have_an_end():
    """The oldest are forgotten, and long ones are not kept: a client cannot fill the memory."""
    known = KnownFields(chat=False)
    for number in range(300):
        members = {"user": b"%d" % number}
        known.of(members, splice.object_of(members))
    long = splice.object_of({"user": b'"%b"' % (b"x" * 4096)})
    known.of({}, long)
    assert known.get(b'{"user":299}') is not None
    assert (known.get(b'{"user":0}'), known.get(long)) == (None, None)
