"""vLLM servers with the connector when something goes wrong: an honest end to everything, and nothing left behind.

The tests run in this order in one deployment; the last one kills a server.
"""

import signal
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.prompts import long_text
from tests.vllm.asking import TOKENS, USAGE, all_free, ask, blocks_are_free, client_of, decode_leg, prefill_leg
from tests.vllm.conftest import Deployment, stopped, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def test_unknown_transfer_is_recomputed(deployment: Deployment) -> None:
    """If the KV is never sent, the decode server computes the prompt and says so."""
    prompt = "Nobody sends this: " + long_text(50, start=41)
    _, answer, (_, _, expected) = ask(deployment.plain, {"prompt": prompt, "max_tokens": TOKENS - 1})
    ids = answer["choices"][0]["prompt_token_ids"]
    rest = decode_leg(deployment, ids, uuid.uuid4().hex)
    assert rest["kv_transfer_params"]["kv"] == "recomputed"
    assert rest["kv_transfer_params"]["reason"] == "unknown_transfer"
    assert rest["choices"][0]["token_ids"] == expected[3]


def test_a_bad_handoff_is_refused_and_the_request_served(deployment: Deployment) -> None:
    """The answer says what is wrong with the handoff."""
    body = {"model": "demo", "prompt": "A", "max_tokens": 2, "kv_transfer_params": {"transfer_id": 7}}
    answer = deployment.decode[0].post("/v1/completions", body)
    assert answer["kv_transfer_params"]["reason"] == "bad_handoff"
    assert "transfer_id" in answer["kv_transfer_params"]["detail"]
    assert answer["usage"]["completion_tokens"] == 2


def test_a_client_gone_from_its_stream_leaves_nothing(deployment: Deployment) -> None:
    """A client that goes away in the middle of a stream: every block comes back on either side."""
    body = {"prompt": "Gone: " + long_text(700, start=11), "max_tokens": 900, "stream": True, "ignore_eos": True}
    with client_of(deployment.proxy, body) as client:
        assert client.recv(1)
        wait_until(lambda: any(server.metric(USAGE) > 0 for server in deployment.decode))
    wait_until(lambda: all_free(deployment))


def test_a_client_gone_before_its_first_token_leaves_nothing(deployment: Deployment) -> None:
    """A client that goes away while its prompt is computed: the same."""
    body = {"prompt": "Soon gone: " + long_text(1000, start=13), "max_tokens": 100}
    with client_of(deployment.proxy, body):
        wait_until(lambda: any(server.metric(USAGE) > 0 for server in deployment.prefill))
    wait_until(lambda: all_free(deployment))


def test_a_request_aborted_while_it_loads_frees_its_blocks(deployment: Deployment) -> None:
    """A decode request that waits for KV that never comes is aborted: its blocks come back at once."""
    server = deployment.decode[0]
    handoff = {"transfer_id": uuid.uuid4().hex, "deadline_seconds": 60.0}
    with client_of(server, {"prompt": "Waits: " + long_text(100, start=9), "kv_transfer_params": handoff}):
        wait_until(lambda: server.metric(USAGE) > 0)
    wait_until(lambda: blocks_are_free(server))


def test_a_stopped_prefill_server_delays_no_other_request(deployment: Deployment) -> None:
    """SIGSTOP in the middle of a prompt: the decode server's request is answered rightly within its deadline."""
    prompt, transfer_id = "Stopped: " + long_text(900, start=51), uuid.uuid4().hex
    _, answer, (_, _, expected) = ask(deployment.plain, {"prompt": prompt, "max_tokens": TOKENS - 1})
    ids = answer["choices"][0]["prompt_token_ids"]
    server = deployment.prefill[0]
    with ThreadPoolExecutor(1) as pool:
        leg = pool.submit(prefill_leg, deployment, prompt, transfer_id)
        wait_until(lambda: server.metric(USAGE) > 0)
        with stopped(server):
            began = time.monotonic()
            rest = decode_leg(deployment, ids, transfer_id, seconds=8.0)
            assert time.monotonic() - began < 60
            assert rest["kv_transfer_params"]["kv"] == "recomputed"
            assert rest["choices"][0]["token_ids"] == expected[3]
        leg.result(timeout=120)
    wait_until(lambda: all_free(deployment))


def test_a_killed_prefill_server_delays_no_other_request(deployment: Deployment) -> None:
    """With kill -9 in the middle of prompts: a waiting decode request is answered rightly in time, a client's too."""
    prompt, transfer_id = "Killed: " + long_text(900, start=61), uuid.uuid4().hex
    body = {"prompt": "Killed, too: " + long_text(900, start=67)}
    _, answer, (_, _, expected) = ask(deployment.plain, {"prompt": prompt, "max_tokens": TOKENS - 1})
    ids = answer["choices"][0]["prompt_token_ids"]
    _, _, of_proxy = ask(deployment.plain, body)
    killed = deployment.prefill[0]
    with ThreadPoolExecutor(3) as pool:
        lost = pool.submit(prefill_leg, deployment, prompt, transfer_id)
        rest = pool.submit(decode_leg, deployment, ids, transfer_id, seconds=8.0)
        client = pool.submit(ask, deployment.proxy, body)
        wait_until(lambda: killed.metric(USAGE) > 0 and deployment.decode[0].metric(USAGE) > 0)
        killed.signal(signal.SIGKILL)
        began = time.monotonic()
        assert rest.result(timeout=100)["kv_transfer_params"]["kv"] == "recomputed"
        assert time.monotonic() - began < 60
        assert rest.result()["choices"][0]["token_ids"] == expected[3]
        assert client.result(timeout=200)[2] == of_proxy
        with pytest.raises(OSError):
            lost.result(timeout=10)
    again = {"prompt": "After: " + long_text(30, start=5)}
    assert ask(deployment.proxy, again)[2] == ask(deployment.plain, again)[2]
    wait_until(lambda: all(blocks_are_free(one) for one in deployment.decode))
