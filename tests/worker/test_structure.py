"""Answers that follow a grammar."""

import json

import jsonschema
import pytest

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}


@pytest.fixture
def ask(client):
    """Asks for a completion; returns its text, whole and streamed, which must be equal."""

    def asked(**changes):
        body = {"prompt": "x", "max_tokens": 100, "temperature": 0, **changes}
        whole = client.post("/v1/completions", json=body)
        assert whole.status_code == 200, whole.text
        (choice,) = whole.json()["choices"]
        lines = client.post("/v1/completions", json=body | {"stream": True}).text.split("\n\n")
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        assert "".join(event["choices"][0]["text"] for event in events) == choice["text"]
        assert choice["finish_reason"] == ("length" if changes.get("ignore_eos") else "stop")
        return choice["text"]

    return asked


@pytest.mark.parametrize(
    "changes",
    [{"temperature": 0}, {"temperature": 1, "seed": 3}, {"min_tokens": 90}, {"logprobs": 2}, {"ignore_eos": True}],
)
def test_an_answer_fits_its_schema(ask, changes):
    """Whatever else is asked for: nothing may come behind its end."""
    jsonschema.validate(json.loads(ask(response_format=FORMAT, **changes)), SCHEMA)


def test_any_object(ask):
    """``json_object``; the brace would hardly come first by itself."""
    assert isinstance(json.loads(ask(response_format={"type": "json_object"}, logit_bias={"125": 100})), dict)


@pytest.mark.parametrize(
    ("outputs", "fits"),
    [
        ({"choice": ["yes", 'say "no"']}, ("yes", 'say "no"')),
        ({"regex": "ab{3}"}, ("abbb",)),
        ({"json": {"enum": ["a", 1]}}, ('"a"', "1")),
        ({"json": '{"const": null}', "regex": None}, ("null",)),
    ],
)
def test_structured_outputs(ask, outputs, fits):
    """VLLM's own field."""
    assert ask(structured_outputs=outputs) in fits


def test_each_choice_follows_the_form_by_itself(client):
    """Drawn at chance, they are at different places of it."""
    body = {"messages": [{"role": "user", "content": "x"}], "n": 3, "max_tokens": 100, "seed": 1}
    answer = client.post("/v1/chat/completions", json=body | {"response_format": FORMAT}).json()
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert len(set(texts)) > 1
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize(
    "changes",
    [
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strange"}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["x" * 70000]}}}},
        {"response_format": "json"},
        {"structured_outputs": {}},
        {"structured_outputs": {"regex": "("}},
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        {"structured_outputs": {"choice": []}},
        {"structured_outputs": {"grammar": "root ::= x"}},
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
    ],
)
def test_what_is_no_form_is_refused(client, changes):
    """400, with the field's name."""
    reply = client.post("/v1/completions", json={"prompt": "x", **changes})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, next(iter(changes)))


def test_text_is_any_text(client):
    """As if the field was not there."""
    answers = [
        client.post("/v1/completions", json={"prompt": "x", "temperature": 0, "max_tokens": 4, **changes}).json()
        for changes in ({}, {"response_format": {"type": "text"}}, {"response_format": None})
    ]
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1


def nested(depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "outputs",
    [
        {"regex": "a" * 65537},
        {"json": nested(500)},
        {"json": {"allOf": [{"anyOf": [{"required": [f"{x}{i}"]} for x in "ab"]} for i in range(24)]}},
    ],
    ids=["long", "nested", "combinations"],
)
def test_a_form_that_is_too_large_is_refused(client, outputs):
    """400 with the field's name, by our limit or the compiler's."""
    reply = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 4, "structured_outputs": outputs})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "structured_outputs")


@pytest.mark.parametrize("regex", ["((a{1,30}){1,30}){1,30}", "(.*a.{200}){20}"])
def test_an_expression_of_many_states_is_followed(client, regex):
    """States are made as they are needed, so the answer begins at once."""
    reply = client.post(
        "/v1/completions",
        json={"prompt": "x", "max_tokens": 3, "temperature": 0, "structured_outputs": {"regex": regex}},
    )
    assert reply.status_code == 200


def test_a_form_that_costs_too_much_is_given_up(client):
    """400, when it shows: here there are ever more ways to go on."""
    body = {"prompt": "x", "max_tokens": 3, "temperature": 0, "structured_outputs": {"regex": "(a?){300}a{300}"}}
    reply = client.post("/v1/completions", json=body)
    assert (reply.status_code, "simpler" in reply.json()["error"]["message"]) == (400, True)
    assert client.post("/v1/completions", json=body | {"structured_outputs": None}).status_code == 200
