"""``GET /openapi.json``: what clients may ask, from the shapes of requests and the list of fields."""

from collections.abc import Iterable
from functools import cache
from typing import Any

import msgspec

from kvbelt import __version__
from kvbelt.wire.about import About
from kvbelt.wire.fields import CHATS_ONLY, COMPLETIONS_ONLY, FIELDS
from kvbelt.wire.health import ProxyHealth
from kvbelt.wire.requests import ChatRequest, CompletionRequest

PATH = "/openapi.json"

_REF = "#/components/schemas/"
_DESCRIPTION = (
    "OpenAI's completions and chat completions, served by prefill and decode workers. What an engine has beside "
    "these (/v1/responses, /v1/embeddings, /tokenize, …) is passed on to it."
)


class Error(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: int | str | None


class ErrorAnswer(msgspec.Struct):
    error: Error


class ModelCard(msgspec.Struct):
    id: str
    object: str


class ModelList(msgspec.Struct):
    object: str
    data: list[ModelCard]


@cache
def document() -> bytes:
    shapes = (CompletionRequest, ChatRequest, ErrorAnswer, ModelCard, ModelList, ProxyHealth, About)
    _, schemas = msgspec.json.schema_components(shapes, ref_template=_REF + "{name}")
    _add_other_fields(schemas["CompletionRequest"], CHATS_ONLY | {"messages"})
    _add_other_fields(schemas["ChatRequest"], COMPLETIONS_ONLY | {"prompt"})
    paths = {
        "/v1/completions": {"post": _generation("createCompletion", "CompletionRequest")},
        "/v1/chat/completions": {"post": _generation("createChatCompletion", "ChatRequest")},
        "/v1/models": {"get": _operation("listModels", _json("ModelList"))},
        "/v1/models/{model}": {"get": _operation("retrieveModel", _json("ModelCard"), ["model"])},
        "/health": {"get": _operation("health", _json("ProxyHealth"), **{"503": _json("ProxyHealth")})},
        "/kvbelt/about": {"get": _operation("about", _json("About"))},
        "/metrics": {"get": _operation("metrics", {"text/plain": {"schema": {"type": "string"}}})},
        PATH: {"get": _operation("describe", {"application/json": {"schema": {"type": "object"}}})},
    }
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": "kvbelt", "version": __version__, "description": _DESCRIPTION},
            "paths": paths,
            "components": {"schemas": schemas},
        }
    )


def _add_other_fields(schema: dict[str, Any], unknown: Iterable[str]) -> None:
    """Fields of which the engines alone know the types."""
    for name in sorted(FIELDS.keys() - schema["properties"].keys() - set(unknown)):
        schema["properties"][name] = {}


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF + name}}}


def _operation(name: str, content: dict[str, Any], in_path: Iterable[str] = (), **others: Any) -> dict[str, Any]:
    answers = {"200": content, **others, "4XX": _json("ErrorAnswer"), "5XX": _json("ErrorAnswer")}
    return {
        "operationId": name,
        "parameters": [{"name": one, "in": "path", "required": True, "schema": {"type": "string"}} for one in in_path],
        "responses": {status: {"description": "", "content": content} for status, content in answers.items()},
    }


def _generation(name: str, shape: str) -> dict[str, Any]:
    answer = {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {"schema": {"type": "string"}}}
    return _operation(name, answer) | {"requestBody": {"required": True, "content": _json(shape)}}
