"""Stand-in engines and a load generator, cheap enough not to be the limit: raw asyncio protocols, canned answers.

The engines read a request to its end by its content-length and write bytes that were made beforehand. The
generator keeps a number of connections busy, each with one request after the other.
"""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

PROMPT_TOKENS = 7500
#: Tokens that the decode engine streams, each an event; they leave in one write.
DECODE_EVENTS = 8
_CREATED = 1_700_000_000


def prompt_ids() -> list[int]:
    """Token ids as of a vocabulary of 49,152: mostly four or five digits."""
    return [i * 7919 % 49152 for i in range(PROMPT_TOKENS)]


def request(prompt: str | list[int]) -> bytes:
    """What a client asks a proxy."""
    return post(prompt=prompt, max_tokens=DECODE_EVENTS + 1, stream=True, temperature=0)


def post(**fields: object) -> bytes:
    """A completions request with these fields."""
    body = json.dumps({"model": "m", **fields}, separators=(",", ":")).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(body) + body


def text_prompt(num_bytes: int = 30_000) -> str:
    """English-like text with the usual escapes."""
    line = 'The quick brown fox said "jumps" over the lazy dog, again and again.\n'
    return (line * (num_bytes // len(line) + 1))[:num_bytes]


def _whole(body: bytes, extra: bytes = b"") -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n%bcontent-length: %d\r\n\r\n"
    return head % (extra, len(body)) + body


def prefill_answer(*, ids: bool) -> bytes:
    """One token, and where they are asked for, its id and those of the prompt."""
    choice = {"index": 0, "text": " first", "logprobs": None, "finish_reason": "length", "stop_reason": None}
    if ids:
        choice |= {"prompt_token_ids": prompt_ids(), "token_ids": [11]}
    body = {
        "id": "cmpl-x", "object": "text_completion", "created": _CREATED, "model": "m", "choices": [choice],
        "usage": {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": 1, "total_tokens": PROMPT_TOKENS + 1},
        "kv_transfer_params": {"transfer_id": "t", "state": "open", "reason": None},
    }  # fmt: skip
    return _whole(json.dumps(body, separators=(",", ":")).encode(), b"server-timing: queue;dur=0, prefill;dur=1\r\n")


def decode_answer() -> bytes:
    """A stream of events, in one write."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\nx-kvbelt-kv: received\r\n"
    parts = [head + b"transfer-encoding: chunked\r\n\r\n"]
    for i in range(DECODE_EVENTS):
        last = i == DECODE_EVENTS - 1
        choice = {
            "index": 0, "text": f" token{i}", "logprobs": None, "finish_reason": "length" if last else None,
            "stop_reason": None,
        }  # fmt: skip
        body = {"id": "cmpl-x", "object": "text_completion", "created": _CREATED + 1, "model": "m", "choices": [choice]}
        event = b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"
        parts.append(b"%x\r\n%b\r\n" % (len(event), event))
    event = b"data: [DONE]\n\n"
    parts.append(b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event))
    return b"".join(parts)


def health(role: str) -> bytes:
    """A worker's ``/health``."""
    receiver = {"engine_id": "d", "host": "127.0.0.1", "init_port": 7300, "alloc_port": 7400}
    body = {
        "status": "ok", "state": "ready", "role": role, "model": "m", "engine_id": role, "max_model_len": 131072,
        "load": {"running": 0, "waiting": 0, "blocks_total": 1, "blocks_free": 1, "blocks_cached": 0},
        "receiver": receiver if role == "decode" else None, "engine": "embedded",
    }  # fmt: skip
    return _whole(json.dumps(body).encode())


@dataclass(slots=True)
class Answered:
    """What the engines have answered, all connections together."""

    one_token: int = 0  #: prefill calls: the first half of a split request
    streams: int = 0


class Engine(asyncio.Protocol):
    """Answers each POST with one token or a stream, as it asks, and every GET with its health.

    As a real server, it returns token ids only to a proxy that asks for them, unless ``always_ids`` is set.
    """

    _STREAM, _ONE_TOKEN, _ONE_TOKEN_IDS = decode_answer(), prefill_answer(ids=False), prefill_answer(ids=True)
    _TAIL = 1024  #: bytes at a body's end: whatever a request asks for stands behind its prompt

    def __init__(self, health_answer: bytes, answered: Answered, *, always_ids: bool = False) -> None:
        self._health = health_answer
        self._always_ids = always_ids
        self._answered = answered
        self._missing = 0  # bytes of the body that have not come
        self._head = b""
        self._tail = b""
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Count to the end of the request."""
        if self._missing:
            self._missing -= len(data)
        else:
            data = self._head + data
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._head = data
                return
            self._head = self._tail = b""
            if data.startswith(b"GET"):
                self._transport.write(self._health)
                return
            at = data.find(b"ontent-length: ", 0, end)
            if at < 0:
                at = data.find(b"ontent-Length: ", 0, end)
            self._missing = int(data[at + 15 : data.find(b"\r", at)]) - (len(data) - end - 4)
        self._tail = (self._tail + data[-self._TAIL :])[-self._TAIL :]
        if self._missing == 0:
            self._answer(self._tail)

    def _answer(self, asked: bytes) -> None:
        if b'"stream":true' in asked:
            self._answered.streams += 1
            self._transport.write(self._STREAM)
        else:
            self._answered.one_token += 1
            ids = self._always_ids or b'"return_token_ids":true' in asked
            self._transport.write(self._ONE_TOKEN_IDS if ids else self._ONE_TOKEN)


class Client(asyncio.Protocol):
    """Sends one request after the other; ``done`` gets the time of each answer's first byte."""

    def __init__(self, requests: list[bytes], done: Callable[["Client", float], bool]) -> None:
        self._requests = requests  # sent in turn; the first token of a both-legs client is the first one's answer
        self._done = done
        self._turn = 0
        self._sent = 0.0
        self._first = 0.0
        self._tail = b""
        self._missing = -1
        self._transport: asyncio.Transport
        self.peers: list[Client] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def send(self) -> None:
        self._first = 0.0
        self._tail = b""
        self._missing = -1
        self._sent = time.perf_counter()
        self._transport.write(self._requests[0])

    def data_received(self, data: bytes) -> None:
        """Find the first event and the end."""
        if not self._first and b"data: " in data:
            self._first = time.perf_counter()
        tail = (self._tail + data)[-5:]
        self._tail = tail
        if tail == b"0\r\n\r\n" and self._done(self, self._first - self._sent):
            self.send()

    def close(self) -> None:
        self._transport.abort()


class BothLegs(Client):
    """A client that calls both engines itself; the proxies' figures are compared with its."""

    def __init__(self, requests: list[bytes], done: Callable[["Client", float], bool], decode: Client | None) -> None:
        super().__init__(requests, done)
        self._decode = decode

    def data_received(self, data: bytes) -> None:
        """The prefill engine's answer: count to its end, then call the decode engine."""
        if self._missing < 0:
            end = data.find(b"\r\n\r\n")
            at = data.find(b"content-length: ", 0, end)
            self._missing = int(data[at + 16 : data.find(b"\r", at)]) + end + 4
        self._missing -= len(data)
        if self._missing == 0 and self._decode is not None:
            self._missing = -1
            self._first = time.perf_counter()
            self._decode.send()

    def decoded(self) -> None:
        """The decode engine's answer is complete."""
        if self._done(self, self._first - self._sent):
            self.send()
