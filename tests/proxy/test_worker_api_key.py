"""vLLM servers that ask for a key (``--api-key``)."""

from pathlib import Path

import pytest

from kvbelt.errors import SettingsError
from kvbelt.ops.http_client import Reply
from kvbelt.ops.supervisor import readiness
from kvbelt.ops.top_frame import frame
from kvbelt.security.worker_api_key import load_worker_api_key
from kvbelt.wire.console import CONSOLE_STATE
from tests.proxy.support import Deployment, async_test, generated

KEY = "s3cret"
BODY = {"prompt": "a prompt of some length", "max_tokens": 6, "temperature": 0}
BEARER = ((b"authorization", f"Bearer {KEY}".encode()),)


def guarded(**settings) -> Deployment:
    """1p1d of vLLM servers with ``--api-key``."""
    deployment = Deployment(**settings)
    for standin in (*deployment.prefill, *deployment.decode):
        standin.script.vllm_metrics = ""
        standin.script.api_key = KEY
        standin.script.peers_by_request = True
        standin.script.peers_status = 404
        standin.more_health = {"engine": "vllm"}
    return deployment


@async_test
async def test_with_the_key_requests_are_split() -> None:
    """The proxy's own questions carry the key, those of clients their own header."""
    async with guarded(worker_api_key=KEY) as deployment:
        assert (await deployment.ask(BODY, headers=BEARER)).path == "first-token"
        assert deployment.prefill[0].told == ["d0"]


@async_test
async def test_a_client_without_the_key_gets_the_server_s_refusal() -> None:
    """The proxy does not lend its key."""
    async with guarded(worker_api_key=KEY) as deployment:
        got = await deployment.ask(BODY)
        assert (got.status, got.json) == (401, {"error": "Unauthorized"})
        assert not generated(deployment.prefill[0]) + generated(deployment.decode[0])


@pytest.mark.parametrize(
    ("given", "carried", "remedy"),
    [
        (None, "no key", "put the worker's --api-key into a file for --worker-api-key-file"),
        ("another", "the key of --worker-api-key-file", "put the worker's --api-key into that file"),
    ],
)
@async_test
async def test_a_worker_that_refuses_the_question_is_not_ready(given: str | None, carried: str, remedy: str) -> None:
    """``/health``, ``kvbelt top`` and ``kvbelt up`` say what was asked, what came, and what to do."""
    async with guarded(worker_api_key=given) as deployment:
        got = await deployment.get("/health")
        assert (got.status, got.json["status"]) == (503, "unavailable")
        for worker in got.json["workers"]:
            assert worker["state"] == "unready"
            assert worker["detail"] == (
                f"/v1/completions answered 401 to the proxy's own question, which carried {carried}; {remedy}, "
                "and start the proxy again"
            )
        assert (await deployment.ask(BODY, headers=BEARER)).status == 503
        assert remedy in readiness("proxy", Reply(503, body=got.body))
        state = CONSOLE_STATE.parse((await deployment.get("/kvbelt/console.json")).body, "the proxy")
        assert sum(remedy in line for line in frame(state, url="", width=400)) == 2


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        ("two words\n", 0o600, "does not hold the workers' API key"),
        ("", 0o600, "does not hold the workers' API key"),
        ("s3cret\n", 0o644, "others may read it; run: chmod 600"),
    ],
)
def test_a_file_that_is_no_secret_key_is_refused(tmp_path: Path, text: str, mode: int, said: str) -> None:
    file = tmp_path / "api.key"
    file.write_text(text)
    file.chmod(mode)
    with pytest.raises(SettingsError, match=said):
        load_worker_api_key(file)


def test_a_short_key_is_the_operator_s_choice(tmp_path: Path) -> None:
    file = tmp_path / "api.key"
    file.touch(0o600)
    file.write_text("a\n")
    assert load_worker_api_key(file) == "a"
