"""Reads a reply into what can be compared: without ids, times and fingerprints, and streams put together. Pure."""

import json
from dataclasses import dataclass
from typing import Any

#: These differ between any two answers.
_OWN = frozenset({"id", "created", "system_fingerprint", "kv_transfer_params", "request_id"})
_CALL_IDS = frozenset({"id"})
#: Strings that a stream sends in parts, to be joined. Other values replace earlier ones.
_PARTS = frozenset({"text", "content", "reasoning", "reasoning_content", "refusal", "arguments"})


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    path: str  #: ``x-kvbelt-path``; empty: the server is no proxy
    said: Any  #: the JSON body, or a stream put together


def read(status: int, path: str, body: bytes, *, model: str) -> Answer:
    """Read one reply.

    Args:
        status: HTTP status.
        path: of the header ``x-kvbelt-path``.
        body: the whole body.
        model: the server's name for its model; names may differ.
    """
    if body.startswith((b"data:", b":")):
        said, path = _stream(body, path)
        if "error" in said and not said["choices"]:
            # vLLM sends the head of a stream before its engine has looked at the request.
            status, said = _status_of(said["error"], status), {"error": said["error"]}
    else:
        said = _json(body)
    return Answer(status, path, _comparable(said, model))


def _status_of(error: Any, status: int) -> int:
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) else status


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode("utf-8", errors="replace")


def _stream(body: bytes, path: str) -> tuple[Any, str]:
    whole: dict[str, Any] = {"keys": {}, "done": False}
    for line in body.decode("utf-8", errors="replace").splitlines():
        if line.startswith(": x-kvbelt-path "):
            path = line.removeprefix(": x-kvbelt-path ")
        elif line.startswith("data: "):
            event = _json(line.removeprefix("data: ").encode())
            if isinstance(event, dict):
                _note_keys(whole["keys"], "event", event)
                _merge(whole, event)
            else:
                whole["done"] = event == "[DONE]"
    whole["choices"] = [whole["choices"][index] for index in sorted(whole.get("choices", ()))]
    return whole, path


def _note_keys(keys: dict[str, list[str]], name: str, part: dict[str, Any]) -> None:
    """Which keys events have, choices and deltas. How many events there are depends on time."""
    keys[name] = sorted({*keys.get(name, ()), *part})
    for choice in part.get("choices") or ():
        _note_keys(keys, "choice", choice)
    if isinstance(part.get("delta"), dict):
        _note_keys(keys, "delta", part["delta"])


def _merge(into: dict[str, Any], part: dict[str, Any]) -> None:
    for key, value in part.items():
        if key in ("choices", "tool_calls"):
            found = into.setdefault(key, {})
            for item in value or ():
                _merge(found.setdefault(item.get("index", 0), {}), item)
        elif value is None:
            into.setdefault(key, None)
        elif isinstance(value, dict):
            if not isinstance(into.get(key), dict):
                into[key] = {}
            _merge(into[key], value)
        elif isinstance(value, list) or key in _PARTS:
            into[key] = value if into.get(key) is None else into[key] + value
        else:
            into[key] = value


def _comparable(value: Any, model: str, own: frozenset[str] = _OWN) -> Any:
    if isinstance(value, list):
        return [_comparable(item, model, own) for item in value]
    if not isinstance(value, dict):
        return "(its model)" if value == model and model else value
    found = {}
    for key, item in value.items():
        if key not in own:
            inner = _CALL_IDS if key == "tool_calls" else frozenset[str]() if key == "choices" else own
            found[key] = _comparable(item, model, inner)
    return found
