"""2p2d under load, while workers are killed, stopped, removed and added: every answer comes, and is right."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from transformers import LlamaConfig

from kvbelt.ops.admin_client import AdminClient
from kvbelt.ops.deployment import RunningProcess, SyncDeployment, running
from kvbelt.security.admin_key import load_admin_key
from tests.e2e.asking import ask, get, until
from tests.e2e.conftest import deployment_spec
from tests.e2e.load import Load
from tests.e2e.stopping import stopped
from tests.engine.support import save_model, small

pytestmark = pytest.mark.e2e

Answer = tuple[int, ...]  # token ids

#: How many answers show that it goes on.
SOME = 12


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SyncDeployment]:
    """A 2p2d of this module's own, with a model of no size; each test leaves it whole."""
    model = save_model(tmp_path_factory.mktemp("models") / "tiny", LlamaConfig(**small()))
    with running(deployment_spec(model, "2p2d", kv_gb=0.05, buffer_gb=0.05, max_model_len=512)) as own:
        yield own


@pytest.fixture(scope="module")
def asked(deployment: SyncDeployment) -> tuple[dict[str, Any], Answer]:
    """A request whose first token may come from the prefill worker, and what a decode worker alone answers."""
    for number in range(100):
        body = {"prompt": f"{number} " * 60, "temperature": 0, "max_tokens": 16, "ignore_eos": True}
        if ask(deployment.url, body, stream=False).path == "first-token":
            alone = {**body, "return_token_ids": True}
            reply = httpx.post(deployment.process("decode-0").url + "/v1/completions", json=alone, timeout=60)
            return body, tuple(reply.json()["choices"][0]["token_ids"])
    raise AssertionError("every first token ends inside a character")


@pytest.fixture
def admin(deployment: SyncDeployment) -> AdminClient:
    """Whoever may change the workers."""
    return AdminClient(deployment.url, load_admin_key(deployment.admin_key_file))


def name_of(process: RunningProcess) -> str:
    """A worker's name at the proxy."""
    return f"{process.host}:{process.port}"


def assert_all_right(load: Load, right: Answer, *, cut_before: float = 0.0) -> None:
    """No answer is wrong, none is missing; streams that began before ``cut_before`` may have ended with an error."""
    assert load.outcomes
    for one in load.outcomes:
        cut = one.status == 200 and "decode_lost" in one.said and one.began < cut_before
        assert cut or (one.status, one.said, one.token_ids) == (200, "", right), one
        assert one.token_ids == right[: len(one.token_ids)], one


def goes_on(load: Load, answers: int = SOME) -> None:
    """Wait for so many good answers to requests that begin from now on."""
    now = time.monotonic()
    until(lambda: load.answers_since(now) >= answers, what="answers under load")


def health_of(process: RunningProcess) -> dict[str, Any]:
    """What a worker says of itself."""
    body: dict[str, Any] = get(process.url + "/health").json()
    return body


def whole_again(admin: AdminClient) -> bool:
    """Every worker takes requests, and every pair is connected."""
    found = admin.workers()
    ready = all(w["state"] == "ready" and w["standing"] == "active" and not w["warming"] for w in found["workers"])
    return ready and [pair["state"] for pair in found["pairs"]] == ["warm"] * 4


def test_workers_of_each_kind_are_killed_under_load(
    deployment: SyncDeployment, admin: AdminClient, asked: tuple[dict[str, Any], Answer]
) -> None:
    """Requests go on elsewhere; a worker that comes back is another life, connected before it gets requests."""
    body, right = asked
    until(lambda: whole_again(admin), what="a whole deployment")
    before = health_of(deployment.process("decode-0"))
    killed = ("prefill-0", "decode-0")
    with Load(deployment.url, body) as load:
        goes_on(load)
        for name in killed:
            os.kill(deployment.process(name).pid, signal.SIGKILL)
            goes_on(load)
        with ThreadPoolExecutor() as both:
            list(both.map(deployment.restart, killed))
        until(lambda: whole_again(admin), what="everybody back, and connected")
        goes_on(load)
    assert_all_right(load, right)
    assert health_of(deployment.process("decode-0"))["engine_id"] != before["engine_id"]

    # Whatever names the earlier life is refused.
    prefill = deployment.process("prefill-0")
    params = {"transfer_id": "of-an-earlier-life", "receiver": before["receiver"], "deadline_seconds": 10.0}
    stale = body | {"max_tokens": 1, "kv_transfer_params": params}
    assert httpx.post(prefill.url + "/v1/completions", json=stale, timeout=60).status_code == 200
    until(lambda: "stale_engine" in health_of(prefill)["belt"]["sent_total"], what="the refusal")


@pytest.mark.parametrize("name", ["decode-1", "prefill-1"])
def test_a_stopped_worker_does_not_delay_the_others(
    deployment: SyncDeployment, admin: AdminClient, asked: tuple[dict[str, Any], Answer], name: str
) -> None:
    """Those that had it go on elsewhere; once it is found out nobody meets it; woken up, it is used again."""
    body, right = asked
    until(lambda: whole_again(admin), what="a whole deployment")
    victim = deployment.process(name)
    with Load(deployment.url, body, stream=True) as load:
        goes_on(load)
        with stopped(victim):
            stopped_at = time.monotonic()
            until(lambda: (admin.worker(name_of(victim)) or {}).get("state") == "lost", what="found out")
            lost_at = time.time()
            goes_on(load)
            recent = get(deployment.url + "/kvbelt/requests").json()["requests"]
        until(lambda: whole_again(admin), what="it is back")
        goes_on(load)
    assert_all_right(load, right, cut_before=stopped_at if name == "decode-1" else 0.0)
    later = [record for record in recent if record["time"] > lost_at]
    assert later
    assert not any(name_of(victim) in record["workers"].values() for record in later)


def test_workers_join_and_leave_under_load(
    deployment: SyncDeployment, admin: AdminClient, asked: tuple[dict[str, Any], Answer]
) -> None:
    """One of each kind leaves and joins again: no request fails, none is even tried twice."""
    body, right = asked
    until(lambda: whole_again(admin), what="a whole deployment")
    with Load(deployment.url, body) as load:
        goes_on(load)
        for process in (deployment.process("decode-1"), deployment.process("prefill-1")):
            name = name_of(process)
            admin.remove(name)
            until(lambda name=name: admin.worker(name) is None, what="it is forgotten")
            assert health_of(process)["load"]["running"] == 0
            goes_on(load)
            admin.add(process.role, process.host, process.port)
        until(lambda: whole_again(admin), what="everybody back, and connected")
        goes_on(load)
    assert_all_right(load, right)
    assert {one.path for one in load.outcomes} == {"first-token"}
