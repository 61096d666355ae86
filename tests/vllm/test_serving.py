"""vLLM servers with the connector against one plain vLLM server: the same answers, and an honest end to everything.

The tests run in this order in one deployment; the last one kills a server.
"""

import json
import signal
import socket
import time
import urllib.error
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.prompts import TWENTY, long_text
from tests.vllm.conftest import Deployment, stopped, wait_until
from tests.vllm.servers import Server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

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
        parts.append(choice.get("logprobs") and sorted(choice["logprobs"]))
    return way, answer, parts


def receiver(server: Server) -> dict[str, Any]:
    """Where a decode server takes KV."""
    body = {"model": "demo", "prompt": [1], "max_tokens": 1, "kv_transfer_params": {"kvbelt": "describe"}}
    return server.post("/v1/completions", body)["kv_transfer_params"]["receiver"]


def prefill_leg(deployment: Deployment, prompt: str, transfer_id: str) -> dict[str, Any]:
    """What a proxy asks of a prefill server."""
    handoff = {"transfer_id": transfer_id, "receiver": receiver(deployment.decode[0]), "deadline_seconds": 20.0}
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


def all_free(deployment: Deployment) -> bool:
    """On both sides."""
    return all(blocks_are_free(server) for server in (*deployment.prefill, *deployment.decode))


def test_kv_arrives_and_is_used(deployment: Deployment) -> None:
    """A prompt computed on the prefill server is continued on the decode server from its KV."""
    prompt, transfer_id = "By hand: " + long_text(150, start=31), uuid.uuid4().hex
    first = prefill_leg(deployment, prompt, transfer_id)
    assert first["kv_transfer_params"]["state"] == "open"
    choice = first["choices"][0]
    rest = decode_leg(deployment, choice["prompt_token_ids"] + choice["token_ids"], transfer_id)
    assert rest["kv_transfer_params"] == {"transfer_id": transfer_id, "kv": "received", "reason": None}
    _, _, (_, _, expected, _) = ask(deployment.plain, {"prompt": prompt})
    assert choice["token_ids"] + rest["choices"][0]["token_ids"] == expected[3]


def test_control_sockets_ask_for_keys(deployment: Deployment) -> None:
    """Each server and the proxy say so; the proxy was told of the transfers all the same."""
    for server in (*deployment.prefill, *deployment.decode):
        assert "control sockets use CURVE; 3 keys are trusted" in server.log.read_text(errors="replace")
    with urllib.request.urlopen(deployment.proxy.url + "/health", timeout=10) as answer:  # noqa: S310 -- ours
        assert json.loads(answer.read())["notifications"]["mechanism"] == "CURVE"
    wait_until(lambda: deployment.proxy.metric("nixl_transfer_total") > 0, 10)


def test_twenty_prompts_one_after_another(deployment: Deployment) -> None:
    """Through the proxy, every prompt's answer equals the plain server's, on the fast path."""
    for body in TWENTY:
        _, _, expected = ask(deployment.plain, body)
        way, _, got = ask(deployment.proxy, body)
        assert got == expected
        assert way.startswith(("first-token", "re-derive; reason=incomplete_text"))


def test_twenty_prompts_eight_at_a_time(deployment: Deployment) -> None:
    """The same, concurrently, and with other prompts, so that nothing is cached."""
    bodies = [
        {"prompt": "Again: " + body["prompt"]} if "prompt" in body else {"messages": [*body["messages"]]}
        for body in TWENTY
    ]
    expected = [ask(deployment.plain, body)[2] for body in bodies]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda body: ask(deployment.proxy, body), bodies))
    assert [parts for _, _, parts in got] == expected
    assert not [way for way, _, _ in got if way.startswith("local")]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.8, "seed": 7},
        {"logprobs": 2},
        {"stop": ["the", "。"]},
        {"n": 2, "temperature": 0.8, "seed": 5},
        {"presence_penalty": 1.5, "repetition_penalty": 1.2},
        {"prompt": ["One prompt of two", "Another, " + long_text(60, start=7)]},
        {
            "structured_outputs": {
                "json": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
            }
        },
    ],
    ids=lambda options: next(iter(options)),
)
def test_options(deployment: Deployment, options: dict[str, Any]) -> None:
    """Whatever the fast path would change takes the other path, and equals the plain server's answer."""
    body = {"prompt": "Options: " + long_text(40, start=17), **options}
    _, _, expected = ask(deployment.plain, body)
    way, _, got = ask(deployment.proxy, body)
    assert got == expected
    several = isinstance(body["prompt"], list)
    assert way == "local; reason=many_prompts" if several else way.startswith(("first-token", "re-derive"))


