"""Tools: what a request may call, the grammar of a call that it must make, and calls found in an answer.

A call is written as Hermes, Qwen and SmolLM models do: ``<tool_call>``, an object with name and arguments,
``</tool_call>``. An answer that must have calls follows a grammar of that form. One reader finds calls in either case,
whole and streamed. What looks like a call and is none stays text.
"""

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llguidance import LLMatcher

from kvbelt.errors import RequestError
from kvbelt.wire.requests import ChatRequest, CompletionRequest
from kvbelt.worker.structure import JSON_STYLE, Form, require_size

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_DEFINITIONS = ("$defs", "definitions")


@dataclass(frozen=True, slots=True)
class Tools:
    names_one: bool  #: the client has chosen the tool, so that its call is no decision of the model's
    most_calls: int | None
    form: Form | None  #: of the answer; None: any text


def tools_of(request: CompletionRequest | ChatRequest, form: Form | None) -> Tools | None:
    """None: nothing may be called. ``form``: what the request wants else. Raises RequestError 400."""
    if not isinstance(request, ChatRequest):
        return None
    tools, choice = request.tools, request.tool_choice
    if tools is not None and not tools:
        raise RequestError("tools is empty; send at least one tool, or leave it out", param="tools")
    if choice == "none":
        return None
    if tools is None:
        if choice is not None:
            raise RequestError("tool_choice needs tools; send them, or leave it out", param="tool_choice")
        return None
    functions = [_function(tool) for tool in tools]
    most = 1 if request.parallel_tool_calls is False else None
    if choice is None or choice == "auto":
        return Tools(names_one=False, most_calls=most, form=_beside(form, functions, most))
    # A demanded call counts more than a form of the answer: agents send both.
    if choice == "required":
        return Tools(names_one=False, most_calls=most, form=_form(functions, most))
    name = _chosen(choice)
    if request.structured_outputs is not None:
        raise RequestError(
            "structured_outputs and a tool_choice that names a function exclude each other; leave one out",
            param="structured_outputs",
        )
    chosen = [function for function in functions if function["name"] == name]
    if not chosen:
        raise RequestError(f"tool_choice names {name!r:.80}, which is none of the tools", param="tool_choice")
    return Tools(names_one=True, most_calls=1, form=_form(chosen[:1], 1))


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    function = tool.get("function")
    if (
        tool.get("type", "function") != "function"
        or not isinstance(function, dict)
        or not isinstance(function.get("name"), str)
        or not isinstance(function.get("parameters"), dict | None)
    ):
        raise RequestError(
            "tools has one that is not of type 'function' with a function's name and, as an object, its parameters",
            param="tools",
        )
    return function


def _chosen(choice: str | Mapping[str, Any]) -> str:
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise RequestError(
            f"tool_choice is {choice!s:.80}; send none, auto, required, or the function with its name",
            param="tool_choice",
        )
    return name


def _form(functions: list[Mapping[str, Any]], most: int | None) -> Form:
    rules, lark = ["start: calls"], _calls(functions, most)
    return Form(LLMatcher.grammar_from_lark("\n".join(rules + lark)), "tools")


def _beside(form: Form | None, functions: list[Mapping[str, Any]], most: int | None) -> Form | None:
    """Calls, or an answer that fits the client's schema."""
    if form is None or form.schema is None:
        return form
    schema = json.dumps({**form.schema, "x-guidance": JSON_STYLE})
    rules = ["start: calls | value", f"value: %json {schema}", *_calls(functions, most)]
    return Form(LLMatcher.grammar_from_lark("\n".join(rules)), form.param)


def _calls(functions: list[Mapping[str, Any]], most: int | None) -> list[str]:
    rules = [
        "calls: call" if most == 1 else 'calls: call ("\\n" call)*',
        f'call: "{_OPEN}\\n" ({" | ".join(f"tool{i}" for i in range(len(functions)))}) "\\n{_CLOSE}"',
    ]
    rules += [f"tool{i}: %json {json.dumps(_schema(function))}" for i, function in enumerate(functions)]
    require_size("\n".join(rules), "tools")
    return rules


def _schema(function: Mapping[str, Any]) -> dict[str, Any]:
    parameters = dict(function.get("parameters") or {"type": "object"})
    # References name definitions from the root on.
    definitions = {name: parameters.pop(name) for name in _DEFINITIONS if name in parameters}
    return {
        "x-guidance": JSON_STYLE,
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
        **definitions,
    }


@dataclass(frozen=True, slots=True)
class Call:
    name: str
    arguments: str  #: as JSON
    id: str = field(default_factory=lambda: f"chatcmpl-tool-{uuid.uuid4().hex}")


class Reader:
    """Takes an answer's text as it comes, and gives out what is text and what are calls."""

    def __init__(self, most_calls: int | None) -> None:
        self._most = most_calls
        self._held = ""  #: from what may be the beginning of a call on
        self._blank = ""  #: space at the beginning or behind a call: none of the content unless text follows
        self._said = False  #: there was text since
        self._inside = False
        self.calls: list[Call] = []
        self.content = ""

    def push(self, text: str, *, last: bool) -> tuple[str, list[Call]]:
        """What is known now: text, and calls behind it."""
        self._held += text
        said, before = "", len(self.calls)
        while True:
            if self._inside:
                if not self._close(last=last):
                    break
            elif (at := self._held.find(_OPEN)) >= 0:
                said += self._say(self._held[:at])
                self._held, self._inside = self._held[at + len(_OPEN) :], True
            else:
                keep = 0 if last else _may_open(self._held)
                cut = len(self._held) - keep
                said += self._say(self._held[:cut])
                self._held = self._held[cut:]
                break
        if last:
            rest = _OPEN + self._held if self._inside else ""
            said += self._say(rest)
            if not self.calls:
                said += self._blank
        self.content += said
        return said, self.calls[before:]

    def _close(self, *, last: bool) -> bool:
        """End the call that is open, if its end is there. A model that stops may leave the end out."""
        end = self._held.find(_CLOSE)
        while end >= 0:
            if self._take(self._held[:end]):
                self._held, self._inside = self._held[end + len(_CLOSE) :], False
                return True
            end = self._held.find(_CLOSE, end + 1)  # a text among the arguments may have it
        if last and self._take(self._held):
            self._held, self._inside = "", False
            return True
        return False

    def _take(self, text: str) -> bool:
        try:
            said = json.loads(text)
        except (ValueError, RecursionError):
            return False
        if not isinstance(said, dict) or not isinstance(said.get("name"), str):
            return False
        arguments = said.get("arguments", {})
        self._blank, self._said = "", False
        if self._most is None or len(self.calls) < self._most:
            shown = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            self.calls.append(Call(said["name"], shown))
        return True

    def _say(self, text: str) -> str:
        if not self._said and not text.strip():
            self._blank += text
            return ""
        said, self._blank, self._said = self._blank + text, "", True
        return said


def _may_open(text: str) -> int:
    """Length of the longest end of the text that begins a call."""
    return next((n for n in range(min(len(text), len(_OPEN) - 1), 0, -1) if _OPEN.startswith(text[-n:])), 0)
