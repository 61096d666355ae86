"""Requests of a client and of a proxy to vLLM servers, and the parts of two answers that must be equal."""

import contextlib
import json
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

from tests.vllm.conftest import Deployment
from tests.vllm.servers import Server

TOKENS = 16
USAGE = "vllm:kv_cache_usage_perc"


def ask(server: Server, body: dict[str, Any]) -> tuple[str, dict[str, Any], list[Any]]:
    """The path, the whole answer, and the parts that must be equal."""
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
    """A client that sends a completion request and goes away at the end of the block."""
    data = json.dumps({"model": "demo", "temperature": 0, **body}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(head.encode() + b"\r\n\r\n" + data)
        yield client


def count_events(client: socket.socket) -> Callable[[], int]:
    """The number of events of a stream that have come so far."""
    found = [0]

    def read() -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                found[0] += data.count(b"data: ")

    threading.Thread(target=read, daemon=True).start()
    return lambda: found[0]


def hold_to(server: Server, itl_seconds: float) -> None:
    """Set the level between tokens, as the proxy does."""
    asked = {"kvbelt": "describe", "itl_seconds": itl_seconds}
    server.post("/v1/completions", {"model": "demo", "prompt": [1], "max_tokens": 1, "kv_transfer_params": asked})


def receiver(server: Server) -> dict[str, Any]:
    """A decode server's receiver address."""
    body = {"model": "demo", "prompt": [1], "max_tokens": 1, "kv_transfer_params": {"kvbelt": "describe"}}
    return server.post("/v1/completions", body)["kv_transfer_params"]["receiver"]


def prefill_leg(
    deployment: Deployment, prompt: str, transfer_id: str, to: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A proxy's request to a prefill server; ``to`` is the receiver, if it is known already."""
    to = to or receiver(deployment.decode[0])
    handoff = {"transfer_id": transfer_id, "receiver": to, "deadline_seconds": 20.0}
    body = {"model": "demo", "prompt": prompt, "temperature": 0, "max_tokens": 1, "return_token_ids": True}
    return deployment.prefill[0].post("/v1/completions", body | {"kv_transfer_params": handoff})


def decode_leg(
    deployment: Deployment, ids: list[int], transfer_id: str, seconds: float = 20.0, **more: Any
) -> dict[str, Any]:
    """A proxy's request to a decode server; ``more`` of the handoff."""
    handoff = {"transfer_id": transfer_id, "deadline_seconds": seconds, **more}
    body = {"model": "demo", "prompt": ids, "temperature": 0, "max_tokens": TOKENS - 1, "return_token_ids": True}
    return deployment.decode[0].post("/v1/completions", body | {"kv_transfer_params": handoff})


def blocks_are_free(server: Server) -> bool:
    """By vLLM's metrics no block is in use, and no request runs or waits."""
    running = server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting")
    return server.metric(USAGE) == 0.0 and running == 0.0


def a_step(server: Server) -> None:
    """Make the server take a step, which brings its cache's contents and its metrics up to date."""
    server.post("/v1/completions", {"model": "demo", "prompt": [1], "max_tokens": 1})


def forget_prefixes(server: Server) -> None:
    """Empty the prefix cache of an idle server. The connector is not told."""
    with urllib.request.urlopen(urllib.request.Request(server.url + "/reset_prefix_cache", b""), timeout=10):  # noqa: S310
        pass


def all_free(deployment: Deployment) -> bool:
    """Whether no block is in use on any server."""
    return all(blocks_are_free(server) for server in (*deployment.prefill, *deployment.decode))
