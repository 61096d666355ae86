"""What one client can send to take what others need: each thing that docs/limits.md bounds, as large as it gets.

    python -m benchmarks._worst URL

sends all of it again and again, four requests at once, until its standard input ends.
"""

import http.client
import itertools
import json
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
_AT_ONCE = 4
_HI = [{"role": "user", "content": "hi"}]
_MIB = 1024 * 1024


@dataclass(frozen=True)
class Worst:
    """One request. ``status``: of its answer; ``said``: a word of it."""

    path: str
    body: bytes
    status: int = 400
    said: str = ""


def _completion(prompt: Any = "hi", **more: Any) -> bytes:
    return json.dumps({"prompt": prompt, "max_tokens": 1} | more).encode()


def _chat(messages: Any = _HI, **more: Any) -> bytes:
    return json.dumps({"messages": messages, "max_tokens": 1} | more).encode()


def _tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}


def _nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for level in range(levels):
        schema = {"anyOf": [schema, {"type": "object", "properties": {f"a{level}": {"type": "integer"}}}]}
    return schema


def _schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


_CONTEXT = "context"
_FIELDS = "limit"

#: Made when they are asked for: together they have 200 MB.
WORST: Mapping[str, Callable[[], Worst]] = {
    "a million token ids": lambda: Worst(COMPLETIONS, _completion([100] * 1_000_000), said=_CONTEXT),
    "a million ids, truncated": lambda: Worst(
        COMPLETIONS, _completion([100] * 1_000_000, truncate_prompt_tokens=9), 200
    ),
    "ids in lists": lambda: Worst(COMPLETIONS, _completion([[100] * 999_000, [5]]), said=_CONTEXT),
    "16,384 messages": lambda: Worst(CHATS, _chat(_HI * 16_384), said=_CONTEXT),
    "a text of 15 MiB": lambda: Worst(COMPLETIONS, _completion("word " * (3 * _MIB)), said=_CONTEXT),
    "a text of escapes": lambda: Worst(COMPLETIONS, _completion("\n\n\n\n" * (15 * _MIB // 8)), said=_CONTEXT),
    "a text of 32 MiB": lambda: Worst(COMPLETIONS, _completion("word " * (32 * _MIB // 5)), 413),
    "a chat of 15 MiB": lambda: Worst(
        CHATS, '{{"messages":[{{"role":"user","content":"{}"}}]}}'.format("语" * (5 * _MIB)).encode(), said=_CONTEXT
    ),
    "60,000 content parts": lambda: Worst(CHATS, _chat([{"role": "user", "content": ["a"] * 60_000}]), said=_FIELDS),
    "20,000 tools": lambda: Worst(CHATS, _chat(tools=[_tool("f")] * 20_000), said=_FIELDS),
    "1,024 tools that must be called": lambda: Worst(
        CHATS, _chat(tools=[_tool(f"f{i}") for i in range(1024)], tool_choice="required"), said="characters"
    ),
    "4,096 tool calls": lambda: Worst(
        CHATS, _chat([{"role": "assistant", "tool_calls": [_tool("f")] * 4096}, *_HI]), 200
    ),
    "logit_bias of 40,000": lambda: Worst(
        COMPLETIONS, _completion(logit_bias={str(i): 1.0 for i in range(40_000)}), said=_FIELDS
    ),
    "100,000 stop strings": lambda: Worst(COMPLETIONS, _completion(stop=["a"] * 100_000), said=_FIELDS),
    "bad words of 10 MB": lambda: Worst(COMPLETIONS, _completion(bad_words=["word " * 20_000] * 100), said=_FIELDS),
    "60,000 fields": lambda: Worst(COMPLETIONS, _completion(**{f"a{i}": 1 for i in range(60_000)}), said=_FIELDS),
    "a model's name of 15 MiB": lambda: Worst(COMPLETIONS, _completion(model="m" * (15 * _MIB)), said="model"),
    "a schema of 10 MB": lambda: Worst(
        CHATS, _chat(response_format=_schema({"enum": ["a" * 100] * 100_000})), said="characters"
    ),
    "a deep schema": lambda: Worst(CHATS, _chat(response_format=_schema(_nested(400))), said="schema"),
    "a schema of 4,000 words": lambda: Worst(
        CHATS, _chat(response_format=_schema({"enum": [f"{i:06d}" for i in range(4000)]})), 200
    ),
    "an expression that grows": lambda: Worst(
        COMPLETIONS, _completion(structured_outputs={"regex": "[ab]*a[ab]{2000}"}), 200
    ),
    "1,024 answers": lambda: Worst(COMPLETIONS, _completion([[5]] * 8, n=128), 200),
    "2,000 prompts": lambda: Worst(COMPLETIONS, _completion([[5]] * 2000), said="at most"),
    "lists in lists": lambda: Worst(
        COMPLETIONS, b'{"prompt":"hi","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", said="nested"
    ),
    "a number of 15 MB": lambda: Worst(COMPLETIONS, b'{"prompt":"hi","seed":' + b"9" * (15 * _MIB) + b"}"),
    "a client's template": lambda: Worst(
        CHATS, _chat(chat_template="{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    ),
}


def send(url: str, worst: Worst, seconds: float = 600.0) -> tuple[int, str]:
    """Status and body of the answer. A server that refuses a body may close before all of it is sent."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=seconds)
    try:
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.request("POST", worst.path, worst.body, {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def main() -> None:
    url, made = sys.argv[1], [make() for make in WORST.values()]
    stop, turns, lock = threading.Event(), itertools.cycle(made), threading.Lock()

    def run() -> None:
        while not stop.is_set():
            with lock:
                worst = next(turns)
            try:
                send(url, worst)
            except OSError:
                continue

    threads = [threading.Thread(target=run, daemon=True) for _ in range(_AT_ONCE)]
    print("ready", flush=True)
    for thread in threads:
        thread.start()
    sys.stdin.read()
    stop.set()


if __name__ == "__main__":
    main()
