"""Workers killed, stopped and started again under requests: a right answer or an honest error, never a hang."""

import os
import signal
from typing import Any

import httpx
import pytest

from kvbelt.ops.deployment import RunningProcess, SyncDeployment
from tests.e2e.asking import Answer, ask, events, get, until
from tests.e2e.breaking import Asking, assert_right, bytes_held, kill
from tests.e2e.prompts import long_text

pytestmark = pytest.mark.e2e

SHORT: dict[str, Any] = {"prompt": "The capital of France is", "temperature": 0, "max_tokens": 12}
LONG: dict[str, Any] = {"prompt": long_text(800), "temperature": 0, "max_tokens": 12}
ENDLESS: dict[str, Any] = {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 1500, "ignore_eos": True}


@pytest.fixture(scope="module")
def expected(started: SyncDeployment) -> dict[str, Answer]:
    """The decode worker's own answers, which are right."""
    alone = started.process("decode-0").url
    return {"short": ask(alone, SHORT, stream=False), "long": ask(alone, LONG, stream=False)}


def long(salt: str) -> dict[str, Any]:
    """A prompt of several chunks. ``salt`` makes it different from all others, so that no worker has a part of it."""
    return {**LONG, "cache_salt": salt}


def wait_for_transfer(decode: RunningProcess) -> None:
    """Wait until bytes are reserved on the decode worker."""
    until(lambda: bytes_held(decode)["reserved"], what="a transfer under way")


def assert_serves_through_prefill(deployment: SyncDeployment, expected: Answer) -> None:
    """The next request is disaggregated again and right."""

    def disaggregated() -> bool:
        reply = Asking(deployment.url, SHORT).answer_or_error()
        # The proxy asks a worker that was lost once a second whether it is back.
        return reply.status_code != 503 and assert_right(reply, expected).startswith("first-token")

    until(disaggregated, what="a request through the prefill worker")


def test_prefill_killed_before_the_request(deployment: SyncDeployment, expected: dict[str, Answer]) -> None:
    """The decode worker answers alone, and the header says so."""
    kill(deployment, "prefill-0")
    path = assert_right(Asking(deployment.url, SHORT).answer_or_error(), expected["short"])
    assert path.startswith("local; reason=")


def test_prefill_killed_during_the_transfer(deployment: SyncDeployment, expected: dict[str, Answer]) -> None:
    """The decode worker computes the prompt itself, and its buffer is free again."""
    decode = deployment.process("decode-0")
    request = Asking(deployment.url, long("killed"))
    wait_for_transfer(decode)
    kill(deployment, "prefill-0")
    path = assert_right(request.answer_or_error(), expected["long"])
    assert path.startswith("local; reason=")
    until(lambda: not any(bytes_held(decode).values()), what="the dead worker's slot given back")
    deployment.restart("prefill-0")
    assert_serves_through_prefill(deployment, expected["short"])


def test_prefill_killed_after_the_transfer(deployment: SyncDeployment) -> None:
    """The stream goes on, because it needs the prefill worker no more."""
    with httpx.stream("POST", deployment.url + "/v1/completions", json={**ENDLESS, "max_tokens": 60, "stream": True},
                      timeout=60) as reply:  # fmt: skip
        stream = events(reply)
        for _ in range(3):
            next(stream)
        kill(deployment, "prefill-0")
        rest = list(stream)
    assert rest[-1] == "[DONE]"
    assert rest[-2]["choices"][0]["finish_reason"] == "length"


def test_prefill_stopped_during_the_transfer(deployment: SyncDeployment, expected: dict[str, Answer]) -> None:
    """The answer is right. After SIGCONT the prefill worker does no harm and serves again."""
    prefill, decode = deployment.process("prefill-0"), deployment.process("decode-0")
    request = Asking(deployment.url, long("stopped"))
    wait_for_transfer(decode)
    os.kill(prefill.pid, signal.SIGSTOP)
    try:
        path = assert_right(request.answer_or_error(), expected["long"])
        assert path.startswith("local; reason=")
        until(lambda: bytes_held(decode)["quarantined"], what="the frozen writer's slot in quarantine")
        assert_right(Asking(deployment.url, SHORT).answer_or_error(), expected["short"])
    finally:
        os.kill(prefill.pid, signal.SIGCONT)
    until(lambda: not any(bytes_held(decode).values()), what="the slot back, once the writer has said so")
    assert_serves_through_prefill(deployment, expected["short"])


def test_decode_killed_mid_stream(deployment: SyncDeployment, expected: dict[str, Answer]) -> None:
    """The stream ends with an error event and [DONE], and a new decode worker gets requests."""
    with httpx.stream(
        "POST", deployment.url + "/v1/completions", json={**ENDLESS, "stream": True}, timeout=60
    ) as reply:
        stream = events(reply)
        for _ in range(4):
            next(stream)
        kill(deployment, "decode-0")
        rest = list(stream)
    assert rest[-1] == "[DONE]"
    assert "was lost" in rest[-2]["error"]["message"]
    reply = Asking(deployment.url, SHORT).answer_or_error()
    assert reply.status_code == 503
    assert "retry-after" in reply.headers
    deployment.restart("decode-0")
    assert_serves_through_prefill(deployment, expected["short"])


def test_decode_killed_under_a_whole_answer(deployment: SyncDeployment) -> None:
    """A client that does not stream gets an error status in OpenAI's shape."""
    decode = deployment.process("decode-0")
    request = Asking(deployment.url, ENDLESS)
    until(lambda: get(decode.url + "/health").json()["load"]["running"], what="decoding")
    kill(deployment, "decode-0")
    reply = request.answer_or_error()
    assert reply.status_code in {502, 503}
    assert reply.json()["error"]["message"]


def test_client_gone_stops_both_workers(deployment: SyncDeployment) -> None:
    """A client may leave during prefill or during the answer; no worker goes on for it."""
    prefill, decode = deployment.process("prefill-0"), deployment.process("decode-0")

    def busy(worker: RunningProcess) -> int:
        load: dict[str, int] = get(worker.url + "/health").json()["load"]
        return load["running"] + load["waiting"]

    def idle_and_empty() -> bool:
        load = get(decode.url + "/health").json()["load"]
        return not (busy(prefill) or busy(decode) or any(bytes_held(decode).values())) and (
            load["blocks_free"] == load["blocks_total"]
        )

    with pytest.raises(httpx.ReadTimeout):  # leaves while the prefill worker computes
        httpx.post(deployment.url + "/v1/completions", json={**LONG, "prompt": long_text(1100, 9)}, timeout=1.0)
    until(idle_and_empty, what="nothing left of the prompt nobody waits for")
    with httpx.stream(
        "POST", deployment.url + "/v1/completions", json={**ENDLESS, "stream": True}, timeout=60
    ) as reply:
        stream = events(reply)
        next(stream)
        until(lambda: busy(decode), what="decoding")
    until(idle_and_empty, what="nothing left of the answer without a reader")