def test_streamed_text_is_the_same(deployment: Deployment) -> None:
    """The pieces of a stream make up the plain server's text."""
    body = {"model": "demo", "prompt": "Stream: " + long_text(50, start=3), "max_tokens": TOKENS, "temperature": 0}
    expected = deployment.plain.post("/v1/completions", body)["choices"][0]["text"]
    data = json.dumps(body | {"stream": True}).encode()
    request = urllib.request.Request(  # noqa: S310 -- ours
        deployment.proxy.url + "/v1/completions", data, {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=100) as response:  # noqa: S310 -- ours
        lines = [line[6:] for line in response.read().decode().splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    pieces = [choice["text"] for line in lines[:-1] for choice in json.loads(line)["choices"]]
    assert "".join(pieces) == expected


def test_unknown_transfer_is_recomputed(deployment: Deployment) -> None:
    """KV that nobody sends: the decode server computes the prompt itself, and says so."""
    prompt = "Nobody sends this: " + long_text(50, start=41)
    _, answer, (_, _, expected, _) = ask(deployment.plain, {"prompt": prompt, "max_tokens": TOKENS - 1})
    ids = answer["choices"][0]["prompt_token_ids"]
    rest = decode_leg(deployment, ids, uuid.uuid4().hex)
    assert rest["kv_transfer_params"]["kv"] == "recomputed"
    assert rest["kv_transfer_params"]["reason"] == "unknown_transfer"
    assert rest["choices"][0]["token_ids"] == expected[3]


def test_a_bad_handoff_is_refused_and_the_request_served(deployment: Deployment) -> None:
    """What is not a handoff is named in the answer."""
    body = {"model": "demo", "prompt": "A", "max_tokens": 2, "kv_transfer_params": {"transfer_id": 7}}
    answer = deployment.decode[0].post("/v1/completions", body)
    assert answer["kv_transfer_params"]["reason"] == "bad_handoff"
    assert "transfer_id" in answer["kv_transfer_params"]["detail"]
    assert answer["usage"]["completion_tokens"] == 2


def test_nothing_is_held_afterwards(deployment: Deployment) -> None:
    """When every request has ended, no block is in use on either side."""
    wait_until(lambda: all_free(deployment), 30)


def test_an_aborted_request_frees_its_blocks(deployment: Deployment) -> None:
    """A client that goes away in the middle of a stream leaves nothing behind on either side."""
    body = {"model": "demo", "prompt": "Gone: " + long_text(700, start=11), "max_tokens": 900, "stream": True}
    data = json.dumps(body | {"temperature": 0, "ignore_eos": True}).encode()
    with socket.create_connection(("127.0.0.1", deployment.proxy.port)) as client:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
        )
        client.sendall(head.encode() + b"\r\n\r\n" + data)
        assert client.recv(1)
        wait_until(lambda: any(server.metric(USAGE) > 0 for server in deployment.decode), 60)
    wait_until(lambda: all_free(deployment), 30)


def test_a_request_aborted_while_it_loads_frees_its_blocks(deployment: Deployment) -> None:
    """A decode request that waits for KV that never comes is aborted: its blocks come back at once."""
    server = deployment.decode[0]
    body = {
        "model": "demo",
        "prompt": "Waits: " + long_text(100, start=9),
        "kv_transfer_params": {"transfer_id": uuid.uuid4().hex, "deadline_seconds": 60.0},
    }
    data = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
        )
        client.sendall(head.encode() + b"\r\n\r\n" + data)
        wait_until(lambda: server.metric(USAGE) > 0, 20)
    wait_until(lambda: blocks_are_free(server), 10)


def test_a_stopped_prefill_server_hangs_nobody(deployment: Deployment) -> None:
    """SIGSTOP in the middle of a prompt: the decode server's request is answered rightly within its deadline."""
    prompt, transfer_id = "Stopped: " + long_text(900, start=51), uuid.uuid4().hex
    _, answer, (_, _, expected, _) = ask(deployment.plain, {"prompt": prompt, "max_tokens": TOKENS - 1})
    ids = answer["choices"][0]["prompt_token_ids"]
    server = deployment.prefill[0]
    with ThreadPoolExecutor(1) as pool:
        leg = pool.submit(prefill_leg, deployment, prompt, transfer_id)
        wait_until(lambda: server.metric(USAGE) > 0, 30)
        with stopped(server):
            began = time.monotonic()
            rest = decode_leg(deployment, ids, transfer_id, seconds=8.0)
            assert time.monotonic() - began < 60
            assert rest["kv_transfer_params"]["kv"] == "recomputed"
            assert rest["choices"][0]["token_ids"] == expected[3]
        leg.result(timeout=120)
    wait_until(lambda: all_free(deployment), 30)


def test_a_killed_prefill_server_hangs_nobody(deployment: Deployment) -> None:
    """With kill -9 in the middle of a prompt: the client's answer is right, and the next one too."""
    body = {"prompt": "Killed: " + long_text(900, start=61)}
    _, _, expected = ask(deployment.plain, body)
    server = deployment.prefill[0]
    with ThreadPoolExecutor(1) as pool:
        leg = pool.submit(ask, deployment.proxy, body)
        wait_until(lambda: any(one.metric(USAGE) > 0 for one in deployment.prefill), 30)
        server.signal(signal.SIGKILL)
        way, _, got = leg.result(timeout=200)
    assert got == expected
    again = {"prompt": "After: " + long_text(30, start=5)}
    assert ask(deployment.proxy, again)[2] == ask(deployment.plain, again)[2]
    wait_until(lambda: all(blocks_are_free(one) for one in deployment.decode), 30)
    assert way
