"""vLLM servers with the connector against one plain vLLM server: the same answers."""

import json
import os
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.prompts import TWENTY, long_text
from tests.vllm.asking import (
    TOKENS,
    a_step,
    all_free,
    ask,
    client_of,
    count_events,
    decode_leg,
    forget_prefixes,
    hold_to,
    prefill_leg,
    receiver,
)
from tests.vllm.conftest import Deployment, wait_until
from tests.vllm.servers import Server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

CACHING = pytest.mark.skipif(
    "--no-enable-prefix-caching" in os.environ.get("KVBELT_VLLM_ARGUMENTS", ""), reason="no prefix caching"
)

DRAFTS = pytest.mark.skipif("ngram" not in os.environ.get("KVBELT_VLLM_ARGUMENTS", ""), reason="no drafts")


def test_kv_arrives_and_is_used(deployment: Deployment) -> None:
    """A prompt computed on the prefill server is continued on the decode server from its KV."""
    prompt, transfer_id = "By hand: " + long_text(150, start=31), uuid.uuid4().hex
    first = prefill_leg(deployment, prompt, transfer_id)
    assert first["kv_transfer_params"]["state"] == "open"
    choice = first["choices"][0]
    rest = decode_leg(deployment, choice["prompt_token_ids"] + choice["token_ids"], transfer_id)
    assert rest["kv_transfer_params"] == {"transfer_id": transfer_id, "kv": "received"}
    _, _, (_, _, expected) = ask(deployment.plain, {"prompt": prompt})
    assert choice["token_ids"] + rest["choices"][0]["token_ids"] == expected[3]


OTHER_ROUTES = {
    "/tokenize": {"prompt": "Hello there"},
    "/detokenize": {"tokens": [5, 6, 7]},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "Hello there"}]},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 5, "temperature": 0},
    "/v1/responses": {"input": "Hello there", "max_output_tokens": 16, "temperature": 0},
}


@pytest.mark.parametrize("path", OTHER_ROUTES)
def test_other_routes_answer_as_a_plain_server(deployment: Deployment, path: str) -> None:
    """A route that the proxy does not split gives the same text, tokens and usage, in the same shape."""

    def told(server: Server) -> dict[str, Any]:
        answer = server.post(path, {"model": "demo", **OTHER_ROUTES[path]})
        shown = {key: answer.get(key) for key in ("tokens", "prompt", "input_tokens", "content", "usage", "count")}
        texts = [part["text"] for item in answer.get("output", ()) for part in item.get("content") or ()]
        return {**shown, "keys": sorted(answer), "texts": texts}

    assert told(deployment.proxy) == told(deployment.plain)


def test_control_sockets_ask_for_keys(deployment: Deployment) -> None:
    """Every server logs that its control sockets require keys, and the proxy still hears of transfers."""
    for server in (*deployment.prefill, *deployment.decode):
        assert "control sockets use CURVE; 3 keys are trusted" in server.log.read_text(errors="replace")
    with urllib.request.urlopen(deployment.proxy.url + "/health", timeout=60) as answer:  # noqa: S310 -- ours
        assert json.loads(answer.read())["notifications"]["mechanism"] == "CURVE"
    ask(deployment.proxy, {"prompt": "Tell the proxy: " + long_text(40, start=23)})
    wait_until(lambda: deployment.proxy.metric("nixl_transfer_total") > 0)


def test_a_prefill_server_is_connected_beforehand(deployment: Deployment) -> None:
    """A prefill server that is told of a decode server reports that it is connected."""
    receivers = [receiver(server) for server in deployment.decode]
    asked = {"kvbelt": "warm", "receivers": receivers}
    body = {"model": "demo", "prompt": [1], "max_tokens": 2, "kv_transfer_params": asked}

    def states() -> set[str]:
        answer = deployment.prefill[0].post("/v1/completions", body)
        return {peer["state"] for peer in answer["kv_transfer_params"]["peers"]}

    wait_until(lambda: states() == {"ready"})


def test_twenty_prompts_one_after_another(deployment: Deployment) -> None:
    """Through the proxy, every prompt's answer equals the plain server's, on the fast path."""
    for body in TWENTY:
        _, _, expected = ask(deployment.plain, body)
        way, _, got = ask(deployment.proxy, body)
        assert got == expected
        assert way.startswith(("first-token", "re-derive; reason=incomplete_text"))


