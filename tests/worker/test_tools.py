"""Tool calls: demanded by a grammar, found in answers, whole and streamed."""

import json

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbelt.worker.tools import Reader

ADD = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/Digit"}, "b": {"$ref": "#/$defs/Digit"}},
    "required": ["a", "b"],
    "additionalProperties": False,
    "$defs": {"Digit": {"type": "integer", "minimum": 0, "maximum": 9}},
}
TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": ADD}},
    {"type": "function", "function": {"name": "now"}},
]
NAMED = {"type": "function", "function": {"name": "add"}}
WRITTEN = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'


@pytest.fixture
def ask(client):
    """Asks for a chat answer; returns its message and finish reason, equal whole and streamed."""

    def asked(**changes):
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 110, "temperature": 0, "tools": TOOLS}
        whole = client.post("/v1/chat/completions", json=body | changes)
        assert whole.status_code == 200, whole.text
        (choice,) = whole.json()["choices"]
        lines = client.post("/v1/chat/completions", json=body | changes | {"stream": True}).text.split("\n\n")
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        streamed, reason = _joined([event["choices"][0] for event in events])
        assert (streamed, reason) == (_without_ids(choice["message"]), choice["finish_reason"])
        return choice["message"], reason

    return asked


def _without_ids(message):
    calls = [{**call, "id": ""} for call in message.get("tool_calls", [])]
    return message | ({"tool_calls": calls} if calls else {})


def _joined(choices):
    content = "".join(choice["delta"].get("content", "") for choice in choices)
    calls = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
    assert [call.pop("index") for call in calls] == list(range(len(calls)))
    message = {"role": "assistant", "content": content}
    if calls:
        message |= {"content": content or None, "tool_calls": [{**call, "id": ""} for call in calls]}
    return message, choices[-1]["finish_reason"]


def test_the_named_tool_is_called(ask):
    """With arguments that fit; the client's own choice is no reason to finish."""
    message, reason = ask(tool_choice=NAMED)
    (call,) = message["tool_calls"]
    assert (message["content"], call["type"], call["function"]["name"], reason) == (None, "function", "add", "stop")
    jsonschema.validate(json.loads(call["function"]["arguments"]), ADD)


@pytest.mark.parametrize("choice", [NAMED, "required"])
def test_a_demanded_call_counts_more_than_a_form(ask, choice):
    """Agents send both: first their tool is to be called, then the answer is to fit."""
    message, _ = ask(
        tool_choice=choice, tools=TOOLS[:1], parallel_tool_calls=False, response_format={"type": "json_object"}
    )
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["add"]


@pytest.mark.parametrize("changes", [{"parallel_tool_calls": False}, {"seed": 5, "temperature": 1}])
def test_some_tool_is_called_where_one_is_required(ask, changes):
    """The model chooses which; one at a time, if the client wants it so."""
    message, reason = ask(tool_choice="required", tools=TOOLS[:1], **changes)
    assert reason in ("tool_calls", "length")
    assert {call["function"]["name"] for call in message["tool_calls"]} == {"add"}
    if "parallel_tool_calls" in changes:
        assert len(message["tool_calls"]) == 1


def test_a_call_is_found_in_an_answer(ask):
    """The text before it stays content."""
    message, reason = ask(structured_outputs={"choice": [f"I add.\n{WRITTEN}"]})
    assert (message["content"], reason) == ("I add.\n", "tool_calls")
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"a": 1, "b": 2}


def test_nothing_is_called_where_nothing_may_be(ask):
    """``tool_choice`` none, or no tools: what looks like a call is text."""
    for changes in ({"tool_choice": "none"}, {"tools": None}):
        message, reason = ask(structured_outputs={"choice": [WRITTEN]}, **changes)
        assert (message, reason) == ({"role": "assistant", "content": WRITTEN}, "stop")


def test_a_form_leaves_room_for_calls(ask):
    """An agent's last answer has a schema, and those before it may be calls."""
    schema = {"type": "object", "properties": {"sum": {"enum": [3]}}, "required": ["sum"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema | {"additionalProperties": False}}}
    for first, called in (("{", False), ("<", True)):
        message, _ = ask(
            response_format=form, logit_bias={str(ord(first)): 100}, parallel_tool_calls=False, tools=TOOLS[:1]
        )
        assert ("tool_calls" in message) is called
        assert called or json.loads(message["content"]) == {"sum": 3}


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tools": []}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "retrieval", "function": {"name": "x"}}]}, "tools"),
        ({"tools": [{"function": {"name": "x", "parameters": {"type": "odd"}}}], "tool_choice": "required"}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"function": {"name": "other"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": NAMED, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ],
)
def test_what_cannot_be_called_is_refused(client, changes, param):
    """400, with the field's name."""
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5, **changes}
    reply = client.post("/v1/chat/completions", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def read(pieces, most=None):
    """The content, and the calls with their arguments."""
    reader = Reader(most)
    said = [reader.push(piece, last=i == len(pieces) - 1) for i, piece in enumerate(pieces)]
    assert "".join(text for text, _ in said) == reader.content
    assert [call for _, calls in said for call in calls] == reader.calls
    return reader.content, [(call.name, call.arguments) for call in reader.calls]


CALL = ("f", '{"t": "é"}')
ONE = '<tool_call>{"name": "f", "arguments": {"t": "é"}}</tool_call>'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("no call", "no call", []),
        (" \n", " \n", []),
        ("", "", []),
        (ONE, "", [CALL]),
        (f"\n\n{ONE}\n{ONE}\n", "", [CALL, CALL]),
        (f"a {ONE} b", "a  b", [CALL]),
        (ONE.removesuffix("</tool_call>"), "", [CALL]),
        ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
        ("<tool_call>{broken}</tool_call> x", "<tool_call>{broken}</tool_call> x", []),
        ("<tool_call>[1]", "<tool_call>[1]", []),
        ("a <tool", "a <tool", []),
        (ONE.replace("é", "</tool_call>"), "", [("f", '{"t": "</tool_call>"}')]),
    ],
)
@given(data=st.data())
def test_calls_are_found_however_the_text_comes(text, content, calls, data):
    """In pieces of any length."""
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(pieces) == (content, calls)


def test_no_more_calls_than_wanted():
    """``parallel_tool_calls`` false: the first counts."""
    assert read([ONE, ONE], most=1) == ("", [CALL])
