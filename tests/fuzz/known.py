"""In what the embedded engine and vLLM differ on purpose: docs/differences.md says why, in a table of these names."""

from collections.abc import Callable, Mapping
from typing import Any

from kvbelt.wire.fields import FIELDS
from tests.fuzz.requests import Drawn

Answer = dict[str, Any]


def refused(answer: Answer) -> bool:
    """VLLM begins some streams before it knows, and refuses in an event."""
    return bool(answer["status"] != 200 or (answer.get("streamed") and "error" in answer["body"]))


def _param(answer: Answer) -> str | None:
    error = answer.get("error") or (answer.get("body") or {}).get("error") or {}
    return error.get("param") if isinstance(error, dict) else None


def _message(answer: Answer) -> str:
    return str(answer.get("error") or (answer.get("body") or {}).get("error") or "")


def _not_computed(request: Drawn, ours: Answer, _: Answer) -> bool:
    name = _param(ours)
    asks = name in ("best_of", "structured_outputs") or (name in FIELDS and FIELDS[name].refused_but is not None)
    return asks and refused(ours)


#: By name: whether this is how two answers to a request differ.
DIFFERENCES: Mapping[str, Callable[[Drawn, Answer, Answer], bool]] = {
    "fields that the embedded engine does not compute": _not_computed,
    "content types": lambda request, ours, theirs: (
        request.content_type is None or (ours["status"], theirs["status"]) == (415, 400)
    ),
    "several greedy choices": lambda _, ours, theirs: not refused(ours) and "greedy" in _message(theirs),
    "max_tokens beyond the context": lambda _, ours, theirs: _error(ours, "code") == "context_length_exceeded",
    "numbers and texts that JSON does not have": lambda _, ours, theirs: "not a JSON object" in _message(ours),
    "size of bodies, choices, bad words, stop strings, parts of messages": lambda _, ours, theirs: (
        refused(ours) and _param(ours) in ("n", "bad_words", "stop")
    ),
    "large repetition penalties": lambda _, ours, theirs: refused(ours) and _param(ours) == "repetition_penalty",
    "arguments of the function that renders": lambda _, ours, theirs: "no variable of a chat" in _message(ours),
    "texts as parts of a message": lambda _, ours, theirs: not refused(ours) and "ContentPartText" in _message(theirs),
    "which of two errors is told": lambda _, ours, theirs: refused(ours) and refused(theirs),
}


def _error(answer: Answer, name: str) -> Any:
    error = answer.get("error")
    return error.get(name) if isinstance(error, dict) else None


def known(request: Drawn, ours: Answer, theirs: Answer) -> str | None:
    """The name of the difference, if it is one of these."""
    return next((name for name, is_it in DIFFERENCES.items() if is_it(request, ours, theirs)), None)