@DRAFTS
def test_decode_servers_accept_drafts(deployment: Deployment) -> None:
    """Speculative decoding goes on over KV that was received, with a plain server's tokens."""
    body = {"prompt": "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2, 3, 4,", "max_tokens": 40}

    def accepted() -> float:
        return sum(server.metric("vllm:spec_decode_num_accepted_tokens_total") for server in deployment.decode)

    before = accepted()
    way, _, got = ask(deployment.proxy, body)
    assert way.startswith("first-token")
    assert got == ask(deployment.plain, body)[2]
    assert accepted() > before


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


def test_the_belt_is_in_vllm_s_metrics(deployment: Deployment) -> None:
    """The metrics have the names of an embedded worker, and one side has received what the other has sent."""
    sent = sum(server.metric("kvbelt_sent_bytes_total") for server in deployment.prefill)
    assert sent > 0
    assert sum(server.metric("kvbelt_received_bytes_total") for server in deployment.decode) >= sent
    for server in deployment.decode:
        ranks = server.metric("kvbelt_receive_buffer_bytes") / (256 << 20)
        assert ranks in (1, 2)


@CACHING
def test_a_shared_prefix_travels_once(deployment: Deployment) -> None:
    """Blocks that a decode server holds are not sent again, and the answer is the same."""
    shared = "Shared: " + long_text(300, start=71)
    for number in range(len(deployment.decode)):
        ask(deployment.proxy, {"prompt": f"{shared} First {number}."})
    wait_until(lambda: all_free(deployment))

    def reused() -> float:
        for server in deployment.decode:
            a_step(server)
        return sum(server.metric("kvbelt_reused_bytes_total") for server in deployment.decode)

    before = reused()
    body = {"prompt": f"{shared} And now for something else."}
    way, _, got = ask(deployment.proxy, body)
    assert got == ask(deployment.plain, body)[2]
    assert way.startswith(("first-token", "re-derive; reason=incomplete_text"))
    wait_until(lambda: reused() > before)


@CACHING
def test_a_prefix_that_is_gone_is_computed(deployment: Deployment) -> None:
    """If held blocks are evicted before they are used, the decode server computes the prompt and says why."""
    prompt = "Gone meanwhile: " + long_text(250, start=72)
    _, answer, (_, _, expected) = ask(deployment.plain, {"prompt": prompt, "max_tokens": TOKENS - 1})
    ids = answer["choices"][0]["prompt_token_ids"]
    to = receiver(deployment.decode[0])
    for reason in (None, "prefix_evicted"):
        transfer_id = uuid.uuid4().hex
        prefill_leg(deployment, prompt, transfer_id, to)
        rest = decode_leg(deployment, ids, transfer_id)
        assert rest["kv_transfer_params"].get("reason") == reason
        assert rest["choices"][0]["token_ids"] == expected[3]
        wait_until(lambda: all_free(deployment))
        # No step follows in which it would be noticed.
        forget_prefixes(deployment.decode[0])


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


def test_a_decode_is_held_to_its_level_beside_a_prompt(deployment: Deployment) -> None:
    """With a level that no step can keep, 64 tokens of the prompt are computed a step, and a token of the decode.

    The prompt's answer is as ever.
    """
    server, ids = deployment.decode[0], [100 + number * 37 % 9000 for number in range(1200)]
    expected = deployment.plain.post(
        "/v1/completions", {"model": "demo", "prompt": ids, "max_tokens": 1, "temperature": 0}
    )
    decode = {"prompt": "Beside it: " + long_text(20, start=5), "max_tokens": 600, "ignore_eos": True, "stream": True}
    hold_to(server, 0.001)
    try:
        with client_of(server, decode) as client:
            tokens = count_events(client)
            wait_until(lambda: tokens() > 1)
            before = tokens()
            got = server.post("/v1/completions", {"model": "demo", "prompt": ids, "max_tokens": 1, "temperature": 0})
            # Half of them are enough: several tokens may share an event, or be on their way. Else there are some two.
            assert tokens() - before >= len(ids) // 64 // 2
    finally:
        hold_to(server, 0.05)
    assert got["choices"][0]["text"] == expected["choices"][0]["text"]


def test_nothing_is_held_afterwards(deployment: Deployment) -> None:
    """When every request has ended, no block is in use on either side."""
    wait_until(lambda: all_free(deployment))
