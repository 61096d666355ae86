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

from kvbelt.ops.deployment import RunningProcess, SyncDeployment, running
from kvbelt.ops.proxy_client import ProxyClient
from kvbelt.security.admin_key import load_admin_key
from kvbelt.wire.workers import NewWorker
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
    """A 2p2d of this module with the tiny model. Each test leaves it working."""
    model = save_model(tmp_path_factory.mktemp("models") / "tiny", LlamaConfig(**small()))
    with running(deployment_spec(model, "2p2d", kv_gb=0.05, buffer_gb=0.05, max_model_len=512)) as own:
        yield own


@pytest.fixture(scope="module")
def asked(deployment: SyncDeployment) -> tuple[dict[str, Any], Answer]:
    """A request that may take the fast path, and a decode worker's own answer to it."""
    for number in range(100):
        body = {"prompt": f"{number} " * 60, "temperature": 0, "max_tokens": 16, "ignore_eos": True}
        if ask(deployment.url, body, stream=False).path == "first-token":
            alone = {**body, "return_token_ids": True}
            reply = httpx.post(deployment.process("decode-0").url + "/v1/completions", json=alone, timeout=60)
            return body, tuple(reply.json()["choices"][0]["token_ids"])
    raise AssertionError("every first token ends inside a character")


@pytest.fixture
def admin(deployment: SyncDeployment) -> ProxyClient:
    """A client of the proxy that may change its workers."""
    return ProxyClient(deployment.url, load_admin_key(deployment.admin_key_file))


def name_of(process: RunningProcess) -> str:
    """A worker's name at the proxy."""
    return f"{process.host}:{process.port}"


def assert_all_right(load: Load, right: Answer) -> None:
    """Check that every answer came and is right."""
    assert load.outcomes
    for one in load.outcomes:
        assert (one.status, one.said, one.token_ids) == (200, "", right), one


def goes_on(load: Load, answers: int = SOME) -> None:
    """Wait for so many good answers to requests that begin from now on."""
    now = time.monotonic()
    until(lambda: load.answers_since(now) >= answers, what="answers under load")


def health_of(process: RunningProcess) -> dict[str, Any]:
    """A worker's own health."""
    body: dict[str, Any] = get(process.url + "/health").json()
    return body


def whole_again(admin: ProxyClient) -> bool:
    """Every worker takes requests, and every pair is connected."""
    found = admin.workers()
    ready = all(worker.shown_state == "ready" for worker in found.workers)
    return ready and [pair.state for pair in found.pairs] == ["warm"] * 4


def test_workers_of_each_kind_are_killed_under_load(
    deployment: SyncDeployment, admin: ProxyClient, asked: tuple[dict[str, Any], Answer]
) -> None:
    """Other workers answer. A restarted worker is a new incarnation, and is connected before it gets requests."""
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
        until(lambda: whole_again(admin), what="every worker back and connected")
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
    deployment: SyncDeployment, admin: ProxyClient, asked: tuple[dict[str, Any], Answer], name: str
) -> None:
    """Requests that it has not begun to answer go elsewhere, its streams wait, and it serves again after SIGCONT."""
    body, right = asked
    until(lambda: whole_again(admin), what="a whole deployment")
    victim = deployment.process(name)
    with Load(deployment.url, body, stream=True) as load:
        goes_on(load)
        with stopped(victim):
            until(lambda: getattr(admin.worker(name_of(victim)), "state", None) == "lost", what="found out")
            lost_at = time.time()
            goes_on(load)
            recent = get(deployment.url + "/kvbelt/requests").json()["requests"]
        until(lambda: whole_again(admin), what="it is back")
        goes_on(load)
    assert_all_right(load, right)
    later = [record for record in recent if record["time"] > lost_at]
    assert later
    assert not any(name_of(victim) in record["workers"].values() for record in later)


def test_workers_join_and_leave_under_load(
    deployment: SyncDeployment, admin: ProxyClient, asked: tuple[dict[str, Any], Answer]
) -> None:
    """A worker of each kind leaves and joins again. No request fails or is repeated."""
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
            admin.add(NewWorker(process.role, process.host, process.port))
        until(lambda: whole_again(admin), what="every worker back and connected")
        goes_on(load)
    assert_all_right(load, right)
    assert {one.path for one in load.outcomes} == {"first-token"}
