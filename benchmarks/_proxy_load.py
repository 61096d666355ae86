"""Stand-in engines and a load generator, cheap enough not to be the limit: raw asyncio protocols, canned answers.

The engines read a request to its end by its content-length and write bytes that were made beforehand. The
generator keeps a number of connections busy, each with one request after the other.
"""

import asyncio
import json
import time
from collections.abc import Callable
from typing import cast

PROMPT_TOKENS = 7500
#: Tokens that the decode engine streams, each an event; they leave in one write.
DECODE_EVENTS = 8
_CREATED = 1_700_000_000


def prompt_ids() -> list[int]:
    """Ids as a tokenizer of 49,152 entries gives them: mostly four or five digits."""
    return [i * 7919 % 49152 for i in range(PROMPT_TOKENS)]


def request(prompt: str | list[int]) -> bytes:
    """A client's request."""
    body = json.dumps(
        {"model": "m", "prompt": prompt, "max_tokens": DECODE_EVENTS + 1, "stream": True, "temperature": 0},
        separators=(",", ":"),
    ).encode()
    return post(body)


def post(body: bytes) -> bytes:
    """A completions request with this body."""
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(body) + body


def text_prompt(num_bytes: int = 30_000) -> str:
    """English-like text with the escapes that text has."""
    line = 'The quick brown fox said "jumps" over the lazy dog, again and again.\n'
    return (line * (num_bytes // len(line) + 1))[:num_bytes]


def _whole(body: bytes, extra: bytes = b"") -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n%bcontent-length: %d\r\n\r\n"
    return head % (extra, len(body)) + body


def prefill_answer() -> bytes:
    """One token, with the prompt's ids."""
    choice = {
        "index": 0, "text": " first", "logprobs": None, "finish_reason": "length", "stop_reason": None,
        "prompt_token_ids": prompt_ids(), "token_ids": [11],
    }  # fmt: skip
    body = {
        "id": "cmpl-x", "object": "text_completion", "created": _CREATED, "model": "m", "choices": [choice],
        "usage": {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": 1, "total_tokens": PROMPT_TOKENS + 1},
        "kv_transfer_params": {"transfer_id": "t", "state": "open", "reason": None},
    }  # fmt: skip
    return _whole(json.dumps(body, separators=(",", ":")).encode(), b"server-timing: queue;dur=0, prefill;dur=1\r\n")


def decode_answer() -> bytes:
    """A stream of events in one write."""
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
    """The contract's health."""
    receiver = {"engine_id": "d", "host": "127.0.0.1", "init_port": 7300, "alloc_port": 7400}
    body = {
        "status": "ok", "state": "ready", "role": role, "model": "m", "engine_id": role, "max_model_len": 131072,
        "load": {"running": 0, "waiting": 0, "blocks_total": 1, "blocks_free": 1},
        "receiver": receiver if role == "decode" else None,
    }  # fmt: skip
    return _whole(json.dumps(body).encode())


class Engine(asyncio.Protocol):
    """Answers every POST with the same bytes, and GET with its health."""

    def __init__(self, answer: bytes, health_answer: bytes) -> None:
        self._answer = answer
        self._health = health_answer
        self._missing = 0  # bytes of the body that have not come
        self._head = b""
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A caller is there."""
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
            self._head = b""
            if data.startswith(b"GET"):
                self._transport.write(self._health)
                return
            at = data.find(b"ontent-length: ", 0, end)
            if at < 0:
                at = data.find(b"ontent-Length: ", 0, end)
            self._missing = int(data[at + 15 : data.find(b"\r", at)]) - (len(data) - end - 4)
        if self._missing == 0:
            self._transport.write(self._answer)


class Client(asyncio.Protocol):
    """One request after the other; ``done`` is called at the end of each with its first body byte's time."""

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
        """Connected."""
        self._transport = cast(asyncio.Transport, transport)

    def send(self) -> None:
        """Begin a request."""
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
        """Close."""
        self._transport.abort()


class BothLegs(Client):
    """A client that asks both engines itself: what the proxies' figures are compared with."""

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
