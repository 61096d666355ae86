"""A request that does not fit into the model's context."""

import pytest
from starlette.testclient import TestClient

from kvbelt.worker.app import make_app

CONTEXT = 32  #: of the fixture's model
BEGINNING = f"This model's maximum context length is {CONTEXT} tokens"


@pytest.mark.parametrize(
    ("prompt", "asked", "param"),
    [(CONTEXT + 10, 3, "prompt"), (CONTEXT, None, "prompt"), (10, CONTEXT, "max_tokens"), (30, 3, "max_tokens")],
)
def test_it_is_refused_as_clients_know_it(ready, prompt, asked, param):
    """By OpenAI's code, and by the sentence that LiteLLM and others look for."""
    body = {"prompt": [5] * prompt, "max_tokens": asked}
    reply = TestClient(make_app(ready)).post("/v1/completions", json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
    assert error["message"].startswith(BEGINNING)
    assert str(prompt) in error["message"]


@pytest.mark.parametrize(("asked", "status"), [(22, 200), (23, 400)])
def test_a_prefill_call_is_refused_for_the_whole_answer(ready, asked, status):
    """The decode worker would refuse it after the prompt has been computed and sent."""
    receiver = {"engine_id": "d", "host": "127.0.0.1", "init_port": 1, "alloc_port": 1}
    handoff = {"transfer_id": "t", "receiver": receiver, "deadline_seconds": 5, "answer_tokens": asked}
    body = {"prompt": [5] * 10, "max_tokens": 1, "kv_transfer_params": handoff}
    reply = TestClient(make_app(ready)).post("/v1/completions", json=body)
    assert reply.status_code == status
    assert status == 200 or reply.json()["error"]["code"] == "context_length_exceeded"


def test_the_last_place_of_the_context_is_used(ready):
    reply = TestClient(make_app(ready)).post("/v1/completions", json={"prompt": [5] * 31, "max_tokens": 1})
    assert reply.status_code == 200


def test_another_model_is_404_by_openais_code(ready):
    reply = TestClient(make_app(ready)).post("/v1/completions", json={"prompt": [5], "model": "other"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
