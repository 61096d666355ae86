"""Asking a server, streamed and whole, and the same answer out of both."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from kvbelt.ops.deployment import RunningProcess


@dataclass(frozen=True)
class Answer:
    """What must be equal between deployments: texts, ids and ends of every choice, and the usage."""

    texts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    finish_reasons: tuple[str | None, ...]
    usage: tuple[int, int]
    logprobs: Any = field(default=None, compare=False)
    path: str = field(default="", compare=False)  #: how it was made, as the proxy says
    cached_tokens: int | None = field(default=None, compare=False)  #: of the prompt, not computed; of a whole answer


#: One for all: making a client takes longer than asking. It keeps no connection, whose peer a test may have killed.
_CLIENT = httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=0))


def get(url: str) -> httpx.Response:
    """The current response, whatever its status. The timeout allows for a busy machine."""
    return _CLIENT.get(url)


def _path(body: dict[str, Any]) -> str:
    return "/v1/chat/completions" if "messages" in body else "/v1/completions"


def ask(url: str, body: dict[str, Any], *, stream: bool, timeout: float = 180) -> Answer:
    """One request, one answer; anything but 200 fails the test with the server's words."""
    body = {**body, "return_token_ids": True, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
        return _streamed(url, body, timeout)
    reply = _CLIENT.post(url + _path(body), json=body, timeout=timeout)
    assert reply.status_code == 200, reply.text
    answer = reply.json()
    choices = answer["choices"]
    return Answer(
        texts=tuple(c["message"]["content"] if "message" in c else c["text"] for c in choices),
        token_ids=tuple(tuple(c["token_ids"]) for c in choices),
        finish_reasons=tuple(c["finish_reason"] for c in choices),
        usage=(answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]),
        logprobs=[c["logprobs"] for c in choices],
        path=reply.headers.get("x-kvbelt-path", ""),
        cached_tokens=(answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens"),
    )


def events(reply: httpx.Response) -> Iterator[Any]:
    """The JSON of each server-sent event; ``"[DONE]"`` as it is. Comments are passed over."""
    for line in reply.iter_lines():
        if line.startswith("data: "):
            payload = line.removeprefix("data: ")
            yield payload if payload == "[DONE]" else json.loads(payload)


def _streamed(url: str, body: dict[str, Any], timeout: float) -> Answer:
    texts: dict[int, str] = {}
    ids: dict[int, list[int]] = {}
    ends: dict[int, str | None] = {}
    logprobs: dict[int, list[Any]] = {}
    usage, seen = None, []
    with _CLIENT.stream("POST", url + _path(body), json=body, timeout=timeout) as reply:
        assert reply.status_code == 200, reply.read()
        for event in events(reply):
            seen.append(event)
            if event == "[DONE]":
                continue
            assert "error" not in event, event
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                index = choice["index"]
                delta = choice["delta"].get("content", "") if "delta" in choice else choice["text"]
                texts[index] = texts.get(index, "") + (delta or "")
                ids.setdefault(index, []).extend(choice.get("token_ids") or ())
                if choice["finish_reason"] is not None:
                    assert index not in ends, "a choice ended twice"
                    ends[index] = choice["finish_reason"]
                if choice.get("logprobs"):
                    logprobs.setdefault(index, []).append(choice["logprobs"])
    assert seen[-1] == "[DONE]"
    assert len({event["id"] for event in seen[:-1]}) == 1, "one answer, one id"
    assert len({event["created"] for event in seen[:-1]}) == 1, "one answer, one time"
    assert usage is not None
    order = sorted(texts)
    return Answer(
        texts=tuple(texts[i] for i in order),
        token_ids=tuple(tuple(ids[i]) for i in order),
        finish_reasons=tuple(ends[i] for i in order),
        usage=(usage["prompt_tokens"], usage["completion_tokens"]),
        logprobs=[_joined(logprobs.get(i)) for i in order],
        path=reply.headers.get("x-kvbelt-path", ""),
    )


def _joined(parts: list[Any] | None) -> Any:
    if not parts:
        return None
    return {key: [item for part in parts for item in part[key]] for key in parts[0]}


def same_numbers(one: Any, other: Any) -> bool:
    """Equal, but for the last digits of log probabilities, which differ between batch shapes."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) < 2e-3
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_numbers(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_numbers, one, other))
    return bool(one == other)


def assert_same(answer: Answer, expected: Answer) -> None:
    """The same answer, to the token."""
    assert answer == expected
    assert same_numbers(answer.logprobs, expected.logprobs), (answer.logprobs, expected.logprobs)


def ask_all(url: str, bodies: list[dict[str, Any]], *, at_once: int, stream: bool = False) -> list[Answer]:
    """Every request, so many at a time, in order."""
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda body: ask(url, body, stream=stream), bodies))


def until(condition: Callable[[], Any], *, what: str, within: float = 60) -> Any:
    """Poll until ``condition`` gives something true; the test fails with ``what`` otherwise."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError(f"not within {within} s: {what}")


def health(process: RunningProcess) -> dict[str, Any]:
    """A worker's own health."""
    body: dict[str, Any] = get(process.url + "/health").json()
    return body


def counters(process: RunningProcess) -> tuple[int, int]:
    """Bytes received, and bytes of reused blocks."""
    belt = health(process)["belt"]
    return belt["received_bytes_total"], belt["reused_bytes_total"]


def metric(process: RunningProcess, name: str) -> float:
    """One of a worker's metrics, without labels."""
    for line in get(process.url + "/metrics").text.splitlines():
        if line.startswith(name + " "):
            return float(line.split()[1])
    raise AssertionError(f"no metric {name}")
