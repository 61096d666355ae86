"""Messages as agents send them, as a chat template reads them."""

import pytest
from msgspec.json import encode

from kvbelt.errors import RequestError
from kvbelt.worker.messages import for_template
from kvbelt.worker.requests import parse_chat


def seen(*messages, template=""):
    """What a template is given."""
    return for_template(parse_chat(encode({"messages": messages})).messages, template)


def _calling(arguments):
    return [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": arguments}}]


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": []}])
def test_content_may_be_missing_beside_tool_calls(content):
    """It is an empty text."""
    (message,) = seen({"role": "assistant", "tool_calls": _calling("{}"), **content})
    assert message == {"role": "assistant", "content": "", "tool_calls": _calling({})}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ('{"a": 3}', {"a": 3}),
        ({"a": 3}, {"a": 3}),
        ("", {}),
        (None, {}),
        ('{"a": 3', {}),
        ("[1]", {}),
        ("[" * 100000, {}),
    ],
)
def test_arguments_are_an_object(given, expected):
    """Also where the client's text is none, since the conversation must go on."""
    (message,) = seen({"role": "assistant", "tool_calls": _calling(given)})
    assert message["tool_calls"][0]["function"]["arguments"] == expected


def test_no_tool_calls_are_left_out():
    """Templates ask whether the member is there."""
    assert seen({"role": "assistant", "content": "x", "tool_calls": []}) == [{"role": "assistant", "content": "x"}]


def test_parts_that_are_text_are_joined():
    """Of each type that has text; one without any is skipped."""
    parts = [
        {"type": "text", "text": "a"},
        {"type": "input_text", "text": "b"},
        {"type": "output_text", "text": "c"},
        {"type": "refusal", "refusal": "d"},
        {"type": "thinking", "thinking": "e"},
        {"type": "text", "text": None},
        "f",
    ]
    assert seen({"role": "tool", "tool_call_id": "c1", "content": parts}) == [
        {"role": "tool", "tool_call_id": "c1", "content": "a\nb\nc\nd\ne\nf"}
    ]


def test_a_refusal_stands_for_missing_content():
    """As OpenAI answers one, and clients send it back."""
    assert seen({"role": "assistant", "content": None, "refusal": "No."})[0]["content"] == "No."


@pytest.mark.parametrize(("template", "role"), [("{{ x }}", "system"), ("{% if role == 'developer' %}", "developer")])
def test_a_developer_is_the_system_where_the_template_knows_none(template, role):
    """And keeps its name where it is known."""
    assert seen({"role": "developer", "content": "x", "name": "dev"}, template=template) == [
        {"role": role, "content": "x", "name": "dev"}
    ]


def test_reasoning_has_both_names():
    """Templates read one of them."""
    (message,) = seen({"role": "assistant", "content": "x", "reasoning": "y"})
    assert (message["reasoning"], message["reasoning_content"]) == ("y", "y")


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]},
        {"role": "user", "content": [{"type": ["text"], "text": "x"}]},
        {"role": "user", "content": [{"text": "x"}]},
        {"role": "user", "content": [{"type": "text", "text": 5}]},
        {"role": "user", "content": 5},
        {"role": "assistant", "tool_calls": [{"type": "custom", "custom": {}}]},
        {"role": "assistant", "tool_calls": [{"type": "function"}]},
        {"content": "x"},
    ],
)
def test_what_is_no_text_is_refused(message):
    """The error names the messages."""
    with pytest.raises(RequestError) as caught:
        seen(message)
    assert caught.value.param == "messages"
