"""vLLM's own tests of its completions and chats pass through the proxy if they pass before a plain server."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.vllm.conftest import Deployment
from tests.vllm.upstream.source import API

#: The tests, models for them, and packages that they need: see ``tests.vllm.upstream.source``.
FOLDER = os.environ.get("KVBELT_VLLM_UPSTREAM", "")

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not FOLDER, reason="KVBELT_VLLM_UPSTREAM names no folder (scripts/test-vllm --openai sets it)"),
]

PLUGIN = Path(__file__).parent / "upstream"

#: What may fail through the proxy, and why.
REASONS = {"test_kv_transfer_prompt_token_ids": "sends kv_transfer_params, which could name another client's KV"}

#: Some sample without a seed. A test that fails is asked again, before both.
TRIES = 3


def test_what_passes_before_plain_vllm_passes_through_the_proxy(deployment: Deployment, tmp_path: Path) -> None:
    with ThreadPoolExecutor() as threads:
        asking = threads.submit(outcomes, deployment.plain.url, tmp_path / "plain", [])
        proxied = outcomes(deployment.proxy.url, tmp_path / "proxied", [])
        plain = asking.result()
    passed = sorted(test for test, outcome in plain.items() if outcome == "passed")
    worse = [test for test in passed if proxied.get(test) != "passed"]
    known, unknown = [test for test in worse if reason_of(test)], [test for test in worse if not reason_of(test)]
    for number in range(1, TRIES):
        for server, name, outcome in ((deployment.proxy, "proxied", "passed"), (deployment.plain, "plain", "failed")):
            if unknown:
                again = outcomes(server.url, tmp_path / f"{name}{number}", unknown)
                unknown = [test for test in unknown if again.get(test) != outcome]
    print(f"\nOf {len(plain)} tests of vLLM's, {len(passed)} pass before plain vLLM. Not through the proxy:")  # noqa: T201
    for test in known + unknown:
        print(f"  {test.removeprefix(API)}: {reason_of(test) or 'not known'}")  # noqa: T201
    assert passed
    assert not unknown


def outcomes(url: str, logs: Path, tests: list[str]) -> dict[str, str]:
    """The outcomes of these tests (none: all of completions and chats) before a server. ``logs`` gets the output."""
    folder = Path(FOLDER).resolve()
    logs.mkdir()
    results = logs / "results.json"
    environment = os.environ | {
        "PYTHONPATH": f"{PLUGIN}:{folder / 'packages'}",
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "KVBELT_UPSTREAM_URL": url,
        "KVBELT_UPSTREAM_RESULTS": str(results),
    }
    command = [sys.executable, "-m", "pytest", "--noconftest", "-c", os.devnull, "--rootdir", ".", "--timeout", "120"]
    command += ["-p", "running_server", "-p", "tests.entrypoints.conftest", "-q", "--continue-on-collection-errors"]
    source = folder / "source"
    if not tests:
        files = source / API
        found = [files / "chat_completion", files / "completion", files / "models", *sorted(files.glob("test_*.py"))]
        tests = [str(file.relative_to(source)) for file in found]
    with (logs / "output.txt").open("wb") as out:
        subprocess.run([*command, *tests], cwd=source, env=environment, stdout=out, stderr=out, check=False)
    return json.loads(results.read_text())


def reason_of(test: str) -> str | None:
    return next((reason for part, reason in REASONS.items() if part in test), None)
