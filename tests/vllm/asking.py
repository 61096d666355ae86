"""What a client and a proxy ask of vLLM servers, and what must be equal of two answers."""

import contextlib
import json
import socket
import urllib.request
from collections.abc import Iterator
from typing import Any

from tests.vllm.conftest import Deployment
from tests.vllm.servers import Server

TOKENS = 16
USAGE = "vllm:kv_cache_usage_perc"


def ask(server: Server, body: dict[str, Any]) -> tuple[str, dict[str, Any], list[Any]]:
    """The way an answer took, the answer, and what must be equal of it."""
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    data = json.dumps(
        {"model": "demo", "temperature": 0, "max_tokens": TOKENS, "return_token_ids": True, **body}
    ).encode()
    request = urllib.request.Request(server.url + path, data, {"content-type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=200) as response:  # noqa: S310 -- ours
        answer = json.loads(response.read())
        way = response.headers.get("x-kvbelt-path", "")
    usage = answer["usage"]
    parts = [usage["prompt_tokens"], usage["completion_tokens"]]
    for choice in answer["choices"]:
        message = choice.get("message") or {}
        calls = [call["function"] for call in message.get("tool_calls") or []]
        parts.append([choice.get("text"), message.get("content"), calls, choice["token_ids"], choice["finish_reason"]])
    return way, answer, parts


@contextlib.contextmanager
def client_of(server: Server, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A client that has asked for a completion, and goes away at the end of the block, whatever came."""
    data = json.dumps({"model": "demo", "temperature": 0, **body}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(head.encode() + b"\r\n\r\n" + data)
        yield client


def receiver(server: Server) -> dict[str, Any]:
    """Where a decode server takes KV."""
    body = {"model": "demo", "prompt": [1], "max_tokens": 1, "kv_transfer_params": {"kvbelt": "describe"}}
    return server.post("/v1/completions", body)["kv_transfer_params"]["receiver"]


def prefill_leg(
    deployment: Deployment, prompt: str, transfer_id: str, to: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What a proxy asks of a prefill server; ``to``: a receiver, if it is known already."""
    to = to or receiver(deployment.decode[0])
    handoff = {"transfer_id": transfer_id, "receiver": to, "deadline_seconds": 20.0}
    body = {"model": "demo", "prompt": prompt, "temperature": 0, "max_tokens": 1, "return_token_ids": True}
    return deployment.prefill[0].post("/v1/completions", body | {"kv_transfer_params": handoff})


def decode_leg(deployment: Deployment, ids: list[int], transfer_id: str, seconds: float = 20.0) -> dict[str, Any]:
    """What a proxy asks of a decode server."""
    handoff = {"transfer_id": transfer_id, "deadline_seconds": seconds}
    body = {"model": "demo", "prompt": ids, "temperature": 0, "max_tokens": TOKENS - 1, "return_token_ids": True}
    return deployment.decode[0].post("/v1/completions", body | {"kv_transfer_params": handoff})


def blocks_are_free(server: Server) -> bool:
    """By vLLM's own metrics no block is held, nothing runs or waits."""
    running = server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting")
    return server.metric(USAGE) == 0.0 and running == 0.0


def a_step(server: Server) -> None:
    """Have it do something: what it knows of its cache, and what it shows in its metrics, comes along with a step."""
    server.post("/v1/completions", {"model": "demo", "prompt": [1], "max_tokens": 1})


def forget_prefixes(server: Server) -> None:
    """Empty its prefix cache, as other prompts would in time; it must be idle. Nobody tells the connector."""
    with urllib.request.urlopen(urllib.request.Request(server.url + "/reset_prefix_cache", b""), timeout=10):  # noqa: S310
        pass


def all_free(deployment: Deployment) -> bool:
    """On both sides."""
    return all(blocks_are_free(server) for server in (*deployment.prefill, *deployment.decode))
