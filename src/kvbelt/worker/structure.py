"""What form a request wants its answer in, as a grammar."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from llguidance import LLMatcher

from kvbelt.errors import RequestError
from kvbelt.wire.requests import ChatRequest, CompletionRequest, ResponseFormat

_MOST_CHARACTERS = 64 * 1024  #: of a schema, a pattern or choices; the compiler has limits of its own
#: One way to write a value: a small model that may write any number of spaces goes on doing so.
JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True, slots=True)
class Form:
    grammar: str
    param: str  #: the field that it came in
    schema: dict[str, Any] | None = None  #: that the grammar was made of


def form_of(request: CompletionRequest | ChatRequest) -> Form | None:
    """None: any text. Raises RequestError 400: the field asks for nothing known, or for too much."""
    wanted, outputs = request.response_format, request.structured_outputs
    if wanted is not None and wanted.type == "text":
        wanted = None
    if wanted is not None and outputs is not None:
        raise RequestError(
            "response_format and structured_outputs are both there; send one of them", param="structured_outputs"
        )
    if wanted is not None:
        schema = _schema_wanted(wanted)
        return Form(of_schema(schema, "response_format"), "response_format", schema)
    return None if outputs is None else Form(_of_structured_outputs(outputs), "structured_outputs")


def of_schema(schema: Any, param: str) -> str:
    """A JSON value that fits the schema, itself JSON, parsed or not."""
    if not isinstance(schema, str):
        require_size(msgspec.json.encode(schema), param)  # is fast, and shorter
        schema = json.dumps(schema)
    require_size(schema, param)
    try:
        grammar: str = LLMatcher.grammar_from_json_schema(schema, overrides=JSON_STYLE)
    except ValueError as error:
        raise RequestError(
            f"the schema in {param} is not valid: {error!s:.400}; correct it and send the request again", param=param
        ) from None
    return grammar


def require_size(text: str | bytes, param: str) -> None:
    if len(text) > _MOST_CHARACTERS:
        raise RequestError(
            f"{param} has {len(text)} characters; it may have {_MOST_CHARACTERS}, so send a smaller one", param=param
        )


def _schema_wanted(wanted: ResponseFormat) -> dict[str, Any]:
    kind = wanted.type
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        raise RequestError(
            f"response_format has type {kind!r:.80}; send text, json_object or json_schema", param="response_format"
        )
    schema = None if wanted.json_schema is None else wanted.json_schema.schema
    if schema is None:
        raise RequestError(
            "response_format of type json_schema has no object in json_schema.schema; send the schema there",
            param="response_format",
        )
    return schema


def _of_structured_outputs(outputs: Mapping[str, Any]) -> str:
    param = "structured_outputs"
    given = {name: value for name, value in outputs.items() if value is not None and value is not False}
    if len(given) != 1:
        raise RequestError(
            f"{param} has {sorted(given)!s:.200}; send one of json, json_object, regex and choice", param=param
        )
    ((name, value),) = given.items()
    if name == "json_object":
        return of_schema({"type": "object"}, param)
    if name == "json" and isinstance(value, str | dict):
        return of_schema(value, param)
    if name == "regex" and isinstance(value, str):
        require_size(value, param)
        regex: str = LLMatcher.grammar_from_regex(value)
        return regex
    if name == "choice" and isinstance(value, list) and value and all(isinstance(one, str) and one for one in value):
        lark = "start: " + " | ".join(json.dumps(one) for one in value)
        require_size(lark, param)
        choice: str = LLMatcher.grammar_from_lark(lark)
        return choice
    raise RequestError(
        f"{param} has {name!r:.80} in a form that is not supported; send a schema as json, a text as regex, or texts "
        "as choice",
        param=param,
    )
