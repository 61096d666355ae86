"""Workers killed, stopped and started again under requests: a right answer or an honest error, never a hang."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvbelt.ops.deployment import RunningProcess, SyncDeployment, running
from tests.e2e.asking import Answer, ask, events, get, until
from tests.e2e.conftest import deployment_spec
from tests.e2e.prompts import long_text

pytestmark = pytest.mark.e2e

SHORT: dict[str, Any] = {"prompt": "The capital of France is", "temperature": 0, "max_tokens": 12}
LONG: dict[str, Any] = {"prompt": long_text(800), "temperature": 0, "max_tokens": 12}
ENDLESS: dict[str, Any] = {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 1500, "ignore_eos": True}


@pytest.fixture(scope="module")
def started(demo_model: Path) -> Iterator[SyncDeployment]:
    """A 1p1d of this module's own, to break."""
    with running(deployment_spec(demo_model, "1p1d")) as own:
        yield own


@pytest.fixture
def deployment(started: SyncDeployment) -> SyncDeployment:
    """Whole and working, whatever the test before has done to it."""
    for process in started.processes:
        if not process.running:
            started.restart(process.name)
    until(lambda: whole(started), what="a whole deployment")
    return started


def whole(deployment: SyncDeployment) -> bool:
    """Every worker takes requests, and the pair is connected."""
    workers = get(deployment.url + "/health").json()["workers"]
    return all(worker["state"] == "ready" and not worker["warming"] for worker in workers)


def kill(deployment: SyncDeployment, name: str) -> None:
    """With SIGKILL; returns when it is gone."""
    os.kill(deployment.process(name).pid, signal.SIGKILL)
    until(lambda: not deployment.process(name).running, what=f"the end of {name}")


def long(salt: str) -> dict[str, Any]:
    """A prompt long enough that several chunks leave one after the other while the rest is computed.

    ``salt``: nobody has any of it from another test.
    """
    return {**LONG, "cache_salt": salt}


@pytest.fixture(scope="module")
def expected(aggregated: SyncDeployment) -> dict[str, Answer]:
    """The right answers."""
    return {
        "short": ask(aggregated.url, SHORT, stream=False),
        "long": ask(aggregated.url, LONG, stream=False),
    }


def belt_of(process: RunningProcess) -> dict[str, Any]:
    """A worker's belt, as its health tells it."""
    body: dict[str, Any] = get(process.url + "/health").json()
    return body["belt"]


def bytes_held(process: RunningProcess) -> dict[str, int]:
    """Bytes of a decode worker's receive buffer, by state."""
    belt = belt_of(process)
    return {state: belt[f"bytes_{state}"] for state in ("reserved", "committed", "quarantined")}


class Asking:
    """One request under way on a thread, so that the test can break things meanwhile."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        self._pool = ThreadPoolExecutor(1)
        path = "/v1/completions"
        wanted = {**body, "return_token_ids": True}
        self.reply = self._pool.submit(lambda: httpx.post(url + path, json=wanted, timeout=180))
        self._pool.shutdown(wait=False)

    def answer_or_error(self) -> httpx.Response:
        """The reply; a hang is a failure of the test by httpx's own timeout."""
        return self.reply.result(timeout=200)


def assert_right(reply: httpx.Response, expected: Answer) -> str:
    """A 200 with the right tokens. Returns the path it took."""
    assert reply.status_code == 200, reply.text
    assert tuple(reply.json()["choices"][0]["token_ids"]) == expected.token_ids[0]
    return reply.headers["x-kvbelt-path"]


def wait_for_transfer(decode: RunningProcess) -> None:
    """Until bytes are reserved on the decode worker: a transfer is under way."""
    until(lambda: bytes_held(decode)["reserved"], what="a transfer under way")


def assert_serves_through_prefill(deployment: SyncDeployment, expected: Answer) -> None:
    """The next request is disaggregated again and right."""

    def disaggregated() -> bool:
        reply = Asking(deployment.url, SHORT).answer_or_error()
        # The proxy asks a worker that was lost once a second whether it is back.
        return reply.status_code != 503 and assert_right(reply, expected).startswith("first-token")

    until(disaggregated, what="a request through the prefill worker")


def test_prefill_killed_before_the_request(deployment: SyncDeployment, expected: dict[str, Answer]) -> None:
    """Without its prefill worker the decode worker answers alone, rightly, and the header says so."""
    kill(deployment, "prefill-0")
    path = assert_right(Asking(deployment.url, SHORT).answer_or_error(), expected["short"])
    assert path.startswith("local; reason=")


def test_prefill_killed_during_the_transfer(deployment: SyncDeployment, expected: dict[str, Answer]) -> None:
    """Killed between two chunks: the decode worker computes the prompt itself; its buffer is given back."""
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
    """Once the answer streams, the prefill worker is not needed: the stream goes on to its end."""
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
    """Frozen with SIGSTOP mid-transfer: the right answer all the same; woken up, it does no harm and serves again."""
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
    """The stream ends with an error event and [DONE], not with silence; a new decode worker is taken up."""
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


def test_client_gone_stops_both_workers(one_p_one_d: SyncDeployment) -> None:
    """A client that leaves while its prompt is read, or while its answer streams, leaves no work behind."""
    prefill, decode = one_p_one_d.process("prefill-0"), one_p_one_d.process("decode-0")

    def busy(worker: RunningProcess) -> int:
        load: dict[str, int] = get(worker.url + "/health").json()["load"]
        return load["running"] + load["waiting"]

    def idle_and_empty() -> bool:
        load = get(decode.url + "/health").json()["load"]
        return not (busy(prefill) or busy(decode) or any(bytes_held(decode).values())) and (
            load["blocks_free"] == load["blocks_total"]
        )

    with pytest.raises(httpx.ReadTimeout):  # leaves while the prefill worker computes
        httpx.post(one_p_one_d.url + "/v1/completions", json={**LONG, "prompt": long_text(1100, 9)}, timeout=1.0)
    until(idle_and_empty, what="nothing left of the prompt nobody waits for")
    with httpx.stream(
        "POST", one_p_one_d.url + "/v1/completions", json={**ENDLESS, "stream": True}, timeout=60
    ) as reply:
        stream = events(reply)
        next(stream)
        until(lambda: busy(decode), what="decoding")
    until(idle_and_empty, what="nothing left of the answer nobody reads")
